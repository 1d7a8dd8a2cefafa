"""A case as its page needs it: image, masks and probability on one grid, and what their files say of themselves."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.affines import apply_affine, voxel_sizes

from rsanet.segment.cases import Case
from rsanet.segment.geometry import align, has_voxels_of, is_sheared, to_canonical, voxel_volume
from rsanet.segment.lists import read_json
from rsanet.segment.raters import ignored_voxels
from rsanet.segment.volumes import (
    MaskSource,
    Volume,
    check_views,
    read_image,
    read_mask,
    read_volume,
    stem,
)
from rsanet.segment.words import counted

Array = np.ndarray

SHEARED = (
    "The voxels of this scan are sheared, and the pictures show them as boxes; volumes and distances are those of the "
    "sheared voxels."
)
ALONE = "a page shows no masks on different grids: bring one to the other's"  # what to do with a mask that lies apart
STRAIGHT = 1.0  # degrees; axes turned by less are not worth a remark
AXES = ("x", "y", "z")


@dataclass(frozen=True, eq=False)
class Scan:
    """A case's volumes on the grid of its predicted mask, axes turned to right, anterior, superior.

    An oblique grid keeps its obliqueness: its axes run as closely to those directions as they did in the file.

    Attributes:
        name: of the case.
        contrast: which image is shown.
        images: (X, Y, Z) float32 by contrast: the one shown and, where there is one, T1w.
        prediction: (X, Y, Z) bool.
        reference: (X, Y, Z) bool, or None.
        probability: (X, Y, Z) float32, or None.
        affine: voxel to world mm.
        file_affine: the same of the mask's file, whose voxels are numbered as viewers number them.
        file_shape: shape of the mask's file.
        sidecar: what the mask's JSON says.
        notes: sentences on what was done to the volumes.
    """

    name: str
    contrast: str
    images: dict[str, Array]
    prediction: Array
    reference: Array | None
    probability: Array | None
    affine: Array
    file_affine: Array
    file_shape: tuple[int, ...]
    sidecar: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def image(self) -> Array:
        """The image that is shown."""
        return self.images[self.contrast]

    @property
    def spacing(self) -> Array:
        """(3,) voxel size in mm."""
        return voxel_sizes(self.affine)

    @property
    def voxel_mm3(self) -> float:
        """Volume of a voxel."""
        return voxel_volume(self.affine)

    def position(self, axis: int, index: int) -> float:
        """World mm along an axis of the middle of a slice."""
        middle = (np.array(self.prediction.shape) - 1) / 2
        middle[axis] = index
        return float(apply_affine(self.affine, middle)[axis])

    def file_voxel(self, world: Array) -> Array:
        """(3,) voxel of the mask's file at a point in world mm."""
        return apply_affine(np.linalg.inv(self.file_affine), world)


def read_scan(case: Case, contrasts: Sequence[str], mask: Path) -> Scan:
    """Reads a case and its predicted mask.

    Args:
        case: with its images, and its reference mask where there is one.
        contrasts: of the cohort; where a case has no FLAIR, its first image among them is shown.
        mask: predicted mask; ``..._probseg.nii.gz`` and ``.json`` beside it are read, too.

    Raises:
        ValueError: a file cannot serve, or they do not belong together; in one sentence.
        OSError: a file cannot be read.
    """
    shown = next((name for name in ("FLAIR", *contrasts) if name in case.images or name in case.several), None)
    if shown is None:
        raise ValueError(f"{case.id} has no images.")
    notes = [] if shown == "FLAIR" else [f"There is no FLAIR image: {shown} is shown."]
    voxels, file = read_mask(mask)
    prediction, affine = to_canonical(voxels, file.affine)
    images = {}
    for name in dict.fromkeys((shown, *(["T1w"] if "T1w" in case.images else []))):
        images[name], note = _image_on(file, mask, case.pick([name])[name], name)
        notes += note
    reference, uncounted = _reference_on(file, mask, case.pick_mask())
    if uncounted is not None and (left_out := np.count_nonzero(prediction & uncounted)):
        prediction = prediction & ~uncounted
        notes.append(
            f"{counted(left_out, 'predicted voxel')} of other pathology: not shown, and neither right nor wrong."
        )
    probability = _probability_on(file, mask)
    if is_sheared(affine):
        notes.append(SHEARED)
    elif (angle := _obliqueness(affine)) > STRAIGHT:
        notes.append(f"The slices follow the scan, which is turned by {angle:.0f}° from the axes of the scanner.")
    return Scan(
        case.id,
        shown,
        images,
        prediction,
        reference,
        probability,
        affine,
        file.affine,
        file.shape[:3],
        _read_sidecar(mask.with_name(stem(mask) + ".json"), notes),
        tuple(notes),
    )


def _image_on(file: nibabel.Nifti1Image, mask: Volume, path: Volume, name: str) -> tuple[Array, list[str]]:
    """An image on the canonical grid of the mask's file, and a remark where it was resampled, by the headers."""
    from nibabel.processing import resample_from_to

    voxels, own = read_image(path)
    if has_voxels_of(own, file):
        turned = align(voxels, own, file, str(path), str(mask), ALONE)
        return to_canonical(turned, file.affine)[0], []
    check_views(mask, file, path, own)
    turned = resample_from_to(nibabel.Nifti1Image(voxels, own.affine), (file.shape[:3], file.affine), order=1)
    shown = to_canonical(np.asarray(turned.dataobj, np.float32), file.affine)[0]
    return shown, [f"{name} is shown on the grid of the mask, by the headers."]


def _reference_on(
    file: nibabel.Nifti1Image, mask: Volume, path: Path | MaskSource | None
) -> tuple[Array | None, Array | None]:
    """The reference, and where it says neither lesion nor none, on the canonical grid of the mask's file."""
    if path is None:
        return None, None
    voxels, own = read_mask(path)
    turned = [
        None if part is None else to_canonical(align(part, own, file, str(path), str(mask), ALONE), file.affine)[0]
        for part in (voxels, ignored_voxels(path))
    ]
    return turned[0], turned[1]


def _probability_on(file: nibabel.Nifti1Image, mask: Path) -> Array | None:
    path = mask.with_name(f"{stem(mask).removesuffix('_mask')}_probseg{mask.name[len(stem(mask)) :]}")
    if not path.is_file():
        return None
    voxels, own = read_volume(path)
    turned = align(voxels, own, file, str(path), str(mask), "predict both again, or remove the one of them")
    return np.clip(np.nan_to_num(to_canonical(turned, file.affine)[0]), 0, 1)


def _read_sidecar(path: Path, notes: list[str]) -> dict[str, Any]:
    """The JSON beside a mask; what is no such file costs a remark, not the page."""
    if not path.is_file():
        return {}
    try:
        content = read_json(path)
    except (ValueError, OSError):
        content = None
    if isinstance(content, dict):
        return content
    notes.append(f"{path.name} beside the mask cannot be read.")
    return {}


def _obliqueness(affine: Array) -> float:
    """The largest angle in degrees between an axis of a canonical grid and its own of the world."""
    directions = affine[:3, :3] / voxel_sizes(affine)
    return float(np.degrees(np.arccos(np.clip(np.diag(directions), -1, 1))).max())
