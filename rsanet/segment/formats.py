"""Volumes in other formats than NIfTI, through SimpleITK (extra ``formats``): NRRD, MetaImage, and series of DICOM.

ITK's world runs to the left, the back and up (LPS), NIfTI's to the right, the front and up (RAS): what is read here has
the affine of NIfTI. A header may name another file for the voxels; it has to lie beside the header, whoever wrote it.
"""

import re
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from rsanet.extras import install
from rsanet.segment.dicom import is_series, read_series
from rsanet.segment.words import DataWarning, counted

# Who reads each, so that the content of a file does not choose.
IMAGE_IOS = {".nrrd": "NrrdImageIO", ".nhdr": "NrrdImageIO", ".mha": "MetaImageIO", ".mhd": "MetaImageIO"}
FORMATS = tuple(IMAGE_IOS)
MILLIMETRES = {"mm", "millimeter", "millimeters", "millimetre", "millimetres", "", "???"}  # of a header

# The spaces of NRRD whose axes run through a patient in a known way; ITK takes any other for LPS.
SPACES = {
    *("left-posterior-superior", "right-anterior-superior", "left-anterior-superior"),
    *("lps", "ras", "las", "lpst", "rast", "last"),  # with time, too
}

SHEARED = 0.1  # mm that a corner lies off without the shear
MOST_VOXELS = 2**31  # of a volume; a scan has a hundredth of it

# Where the voxels are. Libraries differ on where a line of a header begins and the header ends, so these are looked for
# in all of a file.
DATA_FILE = {
    "NrrdImageIO": re.compile(rb"data\s?file\s*:\s*([^\r\n]*)", re.IGNORECASE),
    "MetaImageIO": re.compile(rb"ElementDataFile[\s=:]*([^\r\n]*)", re.IGNORECASE),
}


def is_other_format(path: Path) -> bool:
    """Whether a path is a volume in one of these formats, by its name, or the folder of a DICOM series."""
    return path.name.lower().endswith(FORMATS) or is_series(path)


def read_other_format(path: Path) -> nib.Nifti1Image:
    """Reads a volume, with the affine of NIfTI.

    Args:
        path: a file, or the folder of a DICOM series.

    Raises:
        ValueError: SimpleITK is missing, or the volume cannot be read, is none, or its header names a file elsewhere.
    """
    itk = _itk(path)
    try:
        voxels, affine = read_series(itk, path) if path.is_dir() else _read_file(itk, path)
    except MemoryError as error:
        raise ValueError(f"{path} does not fit into memory.") from error
    except RuntimeError as error:  # ITK's only one
        reason = " ".join(str(error).split())
        reason = re.sub(
            r"^Exception thrown in .*?:\d+ \(\): |\w+\(0x[0-9a-f]+\): ", "", reason.rpartition("ERROR: ")[2] or reason
        ).rstrip(".")
        raise ValueError(f"{path} cannot be read: it is damaged or something else ({reason[:200]}).") from error
    affine = np.diag([-1, -1, 1, 1]) @ affine
    voxels = voxels.astype(np.float64) if voxels.dtype.kind in "iu" and voxels.dtype.itemsize > 4 else voxels
    found = nib.Nifti1Image(voxels, affine)
    found.set_sform(affine, 1)
    found.set_qform(affine, 1)
    if (np.abs(found.get_qform() - affine) @ [*voxels.shape, 1]).max() > SHEARED:  # which a qform cannot hold
        found.set_qform(None, 0)
    found.header.set_xyzt_units("mm")
    return found


def _itk(path: Path) -> Any:
    try:
        itk = import_module("SimpleITK")
    except ImportError as error:
        raise ValueError(
            f"{path} is not NIfTI: to read it as it is, {install('formats')}, which brings SimpleITK; or "
            f"convert it to .nii.gz, for example with {'dcm2niix' if path.is_dir() else 'ITK-SNAP'}."
        ) from error
    itk.ProcessObject.SetGlobalWarningDisplay(False)  # what matters is told below
    return itk


def _read_file(itk: Any, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The voxels of a file, and their affine to ITK's world."""
    _check_data_file(path)
    reader = itk.ImageFileReader()
    reader.SetImageIO(IMAGE_IOS[path.suffix.lower()])
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    size = reader.GetSize()
    if reader.GetDimension() < 3 or set(size[3:]) - {1} or reader.GetNumberOfComponents() != 1:
        raise ValueError(
            f"{path} has {counted(reader.GetDimension(), 'dimension')} and "
            f"{counted(reader.GetNumberOfComponents(), 'number')} per voxel: give one 3-D volume per file, with one "
            "number per voxel."
        )
    if np.prod([float(length) for length in size]) > MOST_VOXELS:
        raise ValueError(f"{path} has {'×'.join(map(str, size))} voxels by its header: repair it, no scan has so many.")
    fields = _fields(path)
    _check_lengths(path, fields)
    _check_space(path, fields)
    slope, offset = _scaling(path, fields)
    image = reader.Execute()
    affine = np.eye(4)
    directions = np.reshape(image.GetDirection(), (len(size), len(size)))[:3, :3]
    affine[:3, :3] = directions * image.GetSpacing()[:3]
    affine[:3, 3] = image.GetOrigin()[:3]
    voxels = itk.GetArrayFromImage(image).T.reshape(size[:3])
    return voxels if (slope, offset) == (1, 0) else voxels.astype(np.float64) * slope + offset, affine


def _check_data_file(path: Path) -> None:
    """Refuses a header whose voxels are in a file that does not lie beside it."""
    kind = IMAGE_IOS[path.suffix.lower()]
    named = [name.decode("utf-8", "replace").strip() for name in DATA_FILE[kind].findall(path.read_bytes())]
    if kind == "MetaImageIO" and not named:
        raise ValueError(f"{path} cannot be read: its header names no ElementDataFile.")
    for name in named:
        if kind == "MetaImageIO" and name.upper() == "LOCAL":
            continue
        if not name or re.search(r"[/\\:%]|^\.\.?$|^LIST\b", name):
            raise ValueError(
                f"{path} has its voxels in {name!r} by its header: give a single file beside it, without a folder in "
                "its name."
            )
        if not (path.parent / name).is_file():
            raise ValueError(f"{path} has its voxels in {name}, which does not lie beside it: put it there.")


def _fields(path: Path) -> dict[str, str]:
    """What a header says, by the names of its fields in small letters."""
    data = path.read_bytes()
    if IMAGE_IOS[path.suffix.lower()] == "MetaImageIO":
        header, line = data.partition(b"ElementDataFile")[0], r"^\s*(\w+)\s*[=:]\s*(.*?)\s*$"
    else:
        header, line = re.split(rb"\r?\n\r?\n", data, maxsplit=1)[0], r"^([\w ]+):=?\s*(.*?)\s*$"
    return {name.lower(): value for name, value in re.findall(line, header.decode("latin-1"), re.MULTILINE)}


def _check_lengths(path: Path, fields: dict[str, str]) -> None:
    """Refuses a header with lengths in another unit than mm, and warns of one that lacks any: ITK reads 1 mm."""
    units = [*re.findall(r'"([^"]*)"', fields.get("space units", "")), fields.get("distanceunits", "")]
    others = {unit.strip().strip("'") for unit in units} - MILLIMETRES
    if others:
        raise ValueError(f"{path} is in {' and '.join(sorted(others))} by its header: give it in mm.")
    names = ("space directions", "spacings", "elementspacing", "elementsize")
    lengths = re.findall(r"\([^)]*\)|\S+", next((fields[name] for name in names if name in fields), ""))
    if len([length for length in lengths if not re.search("none|nan", length, re.IGNORECASE)]) < 3:
        warnings.warn(
            f"{path} does not give the size of its voxels along every axis, and is read as 1 mm where it does not: "
            "repair its header.",
            DataWarning,
            stacklevel=1,
        )


def _check_space(path: Path, fields: dict[str, str]) -> None:
    """Warns of a header of NRRD that gives directions, but not in a space that says where left and right are."""
    if "space directions" in fields and fields.get("space", "").lower().removesuffix("-time") not in SPACES:
        named = fields.get("space", "no space")
        warnings.warn(
            f"{path} does not say how the axes of its space run through the patient ({named}), and is read "
            "as LPS: give its header the right space.",
            DataWarning,
            stacklevel=1,
        )


def _scaling(path: Path, fields: dict[str, str]) -> tuple[float, float]:
    """The slope and the offset of the numbers of a MetaImage, which ITK leaves out."""
    names = ("ElementToIntensityFunctionSlope", "ElementToIntensityFunctionOffset")
    try:
        slope, offset = (float(fields.get(name.lower(), default)) for name, default in zip(names, (1, 0), strict=True))
    except ValueError:
        slope, offset = 0.0, 0.0
    if slope == 0 or not np.isfinite([slope, offset]).all():
        raise ValueError(f"{path} has no numbers, or 0, for {names[0]} and {names[1]}: repair its header.")
    return slope, offset
