import gzip
import os
import struct
import warnings

import nibabel as nib
import numpy as np
import pytest

from rsanet.segment.cases import Case
from rsanet.segment.data import LoadCase
from rsanet.segment.volumes import DataWarning, check_views, read_image, read_mask, read_volume, same_grid, share_inside

MIDDLE = (13, 15, 12)  # of the phantoms' head
SFORM_CODE, QFORM_CODE, PIXDIM, SROW = 254, 252, 80, 280  # where a NIfTI-1 header has them, in bytes


def poke(path, **values):
    """Writes numbers at places of an uncompressed file's header."""
    content = bytearray(path.read_bytes())
    for offset, numbers in values.values():
        form = "<" + ("h" if isinstance(numbers[0], int) else "f") * len(numbers)
        struct.pack_into(form, content, offset, *numbers)
    path.write_bytes(bytes(content))
    return path


@pytest.fixture
def head(phantoms):
    """A skull-stripped FLAIR."""
    return phantoms.make_subject(1)[0]["FLAIR"].astype(np.float32)


def broken_volume(kind, folder):
    path = folder / f"{kind}.nii.gz"
    voxels = np.random.default_rng(0).standard_normal((8, 8, 8)).astype(np.float32)
    if kind == "missing":
        return path
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("not an image")
    elif kind == "nothing":
        path.write_bytes(b"")
    elif kind == "gzipped text":
        path.write_bytes(gzip.compress(b"not an image"))
    elif kind == "truncated":
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
        path.write_bytes(path.read_bytes()[:-600])
    elif kind == "altered":  # as long as before, in a block that is stored as it is, where only the checksum tells
        content = bytearray(gzip.compress(nib.Nifti1Image(voxels, np.eye(4)).to_bytes(), compresslevel=0))
        content[1000] ^= 1
        path.write_bytes(content)
    elif kind == "unknown type":
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), folder / "other.nii")
        path = poke(folder / "other.nii", datatype=(70, (1234,)))
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "too large":
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), folder / "small.nii")
        path = poke(folder / "small.nii", shape=(42, (30000, 30000, 30000)))
    elif kind == "singular":
        affine = np.eye(4)
        affine[:3, 0] = affine[:3, 1]
        nib.save(nib.Nifti1Image(voxels, affine), path)
    elif kind == "colours":
        nib.save(nib.Nifti1Image(np.zeros((8, 8, 8), [("R", "u1"), ("G", "u1"), ("B", "u1")]), np.eye(4)), path)
    else:
        shaped = {"4-D": voxels.reshape(8, 8, 4, 2), "2-D": voxels[0], "no voxels": voxels[:0]}.get(kind, voxels)
        nib.save(nib.Nifti1Image(shaped.astype(np.complex64) if kind == "complex" else shaped, np.eye(4)), path)
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "does not exist"),
        ("folder", "is a folder"),
        ("text", "cannot be read"),
        ("nothing", "cannot be read"),
        ("gzipped text", "cannot be read"),
        ("truncated", "cannot be read"),
        ("altered", "cannot be read"),
        ("unknown type", "cannot be read"),
        ("pipe", "no ordinary file"),
        ("too large", "30000×30000×30000 voxels"),
        ("singular", "do not span space"),
        ("4-D", r"4 dimensions \(8×8×4×2\)"),
        ("2-D", "2 dimensions"),
        ("no voxels", r"has no voxels \("),
        ("complex", "complex64"),
        ("colours", "one real number per voxel"),
    ],
)
def test_a_file_that_cannot_serve_is_refused_in_one_sentence(tmp_path, caplog, kind, reason):
    path = broken_volume(kind, tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=reason) as error:
        read_volume(path)
    assert path.name in str(error.value)
    assert "\n" not in str(error.value)
    assert not caplog.records  # nibabel adds no words of its own


@pytest.mark.parametrize(
    ("name", "tool"),
    [
        ("x.mgz", "mri_convert"),
        ("x.hdr", "FSL"),
        ("x.IMG", "FSL"),
        ("x.dcm", "dcm2niix, or give the folder of its series"),
        ("x.mnc", "ITK-SNAP"),
        ("x.txt", r"ends in .nii or .nii.gz"),
    ],
)
def test_another_format_is_refused_with_what_converts_it(tmp_path, name, tool):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{name} is not NIfTI: .*{tool}"):
        read_volume(tmp_path / name)


def test_a_slice_of_dicom_whose_name_has_no_end_is_known_by_its_beginning(tmp_path):
    (tmp_path / "IM0001").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 8)
    with pytest.raises(ValueError, match=r"IM0001 is not NIfTI: .*dcm2niix, or give the folder of its series"):
        read_volume(tmp_path / "IM0001")


def test_a_file_without_permission_is_named(tmp_path, head, phantoms, monkeypatch):
    path = phantoms.save(tmp_path / "x.nii.gz", head)
    monkeypatch.setattr(os, "access", lambda asked, mode: asked != path)  # the superuser may read everything
    with pytest.raises(ValueError, match=r"x\.nii\.gz cannot be opened: permission denied\."):
        read_volume(path)


def test_a_trailing_dimension_of_one_is_dropped(tmp_path, phantoms):
    path = phantoms.save(tmp_path / "x.nii.gz", np.arange(24.0).reshape(2, 3, 4, 1))
    assert np.array_equal(read_volume(path)[0], np.arange(24.0).reshape(2, 3, 4))


def test_scaled_integers_are_read_as_what_they_mean(tmp_path):
    values = np.linspace(-1, 1, 27).reshape(3, 3, 3)
    image = nib.Nifti1Image(values, np.eye(4))
    image.set_data_dtype(np.int16)
    nib.save(image, tmp_path / "x.nii.gz")
    assert nib.load(tmp_path / "x.nii.gz").dataobj.slope < 1e-3
    assert np.allclose(read_volume(tmp_path / "x.nii.gz")[0], values, atol=1e-4)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image, nib.MGHImage])
def test_an_image_in_memory_is_read_as_a_file_is_and_stays_as_it_is(head, kind):
    voxels = head.copy()
    voxels[0, 0, 0] = np.nan
    image = kind(voxels, np.diag([1.0, 2, 3, 1]))
    with pytest.warns(DataWarning, match="the image: 1 voxel"):
        read, grid = read_image(image)
    assert np.array_equal(read, head)
    assert isinstance(grid, nib.Nifti1Image)
    assert np.array_equal(grid.affine, np.diag([1.0, 2, 3, 1]))
    assert np.isnan(np.asarray(image.dataobj)[0, 0, 0])


def test_an_image_in_memory_is_called_by_its_file_or_the_image(tmp_path, head, phantoms):
    with pytest.raises(ValueError, match=r"^the image has no affine"):
        read_image(nib.Nifti1Image(head, None))
    path = phantoms.save(tmp_path / "zeros.nii.gz", np.zeros_like(head))
    with pytest.raises(ValueError, match=r"zeros\.nii\.gz is empty: every voxel is 0\."):
        read_image(nib.load(path))


@pytest.mark.parametrize("code", ["sform", "qform", "neither"])
@pytest.mark.parametrize(
    ("spacing", "reason"),
    [
        ((0.0, 1.0, 1.0), "voxels of 0 × 1 × 1 mm"),
        ((0.001, 0.001, 0.001), "sizes from 0.05 to 20 mm"),
        ((1.0, 1.0, 21.0), "voxels of 1 × 1 × 21 mm"),
        ((1.0, float("nan"), 1.0), "not finite"),
    ],
)
def test_voxels_of_a_size_that_no_scan_has_are_refused(tmp_path, head, code, spacing, reason):
    nib.save(nib.Nifti1Image(head, np.eye(4)), tmp_path / "x.nii")
    rows = [size if row == column else 0.0 for row, size in enumerate(spacing) for column in range(4)]
    codes = {"sform": (0, 1), "qform": (1, 0), "neither": (0, 0)}[code]
    path = poke(tmp_path / "x.nii", codes=(QFORM_CODE, codes), sizes=(PIXDIM, spacing), rows=(SROW, rows))
    with pytest.raises(ValueError, match=reason) as error:
        read_volume(path)
    assert "x.nii" in str(error.value)


def test_sizes_that_the_sform_leaves_unused_do_not_matter(tmp_path, head, caplog):
    nib.save(nib.Nifti1Image(head, np.eye(4)), tmp_path / "x.nii")
    path = poke(tmp_path / "x.nii", codes=(QFORM_CODE, (0, 1)), sizes=(PIXDIM, (0.0, -1.0, 500.0)))
    assert np.array_equal(read_volume(path)[1].affine, np.eye(4))
    assert not caplog.records  # nibabel logs what it mends, on stderr and without the name of the file


@pytest.mark.parametrize(("unit", "word"), [("unknown", None), ("mm", None), ("meter", "metres"), ("micron", "micro")])
def test_a_unit_that_the_sizes_contradict_is_told(head, recwarn, unit, word):
    image = nib.Nifti1Image(head, np.diag([1, 2, 1, 1]))
    image.header.set_xyzt_units(unit, "sec")
    read_volume(image)
    said = [str(warning.message) for warning in recwarn]
    assert len(said) == (word is not None)
    assert all(f"is in {word}" in each and "voxels of 1 × 2 × 1: it is read as mm" in each for each in said)


@pytest.mark.parametrize("codes", [(1, 1), (1, 2), (0, 1)])
def test_an_sform_and_a_qform_that_contradict_each_other_are_told(head, codes):
    image = nib.Nifti1Image(head, np.eye(4))
    moved = np.eye(4)
    moved[0, 3] = 12
    image.set_qform(moved, codes[0])
    image.set_sform(np.eye(4), codes[1])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert np.array_equal(read_volume(image)[1].affine, np.eye(4))
    # To map to the scanner and to a template is no contradiction.
    assert ["up to 12 mm apart" in str(warning.message) for warning in told] == ([True] if codes == (1, 1) else [])


@pytest.mark.parametrize("air", [0, 3])
def test_bad_voxels_outside_the_head_become_zero_with_a_warning(head, air):
    noise = air * np.random.default_rng(0).random(head.shape, np.float32)
    voxels = np.where(head != 0, head, noise)
    voxels[:4, :4] = np.nan
    voxels[-1, 0, 5] = -np.inf
    count = voxels[:4, :4].size + 1
    with pytest.warns(DataWarning, match=f"{count} voxels outside the head were NaN or infinite, and read as 0"):
        read, _ = read_image(nib.Nifti1Image(voxels, np.eye(4)))
    assert np.allclose(read, np.where(np.isfinite(voxels), voxels, 0), atol=0.01)


def test_a_file_that_is_read_again_is_told_of_once(tmp_path, head, phantoms):
    head[0, 0, 0] = np.nan
    path = phantoms.save(tmp_path / "x.nii.gz", head)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        read_image(path)
        LoadCase()(Case("x", {"FLAIR": path}))
    assert [str(warning.message) for warning in told if warning.category is DataWarning] == [
        f"{path}: 1 voxel outside the head was NaN or infinite, and read as 0."
    ]


def test_a_background_of_nan_becomes_zero_with_a_warning(head):
    with pytest.warns(DataWarning, match="outside the head were NaN"):
        read, _ = read_image(nib.Nifti1Image(np.where(head == 0, np.nan, head), np.eye(4)))
    assert np.array_equal(read, head)


@pytest.mark.parametrize("background", ["zero", "air", "NaN"])
@pytest.mark.parametrize("hole", ["voxel", "ball"])
def test_bad_voxels_in_the_head_are_refused(head, background, hole):
    outside = {"zero": 0, "air": np.random.default_rng(0).random(head.shape), "NaN": np.nan}[background]
    voxels = np.where(head != 0, head, outside).astype(np.float32)
    voxels[tuple(slice(at, at + (1 if hole == "voxel" else 6)) for at in MIDDLE)] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite, within the head"):
        read_image(nib.Nifti1Image(voxels, np.eye(4)))


def test_slices_of_nan_through_the_head_are_refused(head):
    voxels = head.copy()
    voxels[:, :, 10:12] = np.nan
    with pytest.raises(ValueError, match="within the head"):
        read_image(nib.Nifti1Image(voxels, np.eye(4)))


def test_numbers_beyond_float32_are_refused_as_infinite(head):
    voxels = head.astype(np.float64)
    voxels[MIDDLE] = 1e300
    with pytest.raises(ValueError, match="1 voxel that is NaN or infinite"):
        read_image(nib.Nifti1Image(voxels, np.eye(4)))


@pytest.mark.parametrize(
    ("spots", "value", "reason"),
    [(0, 0, "every voxel is 0"), (0, 7, "every voxel is 7"), (0, np.nan, "every voxel is NaN"), (3, 0, "but 3 voxels")],
)
def test_an_image_without_a_head_is_refused(spots, value, reason):
    voxels = np.full((20, 20, 20), value, np.float32)
    voxels[0, 0, :spots] = 100
    with pytest.raises(ValueError, match=reason):
        read_image(nib.Nifti1Image(voxels, np.eye(4)))


@pytest.mark.parametrize("value", [1, 255])
def test_a_mask_is_zero_and_one_other_number(tmp_path, phantoms, value):
    lesions = phantoms.make_subject(1)[1]
    path = phantoms.save(tmp_path / "mask.nii.gz", value * lesions.astype(float), dtype=np.uint8)
    assert np.array_equal(read_mask(path)[0], lesions)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_mask_with_nan_is_refused(tmp_path, phantoms, value):
    voxels = phantoms.make_subject(1)[1].astype(np.float32)
    voxels[0, 0, 0] = value
    with pytest.raises(ValueError, match=r"mask\.nii\.gz is not a binary mask: 1 voxel is NaN or infinite"):
        read_mask(phantoms.save(tmp_path / "mask.nii.gz", voxels))


@pytest.mark.parametrize("values", [[1, 2], [0.25, 0.5, 0.75, 0.8], [-1]])
def test_labels_and_probabilities_are_no_mask(tmp_path, phantoms, values):
    voxels = np.zeros((26, 30, 24))
    voxels[0, 0, : len(values)] = values
    with pytest.raises(ValueError, match=r"x\.nii\.gz is not a binary mask: besides 0 it has "):
        read_mask(phantoms.save(tmp_path / "x.nii.gz", voxels))


def grid(shape, affine):
    return nib.Nifti1Image(np.zeros(shape, np.uint8), affine)


def moved(x, scale=1.0):
    affine = np.diag([scale, scale, scale, 1])
    affine[0, 3] = x
    return affine


def test_a_grid_is_the_same_to_a_thousandth_of_a_millimetre():
    one = grid((8, 8, 8), np.eye(4))
    assert same_grid(one, grid((8, 8, 8), moved(0.0005)))
    assert not same_grid(one, grid((8, 8, 8), moved(0.01)))
    assert not same_grid(one, grid((8, 8, 9), np.eye(4)))


@pytest.mark.parametrize(
    ("other", "share"),
    [
        (grid((32, 20, 20), np.eye(4)), 1),
        (grid((32, 20, 20), moved(16)), 0.5),
        (grid((32, 20, 20), moved(40)), 0),
        (grid((32, 20, 20)[::-1], np.array([[0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])), 1),
        (grid((17, 11, 11), moved(0, 2.0)), 1),
        (grid((8, 20, 20), moved(0)), 0.25),
    ],
)
def test_the_share_of_a_view_that_another_covers_follows_from_the_headers(other, share):
    assert share_inside(grid((32, 20, 20), np.eye(4)), other) == pytest.approx(share, abs=0.04)


@pytest.mark.parametrize(
    ("shape", "x", "serves"),
    [
        ((40, 40, 40), 0, True),
        ((40, 40, 40), 15, True),  # over half is shared
        ((40, 40, 40), 30, False),
        ((40, 40, 40), 100, False),
        ((12, 40, 40), 10, True),  # cropped to a part
        ((2, 40, 40), 10, False),  # a slab
    ],
)
def test_contrasts_that_hardly_overlap_are_refused_with_both_names(shape, x, serves):
    first, second = grid((40, 40, 40), np.eye(4)), grid(shape, moved(x))
    if serves:
        check_views("flair.nii.gz", first, "t1.nii.gz", second)
        return
    with pytest.raises(ValueError, match=r"^t1\.nii\.gz covers \d+ % of the field of view of flair\.nii\.gz by"):
        check_views("flair.nii.gz", first, "t1.nii.gz", second)


def test_a_background_that_a_file_stores_next_to_zero_is_background(tmp_path, head):
    image = nib.Nifti1Image(np.where(head, head - 100, 0), np.eye(4))
    image.set_data_dtype(np.int16)  # scaled, and 0 is between two of its integers
    nib.save(image, tmp_path / "x.nii.gz")
    assert (read_volume(tmp_path / "x.nii.gz")[0][head == 0] != 0).all()
    assert (read_image(tmp_path / "x.nii.gz")[0][head == 0] == 0).all()
