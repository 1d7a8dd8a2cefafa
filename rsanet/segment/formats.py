"""Volumes in other formats than NIfTI, through SimpleITK (extra ``formats``): NRRD, MetaImage, and series of DICOM.

ITK's world runs to the left, the back and up (LPS), NIfTI's to the right, the front and up (RAS): what is read here has
the affine of NIfTI. A header may name another file for the voxels; it has to lie beside the header, whoever wrote it.
"""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from rsanet.extras import install
from rsanet.segment.words import counted

# Who reads each, so that the content of a file does not choose.
IMAGE_IOS = {".nrrd": "NrrdImageIO", ".nhdr": "NrrdImageIO", ".mha": "MetaImageIO", ".mhd": "MetaImageIO"}
FORMATS = tuple(IMAGE_IOS)
SLICES = (".dcm", ".ima")  # of DICOM, whose files need no such end

MOST_VOXELS = 2**31  # of a volume; a scan has a hundredth of it
LOOKED_AT = 5  # files of a folder that are looked at for whether it is a series

# Where the voxels are. Libraries differ on where a line of a header begins and the header ends, so these are looked for
# in all of a file.
DATA_FILE = {
    "NrrdImageIO": re.compile(rb"data\s?file\s*:\s*([^\r\n]*)", re.IGNORECASE),
    "MetaImageIO": re.compile(rb"ElementDataFile[\s=:]*([^\r\n]*)", re.IGNORECASE),
}
DESCRIPTION, POSITION, ORIENTATION = "0008|103e", "0020|0032", "0020|0037"  # tags of DICOM


def is_other_format(path: Path) -> bool:
    """Whether a path is a volume in one of these formats, by its name, or the folder of a DICOM series."""
    return path.name.lower().endswith(FORMATS) or is_series(path)


def is_series(folder: Path) -> bool:
    """Whether a folder holds files of DICOM, by those that come first."""
    if not folder.is_dir():
        return False
    try:
        files = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_file())
    except OSError:  # whoever may not look into it cannot mean it
        return False
    return any(path.name.lower().endswith(SLICES) or _has_magic(path) for path in files[:LOOKED_AT])


def _has_magic(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def read_other_format(path: Path) -> nib.Nifti1Image:
    """Reads a volume, with the affine of NIfTI.

    Args:
        path: a file, or the folder of a DICOM series.

    Raises:
        ValueError: SimpleITK is missing, or the volume cannot be read, is none, or its header names a file elsewhere.
    """
    itk = _itk(path)
    try:
        image = _read_series(itk, path) if path.is_dir() else _read_file(itk, path)
        voxels = itk.GetArrayFromImage(image).T
    except MemoryError as error:
        raise ValueError(f"{path} does not fit into memory.") from error
    except RuntimeError as error:  # ITK's only one
        reason = " ".join(str(error).split())
        reason = reason.rpartition("ERROR: ")[2] or reason
        raise ValueError(f"{path} cannot be read: it is damaged or something else ({reason[:200]}).") from error
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    affine = np.diag([-1, -1, 1, 1]) @ affine
    voxels = voxels.astype(np.float64) if voxels.dtype.kind in "iu" and voxels.dtype.itemsize > 4 else voxels
    found = nib.Nifti1Image(voxels, affine)
    found.set_sform(affine, 1)
    found.set_qform(affine, 1)
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


def _read_file(itk: Any, path: Path) -> Any:
    _check_data_file(path)
    reader = itk.ImageFileReader()
    reader.SetImageIO(IMAGE_IOS[path.suffix.lower()])
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    size = reader.GetSize()
    if reader.GetDimension() != 3 or reader.GetNumberOfComponents() != 1:
        raise ValueError(
            f"{path} has {counted(reader.GetDimension(), 'dimension')} and "
            f"{counted(reader.GetNumberOfComponents(), 'number')} per voxel: give one 3-D volume per file, with one "
            "number per voxel."
        )
    if np.prod([float(length) for length in size]) > MOST_VOXELS:
        raise ValueError(f"{path} has {'×'.join(map(str, size))} voxels by its header: repair it, no scan has so many.")
    return reader.Execute()


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


def _read_series(itk: Any, folder: Path) -> Any:
    reader = itk.ImageSeriesReader()
    series = reader.GetGDCMSeriesIDs(str(folder))
    if not series:
        raise ValueError(f"{folder} has no DICOM series: give a folder with the files of one.")
    files = {each: reader.GetGDCMSeriesFileNames(str(folder), each) for each in series}
    if len(series) > 1:
        names = [
            f"{_tags(itk, paths[0]).get(DESCRIPTION) or each}, {counted(len(paths), 'file')}"
            for each, paths in files.items()
        ]
        raise ValueError(
            f"{folder} has several DICOM series ({'; '.join(names)}): put the files of each into a folder of its own."
        )
    slices = files[series[0]]
    _check_places(itk, folder, slices)
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileNames(slices)
    image = reader.Execute()
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise ValueError(f"{folder} is a DICOM series of colours or of more than one volume: give one volume.")
    return image


def _check_places(itk: Any, folder: Path, slices: tuple[str, ...]) -> None:
    """Refuses slices that do not follow each other evenly: one is missing, or there is more than one volume."""
    tags = [_tags(itk, path) for path in slices]
    if len(slices) < 3 or not all(POSITION in each and ORIENTATION in each for each in tags):
        return
    along, down = np.array(tags[0][ORIENTATION].split("\\"), float).reshape(2, 3)
    places = [np.cross(along, down) @ np.array(each[POSITION].split("\\"), float) for each in tags]
    gaps = np.diff(np.sort(places))
    if gaps.min() < 0.01:
        raise ValueError(f"{folder} has several slices at one place: give the DICOM series of one volume.")
    if gaps.max() > 1.1 * np.median(gaps):
        raise ValueError(
            f"{folder} has slices {gaps.max():.3g} mm apart where others are {np.median(gaps):.3g} mm apart: a file of "
            "the DICOM series is missing."
        )


def _tags(itk: Any, path: str) -> dict[str, str]:
    reader = itk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(path)
    reader.ReadImageInformation()
    return {key: reader.GetMetaData(key).strip() for key in reader.GetMetaDataKeys()}
