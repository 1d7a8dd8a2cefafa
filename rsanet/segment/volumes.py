"""Volumes, read with a reason in one sentence where a file cannot serve: NIfTI, and what `formats` reads."""

import gzip
import logging
import os
import re
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TypeAlias

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine, voxel_sizes
from nibabel.spatialimages import SpatialImage
from scipy import ndimage

from rsanet.segment.dicom import is_dicom
from rsanet.segment.formats import FORMATS, is_other_format, is_series, read_other_format
from rsanet.segment.geometry import align, lattice
from rsanet.segment.geometry import same_grid as same_grid
from rsanet.segment.recipe import LARGEST_VOXEL, SMALLEST_VOXEL
from rsanet.segment.tissue import LEAST_TISSUE, tissue_mask
from rsanet.segment.words import DataWarning, counted, sizes

# nibabel tells of what it mends in a header on stderr, without the file's name; what matters is told below.
nib.imageglobals.logger.setLevel(logging.CRITICAL)

SUFFIXES = (".nii.gz", ".nii")
ENDS = re.compile(r"\.(nii(\.gz)?|nrrd|nhdr|mha|mhd)$", re.IGNORECASE)

# What to do with a file of another format, by how its name ends.
CONVERTERS = {
    (".mgz", ".mgh"): "mri_convert of FreeSurfer",
    (".hdr", ".img", ".hdr.gz", ".img.gz"): "fslchfiletype NIFTI_GZ of FSL",
    (".mnc", ".mif"): "ITK-SNAP or MRtrix",
}

UNITS = {1: "metres", 3: "micrometres"}  # of lengths, by the code of NIfTI; 2 is mm, and 0 says nothing

ROUNDING = 2e-5  # of the largest value; the scaled integers of 16 bits and an interpolation leave less beside 0
LARGEST_STEP = 0.1  # of a slope whose rounding is taken back; a coarser one may mean what it says
FLOAT32 = 1e-6  # of the largest value: what a file that stores 32 bits leaves of a whole number
LEAST_SHARED, LEAST_COVERED = 0.5, 0.1  # of a field of view; see check_views

Volume: TypeAlias = str | os.PathLike | SpatialImage
"""A file, or an image of nibabel in memory."""


class MaskSource(ABC):
    """A lesion mask that is not simply a file, but knows how to read itself; ``str`` of it names it in messages."""

    @property
    @abstractmethod
    def files(self) -> tuple[Path, ...]:
        """The files that it is made of."""

    @abstractmethod
    def read(self) -> tuple[np.ndarray, nib.Nifti1Image]:
        """As `read_mask`."""

    @abstractmethod
    def ignored(self) -> np.ndarray | None:
        """Voxels ``(X, Y, Z)`` that count neither for nor against a prediction; None where there are none."""


def stem(path: Path) -> str:
    """The file name without ``.nii.gz``, or another end that says its format."""
    return ENDS.sub("", path.name)


def is_nifti(path: str | Path) -> bool:
    """Whether a file is NIfTI by its name, in letters of any case."""
    return str(path).lower().endswith(SUFFIXES)


def names_volume(name: str) -> bool:
    """Whether a name ends as that of a volume in any format."""
    return is_nifti(name) or name.lower().endswith(FORMATS)


def name_of(volume: Volume) -> str:
    """What messages call a volume: its file, or "the image"."""
    if isinstance(volume, SpatialImage):
        return str(volume.get_filename() or "the image")
    return str(volume)


def read_volume(volume: Volume) -> tuple[np.ndarray, nib.Nifti1Image]:
    """Reads a 3-D volume, or says in one sentence why it cannot serve.

    Args:
        volume: a file that ends in ``.nii`` or ``.nii.gz``, one that `formats` reads, or an image of nibabel, which
            stays as it is.

    Returns:
        The scaled voxels ``(X, Y, Z)`` as float32, NaN and infinities included, and the image for its affine and
        header.

    Raises:
        ValueError: the file is no 3-D volume of real numbers, or its voxels have sizes that no scan has.
        FileNotFoundError: there is no such file.
    """
    name = name_of(volume)
    if not isinstance(volume, SpatialImage):
        _check_file(Path(volume))
        if not is_nifti(volume):
            volume = read_other_format(Path(volume))
    try:
        image = volume if isinstance(volume, SpatialImage) else _load(Path(volume))
        voxels = np.asarray(image.dataobj)
        if not isinstance(volume, SpatialImage):
            _check_sum(Path(volume))
        if not isinstance(image, nib.Nifti1Image):
            image = nib.Nifti1Image.from_image(image)
    except MemoryError as error:
        shape = sizes(image.shape)
        raise ValueError(f"{name} does not fit into memory: by its header it has {shape} voxels.") from error
    except Exception as error:  # nibabel, gzip and zlib raise a dozen types for a damaged file
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"{name} cannot be read as NIfTI: it is damaged or something else ({reason}).") from error
    while voxels.ndim > 3 and voxels.shape[-1] == 1:
        voxels = voxels[..., 0]
    if voxels.size == 0:
        raise ValueError(
            f"{name} has no voxels ({sizes(voxels.shape)}): give a volume with an extent along every axis."
        )
    if voxels.ndim != 3:
        raise ValueError(
            f"{name} has {counted(voxels.ndim, 'dimension')} ({sizes(voxels.shape)}): give one 3-D volume per file."
        )
    if voxels.dtype.kind not in "biuf":
        raise ValueError(f"{name} stores {voxels.dtype} voxels: give a volume with one real number per voxel.")
    _check_affine(image.affine, name)
    _check_unit(image, name)
    _compare_forms(image, name)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, which the callers look for
        return voxels.astype(np.float32), image


def load_grid(volume: Volume) -> nib.Nifti1Image:
    """The grid and header of a volume that was read before; its voxels take no memory."""
    if isinstance(volume, SpatialImage):
        image = volume
    elif is_nifti(volume):
        image = open_nifti(Path(volume))
    else:
        image = read_other_format(Path(volume))
        image = nib.Nifti1Image(np.broadcast_to(np.uint8(0), image.shape), image.affine, image.header)
    return image if isinstance(image, nib.Nifti1Image) else nib.Nifti1Image.from_image(image)


def _check_file(path: Path) -> None:
    """Refuses what is no volume by its name or kind."""
    wanted = "give a file that ends in .nii or .nii.gz"
    try:
        if path.is_dir() and not is_series(path):
            raise ValueError(f"{path} is a folder: {wanted}, or the folder of one DICOM series.")
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: check the name of the file.")
    except PermissionError as error:  # of a folder above
        raise ValueError(f"{path} cannot be opened: permission denied.") from error
    if not is_nifti(path) and not is_other_format(path):
        tool = next((tool for ends, tool in CONVERTERS.items() if path.name.lower().endswith(ends)), None)
        if is_dicom(path):
            raise ValueError(
                f"{path} is not NIfTI: convert it to .nii.gz, for example with dcm2niix, or give the folder of its "
                "series."
            )
        raise ValueError(
            f"{path} is not NIfTI: {f'convert it to .nii.gz, for example with {tool}' if tool else wanted}."
        )
    if not path.is_file() and not path.is_dir():
        raise ValueError(f"{path} is no ordinary file: {wanted}.")
    if not os.access(path, os.R_OK):  # nibabel would say that the file is damaged
        raise ValueError(f"{path} cannot be opened: permission denied.")


def open_nifti(path: Path) -> SpatialImage:
    """The image of a file, its voxels not read yet. nibabel would look for ``.Nii.gz`` under ``.nii.gz``."""
    if (end := path.name[len(stem(path)) :]) in (end.lower(), end.upper()):
        return nib.load(path)
    with nib.openers.ImageOpener(path) as file:
        second = nib.Nifti2Header.may_contain_header(file.read(nib.Nifti2Header.sizeof_hdr))
    kind = nib.Nifti2Image if second else nib.Nifti1Image
    return kind.from_file_map({"image": nib.FileHolder(os.fspath(path))})


def _load(path: Path) -> SpatialImage:
    """The image of a file, its voxels not read yet; of sizes of 0, which nibabel makes 1 mm, none are made up."""
    image = open_nifti(path)
    if isinstance(image, nib.Nifti1Image) and image.header["sform_code"] == 0:
        with nib.openers.ImageOpener(path) as file:
            stored = type(image.header).from_fileobj(file, check=False)
        zero = np.append(stored["pixdim"][1:4] == 0, False)
        image.affine[:, zero] = 0
    return image


def _check_sum(path: Path) -> None:
    """Reads a compressed file to its end, where its checksum is: nibabel stops at the last voxel, before it."""
    if path.name.lower().endswith(".gz"):
        with gzip.open(path) as file:
            while file.read(2**20):
                pass


def _check_affine(affine: np.ndarray | None, name: str) -> None:
    """Refuses an affine that maps voxels to no plausible place, as where a header is spoilt or not in mm."""
    if affine is None:
        raise ValueError(f"{name} has no affine: give it one, which maps its voxels to mm.")
    spacing = voxel_sizes(affine)
    if not np.isfinite(affine).all():
        raise ValueError(f"{name} has an affine that is not finite: repair its header.")
    if not all(SMALLEST_VOXEL <= size <= LARGEST_VOXEL for size in spacing):
        raise ValueError(
            f"{name} has voxels of {' × '.join(f'{size:.3g}' for size in spacing)} mm: repair its header, which must "
            f"give sizes from {SMALLEST_VOXEL} to {LARGEST_VOXEL} mm."
        )
    if abs(np.linalg.det(affine[:3, :3])) < 1e-3 * spacing.prod():
        raise ValueError(f"{name} has an affine with axes that do not span space: repair its header.")


def _check_unit(image: nib.Nifti1Image, name: str) -> None:
    """Warns of a header whose sizes are those of a scan in mm, but which claims another unit."""
    unit = UNITS.get(int(image.header["xyzt_units"]) & 7)
    if unit:
        warnings.warn(
            f"{name} is in {unit} by its header, but has voxels of "
            f"{' × '.join(f'{size:.3g}' for size in voxel_sizes(image.affine))}: it is read as mm.",
            DataWarning,
            stacklevel=1,
        )


def _compare_forms(image: nib.Nifti1Image, name: str) -> None:
    """Warns where sform and qform claim to map to one space, by their code, and contradict each other.

    With different codes they differ rightly: one may map to the scanner and one to a template. The sform is used.
    """
    sform, qform = image.header["sform_code"], image.header["qform_code"]
    if sform != qform or sform == 0:
        return
    try:
        forms = image.header.get_sform(), image.header.get_qform()
    except nib.spatialimages.HeaderDataError:  # a qform that is none, and is not used
        return
    corners = lattice(image.shape[:3], 2)
    apart = np.linalg.norm(apply_affine(forms[0], corners) - apply_affine(forms[1], corners), axis=-1).max()
    if apart > voxel_sizes(forms[0]).max():
        warnings.warn(
            f"{name}: sform and qform put its voxels up to {apart:.3g} mm apart; the sform is used.",
            DataWarning,
            stacklevel=1,
        )


def read_image(volume: Volume) -> tuple[np.ndarray, nib.Nifti1Image]:
    """As `read_contrast`, without the tissue."""
    voxels, _, image = read_contrast(volume)
    return voxels, image


def read_contrast(volume: Volume) -> tuple[np.ndarray, np.ndarray, nib.Nifti1Image]:
    """Reads a contrast, which must show a head. NaN and infinities outside the head become 0, with a `DataWarning`.

    They are outside where no tissue touches them. Where they cover the faces of the volume, NaN is the mark of the
    background, as in SPM, and they are outside unless tissue encloses them.

    Returns:
        The voxels as `read_volume` gives them, every one finite, and exactly 0 what is 0 but for rounding; where they
        show tissue, as `tissue_mask`; and the image for its affine and header.

    Raises:
        ValueError: also where the image is the same everywhere, shows next to no tissue, or has voxels in the head
            that are NaN or infinite.
    """
    voxels, image = read_volume(volume)
    name = name_of(volume)
    bad = ~np.isfinite(voxels)
    count = int(np.count_nonzero(bad))
    known = voxels[~bad] if count else voxels
    if known.size == 0 or known.min() == known.max():
        value = f"{known.flat[0]:g}" if known.size else "NaN or infinite"
        also = ", NaN or infinite" if count and known.size else ""
        raise ValueError(f"{name} is empty: every voxel is {value}{also}.")
    voxels[np.abs(voxels) < ROUNDING * np.abs(known).max()] = 0
    shown = tissue_mask(voxels)
    if np.count_nonzero(shown) < LEAST_TISSUE * shown.size:
        raise ValueError(
            f"{name} shows no head: all but {counted(int(np.count_nonzero(shown)), 'voxel')} of {shown.size} are "
            "background."
        )
    if count:
        if _in_head(bad, shown):
            raise ValueError(
                f"{name} has {counted(count, 'voxel')} that {'is' if count == 1 else 'are'} NaN or infinite, within "
                "the head: replace them, for example by the mean of those around."
            )
        warnings.warn(
            f"{name}: {counted(count, 'voxel')} outside the head {'was' if count == 1 else 'were'} NaN or infinite, "
            "and read as 0.",
            DataWarning,
            stacklevel=1,  # one place, so that it is told once, whoever reads the file again
        )
        voxels[bad] = 0
    return voxels, shown, image


def _in_head(bad: np.ndarray, shown: np.ndarray) -> bool:
    """Whether bad voxels ``(X, Y, Z)`` are in a head, of which the others show the tissue."""
    faces = [bad.take(end, axis).ravel() for axis in range(3) for end in (0, -1)]
    if np.concatenate(faces).mean() > 0.9:
        return bool((ndimage.binary_fill_holes(~bad) & bad).any())
    return bool((ndimage.binary_dilation(shown, np.ones((3, 3, 3))) & bad).any())


def read_labels(volume: Volume) -> tuple[np.ndarray, nib.Nifti1Image]:
    """Reads a volume of whole numbers; what their storage left of others is rounded.

    Numbers that a header scales come back as far off as half a step of its slope.

    Returns:
        As `read_volume`; voxels that are no whole numbers stay as they are.
    """
    voxels, image = read_volume(volume)
    slope, offset = (float(getattr(image.dataobj, part, plain)) for part, plain in (("slope", 1), ("inter", 0)))
    scaled = (slope, offset) != (1, 0)
    if image.dataobj.dtype.kind in "biu" and not scaled:
        return voxels, image
    step = min(abs(slope), LARGEST_STEP) / 2 if scaled else 0
    largest = max(np.abs(voxels).max(initial=0, where=np.isfinite(voxels)), abs(offset))
    with np.errstate(invalid="ignore"):  # of infinities, which stay
        whole = np.rint(voxels)
        near = np.abs(voxels - whole) <= step + FLOAT32 * largest
    return np.where(near, whole, voxels), image


def read_mask(volume: Volume | MaskSource) -> tuple[np.ndarray, nib.Nifti1Image]:
    """Reads a binary mask: 0 and one other number, whichever it is.

    Returns:
        The voxels as booleans, and the image for its affine and header.

    Raises:
        ValueError: also where the voxels are anything else, NaN and infinities included.
    """
    if isinstance(volume, MaskSource):
        return volume.read()
    voxels, image = read_labels(volume)
    return as_mask(voxels, name_of(volume)), image


def read_mask_on(volume: Volume | MaskSource, like: nib.Nifti1Image, other: str, advice: str) -> np.ndarray:
    """Reads a binary mask in the order of another volume's voxels; see `align`.

    Args:
        volume: the mask.
        like: what was read of the other volume.
        other: its name.
        advice: what to do with a mask that lies elsewhere.
    """
    mask, image = read_mask(volume)
    return align(mask, image, like, name_of(volume), other, advice)


def as_mask(voxels: np.ndarray, name: str) -> np.ndarray:
    """The booleans of a binary mask: of an array with 0 and one other number, whichever it is.

    Args:
        voxels: (X, Y, Z), of any type of real numbers.
        name: of the mask, for messages.

    Raises:
        ValueError: it is something else, NaN and infinities included.
    """
    if isinstance(voxels, (list, tuple, SpatialImage)) or not hasattr(voxels, "__array__"):
        raise ValueError(f"{name} is a {type(voxels).__name__}: give an array (X, Y, Z) of 0 and 1.")
    try:
        voxels = np.asarray(voxels)
    except (TypeError, RuntimeError) as error:  # a tensor on another device, or one that has a gradient
        raise ValueError(f"{name} is no array of NumPy and cannot be made one: {error}") from error
    if voxels.ndim != 3:
        raise ValueError(f"{name} has shape {voxels.shape}: give a mask with three dimensions.")
    if voxels.dtype == bool:
        return voxels
    if voxels.dtype.kind not in "iuf":
        raise ValueError(f"{name} is an array of {voxels.dtype}: give one of 0 and 1.")
    mask = voxels != 0
    labels = np.unique(voxels[mask])
    if not np.isfinite(labels).all():
        bad = int(np.count_nonzero(~np.isfinite(voxels)))
        raise ValueError(
            f"{name} is not a binary mask: {counted(bad, 'voxel')} {'is' if bad == 1 else 'are'} NaN or infinite; "
            "make each 0 or 1."
        )
    if labels.size > 1 or (labels <= 0.5).any():
        some = ", ".join(f"{label:g}" for label in labels[:3])
        raise ValueError(
            f"{name} is not a binary mask: besides 0 it has {some}{', ...' if labels.size > 3 else ''}; "
            "cut a probability map at a threshold, or keep one label, first."
        )
    return mask


def share_inside(one: nib.Nifti1Image, other: nib.Nifti1Image) -> float:
    """The share of an image's field of view that another covers, from 0 to 1, by their headers; no voxel is read."""
    points = apply_affine(np.linalg.inv(other.affine) @ one.affine, lattice(one.shape[:3], 16))
    return float(((points >= -0.5) & (points <= np.array(other.shape[:3]) - 0.5)).all(-1).mean())


def check_views(first: Volume, one: nib.Nifti1Image, second: Volume, other: nib.Nifti1Image) -> None:
    """Refuses two contrasts of a subject that do not show the same part of space.

    One may be cropped to the brain, and then lies within the other; but a shift between headers leaves both half
    uncovered, and a thin slab leaves next to nothing of the other covered.

    Args:
        first: the contrast that gives the grid, for its name.
        one: what was read of it.
        second: another contrast, for its name.
        other: what was read of it.

    Raises:
        ValueError: the fields of view hardly overlap, by their headers.
    """
    covered = share_inside(one, other)
    if covered < LEAST_COVERED or max(covered, share_inside(other, one)) < LEAST_SHARED:
        raise ValueError(
            f"{name_of(second)} covers {100 * covered:.0f} % of the field of view of {name_of(first)} by their "
            "headers: register one to the other, or repair the headers."
        )
