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
    Identityd,
    Lambdad,
    OneOf,
    Orientationd,
    Rand3DElasticd,
    RandAdjustContrastd,
    RandAffined,
    RandBiasFieldd,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandScaleIntensityd,
    RandShiftIntensityd,
    RandSimulateLowResolutiond,
    SelectItemsd,
    Spacingd,
    SpatialPadd,
    SpatialResample,
    Transform,
)
from torch import Tensor

from rsanet.segment.cases import Case
from rsanet.segment.checks import look
from rsanet.segment.registration import Sketch
from rsanet.segment.volumes import (
    ROUNDING,
    check_views,
    load_grid,
    read_contrast,
    read_mask_on,
    same_grid,
    tissue_mask,
)

# Stored as (z, y, x), the network's axis names are anatomically true: "axial" runs from inferior to superior.
ORIENTATION = "SAR"

ALIKE = 0.05  # voxel sizes that differ by less are one
THICK = 2.0  # times the smallest voxel size; across thicker slices, what bends a volume would tear it
CENTRES = 20_000  # of patches without lesion that a case offers; every voxel would take more memory than its image


def voxel_size(image: nib.Nifti1Image) -> np.ndarray:
    """Voxel size in mm along z, y and x, whatever the order in which the file stores its axes."""
    turned = nib.io_orientation(image.affine)[:, 0].astype(int)
    size = np.empty(3)
    size[turned] = nib.affines.voxel_sizes(image.affine)
    return size[::-1]


def common_spacing(cases: Sequence[Case]) -> tuple[float, float, float] | None:
    """The voxel size to bring cases to: None where all have about the same, else the median along each axis."""
    found = voxel_sizes_of(cases)
    median = np.median(found, axis=0)
    if (np.abs(found / median - 1) < ALIKE).all():
        return None
    return tuple(float(f"{size:.4g}") for size in median)


def voxel_sizes_of(cases: Sequence[Case]) -> np.ndarray:
    """Voxel sizes ``(cases, 3)`` in mm along z, y and x, of the first contrast of each case."""
    return np.array([voxel_size(load_grid(next(iter(case.images.values())))) for case in cases])


def foreground(image: Tensor) -> Tensor:
    """Where each channel of ``(C, D, H, W)`` shows tissue, not background."""
    return torch.stack([torch.from_numpy(tissue_mask(np.asarray(channel))) for channel in image])


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
    """Reads a `Case` on the grid of its first contrast.

    ``image`` is ``(C, ...)``; ``tissue``, of the same size, is 1 where a contrast shows tissue; ``mask`` is
    ``(1, ...)``.

    Args:
        checked: whether to add ``head`` ``(1, ...)``, where the first contrast shows tissue, which stays on that grid,
            and ``apart``: where each further contrast lies beside the first, by name.
    """

    def __init__(self, checked: bool = False) -> None:
        self.checked = checked

    def __call__(self, case: Case) -> dict[str, Any]:
        """Contrasts on other grids are resampled, by their headers."""
        volumes: list[Tensor] = []
        tissues: list[Tensor] = []
        grid: nib.Nifti1Image | None = None
        first = next(iter(case.images.values()), None)
        sketches: dict[str, Sketch] = {}
        for name, path in case.images.items():
            voxels, shown, image = read_contrast(path)
            if self.checked:
                sketches[name] = Sketch.of(voxels, shown, image.affine)
            affine = torch.from_numpy(image.affine)
            volume = MetaTensor(torch.from_numpy(voxels)[None], affine=affine)
            tissue = MetaTensor(torch.from_numpy(shown.astype(np.uint8))[None], affine=affine)
            if grid is None:
                grid = image
            elif not same_grid(grid, image):
                check_views(first, grid, path, image)
                there = {"dst_affine": torch.from_numpy(grid.affine), "spatial_size": grid.shape[:3]}
                # Where the contrast ends there is no tissue; its last voxels are not mixed with what is beyond.
                volume = SpatialResample(mode="bilinear", padding_mode="border")(volume, **there)
                tissue = SpatialResample(mode="nearest", padding_mode="zeros")(tissue, **there)
                # An interpolation at the very voxels leaves next to 0 what was 0.
                volume = torch.where(volume.abs() < ROUNDING * volume.abs().max(), 0, volume)
            volumes.append(volume.as_tensor().float())
            tissues.append(tissue.as_tensor().to(torch.uint8))
        if grid is None:
            raise ValueError(f"{case.id} has no images.")
        affine = torch.from_numpy(grid.affine)
        loaded: dict[str, Any] = {
            "case": case.id,
            "image": MetaTensor(torch.cat(volumes), affine=affine),
            "tissue": MetaTensor(torch.cat(tissues), affine=affine),
        }
        if self.checked:
            drawn, *others = sketches
            loaded["head"] = tissues[0].clone()
            loaded["apart"] = {name: sketches[drawn].find(sketches[name]) for name in others}
        if case.mask is not None:
            name = f"the {next(iter(case.images))} image"  # as the check of the data set says, so that it is told once
            mask = read_mask_on(case.mask, grid, name, "resample it to that image, or repair its header")
            mask = torch.from_numpy(mask.astype(np.uint8))
            loaded["mask"] = MetaTensor(mask[None], affine=affine)
        return loaded


class NormalizeForeground(Transform):
    """Gives the tissue of each channel mean 0 and standard deviation 1; what is no tissue becomes 0, like padding.

    Args:
        tissue: the entry that says where each channel shows tissue, which is left out of the result; None finds the
            tissue in the image as it is.
        looked: whether to add ``look``, what the images look like before; see `rsanet.segment.checks`.
    """

    def __init__(self, tissue: str | None = None, looked: bool = False) -> None:
        self.tissue = tissue
        self.looked = looked

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        """Leaves every other entry as it is."""
        image = data["image"]
        tissues = foreground(image) if self.tissue is None else data[self.tissue].as_tensor() > 0
        normalized = []
        for channel, tissue in zip(image.as_tensor(), tissues, strict=True):
            values = channel[tissue]
            if values.numel() == 0:
                raise ValueError(
                    f"{data['case']}: a contrast shows no tissue on the grid of the first contrast: "
                    "register one to the other, or repair the headers."
                )
            # Rounding is not spread; how large the numbers are says nothing.
            least = max(1e-6 * float(values.abs().max()), torch.finfo(values.dtype).tiny)
            deviation = values.std(correction=0).clamp_min(least)
            normalized.append(torch.where(tissue, (channel - values.mean()) / deviation, 0.0))
        result = {key: value for key, value in data.items() if key != self.tissue}
        result["image"] = MetaTensor(torch.stack(normalized), meta=image.meta)
        result["image"].applied_operations = image.applied_operations
        if self.looked:
            result["look"] = look(image.numpy(), tissues.numpy(), image.affine.numpy())
        return result


def preprocessing(
    spacing: Sequence[float] | None = None, *, checked: bool = False, looked: bool = False
) -> Preparation:
    """From a `Case` to normalized volumes around the head; the way back is ``monai.transforms.Invertd``.

    Args:
        spacing: voxel size in mm to resample to, or None to keep the images' own.
        checked: see `LoadCase`.
        looked: see `NormalizeForeground`.
    """
    # The tissue goes along: on a grid of other voxels it might be seen otherwise.
    keys = ("image", "tissue", "mask")
    steps: list[Transform] = [
        LoadCase(checked),
        Orientationd(keys, ORIENTATION, labels=None, allow_missing_keys=True),
    ]
    if spacing is not None:
        steps.append(Spacingd(keys, tuple(spacing), mode=("bilinear", "nearest", "nearest"), allow_missing_keys=True))
    steps.append(CropForegroundd(keys, "tissue", allow_missing_keys=True, allow_smaller=True))
    steps.append(NormalizeForeground("tissue", looked))
    return Preparation(steps)


def preparing_to_train(spacing: Sequence[float] | None = None) -> Preparation:
    """What a cache keeps of a `Case`: ``image``, ``mask``, ``look``, and where patches are centred, lesion or not."""
    return Preparation(
        [
            *preprocessing(spacing, looked=True).transforms,
            EnsureTyped(("image", "mask"), track_meta=False),
            FgBgToIndicesd("mask", image_key="image"),
            Lambdad("mask_bg_indices", lambda indices: indices[:: max(1, len(indices) // CENTRES)]),
        ]
    )


def patch_transforms(
    patch: Sequence[int], *, augment: bool = True, spacing: Sequence[float] = (1.0, 1.0, 1.0)
) -> Preparation:
    """One random patch of a prepared volume, half of them centred on a lesion, with augmentation.

    Args:
        patch: voxels along z, y, x.
        augment: whether to change it at random.
        spacing: voxel size along z, y, x. Turns, bends and blurs are in voxels: across thick slices they are the
            smaller.
    """
    keys = ("image", "mask")
    steps: list[Transform] = [
        RandCropByPosNegLabeld(
            keys,
            "mask",
            patch,
            pos=1,
            neg=1,
            fg_indices_key="mask_fg_indices",
            bg_indices_key="mask_bg_indices",
            allow_smaller=True,
        ),
        SpatialPadd(keys, patch),
        SelectItemsd((*keys, "case")),
    ]
    if augment:
        resampled: dict[str, Any] = {"mode": ("bilinear", "nearest"), "padding_mode": "reflection"}
        size = np.asarray(spacing, float)
        blurs = {
            f"sigma_{name}": tuple(np.array([0.4, 1.0]) * size.min() / own)
            for name, own in zip("xyz", size, strict=True)
        }
        bent = Rand3DElasticd(keys, (4, 6), (30, 100), prob=1, **resampled)
        steps += [
            *(RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in range(3)),
            RandAffined(keys, prob=0.2, rotate_range=rotations(size), scale_range=(0.15,) * 3, **resampled),
            # It resamples whenever it is called, bent or not; so it is called where it bends.
            *([] if size.max() > THICK * size.min() else [OneOf([Identityd(keys), bent], weights=(0.9, 0.1))]),
            RandSimulateLowResolutiond("image", prob=0.1, zoom_range=(0.5, 1.0)),
            RandGaussianSmoothd("image", prob=0.1, **blurs),
            RandBiasFieldd("image", prob=0.15, coeff_range=(0.0, 0.2)),
            RandScaleIntensityd("image", factors=0.1, prob=0.5, channel_wise=True),
            RandShiftIntensityd("image", offsets=0.1, prob=0.5, channel_wise=True),
            RandAdjustContrastd("image", prob=0.15, gamma=(0.7, 1.5), retain_stats=True),
            RandGaussianNoised("image", prob=0.2, std=0.1),
        ]
    return Preparation([*steps, EnsureTyped(keys, track_meta=False)])


def rotations(spacing: Sequence[float]) -> tuple[float, ...]:
    """The largest turn about z, y and x, in radians of a grid of voxels: in mm, one of unequal voxels is sheared by it.

    Of slices five times as thick as their voxels are wide, 0.3 would put one end of a patch a hundred mm below the
    other; turns out of their plane are smaller by the square of that ratio.
    """
    pairs = ((1, 2), (0, 2), (0, 1))  # the axes that each turn mixes
    ratios = [min(spacing[a], spacing[b]) / max(spacing[a], spacing[b]) for a, b in pairs]
    return tuple(0.3 * ratio**2 for ratio in ratios)


def validation_transforms(spacing: Sequence[float] | None = None) -> Preparation:
    """Whole volumes, prepared as at prediction."""
    return Preparation([*preprocessing(spacing).transforms, EnsureTyped(("image", "mask"), track_meta=False)])
