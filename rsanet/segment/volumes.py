"""NIfTI volumes, read with a reason in one sentence where a file cannot serve."""

import re
from pathlib import Path

import nibabel as nib
import numpy as np

SUFFIXES = (".nii.gz", ".nii")


def stem(path: Path) -> str:
    """The file name without ``.nii`` or ``.nii.gz``."""
    return re.sub(r"\.nii(\.gz)?$", "", path.name)


def read_volume(path: str | Path) -> tuple[np.ndarray, nib.Nifti1Image]:
    """Reads a 3-D NIfTI file, or says in one sentence why it cannot serve.

    Returns:
        The scaled voxels as float32, and the image for its affine and header.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: check the name of the file.")
    if path.is_dir() or not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path} is not a NIfTI file: give a file that ends in .nii or .nii.gz.")
    try:
        image = nib.load(path)
        voxels = np.asarray(image.dataobj)
    except PermissionError as error:
        raise ValueError(f"{path} cannot be opened: permission denied.") from error
    except Exception as error:  # nibabel, gzip and zlib raise a dozen types for a damaged file
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"{path} cannot be read as NIfTI: it is damaged or something else ({reason}).") from error
    while voxels.ndim > 3 and voxels.shape[-1] == 1:
        voxels = voxels[..., 0]
    if voxels.ndim != 3:
        raise ValueError(f"{path} has {voxels.ndim} dimensions {voxels.shape}: give one 3-D volume per file.")
    if voxels.size == 0:
        raise ValueError(f"{path} has no voxels {voxels.shape}: give a volume with an extent along every axis.")
    if voxels.dtype.kind not in "biuf":
        raise ValueError(f"{path} stores {voxels.dtype} voxels: give a volume with one real number per voxel.")
    affine = image.affine
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ValueError(f"{path} has an affine that maps no volume to space: repair its header.")
    voxels = voxels.astype(np.float32)
    bad = int(np.count_nonzero(~np.isfinite(voxels)))
    if bad:
        raise ValueError(f"{path} has {bad} voxels that are NaN or infinite: replace them, for example by 0.")
    return voxels, image


def read_image(path: str | Path) -> tuple[np.ndarray, nib.Nifti1Image]:
    """Reads a contrast, which must not be the same everywhere."""
    voxels, image = read_volume(path)
    if voxels.min() == voxels.max():
        raise ValueError(f"{path} is empty: every voxel is {voxels.flat[0]:g}.")
    return voxels, image


def read_mask(path: str | Path) -> tuple[np.ndarray, nib.Nifti1Image]:
    """Reads a binary mask: 0 and one other number, whichever it is.

    Returns:
        The voxels as booleans, and the image for its affine and header.
    """
    voxels, image = read_volume(path)
    mask = voxels != 0
    labels = np.unique(voxels[mask])
    if labels.size > 1 or (labels < 0.5).any():
        some = ", ".join(f"{label:g}" for label in labels[:3])
        raise ValueError(
            f"{path} is not a binary mask: besides 0 it has {some}{', ...' if labels.size > 3 else ''}; "
            "cut a probability map at a threshold, or keep one label, first."
        )
    return mask, image


def same_grid(one: nib.Nifti1Image, other: nib.Nifti1Image) -> bool:
    """Whether two images have the same voxels in space, by their headers, to a thousandth of a mm."""
    return one.shape[:3] == other.shape[:3] and np.allclose(one.affine, other.affine, rtol=0, atol=1e-3)
