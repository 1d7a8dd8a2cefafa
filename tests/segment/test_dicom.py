"""DICOM: every pixel at the place and with the value that the tags of its slice give, or one sentence why not.

The oracle is DICOM's own: a pixel lies at ImagePositionPatient, plus its column times the direction of a row, plus its
row times the direction of a column (PS3.3 C.7.6.2.1.1), and its value is the stored one times RescaleSlope, plus
RescaleIntercept.
"""

import re
import sys
import tempfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    BasicTextSRStorage,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
    MRImageStorage,
    RLELossless,
    generate_uid,
)
from segment.bright import segmenter, thresholded

from rsanet.segment.prediction import predict
from rsanet.segment.volumes import DataWarning, load_grid, read_volume

AXIAL, CORONAL, SAGITTAL = [1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, -1], [0, 1, 0, 0, 0, -1]
TURN, _ = np.linalg.qr(np.array([[0.98, 0.1, -0.05], [-0.12, 0.97, 0.2], [0.07, -0.2, 0.95]]))
OBLIQUE = (TURN * np.sign(np.diag(TURN)))[:, :2].T.ravel().tolist()
SPACING = [1.5, 1.25]  # from row to row comes first


def dataset(kind=MRImageStorage, **tags):
    found = Dataset()
    found.file_meta = FileMetaDataset()
    found.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    found.SOPClassUID = found.file_meta.MediaStorageSOPClassUID = kind
    found.SOPInstanceUID = found.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    found.Modality, found.StudyInstanceUID, found.SeriesInstanceUID = "MR", "1.2.3", "1.2.3.4"
    return with_tags(found, **tags)


def with_tags(found, **tags):
    for name, value in tags.items():
        setattr(found, name, value)
    return found


def sequence(**tags):
    return [with_tags(Dataset(), **tags)]


def with_pixels(found, pixels):
    found.Rows, found.Columns = pixels.shape[-2:]
    found.BitsAllocated = found.BitsStored = 8 * pixels.dtype.itemsize
    found.HighBit, found.PixelRepresentation = found.BitsStored - 1, int(pixels.dtype.kind == "i")
    found.SamplesPerPixel, found.PhotometricInterpretation = 1, "MONOCHROME2"
    found.PixelData = pixels.tobytes()
    return found


def decimals(values, digits=10):
    return [f"{value:.{digits}g}" for value in values]


def normal(orientation):
    return np.cross(orientation[:3], orientation[3:])


def places(number, orientation=AXIAL, step=3.0):
    return [np.array([-10, -20, 5]) + step * k * normal(orientation) for k in range(number)]


def stored(number, kind="<u2", seed=0, shape=(6, 8)):
    return np.random.default_rng(seed).integers(0, 100, (number, *shape)).astype(kind)


def write(path, found):
    path.parent.mkdir(parents=True, exist_ok=True)
    found.save_as(path, enforce_file_format=True)


def write_series(folder, pixels, where, orientation=AXIAL, each=None, names=None, **tags):
    """A file for each slice; ``each`` gives tags by the number of the slice."""
    for number, (picture, place) in enumerate(zip(pixels, where, strict=True)):
        found = with_pixels(dataset(InstanceNumber=number + 1), picture)
        with_tags(found, ImagePositionPatient=decimals(place), ImageOrientationPatient=decimals(orientation))
        with_tags(found, PixelSpacing=SPACING, SliceThickness="3")
        with_tags(found, **tags, **(each(number) if each else {}))
        write(folder / f"{names[number] if names else number:03}.dcm", found)
    return folder


def write_enhanced(folder, pixels, where, orientation=AXIAL, each=None, measures=(), **tags):
    """One file for all slices; ``each`` gives the further groups of tags of a frame by its number."""
    found = with_pixels(dataset(EnhancedMRImageStorage, InstanceNumber=1, NumberOfFrames=len(pixels)), pixels)
    found.SharedFunctionalGroupsSequence = sequence(
        PlaneOrientationSequence=sequence(ImageOrientationPatient=list(map(float, orientation))),
        PixelMeasuresSequence=sequence(PixelSpacing=SPACING, SliceThickness=3, **dict(measures)),
    )
    found.PerFrameFunctionalGroupsSequence = [
        with_tags(
            Dataset(),
            PlanePositionSequence=sequence(ImagePositionPatient=[round(float(part), 6) for part in place]),
            **(each(number) if each else {}),
        )
        for number, place in enumerate(where)
    ]
    write(folder / "all.dcm", with_tags(found, **tags))
    return folder


def assert_at(found, pixels, where, orientation=AXIAL, tolerance=1e-3, spacing=SPACING):
    """Every pixel of every slice is at its place in the volume."""
    voxels, image = found
    along, down = np.array(orientation[:3]) * spacing[1], np.array(orientation[3:]) * spacing[0]
    to_index = np.linalg.inv(image.affine)
    assert voxels.size == pixels.size
    rows, columns = np.indices(pixels.shape[1:])
    for picture, place in zip(pixels, where, strict=True):
        points = np.array(place, float) + columns[..., None] * along + rows[..., None] * down
        index = points * [-1, -1, 1] @ to_index[:3, :3].T + to_index[:3, 3]
        nearest = np.rint(index).astype(int)
        assert np.abs((index - nearest) @ image.affine[:3, :3].T).max() < tolerance, "mm"
        assert np.allclose(voxels[tuple(np.moveaxis(nearest, -1, 0))], picture, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "slopes", "intercepts"),
    [
        ("<u2", [1, 0.004, 0.004, 0.004], [0, 0, 0, 0]),
        ("<u2", [1, 1, 1, 1], [0, -500, -500, -500]),
        ("<u2", [0.004, 1, None, 1000], [0.5, 0, None, -4096]),
        ("<u2", ["", 1, "", 0.5], ["", -5, "", 0]),
        ("<i2", [1, 2, 3, 0.1], [0, 70000, -70000, 0]),
        ("u1", [1, 5, 0.5, 1], [0, -300, 0, 1000]),
        ("<u4", [1, 1, 0.25, 1], [0, -1, 0, 0]),
        ("<i4", [0.001, 1, 1, 1], [0, 0, -3, 0]),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_each_slice_is_scaled_by_its_own_slope_in_whatever_order(tmp_path, kind, slopes, intercepts, order):
    most = min(np.iinfo(kind).max, 2**24)
    pixels = (stored(4, "f8") / 100 * most).astype(kind)
    pixels[:, 0] = np.arange(8)
    pairs = list(zip(slopes, intercepts, strict=True))
    scaling = [{} if a is None else {"RescaleSlope": a, "RescaleIntercept": b} for a, b in pairs]
    series = write_series(tmp_path / "scan", pixels, places(4), each=scaling.__getitem__, names=range(4)[::order])
    wanted = [each * float(a or 1) + float(b or 0) for each, (a, b) in zip(pixels, pairs, strict=True)]
    found = read_volume(series)
    assert found[0].dtype == np.float32
    assert_at(found, np.array(wanted), places(4))


@pytest.mark.parametrize("write_as", [write_series, write_enhanced])
def test_scaling_for_a_vendor_or_for_quantities_is_not_applied(tmp_path, write_as):
    mapping = sequence(RealWorldValueSlope=0.5, RealWorldValueIntercept=3.0, RealWorldValueFirstValueMapped=0)
    pixels = stored(3)
    series = write_as(tmp_path, pixels, places(3), RealWorldValueMappingSequence=mapping)
    for path in series.iterdir():
        found = pydicom.dcmread(path)
        block = found.private_block(0x2005, "Philips MR Imaging DD 001", create=True)
        block.add_new(0x0D, "FL", 3.0)
        block.add_new(0x0E, "FL", 0.5)
        found.save_as(path)
    assert_at(read_volume(series), pixels, places(3))


@pytest.mark.parametrize("write_as", [write_series, write_enhanced])
def test_white_as_0_is_read_as_viewers_show_it_with_a_warning(tmp_path, recwarn, write_as):
    tags = {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12, "HighBit": 11}
    series = write_as(tmp_path / "scan", stored(3), places(3), **tags)
    assert_at(read_volume(series), 4095 - stored(3).astype(float), places(3))
    assert [str(each.message) for each in recwarn] == [
        f"{series} is stored with white as 0 (MONOCHROME1), and read as viewers show it, with white as the most."
    ]


@pytest.mark.parametrize("write_as", [write_series, write_enhanced])
@pytest.mark.parametrize("orientation", [AXIAL, CORONAL, SAGITTAL, OBLIQUE, [-1, 0, 0, 0, 1, 0], [0, 0, 1, 0, 1, 0]])
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4, 1, 3]])
def test_slices_lie_where_their_tags_put_them_in_whatever_order(tmp_path, write_as, orientation, order):
    where = [places(5, orientation, 3.3)[number] for number in order]
    series = write_as(tmp_path / "scan", stored(5), where, orientation)
    found = read_volume(series)
    assert_at(found, stored(5), where, orientation)
    assert np.allclose(load_grid(series).affine, found[1].affine)


def test_a_file_that_no_scanner_made_has_its_pixel_spacing_by_another_name(tmp_path):
    series = write_series(tmp_path, stored(3), places(3), NominalScannedPixelSpacing=SPACING)
    for path in series.iterdir():
        found = pydicom.dcmread(path)
        del found.PixelSpacing
        found.save_as(path)
    assert_at(read_volume(series), stored(3), places(3))


@pytest.mark.parametrize("digits", [6, 4, 3])
def test_tags_that_are_rounded_move_no_pixel_by_more_than_their_rounding(tmp_path, digits):
    where = places(40, OBLIQUE)
    rounded = [np.round(place, 2) for place in where]
    orientation = np.round(OBLIQUE, digits)
    series = write_series(tmp_path, stored(40), rounded, orientation, SpacingBetweenSlices=5, SliceThickness="2")
    assert_at(read_volume(series), stored(40), where, OBLIQUE, tolerance=0.02)


@pytest.mark.parametrize("write_as", [write_series, write_enhanced])
def test_one_slice_is_as_thick_as_it_says(tmp_path, write_as):
    more = {"SpacingBetweenSlices": 7}
    where = places(1, OBLIQUE)
    if write_as == write_series:
        series = write_series(tmp_path, stored(1), where, OBLIQUE, **more)
    else:
        series = write_enhanced(tmp_path, stored(1), where, OBLIQUE, measures=more)
    found = read_volume(series)
    assert found[0].shape == (8, 6, 1)
    assert np.allclose(found[1].header.get_zooms(), [1.25, 1.5, 3])
    assert_at(found, stored(1), where, OBLIQUE)
    third = np.array([-1, -1, 1]) * normal(OBLIQUE) * 3
    assert np.allclose(found[1].affine[:3, 2], third, atol=1e-4)


def compressed(path, way):
    """Compresses the pixels of a file, without loss."""
    found = pydicom.dcmread(path)
    if way == "RLE":
        found.compress(RLELossless)
    else:
        writer = SimpleITK.ImageFileWriter()
        writer.SetImageIO("GDCMImageIO")
        writer.UseCompressionOn()
        writer.SetCompressor(way)
        writer.SetFileName(str(path.with_suffix(".tmp.dcm")))
        writer.Execute(SimpleITK.GetImageFromArray(found.pixel_array))
        other = pydicom.dcmread(path.with_suffix(".tmp.dcm"))
        path.with_suffix(".tmp.dcm").unlink()
        found["PixelData"] = other["PixelData"]
        found.file_meta.TransferSyntaxUID = other.file_meta.TransferSyntaxUID
    found.save_as(path)


@pytest.mark.parametrize("way", [None, "RLE", "JPEG", "JPEG2000"])
@pytest.mark.parametrize("write_as", [write_series, write_enhanced])
def test_compressed_pixels_and_the_scaling_of_each_frame(tmp_path, monkeypatch, write_as, way):
    order, slopes, intercepts = [2, 0, 4, 1, 3], [1, 0.5, 2, 1, 0.001], [0, 0, -10, 5.5, 0]
    where = [places(5)[number] for number in order]
    scaling = [{"RescaleSlope": a, "RescaleIntercept": b} for a, b in zip(slopes, intercepts, strict=True)]
    if write_as == write_enhanced:
        scaling = [{"PixelValueTransformationSequence": sequence(**each, RescaleType="US")} for each in scaling]
    pixels = stored(5, shape=(16, 24))
    series = write_as(tmp_path / "scan", pixels, where, each=scaling.__getitem__)
    for path in series.iterdir() if way else ():
        compressed(path, way)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    wanted = pixels * np.array(slopes)[:, None, None] + np.array(intercepts)[:, None, None]
    assert_at(read_volume(series), wanted, where)
    assert not list((tmp_path / "temporary").iterdir())


def test_an_enhanced_file_with_a_group_for_each_frame_and_one_of_a_single_frame_each(tmp_path):
    def groups(number):
        return {
            "PlaneOrientationSequence": sequence(ImageOrientationPatient=list(map(float, SAGITTAL))),
            "PixelMeasuresSequence": sequence(PixelSpacing=[0.9, 0.8], SliceThickness=3),
            "FrameContentSequence": sequence(StackID="1", InStackPositionNumber=number + 1, TemporalPositionIndex=1),
        }

    where = places(4, SAGITTAL)
    found = read_volume(write_enhanced(tmp_path / "one", stored(4), where, AXIAL, groups))
    assert_at(found, stored(4), where, SAGITTAL, spacing=[0.9, 0.8])
    for number, place in enumerate(where):
        folder = write_enhanced(tmp_path / "each", stored(4)[[number]], [place], AXIAL, groups)
        (folder / "all.dcm").rename(folder / f"{number}")
    assert_at(read_volume(tmp_path / "each"), stored(4), where, SAGITTAL, spacing=[0.9, 0.8])


@pytest.mark.parametrize(
    ("group", "name", "values", "word"),
    [
        ("MREchoSequence", "EffectiveEchoTime", [20.0, 80.0], "echo time"),
        ("MRDiffusionSequence", "DiffusionBValue", [0.0, 1000.0, 2000.0], "b-value"),
        ("FrameContentSequence", "TemporalPositionIndex", [1, 2, 3, 4], "time point"),
        ("MRImageFrameTypeSequence", "ComplexImageComponent", ["MAGNITUDE", "PHASE"], "magnitude and phase"),
        ("FrameContentSequence", "StackID", ["1", "2"], "stack"),
    ],
)
@pytest.mark.parametrize("interleaved", [False, True])
def test_an_enhanced_file_of_several_volumes_is_refused_as_that(tmp_path, group, name, values, word, interleaved):
    count = len(values)
    where = np.repeat(places(5), count, 0) if interleaved else np.concatenate([places(5)] * count)
    which = [k % count if interleaved else k // 5 for k in range(5 * count)]
    series = write_enhanced(
        tmp_path / "scan",
        stored(5 * count),
        where,
        each=lambda number: {group: sequence(**{name: values[which[number]]})},
    )
    with pytest.raises(ValueError, match=rf"holds {count} volumes, .*{word}.*dcm2niix and give one") as error:
        read_volume(series)
    assert str(error.value).startswith(str(series))


def test_an_enhanced_localizer_or_stacks_apart_are_refused_as_that(tmp_path):
    def stack(number):
        return {"FrameContentSequence": sequence(StackID=str(number // 3))}

    apart = [*places(3), *(np.add(place, [0, 0, 40]) for place in places(3))]
    with pytest.raises(ValueError, match=r"holds 2 stacks of slices, not one: convert it with dcm2niix"):
        read_volume(write_enhanced(tmp_path / "apart", stored(6), apart, each=stack))

    def turned(number):
        three = [AXIAL, CORONAL, SAGITTAL][number // 3]
        return {"PlaneOrientationSequence": sequence(ImageOrientationPatient=list(map(float, three)))}

    with pytest.raises(ValueError, match=r"slices of more than one orientation, .*: convert it with dcm2niix"):
        read_volume(write_enhanced(tmp_path / "planes", stored(9), places(9), each=turned))


def sideways(each):
    return [np.add(place, each(k)) for k, place in enumerate(places(12))]


def test_a_tilt_as_small_as_that_of_rounding_is_read_at_its_places(tmp_path):
    where = sideways(lambda k: [0, 0.02 * k, 0])
    assert_at(read_volume(write_series(tmp_path, stored(12), where)), stored(12), where)


def only(number, **tags):
    return {"each": lambda k: tags if k == number else {}}


def gaps(*steps):
    return [np.array([0, 0, height]) for height in np.cumsum([0, *steps])]


# What is written as a series (where its slices lie, further tags), and what is said.
REFUSED = {
    "a stack that drifts": (
        {"where": sideways(lambda k: [0, 0.9 * k, 0])},
        r"is a tilted stack: each slice lies 0\.9 mm sideways of the one before, 9\.9 mm in all; straighten it",
    ),
    "a stack that drifts a little": (
        {"where": sideways(lambda k: [-0.1 * k, 0, 0])},
        r"is a tilted stack: each slice lies 0\.1 mm sideways .*, 1\.1 mm in all",
    ),
    "two slices that drift": ({"where": sideways(lambda k: [0, k, 0])[:2]}, r"is a tilted stack: each slice lies 1 mm"),
    "a slice that is shifted": (
        {"where": sideways(lambda k: [0, 2.0 * (k == 5), 0])},
        r"lie up to 1\.\d mm beside an even stack, so that no grid holds them",
    ),
    "a slice that is a little shifted": (
        {"where": sideways(lambda k: [0.2 * (k == 5), 0, 0])},
        r"lie up to 0\.1\d mm beside an even stack",
    ),
    "steps that grow": (
        {"where": gaps(*np.linspace(2.8, 3.2, 11))},
        r"slices up to 0\.\d+ mm above or below their places in an even stack: a file of the DICOM series is missing",
    ),
    "a stack that bends": (
        {"where": sideways(lambda k: [0.1 * k * k, 0, 0])},
        r"mm beside an even stack, so that no grid holds them",
    ),
    "a localizer": (
        only(4, ImageOrientationPatient=SAGITTAL),
        r"more than one orientation, 11 of one and 1 of another \(004\.dcm\): leave out .* localizer",
    ),
    "localizers": (
        {"each": lambda k: {"ImageOrientationPatient": CORONAL if k % 2 else SAGITTAL} if k > 7 else {}},
        r"more than one orientation, 8 of one and 4 of another \(008\.dcm, 009\.dcm, 010\.dcm, \.\.\.\)",
    ),
    "a slice that is turned by a degree": (
        only(0, ImageOrientationPatient=decimals([np.cos(0.017), np.sin(0.017), 0, -np.sin(0.017), np.cos(0.017), 0])),
        r"more than one orientation, 11 of one and 1 of another \(000\.dcm\)",
    ),
    "a slice of another spacing": (
        only(2, PixelSpacing=[1, 1]),
        r"more than one pixel spacing \(1 × 1 and 1\.25 × 1\.5 mm\), 11 of one and 1 of another \(002\.dcm\)",
    ),
    "a slice of another size": (
        only(11, Rows=8, Columns=6),
        r"more than one size \(6 × 8 and 8 × 6\), 11 of one and 1 of another \(011\.dcm\)",
    ),
    "a gap": (
        {"where": gaps(3, 3, 6, 3)},
        "slices 6 mm apart where others are 3 mm apart: a file of the DICOM series is missing",
    ),
    "steps of two sizes": ({"where": gaps(3, 3, 1.5, 3)}, r"slices 1\.5 mm apart where others are 3 mm apart"),
    "two echoes": (
        {"where": [*places(5), *places(5)], "each": lambda k: {"EchoTime": 20 if k < 5 else 80}},
        r"several slices at one place: it holds 2 volumes, which differ in echo time; convert it with dcm2niix",
    ),
    "three time points": (
        {"where": np.repeat(places(5), 3, 0), "each": lambda k: {"TemporalPositionIdentifier": k % 3 + 1}},
        r"several slices at one place: it holds 3 volumes, which differ in time point",
    ),
    "magnitude and phase": (
        {
            "where": [*places(5), *places(5)],
            "each": lambda k: {"ImageType": ["ORIGINAL", "PRIMARY", "M" if k < 5 else "P"]},
        },
        r"it holds 2 volumes, which differ in image type",
    ),
    "two volumes that hardly differ in place": (
        {"where": np.concatenate([places(5), np.add(places(5), [0, 0, 0.03])])},
        "several slices at one place: it holds 2 volumes;",
    ),
    "two slices at one place": ({"where": places(1) * 2}, "several slices at one place: it holds 2 volumes;"),
    "one slice more at a place": (
        {"where": [*places(5), places(5)[2]], "each": lambda k: {"AcquisitionNumber": 2 if k == 5 else 1}},
        "several slices at one place: it holds parts of 2 volumes, which differ in acquisition",
    ),
    "a copy": (
        {"where": [*places(5), places(5)[2]], "each": lambda k: {"SOPInstanceUID": f"1.2.3.{2 if k == 5 else k}"}},
        r"several slices at one place, which are copies of one \(002\.dcm, 005\.dcm\)",
    ),
    "no thickness": (
        {"where": places(1), "SliceThickness": None},
        "has a single slice that does not say how thick it is",
    ),
    "a thickness of 0": ({"where": places(1), "SliceThickness": 0}, "a single slice that does not say how thick it is"),
    "no position": ({"without": "ImagePositionPatient"}, r"does not say where its slices lie \(ImagePositionPatient\)"),
    "no orientation": ({"without": "ImageOrientationPatient"}, "has no ImageOrientationPatient, .* 6 numbers"),
    "no spacing": ({"without": "PixelSpacing"}, "has no PixelSpacing, which has to be 2 numbers"),
    "directions that are none": (only(0, ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "of no right angle: repair it"),
    "a spacing of 0": ({"PixelSpacing": [0, 1]}, "larger than 0"),
    "a slope of 0": (only(3, RescaleSlope=0, RescaleIntercept=5), "has a RescaleSlope of 0: repair it"),
    "old bits": ({"BitsStored": 12, "HighBit": 15}, "stores its 12 bits up to bit 15"),
    "colours": ({"PhotometricInterpretation": "RGB"}, "is a DICOM series in colour"),
    "a mosaic": (
        {"where": places(1), "ImageType": ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]},
        "is a mosaic of Siemens, .* convert it with dcm2niix",
    ),
    "many frames without groups": (
        {"where": places(1), "NumberOfFrames": 2},
        r"does not say where its slices lie \(ImagePositionPatient\): convert it with dcm2niix",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_even_stack_of_one_volume_is_refused_for_its_reason(tmp_path, capfd, recwarn, case):
    what, reason = REFUSED[case]
    what = dict(what)
    without, where = what.pop("without", None), what.pop("where", places(12))
    pixels = stored(len(where))
    if case == "colours":
        pixels = stored(len(where), "u1", shape=(6, 24))
        what.update(SamplesPerPixel=3, PlanarConfiguration=0, Columns=8)
    elif "NumberOfFrames" in what:
        pixels = stored(1, shape=(12, 8))
        what["Rows"] = 6
    series = write_series(tmp_path / "scan", pixels, where, **what)
    for path in series.iterdir() if without else ():
        found = pydicom.dcmread(path)
        delattr(found, without)
        found.save_as(path)
    capfd.readouterr()
    before = len(recwarn)
    with pytest.raises(ValueError, match=reason) as error:
        read_volume(series)
    said = str(error.value)
    assert said.startswith(str(series))
    assert said.endswith(".")
    assert "\n" not in said
    assert len(re.findall(r"\. [A-Z]", said)) == 0, "one sentence"
    assert capfd.readouterr() == ("", "")
    assert len(recwarn) == before


@pytest.mark.parametrize(("name", "kind"), [("FloatPixelData", "<f4"), ("DoubleFloatPixelData", "<f8")])
@pytest.mark.parametrize("write_as", [write_series, write_enhanced])
def test_pixels_that_are_floating_point_numbers_are_refused_as_that(tmp_path, write_as, name, kind):
    series = write_as(tmp_path / "scan", stored(3), places(3))
    for path in series.iterdir():
        found = pydicom.dcmread(path)
        setattr(found, name, np.frombuffer(found.PixelData, "<u2").astype(kind).tobytes())
        del found.PixelData
        found.save_as(path)
    with pytest.raises(ValueError, match=r"\.dcm stores its pixels as floating-point numbers .* convert the series"):
        read_volume(series)


@pytest.mark.parametrize(("thickness", "warned"), [(2, True), (3, False), (2.5, False), (20, False), (None, False)])
def test_slices_that_are_far_apart_for_their_thickness_are_told(tmp_path, recwarn, thickness, warned):
    where = places(5, step=3.5 if warned else 3)[:: 1 if warned else -1]
    where = places(5, step=1) if thickness == 20 else where
    series = write_series(tmp_path / "scan", stored(5), where, SliceThickness=thickness)
    assert_at(read_volume(series), stored(5), where)
    wanted = f"{series} has slices that are 2 mm thick and 3.5 mm apart: see that no file of the DICOM series"
    assert [str(each.message).startswith(wanted) for each in recwarn] == [True] * warned


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-40], lambda data: data[:300]])
@pytest.mark.parametrize("number", [0, 3, 4])
def test_a_damaged_slice_is_named_though_the_others_would_make_a_volume(tmp_path, damage, number):
    series = write_series(tmp_path / "scan", stored(5), places(5))
    path = series / f"00{number}.dcm"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"1 file of DICOM that cannot be read \(00{number}\.dcm\)"):
        read_volume(series)


@pytest.mark.parametrize("number", ["1.2.3.4", "1.2.3.5"])
def test_a_report_and_a_directory_beside_the_slices_are_left_out(tmp_path, number):
    series = write_series(tmp_path / "scan", stored(5), places(5))
    write(series / "report.dcm", with_tags(dataset(BasicTextSRStorage, SeriesInstanceUID=number), Modality="SR"))
    write(series / "DICOMDIR", dataset(MediaStorageDirectoryStorage))
    (series / "readme.txt").write_text("text")
    (series / ".hidden.dcm").write_text("text")
    write_series(series / "another", stored(5), places(5))
    assert_at(read_volume(series), stored(5), places(5))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda found: found.PerFrameFunctionalGroupsSequence.pop(), "has 5 frames and describes 4"),
        (lambda found: delattr(found, "PerFrameFunctionalGroupsSequence"), "does not say where its slices lie"),
        (
            lambda found: delattr(found.SharedFunctionalGroupsSequence[0], "PixelMeasuresSequence"),
            "has no PixelSpacing, which has to be 2 numbers",
        ),
        (
            lambda found: (
                found.SharedFunctionalGroupsSequence[0]
                .PixelMeasuresSequence[0]
                .add_new("SliceThickness", "LO", "thick")
            ),
            "damaged: its SliceThickness cannot be read|SliceThickness 'thick', which has to be 1 number",
        ),
        (lambda found: setattr(found, "PixelData", found.PixelData[:-50]), "has fewer pixels than its header says"),
    ],
)
def test_a_damaged_enhanced_file_is_refused_in_one_sentence(tmp_path, capfd, spoil, reason):
    series = write_enhanced(tmp_path / "scan", stored(5), places(5))
    found = pydicom.dcmread(series / "all.dcm")
    spoil(found)
    found.save_as(series / "all.dcm")
    with pytest.raises(ValueError, match=reason) as error:
        read_volume(series)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_what_is_told_while_another_thread_reads_an_enhanced_file_is_heard(tmp_path, monkeypatch, recwarn):
    series = write_enhanced(tmp_path / "scan", stored(5), places(5))
    reading, told = threading.Event(), threading.Event()
    read = pydicom.dcmread

    def wait(path):
        reading.set()
        assert told.wait(30)
        warnings.warn("of another thread", DataWarning, stacklevel=1)
        return read(path)

    monkeypatch.setattr(pydicom, "dcmread", wait)
    with ThreadPoolExecutor(1) as reader:
        found = reader.submit(read_volume, series)
        assert reading.wait(30)
        with warnings.catch_warnings():  # which ends while the file is read
            warnings.simplefilter("error")
        warnings.warn("of this thread", DataWarning, stacklevel=1)
        told.set()
        assert found.result()[0].shape == (8, 6, 5)
    assert [str(each.message) for each in recwarn] == ["of this thread", "of another thread"]


def test_the_mask_of_an_enhanced_file_lies_on_its_slices(tmp_path, phantoms):
    image = np.round(phantoms.make_subject(3)[0]["FLAIR"])
    order = np.random.default_rng(0).permutation(image.shape[2])
    slopes = 1 + np.arange(len(order))[:, None, None] % 3
    pixels = (image.T[order] // slopes).astype("<u2")

    def each(number):
        return {"PixelValueTransformationSequence": sequence(RescaleSlope=1 + number % 3, RescaleIntercept=0)}

    where = [places(len(order), OBLIQUE)[number] for number in order]
    scan = write_enhanced(tmp_path / "scan", pixels, where, OBLIQUE, each)
    predict(segmenter(("FLAIR",)), {"FLAIR": scan}, tmp_path / "mask.nii.gz")
    mask = nib.load(tmp_path / "mask.nii.gz")
    wanted = thresholded(nib.Nifti1Image((pixels * slopes).astype(np.float32), np.eye(4)))
    assert wanted.any()
    assert_at((np.asarray(mask.dataobj), mask), wanted, where, OBLIQUE)


def test_without_pydicom_an_enhanced_file_is_refused_with_the_way_and_a_series_is_read(tmp_path, monkeypatch):
    pixels = stored(5)
    classic = write_series(tmp_path / "classic", pixels, places(5))
    enhanced = write_enhanced(tmp_path / "enhanced", pixels, places(5))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert_at(read_volume(classic), pixels, places(5))
    with pytest.raises(ValueError, match=r'is enhanced DICOM, .* pip install "\.\[formats\]", .* dcm2niix\.$'):
        read_volume(enhanced)
