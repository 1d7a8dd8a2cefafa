import os
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from rsa_kernels import use_backend
from rsanet.checkpoints import save_model
from rsanet.network import RSANet
from rsanet.segment.datasets import Case
from rsanet.segment.environment import pick_precision
from rsanet.segment.prediction import (
    Segmenter,
    lesion_probability,
    name_images,
    predict_case,
    predict_cohort,
)

CPU = torch.device("cpu")
FP32 = pick_precision("fp32", CPU)


class BrightOnFirst(nn.Module):
    """A network whose lesions are the voxels brighter than a threshold on the first channel."""

    def __init__(self, threshold):
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(threshold))

    def forward(self, x):
        logit = 40 * (x[:, :1] - self.threshold)
        return torch.cat([-logit, logit], dim=1)


def segmenter(contrasts=("FLAIR", "T1w", "T2w"), threshold=1.2, spacing=None):
    return Segmenter(BrightOnFirst(threshold), contrasts, (16, 16, 16), spacing, CPU, FP32)


def thresholded(image, threshold=1.2):
    """What `BrightOnFirst` has to give on the file's own grid."""
    voxels = np.asarray(image.dataobj, dtype=np.float32)
    tissue = voxels[voxels != 0]
    return (voxels - tissue.mean()) / tissue.std() > threshold


def oblique():
    """A rotated, anisotropic affine, nearest to right-anterior-superior."""
    turn, _ = np.linalg.qr(np.array([[0.98, 0.1, -0.05], [-0.12, 0.97, 0.2], [0.07, -0.2, 0.95]]))
    affine = np.eye(4)
    affine[:3, :3] = turn * np.sign(np.diag(turn)) @ np.diag([0.9, 1.1, 3.0])
    affine[:3, 3] = [-80, 33, 12]
    return affine


def reorient(path, codes):
    """Stores the same image with other axis directions."""
    image = nib.load(path)
    turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(codes))
    turned = image.as_reoriented(turn)
    nib.save(nib.Nifti1Image(turned.get_fdata(dtype=np.float32), turned.affine), path)


def write_images(folder, phantoms, affine, seed=3):
    images, _ = phantoms.make_subject(seed)
    return {name: phantoms.save(folder / f"{name}.nii.gz", image, affine) for name, image in images.items()}


@pytest.mark.parametrize("codes", ["RAS", "LAS", "PSR", "SLA"])
def test_the_mask_lies_on_the_first_images_voxels_whatever_its_orientation(tmp_path, phantoms, codes):
    images = write_images(tmp_path, phantoms, oblique())
    for path in images.values():
        reorient(path, codes)
    predict_case(segmenter(), Case("x", images), tmp_path / "mask.nii.gz")
    mask, flair = nib.load(tmp_path / "mask.nii.gz"), nib.load(images["FLAIR"])
    assert "".join(nib.aff2axcodes(flair.affine)) == codes
    assert mask.shape == flair.shape
    assert np.array_equal(mask.affine, flair.affine)
    assert np.asarray(mask.dataobj).any()
    assert np.array_equal(np.asarray(mask.dataobj), thresholded(flair))


def test_the_mask_keeps_the_header_and_is_uint8(tmp_path, phantoms):
    images = write_images(tmp_path, phantoms, oblique())
    flair = nib.load(images["FLAIR"])
    flair = nib.Nifti1Image(np.asarray(flair.dataobj), flair.affine, flair.header)
    flair.set_qform(flair.affine, 1)
    flair.set_sform(flair.affine, 2)
    flair.header["descrip"] = b"scanner words"
    flair.header.set_xyzt_units("mm", "sec")
    nib.save(flair, images["FLAIR"])
    predict_case(segmenter(), Case("x", images), tmp_path / "mask.nii.gz")
    before, after = nib.load(images["FLAIR"]).header, nib.load(tmp_path / "mask.nii.gz").header
    assert after.get_data_dtype() == np.uint8
    assert after.get_slope_inter() == (None, None) or after.get_slope_inter() == (1, 0)
    for key in (
        "pixdim",
        "qform_code",
        "sform_code",
        "srow_x",
        "srow_y",
        "srow_z",
        "quatern_b",
        "descrip",
        "xyzt_units",
    ):
        assert np.array_equal(before[key], after[key]), key


def test_contrasts_on_other_grids_are_brought_to_the_first(tmp_path, phantoms):
    images = write_images(tmp_path, phantoms, np.eye(4))
    t1 = nib.load(images["T1w"])
    phantoms.save(images["T1w"], np.asarray(t1.dataobj)[::2, :, ::3], np.diag([2.0, 1, 3, 1]))
    predict_case(segmenter(), Case("x", images), tmp_path / "mask.nii.gz")
    flair = nib.load(images["FLAIR"])
    assert np.array_equal(np.asarray(nib.load(tmp_path / "mask.nii.gz").dataobj), thresholded(flair))
    first_t1 = segmenter(("T1w", "FLAIR", "T2w"), threshold=-5.0)
    predict_case(first_t1, Case("x", images), tmp_path / "coarse.nii.gz")
    assert nib.load(tmp_path / "coarse.nii.gz").shape == (13, 30, 8)


def test_a_model_with_its_own_spacing_still_answers_on_the_files_grid(tmp_path, phantoms):
    images = write_images(tmp_path, phantoms, np.diag([1.0, 1, 1, 1]))
    predict_case(segmenter(spacing=(0.8, 0.8, 0.8)), Case("x", images), tmp_path / "mask.nii.gz")
    mask = np.asarray(nib.load(tmp_path / "mask.nii.gz").dataobj) > 0
    expected = thresholded(nib.load(images["FLAIR"]))
    assert mask.shape == expected.shape
    assert 2 * (mask & expected).sum() / (mask.sum() + expected.sum()) > 0.85


def test_counts_and_load_are_those_of_the_mask_by_its_header(tmp_path, phantoms):
    images = write_images(tmp_path, phantoms, oblique())
    found = predict_case(segmenter(), Case("x", images), tmp_path / "mask.nii.gz")
    mask = nib.load(tmp_path / "mask.nii.gz")
    assert found.load_mm3 == pytest.approx(np.asarray(mask.dataobj).sum() * 0.9 * 1.1 * 3.0, abs=0.1)
    assert found.lesions >= 1
    assert found.backend == "none"


def test_the_threshold_is_applied_to_the_probability(tmp_path, phantoms):
    images = write_images(tmp_path, phantoms, np.eye(4))
    soft = segmenter()
    soft.network.forward = lambda x: torch.stack([torch.zeros_like(x[:, 0]), torch.full_like(x[:, 0], 0.4)], 1)
    p = float(torch.sigmoid(torch.tensor(0.4)))
    for threshold, everything in ((p - 0.01, True), (p + 0.01, False)):
        predict_case(soft, Case("x", images), tmp_path / "mask.nii.gz", threshold=threshold)
        assert np.asarray(nib.load(tmp_path / "mask.nii.gz").dataobj).any() == everything


@pytest.mark.parametrize("size", [(16, 16, 16), (9, 20, 37)])
def test_windows_cover_volumes_of_any_size(size):
    image = torch.randn(1, 1, *size, generator=torch.Generator().manual_seed(0))
    probability = lesion_probability(BrightOnFirst(0.3), image, (16, 16, 16), FP32)
    assert probability.shape == (1, 1, *size)
    assert torch.equal(probability > 0.5, image > 0.3)


def test_the_model_file_alone_predicts(trained, cohort, phantoms, tmp_path):
    moved = tmp_path / "elsewhere.safetensors"
    shutil.copy(trained / "model.safetensors", moved)
    model = Segmenter.load(moved)
    assert model.contrasts == ("FLAIR", "T1w", "T2w")
    assert model.roi == (16, 16, 16)
    case = Case("x", {name: phantoms.image_path(cohort, "sub-001", name) for name in model.contrasts})
    predict_case(model, case, tmp_path / "mask.nii.gz")
    mask = np.asarray(nib.load(tmp_path / "mask.nii.gz").dataobj) > 0
    lesions = np.asarray(nib.load(phantoms.mask_path(cohort, "sub-001")).dataobj) > 0
    assert 2 * (mask & lesions).sum() / (mask.sum() + lesions.sum()) > 0.5
    with use_backend("reference"):
        assert "attention backend reference" in model.describe()


def test_the_window_can_be_chosen_at_prediction(trained):
    assert Segmenter.load(trained, roi=[24]).roi == (24, 24, 24)
    assert Segmenter.load(trained, roi=[8, 16, 24]).roi == (8, 16, 24)
    assert "window 8×16×24" in Segmenter.load(trained, roi=[8, 16, 24]).describe()
    with pytest.raises(ValueError, match="--roi is"):
        Segmenter.load(trained, roi=[0])


def test_a_network_that_train_did_not_make_is_refused(tmp_path):
    save_model(RSANet(3, 2, (8, 16)), tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="does not name its contrasts"):
        Segmenter.load(tmp_path / "bare.safetensors")


def test_images_are_named_in_the_models_order():
    case = name_images(segmenter(("T2w", "FLAIR")), ["a.nii.gz", "b.nii.gz"])
    assert {name: path.name for name, path in case.images.items()} == {"T2w": "a.nii.gz", "FLAIR": "b.nii.gz"}
    with pytest.raises(ValueError, match="3 images, but this model wants 2: give T2w FLAIR"):
        name_images(segmenter(("T2w", "FLAIR")), ["a", "b", "c"])


def test_nothing_is_left_behind_when_writing_fails(tmp_path, phantoms, monkeypatch):
    images = write_images(tmp_path / "in", phantoms, np.eye(4))
    (tmp_path / "out").mkdir()

    def disk_full(image, path):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(nib, "save", disk_full)
    with pytest.raises(OSError, match="no space"):
        predict_case(segmenter(), Case("x", images), tmp_path / "out" / "mask.nii.gz")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_cohort_is_predicted_past_a_bad_case(tmp_path, phantoms):
    root = phantoms.write_cohort(tmp_path / "data", 3)
    phantoms.image_path(root, "sub-002", "T1w").write_text("no image")
    predictions, failures = predict_cohort(segmenter(), root, tmp_path / "out")
    assert [row.case for row in predictions] == ["sub-001", "sub-003"]
    assert list(failures) == ["sub-002"]
    assert "T1w" in failures["sub-002"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "predictions.csv",
        "sub-001_label-lesion_mask.nii.gz",
        "sub-003_label-lesion_mask.nii.gz",
    ]
    table = (tmp_path / "out" / "predictions.csv").read_text().splitlines()
    assert table[0] == "case,mask,lesions,load_mm3,seconds,backend"
    assert [line.split(",")[0] for line in table[1:]] == ["sub-001", "sub-003"]


def test_attention_maps_are_of_the_window_around_the_largest_lesion(trained, cohort, phantoms):
    model = Segmenter.load(trained, roi=[8, 16, 24])
    case = Case(
        "x",
        {name: phantoms.image_path(cohort, "sub-001", name) for name in model.contrasts},
        phantoms.mask_path(cohort, "sub-001"),
    )
    seen = []
    model.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    maps = model.attention_maps(case)
    assert {axis: values.shape for axis, values in maps.items()} == {
        "coronal": (8, 8),
        "sagittal": (12, 12),
        "axial": (4, 4),
    }
    assert all(np.allclose(values.sum(1), 1, atol=1e-5) for values in maps.values())
    assert seen[0].shape == (1, 3, 8, 16, 24)
    assert seen[0][0, 0, 3:5, 7:9, 11:13].max() > 1  # a lesion is bright on FLAIR


@pytest.mark.parametrize("which", ["T1w", "mask"])
def test_an_input_is_never_overwritten(tmp_path, phantoms, which):
    images = write_images(tmp_path / "in", phantoms, np.eye(4))
    mask = phantoms.save(tmp_path / "in" / "mask.nii.gz", phantoms.make_subject(3)[1])
    target = {**images, "mask": mask}[which]
    before = target.read_bytes()
    out = tmp_path / "in" / ".." / "in" / target.name
    with pytest.raises(ValueError, match="is an input of x"):
        predict_case(segmenter(), Case("x", images, mask), out)
    assert target.read_bytes() == before


def test_a_network_that_gives_nan_gives_no_mask(tmp_path, phantoms):
    images = write_images(tmp_path, phantoms, np.eye(4))
    with pytest.raises(ValueError, match="the model gives x probabilities that are NaN"):
        predict_case(segmenter(threshold=np.nan), Case("x", images), tmp_path / "mask.nii.gz")
    assert not (tmp_path / "mask.nii.gz").exists()


GOOD = {"contrasts": ["FLAIR", "T1w"], "roi": [16, 16, 16], "spacing": None}


@pytest.mark.parametrize(
    ("change", "classes", "reason"),
    [
        ({}, 3, "3 output channels"),
        ({"contrasts": ["FLAIR"]}, 2, "2 input channels"),
        ({"contrasts": ["FLAIR", "FLAIR"]}, 2, "2 input channels"),
        ({"contrasts": "FT"}, 2, "not a list of names"),
        ({"roi": [16, 16]}, 2, "not three sizes"),
        ({"roi": [16, 16, 0]}, 2, "not three sizes"),
        ({"roi": [16, 16, 1.5]}, 2, "not three sizes"),
        ({"spacing": [1, 1]}, 2, "not three sizes in mm"),
        ({"spacing": [1, 1, -1.0]}, 2, "not three sizes in mm"),
        ({"spacing": "1 mm"}, 2, "not three sizes in mm"),
    ],
)
def test_a_model_file_that_contradicts_itself_is_refused(tmp_path, change, classes, reason):
    save_model(RSANet(2, classes, (8, 16)), tmp_path / "m.safetensors", {**GOOD, **change})
    with pytest.raises(ValueError, match=rf"m\.safetensors has .*{reason}"):
        Segmenter.load(tmp_path / "m.safetensors")


def test_weights_in_half_precision_are_computed_in_single(tmp_path):
    save_model(RSANet(2, 2, (8, 16)).half(), tmp_path / "m.safetensors", GOOD)
    model = Segmenter.load(tmp_path / "m.safetensors", device="cpu")
    assert {parameter.dtype for parameter in model.network.parameters()} == {torch.float32}


def test_an_output_folder_is_checked_before_any_image_is_read(tmp_path, phantoms, monkeypatch):
    root = phantoms.write_cohort(tmp_path / "data", 2)
    (tmp_path / "out").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "out" and access(path, mode))
    seen = []
    with pytest.raises(ValueError, match="not writable"):
        predict_cohort(segmenter(), root, tmp_path / "out", progress=lambda *args: seen.append(args))
    assert not seen
