import dataclasses
import functools
import json

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine, from_matvec
from scipy.spatial.transform import Rotation
from segment.bright import segmenter
from segment.heads import RADII, head, heads
from support import shared_data

from rsanet.segment import registration
from rsanet.segment.cases import Case
from rsanet.segment.ensemble import Ensemble
from rsanet.segment.prediction import predict
from rsanet.segment.registration import Sketch, register
from rsanet.segment.volumes import DataWarning, read_contrast

itk = pytest.importorskip("SimpleITK", reason="registration needs SimpleITK, of the extra formats")


def rigid(degrees=(0, 0, 0), shift=(0, 0, 0)):
    return from_matvec(Rotation.from_rotvec(np.radians(degrees)).as_matrix(), shift)


MOVES = {
    "14 mm": rigid(shift=(14, 0, 0)),
    "10 degrees": rigid((6, -5, 6), (3, -4, 2)),
    "45 mm": rigid(shift=(10, 35, -26)),
}
TURN = Rotation.from_euler("xyz", [8, -6, 12], degrees=True).as_matrix()
OBLIQUE = {"affine": from_matvec(TURN * [2.0, 2.0, 5.0], [-95, -85, -95]), "shape": (90, 98, 40)}


@functools.cache
def flair():
    return head("FLAIR", 9)[0]


def sketch(image):
    voxels, shown, _ = read_contrast(image)
    return Sketch.of(voxels, shown, image.affine)


def mistakes(found, true):
    """How many mm the points of the head are off, at most."""
    points = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) * RADII / 2
    return np.linalg.norm(apply_affine(found, points) - apply_affine(true, points), axis=-1).max()


def test_contrasts_that_lie_together_are_at_home():
    found = sketch(flair()).find(sketch(head("T1w", 9)[0]))
    assert (found.apart, found.is_apart()) == (0, False)
    assert found.overlap == 1
    whole = sketch(flair()).find(sketch(head("T1w", 9, skull=True)[0]))  # the one lies within the other
    assert not whole.is_apart()


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("axis", range(3))
def test_a_few_slices_are_not_apart_as_a_turn_out_of_them_is_not_seen(axis, slices):
    part = tuple(slice(20, 20 + slices) if dim == axis else slice(None) for dim in range(3))
    first, second = (sketch(head(name, 9)[0].slicer[part]) for name in ("FLAIR", "T1w"))
    found = first.find(second)
    assert (found.apart, found.is_apart()) == (0, False)
    beside = dataclasses.replace(second, affine=rigid(shift=(60, 60, 60)) @ second.affine)
    assert first.find(beside).is_apart()


def test_thick_slices_of_another_field_of_view_are_compared_where_both_are():
    assert not sketch(flair()).find(sketch(head("T2w", 9, **OBLIQUE)[0])).is_apart()
    slab = head("T1w", 9)[0].slicer[:, :, 10:25]
    assert not sketch(flair()).find(sketch(slab)).is_apart()
    assert not sketch(slab).find(sketch(flair())).is_apart()


@pytest.mark.parametrize("degrees", [(0, 0, 0), (0, 0, 10)])
@pytest.mark.parametrize("shift", [5, 8, 14])
def test_how_far_apart_they_lie_is_known_to_a_few_mm(shift, degrees):
    move = rigid(degrees, (0, shift, 0))
    found = sketch(flair()).find(sketch(head("T1w", 9, moved=move)[0]))
    assert found.is_apart()
    if not any(degrees):
        assert abs(found.apart - shift) < 4
        assert found.overlap < 1 - shift / 200


@pytest.mark.parametrize("move", MOVES)
def test_a_known_transform_comes_back_within_a_millimetre(move):
    case = Case("x", {"FLAIR": flair(), "T1w": head("T1w", 9, moved=MOVES[move])[0]})
    images, matrices = register(case)
    assert mistakes(matrices["T1w"], MOVES[move]) < 1
    assert images["FLAIR"] is flair()
    assert np.allclose(images["T1w"].affine, np.linalg.inv(matrices["T1w"]) @ case.images["T1w"].affine)
    if move == "14 mm":
        assert np.array_equal(register(case)[1]["T1w"], matrices["T1w"])  # the same bits again


def test_oblique_thick_slices_are_registered():
    moved = head("T2w", 9, moved=MOVES["10 degrees"], **OBLIQUE)[0]
    assert mistakes(register(Case("x", {"FLAIR": flair(), "T2w": moved}))[1]["T2w"], MOVES["10 degrees"]) < 1


def dice(mask, truth):
    return 2 * (mask & truth).sum() / (mask.sum() + truth.sum())


def test_the_mask_is_that_of_aligned_images_and_the_file_resamples_in_itk(tmp_path):
    flair_image, lesions = head("FLAIR", 9)
    aligned, move = head("T1w", 9)[0], MOVES["14 mm"]
    nib.save(flair_image, tmp_path / "FLAIR.nii.gz")
    nib.save(head("T1w", 9, moved=move)[0], tmp_path / "T1w.nii.gz")
    model = segmenter(("FLAIR", "T1w"), threshold=1.5)
    files = [tmp_path / "FLAIR.nii.gz", tmp_path / "T1w.nii.gz"]
    with pytest.warns(DataWarning, match=r"the T1w image lies about 1[1-7] mm off the FLAIR .* give --register"):
        predict(model, files, tmp_path / "apart.nii.gz")
    found = predict(model, files, tmp_path / "sub_mask.nii.gz", register=True)
    assert found.warnings == ()
    assert dice(found.mask > 0, lesions) == dice(predict(model, [flair_image, aligned]).mask > 0, lesions) > 0.9

    name = "sub_from-T1w_to-FLAIR_xfm.tfm"
    told = json.loads((tmp_path / "sub_mask.json").read_text())
    assert (told["Transforms"], told["Warnings"]) == ({"T1w": name}, [])
    fixed, moving = (itk.ReadImage(str(file), itk.sitkFloat32) for file in files)
    brought = itk.GetArrayFromImage(itk.Resample(moving, fixed, itk.ReadTransform(str(tmp_path / name)))).T
    wanted = aligned.get_fdata()
    inside = wanted > 0
    assert np.corrcoef(brought[inside], wanted[inside])[0, 1] > 0.95
    assert np.corrcoef(itk.GetArrayFromImage(itk.Resample(moving, fixed)).T[inside], wanted[inside])[0, 1] < 0.8
    assert mistakes(found.transforms["T1w"], move) < 1

    for beside in ("sub_mask.nii.gz", "sub_mask.json"):
        (tmp_path / beside).unlink()
    with pytest.raises(ValueError, match=f"{name} exists"):
        predict(model, files, tmp_path / "sub_mask.nii.gz", register=True)


def test_both_further_contrasts_reach_the_network_in_their_place():
    images = heads(seed=9)
    moved = {**images, **{name: head(name, 9, moved=MOVES["14 mm"])[0] for name in ("T1w", "T2w")}}
    ensemble = Ensemble((segmenter(),))
    ready = ensemble.prepare(Case("x", moved), registered=True)
    wanted = ensemble.prepare(Case("x", images))
    seen, truth = (each.volumes[None][0].numpy() for each in (ready, wanted))
    assert ready.warnings == ()
    assert set(ready.transforms) == {"T1w", "T2w"}
    if seen.shape == truth.shape:
        assert all(np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.95 for one, other in zip(seen, truth, strict=True))


def test_a_transform_is_whole_or_not_there(tmp_path, monkeypatch):
    def full(transform, path):
        with open(path, "w") as file:
            file.write("half")
        raise OSError(28, "no space left")

    monkeypatch.setattr(itk, "WriteTransform", full)
    with pytest.raises(OSError, match="no space left"):
        registration.write_transform(np.eye(4), tmp_path / "a.tfm")
    assert list(tmp_path.iterdir()) == []


def test_what_fits_nowhere_better_is_left_by_its_header_and_told_of(monkeypatch):
    monkeypatch.setattr(registration, "_refined", lambda *args: rigid(shift=(60, 0, 0)))
    with pytest.warns(DataWarning, match="could not be registered to .*: nothing fits better than their headers"):
        _, matrices = register(Case("x", {"FLAIR": flair(), "T1w": head("T1w", 9)[0]}))
    assert np.array_equal(matrices["T1w"], np.eye(4))


def test_without_simpleitk_or_a_second_contrast_the_way_is_said_first(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="--register has nothing to do: the model takes FLAIR alone"):
        predict(segmenter(("FLAIR",)), "missing.nii.gz", register=True)

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(registration, "import_module", missing)
    with pytest.raises(ValueError, match=r"--register needs SimpleITK, which is not installed: pip install .*formats"):
        predict(segmenter(), ["a.nii.gz", "b.nii.gz", "c.nii.gz"], tmp_path / "m.nii.gz", register=True)


DATA = shared_data()


@pytest.mark.skipif(DATA is None, reason="the real scans, ../shared/data, are not there")
def test_real_sessions_lie_together_but_for_the_one_that_its_own_transform_says_is_off():
    folder = DATA / "ljubljana" / "longitudinal"
    first = sketch(nib.load(folder / "patient03" / "study2_FLAIR.nii.gz"))
    off = first.find(sketch(nib.load(folder / "patient03" / "study2_T1W.nii.gz")))  # 5.8 mm by the data set's transform
    assert off.is_apart()
    assert 4 < off.apart < 9
    assert not first.find(sketch(nib.load(folder / "patient03" / "study2_T2W.nii.gz"))).is_apart()  # 0.8 mm
