"""Other formats than NIfTI: the same voxels at the same places, and nothing that a header has no business to name."""

import locale
import re
import shutil
import sys

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from segment.bright import segmenter, thresholded

from rsanet.segment.cohort import predict_cohort
from rsanet.segment.data import common_spacing
from rsanet.segment.datasets import find_cases, list_cases
from rsanet.segment.evaluation import evaluate
from rsanet.segment.prediction import predict
from rsanet.segment.volumes import read_image, read_mask, read_volume, same_grid

FILES = ("x.nrrd", "x.nhdr", "x.mha", "x.mhd")


def itk_image(voxels, affine):
    """An image of ITK at the place of a NIfTI one: ITK's first two axes of the world run the other way."""
    affine = np.diag([-1, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(voxels.T))
    image.SetSpacing(spacing.tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    return image


def oblique(codes="RAS"):
    """A rotated, anisotropic affine whose axes run as the codes say."""
    turn, _ = np.linalg.qr(np.array([[0.98, 0.1, -0.05], [-0.12, 0.97, 0.2], [0.07, -0.2, 0.95]]))
    affine = np.eye(4)
    affine[:3, :3] = turn * np.sign(np.diag(turn)) @ np.diag([0.9, 1.1, 3.0])
    affine[:3, 3] = [-80, 33, 12]
    image = nib.Nifti1Image(np.zeros((26, 30, 24), np.uint8), affine)
    return image.as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(codes))
    ).affine


def write_series(folder, voxels, affine, series="1", name="FLAIR 3D", skip=()):
    """A DICOM series of axial slices, a file each, in an order of names that is not that of space."""
    folder.mkdir(parents=True, exist_ok=True)
    before = locale.setlocale(locale.LC_ALL)
    image = itk_image(voxels.astype(np.int16), affine)
    writer = SimpleITK.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    directions = np.reshape(image.GetDirection(), (3, 3))
    for number in range(image.GetDepth()):
        if number in skip:
            continue
        part = image[:, :, number]
        tags = {
            "0008|0060": "MR",
            "0008|103e": name,
            "0020|000d": "1.2.826.0.1.3680043.2.1125.1",
            "0020|000e": f"1.2.826.0.1.3680043.2.1125.1.{series}",
            "0008|0018": f"1.2.826.0.1.3680043.2.1125.1.{series}.{number + 1}",
            "0020|0013": str(number + 1),
            "0020|0032": "\\".join(map(str, image.TransformIndexToPhysicalPoint((0, 0, number)))),
            "0020|0037": "\\".join(map(str, directions[:, :2].T.ravel())),
            "0018|0050": str(image.GetSpacing()[2]),
        }
        for key, value in tags.items():
            part.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{series}-{(number * 7) % 101:03d}.dcm"))
        writer.Execute(part)
    locale.setlocale(locale.LC_ALL, before)  # GDCM leaves that of C behind when it writes
    return folder


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIL"])
def test_a_volume_lies_where_its_nifti_lies(tmp_path, phantoms, name, codes):
    voxels = np.random.default_rng(0).standard_normal((7, 6, 5)).astype(np.float32)
    affine = oblique(codes)
    SimpleITK.WriteImage(itk_image(voxels, affine), str(tmp_path / name), useCompression=name == "x.nrrd")
    phantoms.save(tmp_path / "x.nii.gz", voxels, affine)
    found, image = read_volume(tmp_path / name)
    wanted, like = read_volume(tmp_path / "x.nii.gz")
    assert np.array_equal(found, wanted)
    assert np.allclose(image.affine, like.affine, atol=1e-5)
    assert image.header.get_xyzt_units()[0] == "mm"


def test_a_space_to_the_right_front_and_top_is_understood(tmp_path):
    header = "NRRD0004\ntype: uint8\ndimension: 3\nspace: right-anterior-superior\nsizes: 2 3 4\nencoding: raw\n"
    header += "space directions: (2,0,0) (0,3,0) (0,0,4)\nspace origin: (10,20,30)\n\n"
    (tmp_path / "x.nrrd").write_bytes(header.encode() + bytes(range(24)))
    voxels, image = read_volume(tmp_path / "x.nrrd")
    assert np.array_equal(voxels, np.arange(24).reshape(2, 3, 4, order="F"))
    assert np.allclose(image.affine, [[2, 0, 0, 10], [0, 3, 0, 20], [0, 0, 4, 30], [0, 0, 0, 1]])


NRRD = "NRRD0004\ntype: uint8\ndimension: 3\nsizes: {}\nencoding: raw\nspace: LPS\n{}\n\n"
META = "ObjectType = Image\nNDims = 3\nDimSize = {}\n{}\nElementType = MET_UCHAR\nElementDataFile = LOCAL\n"


@pytest.mark.parametrize(
    ("name", "header", "lines"),
    [
        ("x.nrrd", NRRD, "space directions: (2,0,0) (0,3,0) (0,0.9,4)\nspace origin: (1,2,3)"),
        ("x.mha", META, "TransformMatrix = 1 0 0 0 1 0 0 0.225 1\nOffset = 1 2 3\nElementSpacing = 2 3 4"),
    ],
)
def test_a_sheared_volume_keeps_its_places_and_has_no_form_that_loses_them(tmp_path, recwarn, name, header, lines):
    data = np.arange(8000, dtype=np.uint16).astype(np.uint8)
    (tmp_path / name).write_bytes(header.format("20 20 20", lines).encode() + data.tobytes())
    voxels, image = read_volume(tmp_path / name)
    assert np.array_equal(voxels, data.reshape((20, 20, 20), order="F"))
    assert np.allclose(image.affine, [[-2, 0, 0, -1], [0, -3, -0.9, -2], [0, 0, 4, 3], [0, 0, 0, 1]])
    assert (image.header["sform_code"], image.header["qform_code"]) == (1, 0)
    assert not recwarn.list
    straight = lines.replace("0.9,4", "0,4").replace("0.225", "0")
    (tmp_path / name).write_bytes(header.format("20 20 20", straight).encode() + data.tobytes())
    assert read_volume(tmp_path / name)[1].header["qform_code"] == 1


@pytest.mark.parametrize(
    ("name", "header", "lines", "length"),
    [
        ("x.nrrd", NRRD, "space directions: (2,0,0) (0,3,0) (0,0,4)", 4),
        ("x.nrrd", NRRD, "space directions: (2,0,0) (0,3,0) none", None),
        ("x.nrrd", NRRD, "spacings: 2 3 nan", None),
        ("x.nrrd", NRRD, "spacings: 2 3 4", 4),
        ("x.nrrd", NRRD, "content: (1,2,3)", None),
        ("x.mha", META, "ElementSpacing = 2 3 4", 4),
        ("x.mha", META, "ElementSize = 2 3 4", 4),
        ("x.mha", META, "Offset = 2 3 4", None),
    ],
)
def test_one_slice_is_as_thick_as_it_says_or_a_warning_says_that_it_does_not(
    tmp_path, recwarn, name, header, lines, length
):
    header = header.replace("space: LPS\n", "") if "spacings" in lines else header
    (tmp_path / name).write_bytes(header.format("4 6 1", lines).encode() + bytes(range(24)))
    voxels, image = read_volume(tmp_path / name)
    assert voxels.shape == (4, 6, 1)
    assert image.header.get_zooms()[2] == (length or 1)
    said = [str(warning.message) for warning in recwarn]
    assert len(said) == (length is None)
    assert all("does not give the size of its voxels along every axis, and is read as 1 mm" in each for each in said)


def test_the_slope_of_a_metaimage_is_applied(tmp_path, recwarn):
    lines = "DistanceUnits = mm\nElementSpacing = 2 3 4\nElementToIntensityFunctionSlope = 0.5\n"
    lines += "ElementToIntensityFunctionOffset = -20"
    (tmp_path / "x.mha").write_bytes(META.format("2 3 4", lines).encode() + bytes(range(24)))
    voxels, _ = read_volume(tmp_path / "x.mha")
    assert np.array_equal(voxels.ravel(order="F"), np.arange(24) * 0.5 - 20)
    assert not recwarn.list


@pytest.mark.filterwarnings("ignore:.*is read as LPS")  # ITK names no space in four dimensions
@pytest.mark.parametrize("name", FILES)
def test_a_fourth_dimension_of_one_is_dropped_as_of_nifti(tmp_path, name):
    image = itk_image(np.arange(24, dtype=np.uint8).reshape(2, 3, 4), oblique("LAS"))
    SimpleITK.WriteImage(SimpleITK.JoinSeries([image]), str(tmp_path / name))
    voxels, found = read_volume(tmp_path / name)
    assert np.array_equal(voxels, np.arange(24).reshape(2, 3, 4))
    assert np.allclose(found.affine, oblique("LAS"), atol=1e-5)
    SimpleITK.WriteImage(SimpleITK.JoinSeries([image, image]), str(tmp_path / name))
    with pytest.raises(ValueError, match="has 4 dimensions"):
        read_volume(tmp_path / name)


@pytest.mark.parametrize(
    ("space", "told"),
    [
        ("space: LPS", None),
        ("space: right-anterior-superior", None),
        ("space: Left-Anterior-Superior", None),
        ("space: scanner-xyz", "scanner-xyz"),
        ("space: 3D-right-handed", "3D-right-handed"),
        ("space dimension: 3", "no space"),
    ],
)
def test_a_space_without_left_and_right_is_told(tmp_path, recwarn, space, told):
    header = NRRD.replace("space: LPS", space).format("2 3 4", "space directions: (2,0,0) (0,3,0) (0,0,4)")
    (tmp_path / "x.nrrd").write_bytes(header.encode() + bytes(range(24)))
    read_volume(tmp_path / "x.nrrd")
    said = [str(warning.message) for warning in recwarn]
    assert len(said) == (told is not None)
    assert all(f"run through the patient ({told}), and is read as LPS" in each for each in said)


@pytest.mark.parametrize("tilted", [False, True])
def test_a_dicom_series_lies_where_its_nifti_lies(tmp_path, tilted):
    voxels = np.arange(7 * 6 * 5).reshape(7, 6, 5)
    affine = oblique("LPS") if tilted else np.diag([-1.0, -1.5, 4.0, 1.0])
    series = write_series(tmp_path / "scan", voxels, affine)
    before = locale.setlocale(locale.LC_ALL)
    found, image = read_volume(series)
    assert locale.setlocale(locale.LC_ALL) == before  # which a library may change for the whole process
    assert np.array_equal(found, voxels)
    assert np.allclose(image.affine, affine, atol=1e-4)


def test_nan_is_read_as_in_nifti(tmp_path, phantoms, recwarn):
    head = phantoms.make_subject(1)[0]["FLAIR"].astype(np.float32)
    head[0, 0, :3] = np.nan
    SimpleITK.WriteImage(itk_image(head, oblique()), str(tmp_path / "x.mha"))
    voxels, _ = read_image(tmp_path / "x.mha")
    assert np.array_equal(voxels, np.nan_to_num(head))
    assert "3 voxels outside the head were NaN or infinite" in str(recwarn[0].message)
    head[13, 15, 12] = np.nan
    SimpleITK.WriteImage(itk_image(head, oblique()), str(tmp_path / "x.mha"))
    with pytest.raises(ValueError, match="within the head"):
        read_image(tmp_path / "x.mha")


@pytest.mark.parametrize("kind", ["mha", "dicom"])
def test_a_mask_in_nifti_lies_on_the_grid_of_an_image_in_another_format(tmp_path, phantoms, kind):
    images, affine = phantoms.make_subject(3)[0], oblique("LPS")
    whole = {name: np.round(image) for name, image in images.items()}
    paths = {}
    for name, image in whole.items():
        paths[name] = tmp_path / f"{name}.mha"
        SimpleITK.WriteImage(itk_image(image.astype(np.int16), affine), str(paths[name]))
    if kind == "dicom":
        paths["FLAIR"] = write_series(tmp_path / "series", whole["FLAIR"], affine)
    predict(segmenter(), paths, tmp_path / "mask.nii.gz")
    mask = nib.load(tmp_path / "mask.nii.gz")
    assert np.allclose(mask.affine, affine, atol=1e-4)
    assert np.array_equal(np.asarray(mask.dataobj), thresholded(nib.Nifti1Image(whole["FLAIR"], affine)))
    for name in (str(tmp_path / "mask.mha"), ".", "/"):
        with pytest.raises(ValueError, match=rf"^{re.escape(name)} is not a name for a mask: end it in \.nii\.gz"):
            predict(segmenter(), paths, name)


def test_a_cohort_in_other_formats_is_found_checked_and_compared(tmp_path, phantoms):
    root = tmp_path / "data"
    for number in (1, 2):
        images, lesions = phantoms.make_subject(number)
        affine = np.diag([-1.0, -1.0, 3.0, 1.0])
        folder = root / f"P{number}"
        write_series(folder / "FLAIR", images["FLAIR"], affine)
        SimpleITK.WriteImage(itk_image(images["T1w"].astype(np.float32), affine), str(folder / "T1.nrrd"))
        SimpleITK.WriteImage(itk_image(lesions.astype(np.uint8), affine), str(folder / "lesion.seg.nrrd"))
    cases = find_cases(root, require_mask=True)
    assert [(case.id, list(case.images), case.mask.name) for case in cases] == [
        (f"P{number}", ["FLAIR", "T1w"], "lesion.seg.nrrd") for number in (1, 2)
    ]
    assert common_spacing(cases) is None
    rows, failures = predict_cohort(segmenter(("FLAIR",)), root, tmp_path / "out")
    assert (len(rows), failures) == (2, {})
    assert same_grid(nib.load(tmp_path / "out" / rows[0].mask), read_mask(cases[0].mask)[1])
    assert len(evaluate(tmp_path / "out", root).cases) == 2
    (root / "list.csv").write_text("id,FLAIR,mask\na,P1/FLAIR,P1/lesion.seg.nrrd\n")
    assert len(find_cases(root / "list.csv", require_mask=True)) == 1


def test_what_a_nifti_was_made_of_is_left_out_beside_it(tmp_path, phantoms):
    images, _ = phantoms.make_subject(1)
    phantoms.save(tmp_path / "P1" / "FLAIR.nii.gz", images["FLAIR"])
    before = list_cases(tmp_path)
    for name in ("P1/FLAIR.mha", "P1/T1.mha", "P2/FLAIR.mha"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        SimpleITK.WriteImage(itk_image(images["FLAIR"], np.eye(4)), str(tmp_path / name))
    write_series(tmp_path / "P1" / "dicom_T2", np.ones((3, 3, 3)), np.eye(4))
    assert list_cases(tmp_path) == before
    phantoms.save(tmp_path / "flat" / "P1_FLAIR.nii.gz", images["FLAIR"])
    SimpleITK.WriteImage(itk_image(images["FLAIR"], np.eye(4)), str(tmp_path / "flat" / "P1_T1.mha"))
    assert [list(case.images) for case in list_cases(tmp_path / "flat")[0]] == [["FLAIR"]]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("x.mhd", "ElementDataFile = {}"),
        ("x.mha", "ElementDataFile = {}"),
        ("x.mhd", "ElementDataFile={}"),
        ("x.mhd", "\rElementDataFile = {}"),
        ("x.mha", "Comment = ElementDataFile = LOCAL\n" + "Comment = x\n" * 9999 + "ElementDataFile = {}"),
        ("x.nhdr", "data file: {}"),
        ("x.nhdr", "DATAFILE: {}"),
        ("x.nrrd", "data file: {}"),
    ],
)
@pytest.mark.parametrize("place", ["../secret.raw", "/absolute", "..\\secret.raw", "LIST", "s%03d.raw 1 2 1"])
def test_a_header_names_no_file_elsewhere(tmp_path, name, line, place):
    (tmp_path / "secret.raw").write_bytes(bytes(range(8)))
    (tmp_path / "in").mkdir()
    place = str(tmp_path / "secret.raw") if place == "/absolute" else place
    if "Element" in line:
        header = "ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementSpacing = 1 1 1\nElementType = MET_UCHAR\n"
    else:
        header = "NRRD0004\ntype: uint8\ndimension: 3\nsizes: 2 2 2\nencoding: raw\nspacings: 1 1 1\n"
    (tmp_path / "in" / name).write_text(header + line.format(place) + "\n\n")
    with pytest.raises(ValueError, match=r"has its voxels in .* by its header: give a single file beside it"):
        read_volume(tmp_path / "in" / name)
    shutil.copy(tmp_path / "secret.raw", tmp_path / "in" / "open.raw")
    (tmp_path / "in" / name).write_text(header + line.format("open.raw") + "\n\n")
    if line.count("Element") < 2 and "\r" not in line:
        assert read_volume(tmp_path / "in" / name)[0].sum() == 28, "the same header is good with a file beside it"


def spoiled(kind, folder):
    path = folder / "x.mha"
    header = "ObjectType = Image\nNDims = 3\nDimSize = {}\nElementSpacing = 1 1 1\nElementType = {}\n"
    if kind == "text":
        path.write_text("not an image")
    elif kind == "too large":
        path.write_text(header.format("30000 30000 30000", "MET_UCHAR") + "ElementDataFile = LOCAL\n")
    elif kind == "truncated":
        path.write_bytes((header.format("9 9 9", "MET_FLOAT") + "ElementDataFile = LOCAL\n").encode() + bytes(99))
    elif kind == "centimetres":
        path = path.with_suffix(".nrrd")
        lines = 'space directions: (.2,0,0) (0,.3,0) (0,0,.4)\nspace units: "cm" "cm" "cm"'
        path.write_bytes(NRRD.format("2 3 4", lines).encode() + bytes(24))
    elif kind in ("micrometres", "no slope"):
        lines = "ElementSpacing = 2 3 4\n"
        lines += "DistanceUnits = um" if kind == "micrometres" else "ElementToIntensityFunctionSlope = 0"
        path.write_bytes(META.format("2 3 4", lines).encode() + bytes(24))
    elif kind == "a plane":
        path = path.with_suffix(".nrrd")
        header = NRRD.replace("dimension: 3", "dimension: 2").format("4 6", "space directions: (2,0,0) (0,3,0)")
        path.write_bytes(header.encode() + bytes(24))
    elif kind == "missing":
        path = path.with_suffix(".mhd")
        path.write_text(header.format("2 2 2", "MET_UCHAR") + "ElementDataFile = x.raw\n")
    elif kind == "2-D":
        SimpleITK.WriteImage(SimpleITK.Image(4, 4, SimpleITK.sitkUInt8), str(path))
    elif kind == "colours":
        SimpleITK.WriteImage(SimpleITK.Image([4, 4, 4], SimpleITK.sitkVectorUInt8, 3), str(path))
    elif kind == "several series":
        write_series(folder / "scans", np.ones((4, 4, 4)), np.eye(4))
        return write_series(folder / "scans", np.ones((4, 4, 3)), np.eye(4), "2", "T1 MPRAGE")
    elif kind == "a slice missing":
        return write_series(folder / "scan", np.ones((4, 4, 6)), np.eye(4), skip=(3,))
    elif kind == "twice":
        path = write_series(folder / "scan", np.ones((4, 4, 4)), np.eye(4))
        for slice_ in list(path.iterdir()):
            shutil.copy(slice_, path / f"again-{slice_.name}")
    elif kind == "empty slices":
        path = folder / "scan"
        path.mkdir()
        (path / "1.dcm").write_bytes(b"nothing")
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("text", "names no ElementDataFile"),
        ("too large", "30000×30000×30000 voxels by its header"),
        ("truncated", "cannot be read: it is damaged or something else"),
        ("missing", r"has its voxels in x\.raw, which does not lie beside it"),
        ("centimetres", "is in cm by its header: give it in mm"),
        ("micrometres", "is in um by its header: give it in mm"),
        ("no slope", "has no numbers, or 0, for ElementToIntensityFunctionSlope and "),
        ("a plane", r"cannot be read: it is damaged or something else \(ReadImageInformation: number of domain axes"),
        ("2-D", "has 2 dimensions and 1 number per voxel"),
        ("colours", "has 3 dimensions and 3 numbers per voxel"),
        ("several series", r"several DICOM series \(FLAIR 3D, 4 files; T1 MPRAGE, 3 files\): put the files of each"),
        ("a slice missing", "slices 2 mm apart where others are 1 mm apart: a file of the DICOM series is missing"),
        ("twice", "several slices at one place"),
        ("empty slices", "has no DICOM series"),
    ],
)
def test_a_volume_that_cannot_serve_is_refused_in_one_sentence(tmp_path, capfd, kind, reason):
    path = spoiled(kind, tmp_path)
    with pytest.raises(ValueError, match=reason) as error:
        read_volume(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    words = [line for line in capfd.readouterr().err.splitlines() if "ideal =" not in line]
    assert [line for line in words if "M_ReadElementsData" not in line] == []  # MetaIO's, which nothing silences


@pytest.mark.parametrize("name", [*FILES, "scan"])
def test_without_simpleitk_the_message_says_how_to_get_it_and_how_to_do_without(tmp_path, monkeypatch, name):
    if name == "scan":
        write_series(tmp_path / name, np.ones((3, 3, 3)), np.eye(4))
    else:
        SimpleITK.WriteImage(SimpleITK.Image([3, 3, 3], SimpleITK.sitkUInt8), str(tmp_path / name))
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(ValueError, match=rf'{name} is not NIfTI: .* pip install "\.\[formats\]", .*; or conv'):
        read_volume(tmp_path / name)
