"""How far apart two contrasts of a subject lie, and the rigid transform that brings one to the other.

A transform maps points of the fixed image to the moving one, as those that a resampler takes. Here it is a 4×4 matrix
in NIfTI's world (to the right, the front and up); its file is ITK's, in ITK's world (to the left, the back and up).
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine, from_matvec
from scipy import ndimage
from scipy.spatial.transform import Rotation

from rsanet.segment.cases import Case
from rsanet.segment.checks import coarse
from rsanet.segment.files import written_beside
from rsanet.segment.volumes import DataWarning, name_of, read_contrast, stem

COARSE = 4.0  # mm; a sketch takes voxels together up to this size
LEVELS = 24  # of intensity, each of as many voxels; beside them 0 for what is no head
POINTS = 20_000  # of the head and its surroundings that two sketches are compared at
STEPS = (7, 14, 28)  # parts of the head's radius that the search moves by, in turn; 10 to 2.5 mm in an adult
LEAST_SEEN = 0.3  # of the points, in the other's field of view
GAIN = 1e-4  # of the likeness; less is no step
MOST_STEPS = 60
DIRECTIONS = np.vstack([np.eye(6), -np.eye(6)])
APART = 0.06  # of the head's radius; 5 mm in an adult, where sessions of real scans are within 1 mm
LEAST_OVERLAP = 0.9  # of the heads; aligned ones of one session have 0.95 and more
FINE = 3.0  # mm of the grid that images are registered on
BINS, ITERATIONS = 32, 200
LONGEST_STEP, SHORTEST_STEP, RELAXATION = 4.0, 1e-4, 0.7  # mm; smaller or fewer ones stop a millimetre short

FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])  # between the worlds of NIfTI and ITK


@dataclass(frozen=True, eq=False)
class Found:
    """Where a sketch lies beside another.

    Attributes:
        matrix: from the fixed to the moving one.
        apart: mm that the fixed head's points move by, on average.
        share: the same as a share of the head's radius.
        overlap: of the two heads by their headers, where both fields of view are: 1 where one lies within the other.
    """

    matrix: np.ndarray
    apart: float
    share: float
    overlap: float

    def is_apart(self) -> bool:
        """Whether the contrasts are so far apart that a network would see one beside the other."""
        return self.far() or self.overlap < LEAST_OVERLAP

    def far(self) -> bool:
        """Whether another place fits better, by more than APART."""
        return self.share > APART


@dataclass(frozen=True, eq=False)
class Sketch:
    """A small picture of a head, by which two contrasts can be compared in a fraction of a second.

    Attributes:
        levels: ``(X, Y, Z)``, the rank of the intensity, 0 outside the head.
        affine: from voxels to mm.
        points: of the head and its surroundings, in mm.
        own: the levels there.
        radius: of a ball as large as the head, in mm.
    """

    levels: np.ndarray
    affine: np.ndarray
    points: np.ndarray
    own: np.ndarray
    radius: float

    @classmethod
    def of(cls, voxels: np.ndarray, head: np.ndarray, affine: np.ndarray) -> "Sketch":
        """Draws an image ``(X, Y, Z)`` of which the head is known."""
        small, own = coarse(voxels, affine, COARSE)
        inside = coarse(head.astype(np.float32), affine, COARSE)[0] > 0.5
        values = small[inside]
        edges = np.unique(np.quantile(values, np.linspace(0, 1, LEVELS + 1)[1:-1])) if values.size else np.zeros(0)
        levels = np.where(inside, np.searchsorted(edges, small) + 1, 0)
        around = np.argwhere(ndimage.binary_dilation(inside, iterations=2))
        around = around[:: max(1, len(around) // POINTS)]
        volume = np.count_nonzero(inside) * abs(np.linalg.det(own[:3, :3]))
        radius = (volume * 0.75 / np.pi) ** (1 / 3)
        return cls(levels, own, apply_affine(own, around), levels[tuple(around.T)], radius)

    def seen(self, other: "Sketch", matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The levels of both at the points that are in the other's field of view, too, at a transform."""
        there = np.rint(apply_affine(np.linalg.inv(other.affine) @ matrix, self.points)).astype(int)
        inside = ((there >= 0) & (there < other.levels.shape)).all(-1)
        return self.own[inside], other.levels[tuple(there[inside].T)]

    def likeness(self, other: "Sketch", matrix: np.ndarray) -> float:
        """How much the two know of each other at a transform, see `alike`; 0 where they hardly meet."""
        mine, its = self.seen(other, matrix)
        return alike(mine, its) if len(mine) >= LEAST_SEEN * len(self.own) else 0.0

    def middle(self) -> np.ndarray:
        """The centre of the head, in mm."""
        return self.points[self.own > 0].mean(0)

    def is_thin(self) -> bool:
        """Whether the head has but one or two layers along an axis."""
        return bool((np.ptp(np.argwhere(self.levels > 0), axis=0) < 2).any())

    def overlap(self, other: "Sketch") -> float:
        """Of the two heads by their headers, see `Found`."""
        mine, its = (part > 0 for part in self.seen(other, np.eye(4)))
        least = min(np.count_nonzero(mine), np.count_nonzero(its))
        return np.count_nonzero(mine & its) / least if least else 0.0

    def find(self, other: "Sketch", starts: Sequence[np.ndarray] = (np.eye(4),)) -> Found:
        """Where another contrast lies, sought from where its header puts it.

        Steps along and turns about three axes are tried, and the best one is taken, until none is better.

        Args:
            other: the moving one.
            starts: where to seek from; the best end counts.
        """
        if not self.own.any() or not other.levels.any():
            return Found(np.eye(4), 0.0, 0.0, 1.0)
        if self.is_thin() or other.is_thin():  # a turn or a shift out of the slices changes nothing that is seen
            return Found(np.eye(4), 0.0, 0.0, self.overlap(other))
        centre = self.middle()

        def matrix(start: np.ndarray, move: np.ndarray) -> np.ndarray:
            turn = Rotation.from_rotvec(move[3:] / self.radius).as_matrix()
            return start @ from_matvec(turn, centre - turn @ centre + move[:3])

        ends = []
        for start in starts:
            move = np.zeros(6)
            best = self.likeness(other, start)
            for part in STEPS:
                for _ in range(MOST_STEPS):
                    tried = [move + direction * self.radius / part for direction in DIRECTIONS]
                    likely = [self.likeness(other, matrix(start, each)) for each in tried]
                    if max(likely) <= best + GAIN:
                        break
                    best, move = max(likely), tried[int(np.argmax(likely))]
            ends.append((best, matrix(start, move)))
        found = max(ends, key=lambda end: end[0])[1]
        inner = self.points[self.own > 0]
        apart = float(np.linalg.norm(apply_affine(found, inner) - inner, axis=-1).mean())
        return Found(found, apart, apart / self.radius, self.overlap(other))


def alike(one: np.ndarray, other: np.ndarray) -> float:
    """The normalized mutual information of two lists of levels: 1 where they know nothing of each other, at most 2."""
    joint = np.bincount(one * (LEVELS + 1) + other, minlength=(LEVELS + 1) ** 2).reshape(LEVELS + 1, LEVELS + 1)

    def entropy(counts: np.ndarray) -> float:
        share = counts[counts > 0] / len(one)
        return float(-(share * np.log(share)).sum())

    both = entropy(joint.ravel())
    return (entropy(joint.sum(0)) + entropy(joint.sum(1))) / both if both > 0 else 1.0


def transform_name(mask: Path, contrast: str, first: str) -> str:
    """The name of the file beside a mask that says where a contrast lies beside the first one."""
    return f"{stem(mask).removesuffix('_mask')}_from-{contrast}_to-{first}_xfm.tfm"


def check_registration() -> Any:
    """SimpleITK, or the way to it in one sentence."""
    try:
        return import_module("SimpleITK")
    except ImportError as error:
        raise ValueError(
            '--register needs SimpleITK, which is not installed: pip install ".[formats]" brings it; or register the '
            "images yourself."
        ) from error


def register(case: Case) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Registers each further contrast of a case to the first, rigidly, by their mutual information.

    The images stay as they are on disk. What comes back has another affine, so that no voxel is interpolated here.

    Args:
        case: images by contrast.

    Returns:
        The images, the further ones in memory with the affine that fits the first, and the 4×4 transform of each.

    Raises:
        ValueError: SimpleITK is missing, or an image cannot serve.
    """
    itk = check_registration()
    names = list(case.images)
    fixed, head, grid = read_contrast(case.images[names[0]])
    sketch = Sketch.of(fixed, head, grid.affine)
    images, matrices = dict(case.images), {}
    for name in names[1:]:
        moving, shown, image = read_contrast(case.images[name])
        other = Sketch.of(moving, shown, image.affine)
        centred = from_matvec(np.eye(3), other.middle() - sketch.middle())
        start = sketch.find(other, (np.eye(4), centred))
        matrix = _refined(itk, (fixed, head, grid.affine), (moving, image.affine), start.matrix)
        before, after = sketch.likeness(other, np.eye(4)), sketch.likeness(other, matrix)
        inner = sketch.points[sketch.own > 0]
        moved = np.linalg.norm(apply_affine(matrix, inner) - inner, axis=-1).mean()
        if after < before and moved > APART * sketch.radius:  # nearer than that, the header was right already
            warnings.warn(
                f"{name_of(case.images[name])} could not be registered to {name_of(case.images[names[0]])}: nothing "
                "fits better than their headers do, which are taken; look at the images.",
                DataWarning,
                stacklevel=1,
            )
            matrix = np.eye(4)
        matrices[name] = matrix
        images[name] = nib.Nifti1Image(moving, np.linalg.inv(matrix) @ image.affine)
    return images, matrices


def _refined(
    itk: Any, fixed: tuple[np.ndarray, np.ndarray, np.ndarray], moving: tuple[np.ndarray, np.ndarray], start: np.ndarray
) -> np.ndarray:
    """A transform that is right within a few mm, to a fraction of one. One thread, so that it has the same bits again.

    Args:
        itk: SimpleITK.
        fixed: voxels, head and affine.
        moving: voxels and affine.
        start: the transform.
    """
    voxels, head, affine = fixed
    target, mask = _itk_image(itk, voxels, affine), _itk_image(itk, head.astype(np.float32), affine)
    source = _itk_image(itk, *moving)
    around = itk.BinaryDilate(itk.Cast(mask > 0.5, itk.sitkUInt8), [3, 3, 3])
    initial = _itk_transform(itk, start, apply_affine(affine, np.argwhere(head).mean(0)))
    method = itk.ImageRegistrationMethod()
    method.SetNumberOfThreads(1)
    method.SetMetricAsMattesMutualInformation(BINS)
    method.SetMetricSamplingStrategy(method.NONE)
    method.SetMetricFixedMask(around)
    method.SetInterpolator(itk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(LONGEST_STEP, SHORTEST_STEP, ITERATIONS, RELAXATION)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([2, 1])
    method.SetSmoothingSigmasPerLevel([FINE, 0.0])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetInitialTransform(initial, inPlace=True)
    threads = itk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    itk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)  # the metric has threads of its own
    try:
        method.Execute(target, source)
    except RuntimeError:  # ITK's only one: too few points are in both
        return start
    finally:
        itk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    turn = np.reshape(initial.GetMatrix(), (3, 3))
    centre, shift = np.array(initial.GetCenter()), np.array(initial.GetTranslation())
    return FLIP @ from_matvec(turn, centre - turn @ centre + shift) @ FLIP


def _itk_image(itk: Any, voxels: np.ndarray, affine: np.ndarray) -> Any:
    """An image as ITK's, on an even grid along the world's axes, whatever its own grid is."""
    small, own = coarse(voxels.astype(np.float32), affine, FINE)
    corners = apply_affine(own, np.array(list(np.ndindex(2, 2, 2))) * (np.array(small.shape) - 1))
    low, high = corners.min(0), corners.max(0)
    shape = np.ceil((high - low) / FINE).astype(int) + 1
    even = np.linalg.inv(own) @ from_matvec(np.eye(3) * FINE, low)
    image = itk.GetImageFromArray(
        ndimage.affine_transform(small, even[:3, :3], even[:3, 3], output_shape=tuple(shape), order=1).T.copy()
    )
    image.SetSpacing([FINE] * 3)
    image.SetOrigin((FLIP[:3, :3] @ low).tolist())
    image.SetDirection(FLIP[:3, :3].ravel().tolist())
    return image


def _itk_transform(itk: Any, matrix: np.ndarray, centre: np.ndarray | None = None) -> Any:
    """A rigid 4×4 transform as ITK's, which turns about a centre."""
    turned = FLIP @ matrix @ FLIP
    around = np.zeros(3) if centre is None else FLIP[:3, :3] @ centre
    transform = itk.Euler3DTransform()
    transform.SetCenter(around.tolist())
    transform.SetMatrix(turned[:3, :3].ravel().tolist(), 1e-6)
    transform.SetTranslation((apply_affine(turned, around) - around).tolist())
    return transform


def write_transform(matrix: np.ndarray, path: Path) -> None:
    """Writes a transform for ITK: ``sitk.Resample(moving, fixed, sitk.ReadTransform(path))``."""
    itk = check_registration()
    with written_beside(path) as partial:
        itk.WriteTransform(_itk_transform(itk, matrix), str(partial))
