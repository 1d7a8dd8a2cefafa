"""A DICOM series: each slice where its own tags put it, with its own scaling.

SimpleITK (GDCM) decodes the pixels and reads the tags of files of one slice. The slices of an enhanced file, which
holds a whole volume, are described in nested tags that it does not show; pydicom reads those.
"""

import re
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from rsanet.extras import install
from rsanet.segment.words import DataWarning, counted

SLICES = (".dcm", ".ima")  # of DICOM, whose files need no such end
LOOKED_AT = 5  # files of a folder that are looked at for whether it is a series

ORTHOGONAL = 0.02  # of the two directions of a slice, which are rounded in its file
TURNED = 2e-3  # a change of a direction's part that is another orientation
SAME_PLACE = 0.05  # mm
UNEVEN = 0.1  # of the step from slice to slice
SPARSE = 1.5  # thicknesses from slice to slice; a gap between slices is a tenth to a third of one
MOST_SHIFT = 0.1  # mm that a slice may lie beside its place in the stack, which positions in tenths of a mm do
MOST_DRIFT, DRIFT_SHARE = 0.05, 0.01  # mm that a stack may drift sideways in all; or a share of its extent

# What the slices of two volumes at one place may differ in: where a file of one slice has it, and an enhanced one.
VOLUMES = {
    "echo time": ("0018|0081", "MREchoSequence", "EffectiveEchoTime"),
    "inversion time": ("0018|0082", "MRModifierSequence", "InversionTimes"),
    "b-value": ("0018|9087", "MRDiffusionSequence", "DiffusionBValue"),
    "time point": ("0020|0100", "FrameContentSequence", "TemporalPositionIndex"),
    "trigger time": ("0018|1060", "CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime"),
    "magnitude and phase": ("0008|9208", "MRImageFrameTypeSequence", "ComplexImageComponent"),
    "image type": ("0008|0008", "MRImageFrameTypeSequence", "FrameType"),
    "acquisition": ("0020|0012", "FrameContentSequence", "FrameAcquisitionNumber"),
    "stack": ("0020|9056", "FrameContentSequence", "StackID"),
}
DESCRIPTION, INSTANCE, IMAGE_TYPE = "0008|103e", "0008|0018", "0008|0008"
POSITION, ORIENTATION, SPACING, THICKNESS = "0020|0032", "0020|0037", "0028|0030", "0018|0050"
SCANNED_SPACING = "0018|2010"  # what a file has instead that no scanner made
FRAMES, ROWS, COLUMNS, SLOPE = "0028|0008", "0028|0010", "0028|0011", "0028|1053"
SAMPLES, COLOURS, BITS, HIGH_BIT = "0028|0002", "0028|0004", "0028|0101", "0028|0102"
KIND = re.compile(rb"\x02\x00\x02\x00UI..([\d.]+)", re.DOTALL)  # at the beginning of a file
MULTIFRAME = "1.2.840.10008.5.1.4.1.1.7.3"  # of words of grey, to which GDCM gives no scaling


@dataclass(frozen=True)
class Slice:
    """Where one slice lies, and what it is part of; lengths in mm, directions to the left, the back and up."""

    file: Path
    frame: int | None  # of an enhanced file
    size: tuple[int, int]  # columns, rows
    place: np.ndarray  # of the centre of the first pixel
    directions: np.ndarray  # rows of this array: of a row of pixels, and of a column
    spacing: tuple[float, float]  # along these
    thickness: float | None
    instance: str
    volume: dict[str, str] = field(default_factory=dict)  # by VOLUMES
    scaling: tuple[float, float] = (1.0, 0.0)  # slope and intercept, of an enhanced file
    inverted: bool = False  # by GDCM, where 0 is white


def is_series(folder: Path) -> bool:
    """Whether a folder holds files of DICOM, by those that come first."""
    if not folder.is_dir():
        return False
    try:
        files = _files(folder)
    except OSError:  # whoever may not look into it cannot mean it
        return False
    return any(is_dicom(path) for path in files[:LOOKED_AT])


def read_series(itk: Any, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads the one volume of a folder.

    Args:
        itk: SimpleITK.
        folder: with the files of a series.

    Returns:
        The voxels ``(X, Y, Z)`` as float32, and the affine ``(4, 4)`` to ITK's world, which runs to the left, the back
        and up.

    Raises:
        ValueError: it is no series of one volume whose slices follow each other evenly.
        RuntimeError: SimpleITK cannot read a file.
    """
    datasets = cache(_dataset)  # those of enhanced files, read once
    slices = [each for path in _series_files(itk, folder) for each in _slices(itk, folder, path, datasets)]
    _check_alike(folder, slices)
    if any(each.inverted for each in slices):
        warnings.warn(
            f"{folder} is stored with white as 0 (MONOCHROME1), and read as viewers show it, with white as the most.",
            DataWarning,
            stacklevel=1,
        )
    slices, affine = _stack(folder, slices)
    columns, rows = slices[0].size
    voxels = np.empty((len(slices), rows, columns), np.float32)
    stored: dict[Path, np.ndarray] = {}
    for number, each in enumerate(slices):
        if each.frame is None:
            voxels[number] = _pixels(itk, each.file, itk.sitkFloat32)[0]
            continue
        if each.file not in stored:
            stored[each.file] = _stored_pixels(itk, each.file, datasets(each.file))
        slope, intercept = each.scaling
        voxels[number] = stored[each.file][each.frame].astype(np.float64) * slope + intercept
    return voxels.T, affine


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_file())


def is_dicom(path: Path) -> bool:
    """Whether a file is of DICOM, by its name or its beginning."""
    if path.name.lower().endswith(SLICES):
        return True
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _series_files(itk: Any, folder: Path) -> list[Path]:
    """The files of the one series of a folder."""
    reader = itk.ImageSeriesReader()
    series = reader.GetGDCMSeriesIDs(str(folder))
    if not series:
        if path := next((path for path in _files(folder) if is_dicom(path) and _has_floats(path)), None):
            raise ValueError(
                f"{path} stores its pixels as floating-point numbers (FloatPixelData), which is not read: convert the "
                "series to .nii.gz."
            )
        raise ValueError(f"{folder} has no DICOM series that can be read: give a folder with the files of one.")
    files = {each: reader.GetGDCMSeriesFileNames(str(folder), each) for each in series}
    if len(series) > 1:
        names = [
            f"{_tags(itk, Path(paths[0])).get(DESCRIPTION) or each}, {counted(len(paths), 'file')}"
            for each, paths in files.items()
        ]
        raise ValueError(
            f"{folder} has several DICOM series ({'; '.join(names)}): put the files of each into a folder of its own."
        )
    paths = sorted(Path(path) for path in files[series[0]])
    _check_all_read(folder, paths)
    return paths


def _has_floats(path: Path) -> bool:
    """Whether a file has its pixels in FloatPixelData or DoubleFloatPixelData, which GDCM knows nothing of."""
    data = path.read_bytes()  # the tags in explicit VR
    return b"\xe0\x7f\x08\x00OF" in data or b"\xe0\x7f\x09\x00OD" in data


def _check_all_read(folder: Path, paths: list[Path]) -> None:
    """Refuses a folder of which GDCM left out a damaged slice, which would leave a volume that is cut off.

    It leaves out reports and what else is no image, too, and rightly.
    """
    kinds = {_kind(path) for path in paths} | {None}
    names = {path.name for path in paths}
    unread = [
        path.name for path in _files(folder) if path.name not in names and is_dicom(path) and _kind(path) in kinds
    ]
    if unread:
        raise ValueError(
            f"{folder} has {counted(len(unread), 'file')} of DICOM that cannot be read ({_some(unread)}): replace or "
            "remove what is damaged."
        )


def _kind(path: Path) -> bytes | None:
    """What a file of DICOM holds (MediaStorageSOPClassUID), None where its beginning does not say."""
    try:
        with path.open("rb") as file:
            found = KIND.search(file.read(1024))
    except OSError:
        return None
    return found[1] if found else None


def _slices(itk: Any, folder: Path, path: Path, datasets: Any) -> list[Slice]:
    """The slices of a file."""
    tags = _tags(itk, path)
    if ROWS not in tags or COLUMNS not in tags:
        raise ValueError(f"{path} is DICOM without an image, as a report: leave it out of the series.")
    if tags.get(SAMPLES, "1") != "1" or not tags.get(COLOURS, "MONOCHROME").startswith("MONOCHROME"):
        raise ValueError(f"{folder} is a DICOM series in colour: give a scan with one number per pixel.")
    if BITS in tags and HIGH_BIT in tags and int(tags[HIGH_BIT]) != int(tags[BITS]) - 1:  # which GDCM misreads
        raise ValueError(
            f"{path} stores its {tags[BITS]} bits up to bit {tags[HIGH_BIT]}, an old way that is not read: convert it "
            "with dcm2niix."
        )
    if "MOSAIC" in tags.get(IMAGE_TYPE, "").split("\\"):
        raise ValueError(f"{path} is a mosaic of Siemens, with many slices in one picture: convert it with dcm2niix.")
    size = int(tags[COLUMNS]), int(tags[ROWS])
    inverted = tags.get(COLOURS) == "MONOCHROME1"
    count = int(_numbers(tags.get(FRAMES) or "1", 1, path, "NumberOfFrames")[0])
    if POSITION not in tags or count > 1:
        slices = _frames(path, size, count, datasets(path))
        return [replace(each, inverted=inverted) for each in slices]
    if tags.get(SLOPE) and _numbers(tags[SLOPE], 1, path, "RescaleSlope")[0] == 0:
        raise ValueError(f"{path} has a RescaleSlope of 0: repair it, no scan is scaled by that.")
    volume = {name: tags[tag] for name, (tag, *_) in VOLUMES.items() if tag in tags}
    spacing = SPACING if SPACING in tags else SCANNED_SPACING
    where = [tags.get(tag, "") for tag in (POSITION, ORIENTATION, spacing, THICKNESS)]
    return [replace(_slice(path, None, size, where, tags.get(INSTANCE, ""), volume), inverted=inverted)]


def _frames(path: Path, size: tuple[int, int], count: int, dataset: Any) -> list[Slice]:
    """The slices of an enhanced file, by the groups of tags that all share or that each has."""
    frames = dataset.get("PerFrameFunctionalGroupsSequence") or []
    if not frames:
        advice = "convert it with dcm2niix" if count > 1 else "export the series again from the scanner"
        raise ValueError(f"{path} does not say where its slices lie (ImagePositionPatient): {advice}.")
    if len(frames) != count:
        raise ValueError(f"{path} is damaged: it has {counted(count, 'frame')} and describes {len(frames)}.")
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [{}])[0]
    slices = []
    for number, frame in enumerate(frames):
        value = partial(_value, path, frame, shared)
        where = [
            value("PlanePositionSequence", "ImagePositionPatient"),
            value("PlaneOrientationSequence", "ImageOrientationPatient"),
            value("PixelMeasuresSequence", "PixelSpacing"),
            value("PixelMeasuresSequence", "SliceThickness"),
        ]
        scaling = [value("PixelValueTransformationSequence", name) for name in ("RescaleSlope", "RescaleIntercept")]
        slope = _numbers(scaling[0] or "1", 1, path, "RescaleSlope")[0]
        intercept = _numbers(scaling[1] or "0", 1, path, "RescaleIntercept")[0]
        if slope == 0:
            raise ValueError(f"{path} has a RescaleSlope of 0: repair it, no scan is scaled by that.")
        volume = {name: found for name, place in VOLUMES.items() if (found := value(*place[1:]))}
        slices.append(_slice(path, number, size, where, f"{path} {number}", volume, (slope, intercept)))
    return slices


def _value(path: Path, own: Any, shared: Any, group: str, name: str) -> str:
    """A value of a frame as a file of one slice has it, from its own groups or those that all share, or nothing."""
    try:
        items = own.get(group) or shared.get(group) or [{}]
        found = items[0].get(name)
        return "" if found is None else "\\".join(map(str, np.atleast_1d(found).tolist()))
    except Exception as error:  # pydicom decodes a value when it is asked for
        raise ValueError(f"{path} is damaged: its {name} cannot be read.") from error


def _slice(
    path: Path,
    frame: int | None,
    size: tuple[int, int],
    where: list[str],
    instance: str,
    volume: dict[str, str],
    scaling: tuple[float, float] = (1.0, 0.0),
) -> Slice:
    position, orientation, spacing, thickness = where
    place = _numbers(position, 3, path, "ImagePositionPatient")
    directions = _numbers(orientation, 6, path, "ImageOrientationPatient").reshape(2, 3)
    if np.abs(directions @ directions.T - np.eye(2)).max() > ORTHOGONAL:
        raise ValueError(f"{path} has an ImageOrientationPatient ({orientation}) of no right angle: repair it.")
    left, _, right = np.linalg.svd(directions, full_matrices=False)
    down, along = _numbers(spacing, 2, path, "PixelSpacing")  # from row to row comes first
    if min(down, along) <= 0:
        raise ValueError(f"{path} has a PixelSpacing of {spacing} mm: repair it, it is larger than 0.")
    thick = _numbers(thickness, 1, path, "SliceThickness")[0] if thickness else 0
    return Slice(
        path, frame, size, place, left @ right, (along, down), thick if thick > 0 else None, instance, volume, scaling
    )


def _numbers(text: str, count: int, path: Path, name: str) -> np.ndarray:
    try:
        found = np.array([float(part) for part in text.split("\\")] if text else [], float)
    except ValueError:
        found = np.array([])
    if len(found) != count or not np.isfinite(found).all():
        reason = f"has {name} {text!r}" if text else f"has no {name}"
        raise ValueError(
            f"{path} {reason}, which has to be {counted(count, 'number')}: export the series again from the scanner."
        )
    return found


def _check_alike(folder: Path, slices: list[Slice]) -> None:
    """Refuses slices of more than one orientation, size or pixel spacing, with the names of the fewer."""
    for what, values, tolerance, unit in (
        ("orientation", [each.directions.ravel() for each in slices], TURNED, ""),
        ("size", [each.size for each in slices], 0, ""),
        ("pixel spacing", [each.spacing for each in slices], 1e-3, " mm"),
    ):
        kinds = _kinds(values, tolerance)
        if len(set(kinds)) == 1:
            continue
        most = Counter(kinds).most_common(1)[0][0]
        others = [each for each, kind in zip(slices, kinds, strict=True) if kind != most]
        found = [" × ".join(f"{number:g}" for number in kind) for kind in sorted(set(kinds))]
        told = "" if what == "orientation" else f" ({' and '.join(found)}{unit})"
        names = f" ({_some(sorted(each.file.name for each in others))})"
        advice = "leave out what is no part of the volume, as a localizer"
        if all(each.frame is not None for each in others):
            names, advice = "", "convert it with dcm2niix and give one volume"
        raise ValueError(
            f"{folder} has slices of more than one {what}{told}, {len(slices) - len(others)} of one and {len(others)} "
            f"of another{names}: {advice}."
        )


def _kinds(values: list[Any], tolerance: float) -> list[tuple[float, ...]]:
    """For each value the first one that it equals within a tolerance."""
    firsts: list[np.ndarray] = []
    found = []
    for value in map(np.asarray, values):
        first = next((each for each in firsts if np.abs(each - value).max() <= tolerance), None)
        if first is None:
            firsts.append(value)
            first = value
        found.append(tuple(first.tolist()))
    return found


def _stack(folder: Path, slices: list[Slice]) -> tuple[list[Slice], np.ndarray]:
    """The slices in the order of space, and the affine that their places make, which have to be even steps."""
    along, down = np.mean([each.directions for each in slices], axis=0)
    normal = np.cross(along, down)
    heights = np.array([normal @ each.place for each in slices])
    order = np.argsort(heights, kind="stable")
    slices, heights = [slices[number] for number in order], heights[order]
    places = np.array([each.place for each in slices])
    if len(slices) == 1:
        if slices[0].thickness is None:
            raise ValueError(
                f"{folder} has a single slice that does not say how thick it is (SliceThickness): give all of the "
                "series."
            )
        step, origin = normal * slices[0].thickness, places[0]
    else:
        _check_steps(folder, slices, heights)
        numbers = np.arange(len(slices)) - (len(slices) - 1) / 2
        step = numbers @ places / (numbers @ numbers)
        origin = places.mean(0) + numbers[0] * step
        thickness, apart = slices[0].thickness, float(np.linalg.norm(step))
        if thickness and apart > SPARSE * thickness:
            warnings.warn(
                f"{folder} has slices that are {thickness:.3g} mm thick and {apart:.3g} mm apart: see that no file of "
                "the DICOM series is missing between them.",
                DataWarning,
                stacklevel=1,
            )
        _check_drift(folder, normal, step, places - origin - np.outer(numbers - numbers[0], step))
    affine = np.eye(4)
    affine[:3, :3] = np.stack([along * slices[0].spacing[0], down * slices[0].spacing[1], step], 1)
    affine[:3, 3] = origin
    return slices, affine


def _check_steps(folder: Path, slices: list[Slice], heights: np.ndarray) -> None:
    """Refuses slices, in the order of space, that do not follow each other evenly along their normal."""
    gaps = np.diff(heights)
    starts = np.append(True, gaps > SAME_PLACE)
    if not starts.all():
        _refuse_volumes(folder, slices, np.cumsum(starts) - 1)
    step = np.median(gaps)
    odd = gaps[np.argmax(np.abs(gaps - step))]
    if abs(odd - step) > max(UNEVEN * step, MOST_SHIFT):
        stacks = {each.volume.get("stack") for each in slices}
        if len(stacks) > 1:
            raise ValueError(
                f"{folder} holds {len(stacks)} stacks of slices, not one: convert it with dcm2niix and give one."
            )
        raise ValueError(
            f"{folder} has slices {odd:.3g} mm apart where others are {step:.3g} mm apart: a file of the DICOM series "
            "is missing, or its slices are not evenly spaced."
        )


def _refuse_volumes(folder: Path, slices: list[Slice], places: np.ndarray) -> None:
    """Refuses slices of which several lie at one place.

    Args:
        folder: the series.
        slices: in the order of space.
        places: the number of the place of each.
    """
    groups = [[slices[number] for number in np.flatnonzero(places == place)] for place in range(places[-1] + 1)]
    several = [group for group in groups if len(group) > 1]
    if all(len({each.instance for each in group}) == 1 for group in several):
        names = _some([each.file.name for each in several[0]])
        raise ValueError(
            f"{folder} has several slices at one place, which are copies of one ({names}): leave one file of each."
        )
    volumes = max(map(len, groups))
    differ = [name for name in VOLUMES if any(len({each.volume.get(name) for each in group}) > 1 for group in several)]
    by = f", which differ in {' and '.join(differ[:2])}" if differ else ""
    holds = f"holds {volumes} volumes" if len(several) == len(groups) else f"holds parts of {volumes} volumes"
    raise ValueError(
        f"{folder} has several slices at one place: it {holds}{by}; convert it with dcm2niix and give one."
    )


def _check_drift(folder: Path, normal: np.ndarray, step: np.ndarray, beside: np.ndarray) -> None:
    """Refuses a stack whose slices move within their plane, and one whose slices do so unevenly.

    Args:
        folder: the series.
        normal: of the slices.
        step: from slice to slice.
        beside: from the place of each slice in an even stack to its own, ``(slices, 3)``.
    """
    advice = "straighten it, for example with 3D Slicer, and give that"
    height = normal @ step
    above = beside @ normal
    off = np.linalg.norm(beside - np.outer(above, normal), axis=1).max()
    if off > MOST_SHIFT:
        raise ValueError(
            f"{folder} has slices that lie up to {off:.2g} mm beside an even stack, so that no grid holds them: "
            f"{advice}."
        )
    if np.abs(above).max() > max(UNEVEN * height, MOST_SHIFT):
        raise ValueError(
            f"{folder} has slices up to {np.abs(above).max():.2g} mm above or below their places in an even stack: a "
            "file of the DICOM series is missing, or its slices are not evenly spaced."
        )
    sideways = np.linalg.norm(step - normal * height)
    total = (len(beside) - 1) * sideways
    if total > max(MOST_DRIFT, DRIFT_SHARE * (len(beside) - 1) * height):
        raise ValueError(
            f"{folder} is a tilted stack: each slice lies {sideways:.2g} mm sideways of the one before, {total:.2g} mm "
            f"in all; {advice}."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _tags(itk: Any, path: Path) -> dict[str, str]:
    reader = itk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return {key: reader.GetMetaData(key).strip(" \0") for key in reader.GetMetaDataKeys()}


def _pixels(itk: Any, path: Path, kind: int) -> np.ndarray:
    """The pixels ``(frames, rows, columns)`` of a file, scaled as it says."""
    reader = itk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    reader.SetOutputPixelType(kind)  # each slice may have a type of its own, by its scaling
    voxels = itk.GetArrayFromImage(reader.Execute())
    return voxels.reshape(-1, *voxels.shape[-2:])


def _dataset(path: Path) -> Any:
    """All of an enhanced file."""
    try:
        pydicom = import_module("pydicom")
    except ImportError as error:
        raise ValueError(
            f"{path} is enhanced DICOM, of many slices: to read it as it is, {install('formats')}, which brings "
            "pydicom; or convert it to .nii.gz, for example with dcm2niix."
        ) from error
    # About values that are not used or are refused here. A filter for a while would be one for all threads, and a case
    # is read while another one is computed, whose warnings are to be heard.
    warnings.filterwarnings("ignore", module=r"pydicom\.")
    try:
        return pydicom.dcmread(path)
    except Exception as error:  # as many types as there are damages
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:200].rstrip(".")
    return ValueError(f"{path} cannot be read: it is damaged or something else ({reason}).")


def _stored_pixels(itk: Any, path: Path, dataset: Any) -> np.ndarray:
    """The pixels ``(frames, rows, columns)`` of an enhanced file as they are stored.

    SimpleITK scales all frames by the first one's slope, so it gets a copy of the file that has none.
    """
    bits = dataset.Rows * dataset.Columns * int(dataset.get("NumberOfFrames") or 1) * dataset.BitsAllocated
    pixels = dataset.get("PixelData")
    if pixels is not None and not dataset.file_meta.TransferSyntaxUID.is_encapsulated and 8 * len(pixels) < bits:
        raise ValueError(f"{path} is damaged: it has fewer pixels than its header says.")
    dataset = dataset.copy()
    for name in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        if name in dataset:
            del dataset[name]
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = MULTIFRAME
    with TemporaryDirectory() as folder:
        plain = Path(folder) / "frames.dcm"
        try:
            dataset.save_as(plain, enforce_file_format=True)
        except Exception as error:  # also where the disk is full
            raise _unreadable(path, error) from error
        return _pixels(itk, plain, itk.sitkFloat64)
