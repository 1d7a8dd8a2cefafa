"""Cases on disk, and what happens to them before the network sees them.

A reader of a layout returns `Case` objects, complete or not; nothing after it knows a layout.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    CropForegroundd,
    EnsureTyped,
    FgBgToIndicesd,
    Orientationd,
    RandAffined,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandGaussianNoised,
    RandScaleIntensityd,
    RandShiftIntensityd,
    SelectItemsd,
    Spacingd,
    SpatialPadd,
    SpatialResample,
    Transform,
)
from torch import Tensor

from rsanet.segment.volumes import SUFFIXES, read_image, read_mask, same_grid, stem

# Stored as (z, y, x), the network's axis names are anatomically true: "axial" runs from inferior to superior.
ORIENTATION = "SAR"

# The order of channels where the user names none; other contrasts follow alphabetically.
CONTRASTS = ("FLAIR", "T1w", "T2w")


@dataclass(frozen=True)
class Case:
    """One subject, or one session: an image per contrast, in channel order, and a lesion mask where there is one.

    A contrast with several images is in ``several`` instead: which of them is meant is not ours to say.
    """

    id: str
    images: dict[str, Path] = field(default_factory=dict)
    mask: Path | None = None
    several: dict[str, list[Path]] = field(default_factory=dict)

    def pick(self, contrasts: Sequence[str]) -> dict[str, Path]:
        """The images of some contrasts, in their order, or an error that says which one is missing."""
        for name in contrasts:
            if name in self.several:
                files = ", ".join(path.name for path in self.several[name])
                raise ValueError(f"{self.id} has several {name} images ({files}): leave one.")
        missing = [name for name in contrasts if name not in self.images]
        if missing or not contrasts:
            raise ValueError(f"{self.id} has no {' and no '.join(missing) or 'images'}.")
        return {name: self.images[name] for name in contrasts}


# --- finding cases ------------------------------------------------------------------------------------------


def read_bids(folder: Path) -> list[Case]:
    """Cases of ``sub-*/anat/*_CONTRAST.nii.gz``, masks in ``derivatives/*/sub-*/anat/*label-lesion*_mask.nii.gz``.

    With sessions, each ``sub-*/ses-*`` is a case, likewise.
    """
    cases = []
    for subject in sorted(path for path in folder.glob("sub-*") if path.is_dir()):
        sessions = sorted(path for path in subject.glob("ses-*") if path.is_dir())
        for place in [subject, *sessions] if (subject / "anat").is_dir() or not sessions else sessions:
            found: dict[str, list[Path]] = {}
            for path in sorted((place / "anat").glob("[!.]*")):
                if path.name.endswith(SUFFIXES):
                    found.setdefault(stem(path).rpartition("_")[2], []).append(path)
            where = place.relative_to(folder)
            masks = [
                path
                for path in sorted(folder.glob(f"derivatives/*/{where.as_posix()}/anat/*_mask.nii*"))
                if "label-lesion" in path.name and path.name.endswith(SUFFIXES)
            ]
            cases.append(
                Case(
                    "_".join(where.parts),
                    {name: paths[0] for name, paths in found.items() if len(paths) == 1},
                    masks[0] if masks else None,
                    {name: paths for name, paths in found.items() if len(paths) > 1},
                )
            )
    return cases


def list_cases(path: str | Path, contrasts: Sequence[str] | None = None) -> tuple[list[Case], list[str]]:
    """All the cases of a data set, complete or not.

    Args:
        path: folder of the data set.
        contrasts: the wanted contrasts in channel order; None takes every contrast that occurs.

    Returns:
        The cases, each with those of the wanted contrasts that it has, and the wanted contrasts.
    """
    path = Path(path)
    if twice := sorted({name for name in contrasts or () if list(contrasts or ()).count(name) > 1}):
        raise ValueError(f"--contrasts has {' and '.join(twice)} more than once: name each channel once.")
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder: give the folder of a cohort, with sub-*/anat/ inside.")
    cases = read_bids(path)
    if not cases:
        raise ValueError(f"{path} has no cases: expected images named sub-001/anat/sub-001_FLAIR.nii.gz inside.")
    if contrasts is None:
        found = {name for case in cases for name in (*case.images, *case.several)}
        contrasts = sorted(found, key=lambda name: (CONTRASTS.index(name) if name in CONTRASTS else 99, name))
    return [
        replace(case, images={name: case.images[name] for name in contrasts if name in case.images}) for case in cases
    ], list(contrasts)


def check_case(case: Case, contrasts: Sequence[str], *, require_mask: bool) -> None:
    """Reads every file of a case once and raises on the first that cannot serve."""
    images = [read_image(path)[1] for path in case.pick(contrasts).values()]
    if not require_mask:
        return
    if case.mask is None:
        raise ValueError(f"{case.id} has no lesion mask.")
    mask = read_mask(case.mask)[1]
    if not same_grid(images[0], mask):
        name, shape = contrasts[0], "×".join(map(str, mask.shape[:3]))
        raise ValueError(
            f"{case.mask} ({shape}) is on another grid than the {name} image "
            f"({'×'.join(map(str, images[0].shape[:3]))}): put the contrast it was drawn on first in --contrasts."
        )


def find_cases(path: str | Path, contrasts: Sequence[str] | None = None, *, require_mask: bool) -> list[Case]:
    """The cases of a data set, every file of them read and found good.

    Args:
        path: folder of the data set.
        contrasts: the wanted contrasts in channel order; None wants every contrast that occurs.
        require_mask: whether a case needs a lesion mask on the grid of its first contrast.

    Raises:
        ValueError: naming every case that cannot serve, each with its reason.
    """
    cases, contrasts = list_cases(path, contrasts)
    problems = []
    for case in cases:
        try:
            check_case(case, contrasts, require_mask=require_mask)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    if problems:
        raise ValueError(f"{len(problems)} of {len(cases)} cases in {path} cannot be used:\n  " + "\n  ".join(problems))
    return cases


def is_simulated(path: str | Path) -> bool:
    """Whether a path is in a cohort of `rsanet simulate`, by the ``dataset_description.json`` above it."""
    path = Path(path).resolve()
    for folder in (path, *path.parents):
        try:
            description = json.loads((folder / "dataset_description.json").read_text())
            makers = [entry["Name"] for entry in description["GeneratedBy"]]
        except (OSError, ValueError, LookupError, TypeError):
            continue  # no description here, or one that names no maker
        if "rsanet simulate" in makers:
            return True
    return False


# --- preparing volumes --------------------------------------------------------------------------------------


def foreground(image: Tensor) -> Tensor:
    """Where each channel of ``(C, D, H, W)`` shows tissue, not background.

    The background of a skull-stripped or normalized image is exactly zero. Elsewhere it is air, with noise, and
    tissue is what is brighter than a tenth of the 99th percentile.
    """
    masks = []
    for channel in image:
        voxels = np.asarray(channel)
        zero = voxels == 0
        air = voxels.min() >= 0 and zero.mean() < 0.02
        masks.append(torch.from_numpy(voxels > 0.1 * np.percentile(voxels, 99) if air else ~zero))
    return torch.stack(masks)


class Preparation(Compose):
    """Transforms in order. MONAI hides the reason of a failure behind its own error; here the reason comes out."""

    def __init__(self, transforms: Sequence[Callable]) -> None:
        super().__init__(transforms, log_stats=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Compose``."""
        try:
            return super().__call__(*args, **kwargs)
        except RuntimeError as error:
            reason: BaseException = error
            while reason.__cause__ is not None and not isinstance(reason, (ValueError, OSError)):
                reason = reason.__cause__
            raise reason from reason.__cause__


class LoadCase(Transform):
    """Reads a `Case`: ``image`` ``(C, ...)`` on the grid of its first contrast, and ``mask`` ``(1, ...)``."""

    def __call__(self, case: Case) -> dict[str, Any]:
        """Contrasts on other grids are resampled, by their headers."""
        volumes: list[Tensor] = []
        grid: nib.Nifti1Image | None = None
        for path in case.images.values():
            voxels, image = read_image(path)
            volume = MetaTensor(torch.from_numpy(voxels)[None], affine=torch.from_numpy(image.affine))
            if grid is None:
                grid = image
            elif not same_grid(grid, image):
                volume = SpatialResample(mode="bilinear", padding_mode="zeros")(
                    volume, dst_affine=torch.from_numpy(grid.affine), spatial_size=grid.shape[:3]
                )
            volumes.append(volume.as_tensor().float())
        if grid is None:
            raise ValueError(f"{case.id} has no images.")
        affine = torch.from_numpy(grid.affine)
        loaded: dict[str, Any] = {"case": case.id, "image": MetaTensor(torch.cat(volumes), affine=affine)}
        if case.mask is not None:
            mask = torch.from_numpy(read_mask(case.mask)[0].astype(np.uint8))
            loaded["mask"] = MetaTensor(mask[None], affine=affine)
        return loaded


class NormalizeForeground(Transform):
    """Gives the tissue of each channel mean 0 and standard deviation 1; exact zeros stay zero, like padding."""

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        """Leaves every other entry as it is."""
        image = data["image"]
        normalized = []
        for channel, tissue in zip(image.as_tensor(), foreground(image), strict=True):
            values = channel[tissue]
            if values.numel() == 0:
                raise ValueError(f"{data['case']}: a contrast shows no tissue on the grid of the first contrast.")
            deviation = values.std(correction=0).clamp_min(1e-6)
            normalized.append(torch.where(channel == 0, 0.0, (channel - values.mean()) / deviation))
        result = dict(data)
        result["image"] = MetaTensor(torch.stack(normalized), meta=image.meta)
        result["image"].applied_operations = image.applied_operations
        return result


def preprocessing(spacing: Sequence[float] | None = None) -> Preparation:
    """From a `Case` to normalized volumes around the head; the way back is ``monai.transforms.Invertd``.

    Args:
        spacing: voxel size in mm to resample to, or None to keep the images' own.
    """
    keys = ("image", "mask")
    steps: list[Transform] = [
        LoadCase(),
        Orientationd(keys, ORIENTATION, labels=None, allow_missing_keys=True),
    ]
    if spacing is not None:
        steps.append(Spacingd(keys, tuple(spacing), mode=("bilinear", "nearest"), allow_missing_keys=True))
    steps.append(CropForegroundd(keys, "image", select_fn=foreground, allow_missing_keys=True, allow_smaller=True))
    steps.append(NormalizeForeground())
    return Preparation(steps)


def training_transforms(patch: Sequence[int], spacing: Sequence[float] | None = None) -> Preparation:
    """Preprocessing, which a cache keeps, and then one random patch with light augmentation."""
    keys, modes = ("image", "mask"), ("bilinear", "nearest")
    return Preparation(
        [
            *preprocessing(spacing).transforms,
            SpatialPadd(keys, patch),
            FgBgToIndicesd("mask", image_key="image"),
            EnsureTyped(keys, track_meta=False),
            RandCropByPosNegLabeld(
                keys,
                "mask",
                patch,
                pos=1,
                neg=1,
                fg_indices_key="mask_fg_indices",
                bg_indices_key="mask_bg_indices",
            ),
            SelectItemsd((*keys, "case")),
            *(RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in range(3)),
            RandAffined(
                keys,
                prob=0.2,
                rotate_range=(0.2, 0.2, 0.2),
                scale_range=(0.1, 0.1, 0.1),
                mode=modes,
                padding_mode="border",
            ),
            RandScaleIntensityd("image", factors=0.1, prob=0.5, channel_wise=True),
            RandShiftIntensityd("image", offsets=0.1, prob=0.5, channel_wise=True),
            RandGaussianNoised("image", prob=0.2, std=0.1),
        ]
    )


def validation_transforms(spacing: Sequence[float] | None = None) -> Preparation:
    """Whole volumes, prepared as at prediction."""
    return Preparation([*preprocessing(spacing).transforms, EnsureTyped(("image", "mask"), track_meta=False)])
