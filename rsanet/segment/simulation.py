"""Simulated patients with multiple-sclerosis lesions, on the real anatomy that nilearn ships.

The anatomy is the ICBM 2009a nonlinear symmetric template (Fonov et al., NeuroImage 2009): a T1-weighted
average and its grey- and white-matter maps. It is loaded at run time and never written to disk as it is. Each
patient gets an asymmetric warp of it, enlarged ventricles, lesions where multiple sclerosis puts them, and
FLAIR, T1w and T2w images with texture, bias field and Rician noise. A patient follows from the subject's seed
alone: lesions are drawn in template space, in millimetres, so that the same seed is the same patient at every
voxel spacing.

Scores on these images say nothing about clinical accuracy.
"""

import gzip
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from scipy import ndimage, special
from torch.nn import functional as F

from rsanet.segment import files
from rsanet.segment.recipe import triple

Array = np.ndarray

FIELD_OF_VIEW = np.array([176.0, 208.0, 176.0])  # mm; holds the largest warped brain with a margin
CENTRE = np.array([0.0, -17.0, 5.0])  # world mm; the middle of the template's brain
MARGIN = 4  # voxels of background around the template's brain
LABEL_THRESHOLD = 0.35  # of the soft lesion profile
SMALLEST_LESION = 3  # labelled voxels; a blob that leaves fewer is not painted either
LESION_CONNECTIVITY = 26
COHORT_NAME = "Simulated multiple-sclerosis patients"

README = """\
Simulated patients with multiple-sclerosis lesions, made by `rsanet simulate`.

For research and software testing only. Nobody was scanned: the images have no clinical meaning, and scores on
them say nothing about accuracy on patients.

    sub-XXX/anat/                      FLAIR, T1w, T2w: skull-stripped, background 0, one grid
    derivatives/lesions/sub-XXX/anat/  the lesion mask (1 = lesion); its .json lists every lesion and setting

The anatomy under the lesions is a warp of the ICBM 2009a nonlinear symmetric template. Cite:
Fonov VS, Evans AC, McKinstry RC, Almli CR, Collins DL. Unbiased nonlinear average age-appropriate brain
templates from birth to adulthood. NeuroImage 47 (2009), Supplement 1, S102.
"""


@dataclass(frozen=True)
class LesionKind:
    """One place where lesions arise, and their sizes and shapes there.

    Attributes:
        name: what the sidecar calls it; also the key of its candidate voxels in :class:`Anatomy`.
        share: fraction of the lesions.
        median_mm3: median of the log-normal volume.
        spread: standard deviation of the log volume.
        elongation: range of the semi-axis along the gradient of the distance, over the mean of the other two.
            Above 1 the lesion points away from the surface (Dawson's fingers), below 1 it lies along it.
        offset: how far, in semi-axes, the centre lies from the drawn voxel along that gradient.
    """

    name: str
    share: float
    median_mm3: float
    spread: float
    elongation: tuple[float, float]
    offset: float = 0.0


@dataclass(frozen=True)
class Contrast:
    """Mean signal of each tissue in one MR contrast, as a fraction of its brightest tissue.

    Attributes:
        csf: cerebrospinal fluid.
        grey: grey matter.
        white: white matter.
        lesion: a typical lesion.
        hole: the most destroyed lesion tissue (a T1 black hole).
        detail: how much of the template's own contrast within a tissue to keep, and its sign.
        rim: brightness added to the normal rim of the ventricles.
        gain: signal of a fraction of 1, in scanner units.
    """

    csf: float
    grey: float
    white: float
    lesion: float
    hole: float
    detail: float
    rim: float
    gain: float


CONTRASTS = {
    "FLAIR": Contrast(csf=0.10, grey=0.66, white=0.53, lesion=0.92, hole=0.84, detail=-0.45, rim=0.26, gain=620),
    "T1w": Contrast(csf=0.20, grey=0.60, white=0.90, lesion=0.66, hole=0.38, detail=1.0, rim=-0.04, gain=540),
    "T2w": Contrast(csf=1.00, grey=0.53, white=0.36, lesion=0.70, hole=0.82, detail=-0.55, rim=0.06, gain=900),
}

LESION_KINDS = (
    LesionKind("periventricular", 0.5, 130.0, 0.8, (1.5, 2.8), offset=0.7),
    LesionKind("juxtacortical", 0.2, 70.0, 0.7, (0.5, 0.9)),
    LesionKind("deep", 0.3, 70.0, 0.7, (0.8, 1.5)),
)


@dataclass(frozen=True)
class Settings:
    """Everything about a patient but the seed.

    Attributes:
        spacing: voxel size in mm along x, y, z.
        lesions_median: median number of lesions drawn; some merge and some are too small to be labelled.
        lesions_spread: standard deviation of the log number of lesions.
        load_spread: standard deviation of the log factor on all lesion volumes of a patient.
        kinds: where lesions arise.
        warp_mm: displacement (standard deviation) at the knots of the coarse and the fine control grid.
        enlargement_mm: range of the widening of the lateral ventricles.
        texture: relative standard deviation of the smooth texture of the tissue.
        bias: standard deviation of the log of the bias field at its knots.
        noise: standard deviation of the noise in each channel, as a fraction of the brightest tissue.
    """

    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    lesions_median: float = 30.0
    lesions_spread: float = 0.5
    load_spread: float = 0.35
    kinds: tuple[LesionKind, ...] = LESION_KINDS
    warp_mm: tuple[float, float] = (2.2, 1.3)
    enlargement_mm: tuple[float, float] = (0.0, 2.5)
    texture: float = 0.03
    bias: float = 0.10
    noise: float = 0.025


@dataclass(frozen=True)
class Anatomy:
    """The template: maps on its own grid, in template millimetres.

    Attributes:
        maps: (6, X, Y, Z) float32: T1, grey, white, CSF, brain, signed distance to the lateral ventricles.
        origin: world mm of voxel (0, 0, 0); voxels are 1 mm, axes point right, anterior, superior.
        cortex_distance: (X, Y, Z) mm to the cortex.
        candidates: for each kind of lesion, the flat indices of the voxels where one may be centred.
        detail_means: mean T1 of CSF, grey and white matter.
    """

    maps: torch.Tensor
    origin: Array
    cortex_distance: Array
    candidates: dict[str, Array]
    detail_means: tuple[float, float, float] = (0.28, 0.655, 0.87)

    def distance(self, kind: str) -> Array:
        """The distance whose gradient is the axis of this kind of lesion."""
        return self.cortex_distance if kind == "juxtacortical" else self.maps[5].numpy()


@dataclass(frozen=True)
class Lesion:
    """One drawn ellipsoid, in the patient's world millimetres."""

    kind: str
    centre: Array
    axes: Array  # rows are orthonormal
    semi_axes: Array
    edge_mm: float  # width of its soft edge
    outline: Array  # random knots of its irregular outline
    signal: dict[str, float]


@dataclass(frozen=True)
class Patient:
    """A simulated subject in memory.

    Attributes:
        images: contrast to (X, Y, Z) int16, background 0.
        mask: (X, Y, Z) uint8, 1 in lesions.
        affine: voxel to world mm, axes right, anterior, superior.
        lesions: each 26-connected component of the mask: id, kind, voxels, volume_mm3, centre_mm.
        seed: the subject's seed.
        settings: what else it was made from.
    """

    images: dict[str, Array]
    mask: Array
    affine: Array
    lesions: list[dict[str, Any]]
    seed: int
    settings: Settings


@dataclass(frozen=True)
class Subject:
    """A simulated subject on disk: a row of ``participants.tsv``."""

    participant_id: str
    seed: int
    lesion_count: int
    lesion_load_mm3: float
    folder: Path = field(compare=False)


# --- anatomy ------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def load_anatomy() -> Anatomy:
    """Load the template from nilearn and derive the distances and the places where lesions arise.

    Raises:
        RuntimeError: nilearn is not installed.
    """
    try:
        from nilearn import datasets
    except ImportError as error:
        raise RuntimeError(
            "The simulator needs the anatomy that nilearn ships, and nilearn is not installed: "
            'pip install "rsanet[demo]".'
        ) from error
    loaders = (
        datasets.load_mni152_template,
        datasets.load_mni152_gm_template,
        datasets.load_mni152_wm_template,
    )
    templates = [nibabel.as_closest_canonical(load(resolution=1)) for load in loaders]
    t1, grey, white = (np.asarray(template.dataobj, dtype=np.float32) for template in templates)
    brain = t1 > 0
    # The brain touches the template's lowest slice: around its box comes a margin, so that the warp's border samples
    # are background on every side.
    box = ndimage.find_objects(brain.astype(np.uint8))[0]
    origin = templates[0].affine[:3, 3] + [span.start - MARGIN for span in box]
    t1, grey, white = (np.pad((volume * brain)[box], MARGIN) for volume in (t1, grey, white))
    brain = t1 > 0
    csf = np.clip(1 - grey - white, 0, 1) * brain
    x, y, z = (
        np.arange(n, dtype=np.float32).reshape(shape) + o
        for n, o, shape in zip(t1.shape, origin, [(-1, 1, 1), (1, -1, 1), (1, 1, -1)], strict=True)
    )
    ventricles = _lateral_ventricles(csf, origin, x, y, z)
    to_ventricles = _distance(ventricles) - _distance(~ventricles)
    # Deep grey nuclei are not cortex: cortex lies within a few millimetres of the outer CSF.
    outer = ~brain | ((csf > 0.3) & (to_ventricles > 12))
    cortex = (grey > 0.5) & (_distance(outer) < 5)
    to_cortex = _distance(cortex)
    maps = np.stack([t1, grey, white, csf, brain.astype(np.float32), to_ventricles]).astype(np.float32)

    below_tentorium = (z < 2 - 0.3 * np.abs(x)) & ((y < -28) | (np.abs(x) < 20))
    tissue = (white > 0.75) & ~below_tentorium
    places = {
        # The corpus callosum's midline is left out by |x|: a lesion there would sit on the template's seam.
        "periventricular": tissue & (to_ventricles > 0.5) & (to_ventricles < 3) & (np.abs(x) > 5) & (to_cortex > 4),
        "juxtacortical": tissue & (to_cortex > 0.5) & (to_cortex < 3) & (to_ventricles > 10),
        "deep": tissue & (to_cortex > 4) & (to_ventricles > 8) & (z > 5),
    }
    candidates = {name: np.flatnonzero(place) for name, place in places.items()}
    return Anatomy(torch.from_numpy(maps), origin, to_cortex, candidates)


def _distance(mask: Array) -> Array:
    """Distance in voxels (1 mm) to the nearest voxel of the mask."""
    return ndimage.distance_transform_edt(~mask).astype(np.float32)


def _lateral_ventricles(csf: Array, origin: Array, x: Array, y: Array, z: Array) -> Array:
    """The CSF connected to the frontal horns and the atria, within the box of the lateral ventricles."""
    box = (np.abs(x) < 42) & (y > -62) & (y < 38) & (z > -24) & (z < 34)
    labels, _ = ndimage.label((csf > 0.5) & box)
    inside = [(8, 18, 10), (-8, 18, 10), (27, -44, 6), (-27, -44, 6)]
    found = {int(labels[tuple(np.round(point - origin).astype(int))]) for point in inside} - {0}
    return np.isin(labels, list(found))


# --- warp ---------------------------------------------------------------------------------------------------


def _sample(maps: torch.Tensor, origin: Array, step: float, points: torch.Tensor) -> torch.Tensor:
    """Trilinear values of maps (K, X, Y, Z) at world points (..., 3): (K, ...)."""
    size = torch.tensor(maps.shape[1:], dtype=torch.float32)
    index = (points - torch.as_tensor(origin, dtype=torch.float32)) / step
    grid = (2 * index / (size - 1) - 1).flip(-1).reshape(1, -1, 1, 1, 3)
    values = F.grid_sample(maps[None], grid, mode="bilinear", padding_mode="border", align_corners=True)
    return values.reshape(maps.shape[0], *points.shape[:-1])


def _random_field(rng: np.random.Generator, channels: int, knots_mm: float) -> tuple[torch.Tensor, Array, float]:
    """Standard normal values at knots that cover the field of view: (maps, origin, step) for :func:`_sample`.

    Widely spaced knots are joined by cubic splines first, so that the field is smooth, not merely continuous.
    """
    knots = np.ceil(FIELD_OF_VIEW / knots_mm).astype(int) + 3
    origin = CENTRE - (knots - 1) * knots_mm / 2
    values = rng.standard_normal((channels, *knots)).astype(np.float32)
    finer = 4
    if knots_mm < 10:
        return torch.from_numpy(values), origin, knots_mm
    values = np.stack([ndimage.zoom(value, ((knots - 1) * finer + 1) / knots, order=3) for value in values])
    return torch.from_numpy(values), origin, knots_mm / finer


@dataclass(frozen=True)
class Warp:
    """From the patient's world to the template's: an affine map, then a smooth displacement."""

    matrix: torch.Tensor
    displacement: torch.Tensor  # (3, X, Y, Z) mm on a grid over the field of view
    origin: Array
    step: float

    def __call__(self, points: torch.Tensor) -> torch.Tensor:
        """Template points of the patient's points (..., 3)."""
        centre = torch.as_tensor(CENTRE, dtype=torch.float32)
        linear = (points - centre) @ self.matrix.T + centre
        return linear + _sample(self.displacement, self.origin, self.step, linear).movedim(0, -1)

    def inverse(self, points: torch.Tensor) -> torch.Tensor:
        """The patient's points of template points, by fixed-point iteration: the displacement contracts."""
        guess = points
        for _ in range(40):
            guess = guess + (points - self(guess))
        return guess


def _draw_warp(rng: np.random.Generator, anatomy: Anatomy, settings: Settings) -> Warp:
    angles = rng.normal(0, np.deg2rad(2), 3)
    scales = rng.uniform(0.97, 1.06, 3)  # patient to template: above 1 is a smaller head
    matrix = _rotation(angles) @ np.diag(scales)
    coarse_mm, fine_mm = settings.warp_mm
    step = 4.0
    size = np.ceil(FIELD_OF_VIEW / step).astype(int) + 3
    origin = CENTRE - (size - 1) * step / 2
    points = _grid_points(size, origin, np.full(3, step))
    displacement = coarse_mm * _sample(*_random_field(rng, 3, 40.0), points)
    displacement = displacement + fine_mm * _sample(*_random_field(rng, 3, 16.0), points)
    # Sampling closer to the ventricle than one stands widens it; the effect fades into the tissue.
    distance = _sample(anatomy.maps[5:6], anatomy.origin, 1.0, points)[0].numpy()
    smooth = ndimage.gaussian_filter(distance, 0.75)
    slope = np.stack(np.gradient(smooth, step))
    pull = rng.uniform(*settings.enlargement_mm) * np.exp(-np.clip(smooth, 0, None) / 8)
    displacement = displacement - torch.from_numpy((pull * slope).astype(np.float32))
    return Warp(torch.tensor(matrix, dtype=torch.float32), displacement, origin, step)


def _rotation(angles: Array) -> Array:
    """Rotation about x, then y, then z, by angles in radians."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def _grid(spacing: Sequence[float]) -> tuple[Array, Array, Array]:
    """Shape, world origin and affine of the patient's voxel grid over the field of view."""
    step = np.asarray(spacing, dtype=float)
    shape = np.ceil(FIELD_OF_VIEW / step - 1e-6).astype(int)
    origin = CENTRE - (shape - 1) * step / 2
    affine = np.diag([*step, 1.0])
    affine[:3, 3] = origin
    return shape, origin, affine


def _grid_points(shape: Array, origin: Array, step: Array) -> torch.Tensor:
    """World points (X, Y, Z, 3) of a voxel grid."""
    lines = [
        torch.from_numpy((o + s * np.arange(n)).astype(np.float32)) for n, o, s in zip(shape, origin, step, strict=True)
    ]
    return torch.stack(torch.meshgrid(*lines, indexing="ij"), dim=-1)


# --- lesions ------------------------------------------------------------------------------------------------


def _draw_lesions(rng: np.random.Generator, anatomy: Anatomy, warp: Warp, settings: Settings) -> list[Lesion]:
    """Draw places, sizes and shapes in template space, and carry them into the patient's."""
    count = int(np.clip(np.round(settings.lesions_median * np.exp(settings.lesions_spread * rng.normal())), 4, 150))
    load = np.exp(settings.load_spread * rng.normal())
    shares = np.array([kind.share for kind in settings.kinds])
    lesions = []
    for _ in range(count):
        kind = settings.kinds[rng.choice(len(shares), p=shares / shares.sum())]
        volume = load * kind.median_mm3 * np.exp(kind.spread * rng.normal())
        volume = float(np.clip(volume, 5, 6000))
        distance = anatomy.distance(kind.name)
        index = np.unravel_index(rng.choice(anatomy.candidates[kind.name]), distance.shape)
        centre = anatomy.origin + np.array(index)
        along = _slope(distance, index)
        elongation = rng.uniform(*kind.elongation)
        flattening = rng.uniform(0.8, 1.25)
        across = (volume / (4 / 3 * np.pi * elongation)) ** (1 / 3)
        semi_axes = np.array([elongation * across, flattening * across, across / flattening])
        # Its near end on the surface it grows from: the ventricle's wall, or the cortex.
        centre = centre + kind.offset * rng.uniform(0.8, 1.2) * semi_axes[0] * along
        ends = warp.inverse(torch.tensor(np.stack([centre, centre + 2 * along]), dtype=torch.float32)).numpy()
        axes = _frame(ends[1] - ends[0], rng.normal(size=3))
        # A longer history destroys more tissue; large lesions are the older ones.
        destruction = rng.beta(1.2, 3.0) * min(1.0, 0.5 + volume / 600)
        signal = {
            name: float(
                (contrast.lesion + destruction * (contrast.hole - contrast.lesion)) * np.exp(0.07 * rng.normal())
            )
            for name, contrast in CONTRASTS.items()
        }
        outline = rng.standard_normal((5, 5, 5))
        edge_mm = rng.uniform(0.3, 0.9)
        lesions.append(Lesion(kind.name, ends[0].astype(float), axes, semi_axes, edge_mm, outline, signal))
    return lesions


def _slope(distance: Array, index: tuple[Any, ...]) -> Array:
    """Unit gradient of a distance map at a voxel, over 2 voxels on each side to look past its roughness."""
    slope = np.empty(3)
    for axis in range(3):
        near, far = list(index), list(index)
        near[axis], far[axis] = index[axis] - 2, index[axis] + 2
        slope[axis] = float(distance[tuple(far)]) - float(distance[tuple(near)])
    return slope / max(float(np.linalg.norm(slope)), 1e-6)


def _frame(along: Array, other: Array) -> Array:
    """Orthonormal rows, the first along the given direction."""
    first = along / max(float(np.linalg.norm(along)), 1e-6)
    second = other - (other @ first) * first
    second = second / np.linalg.norm(second)
    return np.stack([first, second, np.cross(first, second)])


def _lesion_profile(lesion: Lesion, white: Array, origin: Array, step: Array) -> tuple[tuple[slice, ...], Array] | None:
    """The soft profile of one lesion: its box of voxels and its values there; None if too small."""
    reach = 1.5 * lesion.semi_axes.max() + step
    first = np.maximum(np.floor((lesion.centre - reach - origin) / step), 0).astype(int)
    last = np.minimum(np.ceil((lesion.centre + reach - origin) / step) + 1, white.shape).astype(int)
    if (last <= first).any():
        return None
    box = tuple(slice(a, b) for a, b in zip(first, last, strict=True))
    offset = np.stack(
        np.meshgrid(
            *[
                o + s * np.arange(a, b) - c
                for o, s, a, b, c in zip(origin, step, first, last, lesion.centre, strict=True)
            ],
            indexing="ij",
        )
    )
    local = np.tensordot(lesion.axes, offset, axes=1) / lesion.semi_axes[:, None, None, None]
    radius = np.sqrt((local**2).sum(0))
    bumps = ndimage.map_coordinates(lesion.outline, 2 + local, order=3, mode="nearest")
    radius = radius * (1 + 0.13 * bumps)
    depth = (1 - radius) * np.cbrt(lesion.semi_axes.prod())
    profile = special.expit(depth / max(lesion.edge_mm, 0.35 * float(step.max())))
    profile = profile * np.clip(1.25 * white[box], 0, 1)
    labels, count = ndimage.label(profile > LABEL_THRESHOLD, np.ones((3, 3, 3)))
    if count == 0:
        return None
    sizes = np.bincount(labels.ravel())[1:]
    if sizes.max() < SMALLEST_LESION:
        return None
    # Tissue can cut a blob in pieces; only the largest stays, with its soft edge.
    body = ndimage.binary_dilation(labels == sizes.argmax() + 1, np.ones((3, 3, 3)), iterations=2)
    other = (labels > 0) & (labels != sizes.argmax() + 1)
    return box, np.where(body & ~other & (profile > 0.02), profile, 0).astype(np.float32)


def _paint_lesions(lesions: list[Lesion], white: Array, origin: Array, step: Array) -> tuple[Array, Array]:
    """The soft union of all lesions, and for each voxel the number of the lesion that owns it (-1: none)."""
    soft = np.zeros(white.shape, np.float32)
    owner = np.full(white.shape, -1, np.int32)
    for number, lesion in enumerate(lesions):
        found = _lesion_profile(lesion, white, origin, step)
        if found is None:
            continue
        box, profile = found
        stronger = profile > soft[box]
        soft[box][stronger] = profile[stronger]
        owner[box][stronger] = number
    return soft, owner


def describe_lesions(mask: Array, affine: Array, kinds: Array | None = None, names: Sequence[str] = ()) -> list[dict]:
    """Each 26-connected component of a mask: id, kind, voxels, volume in mm³ and centre in world mm.

    Args:
        mask: (X, Y, Z), non-zero in lesions.
        affine: voxel to world mm.
        kinds: (X, Y, Z) index into ``names`` of the kind of each lesion voxel; the kind of a component is the
            most frequent one.
        names: names of the kinds.
    """
    labels, _ = ndimage.label(mask, np.ones((3, 3, 3)))
    voxel_mm3 = float(abs(np.linalg.det(affine[:3, :3])))
    described = []
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        inside = labels[box] == number
        voxels = np.argwhere(inside) + [span.start for span in box]
        entry: dict[str, Any] = {"id": number}
        if kinds is not None:
            entry["kind"] = names[int(np.bincount(kinds[box][inside]).argmax())]
        entry["voxels"] = len(voxels)
        entry["volume_mm3"] = round(len(voxels) * voxel_mm3, 3)
        centre = affine[:3, :3] @ voxels.mean(0) + affine[:3, 3]
        entry["centre_mm"] = [round(float(value), 2) for value in centre]
        described.append(entry)
    return described


# --- images -------------------------------------------------------------------------------------------------


def _signal(
    contrast: Contrast,
    tissue: dict[str, Array],
    soft: Array,
    lesion: Array,
    means: tuple[float, float, float],
) -> Array:
    """Noise-free signal of one contrast, of the brain's voxels."""
    csf, grey, white = tissue["csf"], tissue["grey"], tissue["white"]
    signal = contrast.csf * csf + contrast.grey * grey + contrast.white * white
    detail = tissue["t1"] - (means[0] * csf + means[1] * grey + means[2] * white)
    signal = signal + contrast.detail * np.clip(detail, -0.25, 0.25) + contrast.rim * tissue["rim"]
    return (1 - soft) * np.clip(signal, 0.02, None) + soft * lesion


def simulate_patient(seed: int, settings: Settings | None = None, anatomy: Anatomy | None = None) -> Patient:
    """Simulate one patient.

    Lesions, appearance and noise come from separate random streams: a setting of one leaves the others as
    they are.

    Args:
        seed: the subject's seed.
        settings: everything else; the defaults if None.
        anatomy: the template; loaded if None.

    Returns:
        The patient. The same seed, settings and versions of the libraries give the same bits.
    """
    settings = settings or Settings()
    anatomy = anatomy or load_anatomy()
    streams = [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(4)]
    shape_rng, lesion_rng, look_rng, noise_rng = streams
    step = np.asarray(settings.spacing, dtype=float)
    shape, origin, affine = _grid(settings.spacing)

    warp = _draw_warp(shape_rng, anatomy, settings)
    lesions = _draw_lesions(lesion_rng, anatomy, warp, settings)
    points = _grid_points(shape, origin, step)
    # A large voxel averages the tissue under it. In-slice widths of one voxel and less need no filter.
    maps = anatomy.maps
    if step.max() > 1:
        maps = torch.stack([torch.from_numpy(_box_filter(m.numpy(), step)) for m in maps])
    t1, grey, white, csf, brain, to_ventricles = _sample(maps, anatomy.origin, 1.0, warp(points)).numpy()
    inside = brain > 0.5

    soft, owner = _paint_lesions(lesions, np.where(inside, white, 0), origin, step)
    mask = (soft > LABEL_THRESHOLD).astype(np.uint8)
    names = [kind.name for kind in settings.kinds]
    kind_of = np.array([names.index(lesion.kind) for lesion in lesions])
    described = describe_lesions(mask, affine, kind_of[owner], names)

    spots = points[torch.from_numpy(inside)]
    soft, owner = soft[inside], owner[inside]
    tissue = {"t1": t1[inside], "grey": grey[inside], "white": white[inside], "csf": csf[inside]}
    # The normal bright rim of the ventricles, patchy and of varying width: bright on FLAIR, and not a lesion.
    patchy = _sample(*_random_field(look_rng, 2, 14.0), spots).numpy()
    width = 0.8 + 1.0 * special.expit(1.5 * patchy[0])
    strength = special.expit(2.0 * patchy[1])
    depth = (to_ventricles[inside] - 1.2) / width  # CSF still fills part of the voxels of the wall itself
    tissue["rim"] = strength * np.exp(-(depth**2)) * (1 - tissue["csf"])
    texture = _sample(*_random_field(look_rng, len(CONTRASTS), 2.5), spots).numpy()
    bias = np.exp(settings.bias * _sample(*_random_field(look_rng, len(CONTRASTS), 60.0), spots).numpy())

    images = {}
    for number, (name, contrast) in enumerate(CONTRASTS.items()):
        signals = np.array([lesion.signal[name] for lesion in lesions], np.float32)
        lesion = signals[owner] * (1 + 2 * settings.texture * texture[number])
        signal = _signal(contrast, tissue, soft, lesion, anatomy.detail_means)
        signal = signal * (1 + settings.texture * texture[number] * (1 - soft)) * bias[number]
        real, imaginary = settings.noise * noise_rng.standard_normal((2, signal.size), dtype=np.float32)
        magnitude = np.sqrt((signal + real) ** 2 + imaginary**2)
        image = np.zeros(tuple(shape), np.int16)
        # Zero is kept for the background, so that `image > 0` is the brain.
        image[inside] = np.clip(np.round(contrast.gain * magnitude), 1, 32767)
        images[name] = image
    return Patient(images, mask, affine, described, seed, settings)


def _box_filter(volume: Array, step: Array) -> Array:
    for axis, width in enumerate(step):
        if width > 1:
            volume = ndimage.uniform_filter1d(volume, max(1, round(float(width))), axis=axis)
    return volume


# --- cohort -------------------------------------------------------------------------------------------------


def subject_seed(seed: int, number: int) -> int:
    """The seed of subject ``number`` (from 1) of a cohort, whatever the size of the cohort."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def simulate_cohort(
    out: str | os.PathLike,
    subjects: int,
    *,
    spacing: float | Sequence[float] = 1.0,
    seed: int = 0,
    settings: Settings | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Subject]:
    """Simulate patients into a BIDS-style folder.

    A cohort that an earlier call with the same seed and settings began is completed: subjects on disk stay as
    they are. A subject is written beside its place and renamed into it, so there is never half of one.

    Args:
        out: folder of the cohort; new, empty, or begun with the same settings.
        subjects: number of patients, up to 999.
        spacing: voxel size in mm, one number or three (x, y, z), each from 0.5 to 8.
        seed: seed of the cohort.
        settings: everything else; its ``spacing`` is replaced by the argument.
        progress: called as ``progress(done, subjects, participant_id)`` after each subject.

    Returns:
        One :class:`Subject` per patient, as in ``participants.tsv``.

    Raises:
        ValueError: an argument is out of range, or ``out`` holds something else.
        RuntimeError: nilearn is not installed.
    """
    if not 1 <= subjects <= 999:
        raise ValueError(f"subjects is {subjects}: ask for 1 to 999, which have names of three digits.")
    if seed < 0:
        raise ValueError(f"seed is {seed}: give a whole number of 0 or more.")
    base = asdict(settings or Settings()) | {"spacing": _voxel_size(spacing)}
    settings = Settings(**base | {"kinds": (settings or Settings()).kinds})
    out = Path(out)
    description = _description(seed, settings)
    _check_folder(out, description)
    anatomy = load_anatomy()  # before anything is written: nilearn may be missing
    _begin(out, description)
    cohort: list[Subject] = []
    for number in range(1, subjects + 1):
        name = f"sub-{number:03d}"
        if not (out / name).exists():
            _write_subject(out, name, simulate_patient(subject_seed(seed, number), settings, anatomy), seed)
        cohort.append(_read_subject(out, name))
        _write_participants(out)
        if progress is not None:
            progress(number, subjects, name)
    return cohort


def _voxel_size(spacing: float | Sequence[float]) -> tuple[float, float, float]:
    size = triple(np.atleast_1d(np.asarray(spacing, dtype=float)).tolist(), "spacing")
    if not all(0.5 <= width <= 8 for width in size):
        raise ValueError(f"spacing is {spacing}: give one voxel size or three, in mm, each from 0.5 to 8.")
    return size


def _version() -> str:
    try:
        return importlib.metadata.version("rsanet")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _description(seed: int, settings: Settings) -> dict[str, Any]:
    made_by = {
        "Name": "rsanet simulate",
        "Version": _version(),
        "Description": "Simulated data: no clinical meaning.",
        "Seed": seed,
        "Settings": asdict(settings),
    }
    description = {
        "Name": COHORT_NAME,
        "BIDSVersion": "1.9.0",
        "DatasetType": "raw",
        "License": "See README: the anatomy is nilearn's copy of the ICBM 2009a template.",
        "ReferencesAndLinks": ["Fonov et al., NeuroImage 47 (2009), Supplement 1, S102"],
        "GeneratedBy": [made_by],
    }
    return json.loads(json.dumps(description))  # tuples become lists, as they will read back


def _check_folder(out: Path, description: dict[str, Any]) -> None:
    """Refuse a folder that holds anything but this very cohort."""
    file = out / "dataset_description.json"
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder for the cohort.")
    if not file.exists():
        if out.is_dir() and any(not there.name.startswith(".") for there in out.iterdir()):
            raise ValueError(f"{out} is not empty and holds no simulated cohort: give a new or an empty folder.")
        return
    try:
        there = json.loads(file.read_text())
        made = there["GeneratedBy"][0]
        settings = f"seed {made['Seed']}, spacing {made['Settings']['spacing']}, version {made['Version']}"
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{out} holds another data set: give a new or an empty folder.") from None
    if there != description:
        raise ValueError(
            f"{out} holds a cohort made with other settings ({settings}): "
            "give a new folder, or the same settings to complete it."
        )


def _begin(out: Path, description: dict[str, Any]) -> None:
    """Write what belongs to the cohort and not to a subject; the description comes first, for it marks the folder."""
    lesions = out / "derivatives" / "lesions"
    out.mkdir(parents=True, exist_ok=True)
    files.write_text(out / "dataset_description.json", _json(description))
    lesions.mkdir(parents=True, exist_ok=True)
    files.write_text(out / "README", README)
    masks = description | {"Name": "Lesion masks: " + COHORT_NAME.lower(), "DatasetType": "derivative"}
    files.write_text(lesions / "dataset_description.json", _json(masks))


def _mask_file(out: Path, name: str) -> Path:
    return out / "derivatives" / "lesions" / name / "anat" / f"{name}_label-lesion_mask.nii.gz"


def _write_subject(out: Path, name: str, patient: Patient, seed: int) -> None:
    """Write a subject beside its place; the rename of its images is the last act and makes it complete."""
    sidecar = {
        "Description": "Lesion mask of a simulated patient: no clinical meaning.",
        "Simulated": True,
        "SoftwareName": "rsanet",
        "SoftwareVersion": _version(),
        "CohortSeed": seed,
        "Seed": patient.seed,
        "Spacing": list(patient.settings.spacing),
        "Settings": asdict(patient.settings),
        "LabelThreshold": LABEL_THRESHOLD,
        "Connectivity": LESION_CONNECTIVITY,
        "LesionCount": len(patient.lesions),
        "LesionLoad_mm3": round(sum(lesion["volume_mm3"] for lesion in patient.lesions), 3),
        "Lesions": patient.lesions,
    }
    derived = _mask_file(out, name).parent.parent
    for left in out.glob(f".{name}.*"):  # by a run that was killed
        shutil.rmtree(left)
    beside = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=out))
    try:
        images, masks = beside / "images", beside / "masks"
        (images / "anat").mkdir(parents=True)
        (masks / "anat").mkdir(parents=True)
        for contrast, image in patient.images.items():
            _write_image(images / "anat" / f"{name}_{contrast}.nii.gz", image, patient.affine)
        mask_file = masks / "anat" / _mask_file(out, name).name
        _write_image(mask_file, patient.mask, patient.affine)
        mask_file.with_name(mask_file.name.replace(".nii.gz", ".json")).write_text(_json(sidecar))
        if derived.exists():  # left by a run that was stopped between the two renames
            shutil.rmtree(derived)
        masks.rename(derived)
        images.rename(out / name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write_image(file: Path, volume: Array, affine: Array) -> None:
    image = nibabel.Nifti1Image(volume, affine)
    image.set_qform(affine, code="scanner")
    image.set_sform(affine, code="scanner")
    image.header.set_xyzt_units("mm", "sec")
    # gzip stores the time of writing unless told otherwise, and equal images would differ on disk.
    file.write_bytes(gzip.compress(image.to_bytes(), compresslevel=4, mtime=0))


def _read_subject(out: Path, name: str) -> Subject:
    file = _mask_file(out, name)
    sidecar = json.loads(file.with_name(file.name.replace(".nii.gz", ".json")).read_text())
    return Subject(name, sidecar["Seed"], sidecar["LesionCount"], sidecar["LesionLoad_mm3"], out / name)


def _write_participants(out: Path) -> None:
    rows = ["participant_id\tseed\tlesion_count\tlesion_load_mm3"]
    for folder in sorted(out.glob("sub-*")):
        subject = _read_subject(out, folder.name)
        rows.append(f"{subject.participant_id}\t{subject.seed}\t{subject.lesion_count}\t{subject.lesion_load_mm3:g}")
    files.write_text(out / "participants.tsv", "\n".join(rows) + "\n")


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"
