"""What happens to the volumes of a case before the network sees them."""

from collections.abc import Callable, Sequence
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

from rsanet.segment.datasets import Case
from rsanet.segment.volumes import read_image, read_mask, same_grid

# Stored as (z, y, x), the network's axis names are anatomically true: "axial" runs from inferior to superior.
ORIENTATION = "SAR"


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
