import json
import os
import shutil
import socket
import subprocess
import sys
import warnings

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage
from segment.bright import FP32, BrightOnFirst, segmenter, thresholded
from segment.heads import heads

from rsa_kernels import use_backend
from rsanet.checkpoints import save_model
from rsanet.network import RSANet
from rsanet.segment import prediction
from rsanet.segment import segmenter as segmenters
from rsanet.segment.checks import is_summary, summary
from rsanet.segment.data import preprocessing
from rsanet.segment.datasets import Case
from rsanet.segment.ensemble import Ensemble
from rsanet.segment.pairs import find_masks
from rsanet.segment.prediction import Options, lesion_mask, name_images, predict, predict_case
from rsanet.segment.report import draw_overlay
from rsanet.segment.segmenter import Segmenter, lesion_probability
from rsanet.segment.volumes import DataWarning


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
    predict(segmenter(), images, tmp_path / "mask.nii.gz")
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
    predict(segmenter(), images, tmp_path / "mask.nii.gz")
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
    predict(segmenter(), images, tmp_path / "mask.nii.gz")
    flair = nib.load(images["FLAIR"])
    assert np.array_equal(np.asarray(nib.load(tmp_path / "mask.nii.gz").dataobj), thresholded(flair))
    first_t1 = segmenter(("T1w", "FLAIR", "T2w"), threshold=-5.0)
    predict(first_t1, images, tmp_path / "coarse.nii.gz")
    assert nib.load(tmp_path / "coarse.nii.gz").shape == (13, 30, 8)


def test_a_model_with_its_own_spacing_still_answers_on_the_files_grid(tmp_path, phantoms):
    images = write_images(tmp_path, phantoms, np.diag([1.0, 1, 1, 1]))
    predict(segmenter(spacing=(0.8, 0.8, 0.8)), images, tmp_path / "mask.nii.gz")
    mask = np.asarray(nib.load(tmp_path / "mask.nii.gz").dataobj) > 0
    expected = thresholded(nib.load(images["FLAIR"]))
    assert mask.shape == expected.shape
    assert 2 * (mask & expected).sum() / (mask.sum() + expected.sum()) > 0.85


def test_counts_and_load_are_those_of_the_mask_by_its_header(tmp_path, phantoms):
    images = write_images(tmp_path, phantoms, oblique())
    found = predict(segmenter(), images, tmp_path / "mask.nii.gz")
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
        predict(soft, images, tmp_path / "mask.nii.gz", threshold=threshold, overwrite=True)
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
    images = [phantoms.image_path(cohort, "sub-001", name) for name in model.contrasts]
    predict(model, images, tmp_path / "mask.nii.gz")
    mask = np.asarray(nib.load(tmp_path / "mask.nii.gz").dataobj) > 0
    lesions = np.asarray(nib.load(phantoms.mask_path(cohort, "sub-001")).dataobj) > 0
    assert 2 * (mask & lesions).sum() / (mask.sum() + lesions.sum()) > 0.5
    with use_backend("reference"):
        assert "attention backend reference" in Ensemble((model,)).describe()


def test_the_window_can_be_chosen_at_prediction(trained):
    assert Segmenter.load(trained, roi=[24]).roi == (24, 24, 24)
    assert Segmenter.load(trained, roi=[8, 16, 24]).roi == (8, 16, 24)
    assert "window 8×16×24" in Ensemble.load(trained, roi=[8, 16, 24]).describe()
    with pytest.raises(ValueError, match="--roi is"):
        Segmenter.load(trained, roi=[0])


def test_a_network_that_train_did_not_make_is_refused(tmp_path):
    save_model(RSANet(3, 2, (8, 16)), tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="does not name its contrasts"):
        Segmenter.load(tmp_path / "bare.safetensors")


def test_images_are_named_in_the_models_order():
    case = name_images(("T2w", "FLAIR"), ["a.nii.gz", "b.nii.gz"])
    assert {name: path.name for name, path in case.images.items()} == {"T2w": "a.nii.gz", "FLAIR": "b.nii.gz"}
    with pytest.raises(ValueError, match="3 images, but this model wants 2: give T2w FLAIR"):
        name_images(("T2w", "FLAIR"), ["a", "b", "c"])


def test_nothing_is_left_behind_when_writing_fails(tmp_path, phantoms, monkeypatch):
    images = write_images(tmp_path / "in", phantoms, np.eye(4))
    (tmp_path / "out").mkdir()

    def disk_full(image, path):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(nib, "save", disk_full)
    with pytest.raises(OSError, match="no space"):
        predict(segmenter(), images, tmp_path / "out" / "mask.nii.gz")
    assert list((tmp_path / "out").iterdir()) == []


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
    ensemble = Ensemble((segmenter(),))
    ready = ensemble.prepare(Case("x", images, mask))
    with pytest.raises(ValueError, match="is an input of x"):
        predict_case(ensemble, ready, out, Options())
    assert target.read_bytes() == before


def test_a_network_that_gives_nan_gives_no_mask(tmp_path, phantoms):
    images = write_images(tmp_path, phantoms, np.eye(4))
    with pytest.raises(ValueError, match=r"the model gives .*FLAIR.nii.gz probabilities that are NaN"):
        predict(segmenter(threshold=np.nan), images, tmp_path / "mask.nii.gz")
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


def test_mirror_images_are_averaged():
    torch.manual_seed(0)
    network = RSANet(1, 2, (8, 16)).eval()
    image = torch.randn(1, 1, 8, 10, 12)
    with torch.inference_mode():
        seen = [
            torch.softmax(network(image.flip(axes)), 1)[:, 1:].flip(axes)
            for axes in ([], [2], [3], [4], [2, 3], [2, 4], [3, 4], [2, 3, 4])
        ]
    found = lesion_probability(network, image, (8, 10, 12), FP32, flips=True)
    assert torch.allclose(found, torch.stack(seen).mean(0), atol=1e-5)
    assert not torch.allclose(found, seen[0], atol=1e-3)


def test_smaller_lesions_are_removed_and_those_of_the_minimum_stay():
    probability = np.zeros((9, 9, 9), np.float32)
    probability[0, 0, :2] = probability[1, 1, 2] = 1  # three voxels, the last one touching by a corner
    probability[5, 5, :2] = 1
    mask, count = lesion_mask(probability, Options(min_lesion_mm3=0.9), voxel_mm3=0.3)
    assert count == 1
    assert mask.dtype == np.uint8
    assert np.array_equal(np.argwhere(mask), [[0, 0, 0], [0, 0, 1], [1, 1, 2]])
    assert lesion_mask(probability, Options(), voxel_mm3=0.3)[1] == 2
    assert lesion_mask(probability, Options(min_lesion_mm3=1), voxel_mm3=0.3)[1] == 0


def test_the_minimum_volume_is_one_by_the_header(tmp_path, phantoms):
    images = write_images(tmp_path, phantoms, np.diag([1.0, 1, 3, 1]))
    lesions = predict(segmenter(), images)
    assert lesions.load_mm3 == pytest.approx(int(lesions.mask.sum()) * 3)
    assert predict(segmenter(), images, min_lesion_mm3=lesions.load_mm3 + 1).load_mm3 == 0


def test_the_probability_map_lies_beside_the_mask_and_is_taken_for_none(tmp_path, phantoms):
    images = write_images(tmp_path / "in", phantoms, oblique())
    (tmp_path / "out").mkdir()
    for name, beside in (("sub-1_label-lesion_mask.nii.gz", "sub-1_label-lesion_probseg.nii.gz"), ("b.nii", None)):
        predict(segmenter(), images, tmp_path / "out" / name, probability_map=True)
        mask = nib.load(tmp_path / "out" / name)
        probability = nib.load(tmp_path / "out" / (beside or "b_probseg.nii"))
        assert probability.get_data_dtype() == np.float32
        assert np.array_equal(probability.affine, mask.affine)
        assert np.array_equal(np.asarray(probability.dataobj) > 0.5, np.asarray(mask.dataobj))
    assert {file.name for files in find_masks(tmp_path / "out").values() for file in files} == {
        "sub-1_label-lesion_mask.nii.gz",
        "b.nii",
    }


def test_the_preview_is_a_picture_beside_the_mask_that_names_its_contrast(tmp_path, phantoms, monkeypatch):
    images = write_images(tmp_path, phantoms, oblique())
    drawn = []

    def draw(*args, **words):
        drawn.append(words)
        return draw_overlay(*args, **words)

    monkeypatch.setattr(prediction, "draw_overlay", draw)
    predict(segmenter(("T1w",), -2.0), images["T1w"], tmp_path / "mask.nii.gz", preview=True)
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")
    assert drawn == [{"name": "T1w.nii.gz", "simulated": False, "contrast": "T1w"}]


@pytest.mark.parametrize("taken", ["mask.nii.gz", "mask_probseg.nii.gz", "mask.png"])
def test_what_exists_is_kept_and_nothing_computed_unless_it_may_be_replaced(tmp_path, phantoms, taken):
    images = write_images(tmp_path / "in", phantoms, np.eye(4))
    (tmp_path / taken).write_text("precious")
    model = segmenter()
    out = tmp_path / "mask.nii.gz"
    with pytest.raises(ValueError, match=f"{taken} exists"):
        predict("no model", images, out, probability_map=True, preview=True)
    assert (tmp_path / taken).read_text() == "precious"
    predict(model, images, out, probability_map=True, preview=True, overwrite=True)
    assert (tmp_path / taken).read_bytes() != b"precious"


def test_what_the_prediction_before_wrote_does_not_stay_beside_a_mask_that_takes_its_place(tmp_path, phantoms):
    images = write_images(tmp_path / "in", phantoms, np.eye(4))
    out = tmp_path / "mask.nii.gz"
    theirs = [tmp_path / "mask_probseg.nii.gz", tmp_path / "mask.png"]
    for path in (out, *theirs):
        path.write_text("of another program")
    predict(segmenter(), images, out, overwrite=True)
    assert all(path.exists() for path in theirs)  # no prediction of ours was there
    predict(segmenter(), images, out, probability_map=True, preview=True, overwrite=True)
    predict(segmenter(threshold=1.5), images, out, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "mask.json", "mask.nii.gz"]


def test_an_ensemble_takes_the_mean_each_model_with_its_own_order_and_voxel_size(tmp_path, phantoms):
    images = write_images(tmp_path, phantoms, np.eye(4))
    members = [segmenter(), segmenter(("T1w", "T2w", "FLAIR"), -1.0), segmenter(threshold=1.0, spacing=(1.5, 1.5, 1.5))]
    mean = predict(members, images).probability
    alone = [predict(members[0], images).probability, predict(members[2], images).probability]
    t1_first = {name: images[name] for name in ("T1w", "T2w", "FLAIR")}
    alone.append(predict(members[1], t1_first).probability)
    assert np.allclose(mean, np.mean(alone, axis=0), atol=1e-6)
    assert not np.allclose(mean, alone[0], atol=0.1)
    assert "mean of 3 models" in Ensemble(tuple(members)).describe()


def test_models_of_other_contrasts_make_no_ensemble():
    with pytest.raises(ValueError, match="the model takes FLAIR, but the model takes FLAIR T1w T2w: give models"):
        Ensemble((segmenter(), segmenter(("FLAIR",))))
    with pytest.raises(ValueError, match="There is no model"):
        Ensemble.load([])


def whole_brain_model(tmp_path):
    torch.manual_seed(0)
    extra = {"contrasts": ["FLAIR"], "roi": [8, 8, 8], "spacing": None}
    save_model(RSANet(1, 2, (8, 8, 16), dropout=0), tmp_path / "m.safetensors", extra)
    return Segmenter.load(tmp_path / "m.safetensors", device="cpu", precision="fp32", whole_brain=True)


def test_the_whole_brain_goes_through_the_network_at_once(tmp_path, phantoms):
    image = write_images(tmp_path, phantoms, np.eye(4))["FLAIR"]
    model, seen, lines = whole_brain_model(tmp_path), [], []
    model.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[2:]))
    predict(model, image, say=lines.append)
    assert seen == [(24, 28, 24)]  # multiples of four around the tissue, along z, y, x
    assert "images 26×30×24, window 24×28×24, the whole brain." in lines[0]


def test_where_the_whole_brain_does_not_fit_windows_are_taken_and_the_reason_said(tmp_path, phantoms, monkeypatch):
    image = write_images(tmp_path, phantoms, np.eye(4))["FLAIR"]
    monkeypatch.setattr(segmenters, "available_memory", lambda device: 2**20)
    lines = []
    found = predict(whole_brain_model(tmp_path), image, say=lines.append)
    assert found.windows[0].size == (8, 8, 8)
    assert "window 8×8×8, as the whole brain of 24×28×24 takes about 0.0 GiB and 0.0 GiB are free" in lines[0]


def test_images_in_memory_are_as_good_as_files(tmp_path, phantoms):
    files = write_images(tmp_path, phantoms, oblique())
    expected = predict(segmenter(), files)
    loaded = {name: nib.load(path) for name, path in files.items()}
    arrays = [loaded[name].get_fdata() for name in ("FLAIR", "T1w", "T2w")]
    for images, affine in (
        (list(loaded.values()), None),
        ({"t2": loaded["T2w"], "flair": loaded["FLAIR"], "t1": files["T1w"]}, None),
        (arrays, oblique()),
    ):
        found = predict(segmenter(), images, affine=affine)
        assert np.array_equal(found.mask, expected.mask)
        assert np.array_equal(found.probability, expected.probability)
        assert np.allclose(found.affine, oblique())
        assert (found.lesions, found.path) == (expected.lesions, None)
    assert np.array_equal(predict(segmenter(("FLAIR",)), arrays[0], affine=oblique()).mask, expected.mask)
    with pytest.raises(ValueError, match="FLAIR is an array without an affine"):
        predict(segmenter(), arrays)
    with pytest.raises(ValueError, match="no T2w: give FLAIR T1w T2w"):
        predict(segmenter(), {"FLAIR": arrays[0], "T1w": arrays[1]}, affine=oblique())
    for affine in (np.eye(3), np.zeros((4, 4)), np.full((4, 4), np.nan)):
        with pytest.raises(ValueError, match="The affine of FLAIR maps voxels to no place: give the 4×4 matrix"):
            predict(segmenter(), arrays, affine=affine)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_a_lack_of_memory_is_one_sentence(tmp_path, phantoms, error):
    images = write_images(tmp_path, phantoms, np.eye(4))
    model = segmenter()

    def fail(x):
        raise error

    model.network.forward = fail
    with pytest.raises(ValueError, match=r"FLAIR.nii.gz \(26×30×24\) does not fit into memory: give a smaller --roi"):
        predict(model, images)


class Trap:
    """A file appears when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["weights.pt", "weights.pth", "last.ckpt"])
def test_a_pickle_is_not_opened(tmp_path, name):
    torch.save({"state_dict": Trap(tmp_path / "sprung")}, tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name} is a PyTorch checkpoint, which can run code .*save_model"):
        Segmenter.load(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


ONE_PASS = """
import torch
from rsanet.network import RSANet
from rsanet.segment.environment import MEMORY_FORMAT, pick_precision
from rsanet.segment.memory import forward_bytes
status = lambda key: int(open("/proc/self/status").read().split(key)[1].split()[0]) * 1024
network = RSANet(1, 2, (32, 64, 128)).to(memory_format=MEMORY_FORMAT).eval()
with torch.inference_mode():
    network(torch.zeros(1, 1, 8, 8, 8).contiguous(memory_format=MEMORY_FORMAT))
    before = status("VmRSS:")
    network(torch.zeros(1, 1, *SIZE).contiguous(memory_format=MEMORY_FORMAT))
said = forward_bytes(network, SIZE, pick_precision("fp32", torch.device("cpu")))
print((status("VmHWM:") - before) / said)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system does not tell the peak in this way")
@pytest.mark.parametrize("size", [(64, 64, 64), (65, 65, 65), (64, 65, 64)])
def test_a_pass_takes_the_memory_that_is_said(size):
    program = f"SIZE = {size}\n{ONE_PASS}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 0.7 < float(done.stdout) < 1.15


def test_what_a_killed_run_left_half_written_is_removed(tmp_path, phantoms):
    dead = subprocess.Popen(["true"])
    dead.wait()
    host = socket.gethostname()
    images = write_images(tmp_path / "in", phantoms, np.eye(4))
    (tmp_path / f".partial-{host}-{dead.pid}-mask.nii.gz").write_text("half")
    others = [f".partial-{host}-{os.getpid()}-mask.nii.gz", f".partial-elsewhere-{dead.pid}-mask.nii.gz"]
    for name in others:
        (tmp_path / name).write_text("in work")
    predict(segmenter(), images, tmp_path / "b.nii.gz")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "b.json", "b.nii.gz", "in"])


def test_no_lesion_is_written_in_the_air(tmp_path, phantoms):
    images = write_images(tmp_path, phantoms, np.diag([1.0, 1, 2, 1]))
    everything = segmenter(threshold=-100.0)
    with pytest.warns(
        DataWarning,
        match=rf"^{tmp_path}.*FLAIR.nii.gz: (\d+) voxels outside the head were found to be lesion, and left",
    ):  # by its path, as all that is said of a file
        found = predict(everything, images, tmp_path / "mask.nii.gz", probability_map=True)
    assert found.case == images["FLAIR"].name
    flair = np.asarray(nib.load(images["FLAIR"]).dataobj)
    mask = np.asarray(nib.load(tmp_path / "mask.nii.gz").dataobj) > 0
    assert not mask[(flair == 0) & ~ndimage.binary_fill_holes(flair != 0)].any()
    assert mask[flair != 0].mean() > 0.99
    assert (found.lesions, found.load_mm3) == (1, 2 * mask.sum())
    assert found.probability[0, 0, 0] == 0  # what the network said stays in the map, as far as it looked
    assert (found.probability > 0.5).sum() > mask.sum()
    said = json.loads((tmp_path / "mask.json").read_text())
    assert tuple(said["Warnings"]) == found.warnings
    assert f"{(found.probability > 0.5).sum() - mask.sum()} voxels" in found.warnings[-1]


def test_a_lesion_that_is_whole_within_the_head_stays_as_it_is(tmp_path, phantoms):
    images = write_images(tmp_path, phantoms, np.eye(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = predict(segmenter(), images)
    assert np.array_equal(found.mask, thresholded(nib.load(images["FLAIR"])))
    assert found.warnings == ()


@pytest.fixture(scope="module")
def of_brains():
    looks = [preprocessing(looked=True)(Case("x", heads(seed=seed)))["look"] for seed in (1, 2)]
    return segmenter(threshold=2.0, trained_on=summary(looks))


def test_a_head_with_skull_and_exchanged_contrasts_are_told_of(of_brains, tmp_path):
    images = heads(seed=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert predict(of_brains, images).warnings == ()
    with pytest.warns(
        DataWarning, match="the subject: the images show a head with its skull, but the model was trained"
    ):
        found = predict(of_brains, heads(seed=9, skull=True), tmp_path / "mask.nii.gz")
    assert len(found.warnings) == 1
    assert json.loads((tmp_path / "mask.json").read_text())["Warnings"] == list(found.warnings)
    swapped = [images["T1w"], images["FLAIR"], images["T2w"]]
    with pytest.warns(DataWarning, match="given as FLAIR looks like T1w and the image given as T1w looks like FLAIR"):
        predict(of_brains, swapped)
    members = [of_brains, segmenter(("T2w", "FLAIR", "T1w"), 2.0)]  # of an older version, which says nothing
    with pytest.warns(DataWarning, match="given as FLAIR looks like T1w"):
        assert len(predict(members, swapped).warnings) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predict(segmenter(threshold=2.0), heads(seed=9, skull=True))


def test_a_trained_model_knows_its_training_images(trained):
    model = Segmenter.load(trained)
    assert is_summary(model.trained_on, 3)
    for name in ("last", "ema"):
        assert Segmenter.load(trained / f"{name}.safetensors").trained_on == model.trained_on


def test_what_a_model_file_says_of_its_training_images_is_checked(tmp_path):
    save_model(RSANet(2, 2, (8, 16)), tmp_path / "m.safetensors", {**GOOD, "trained_on": {"skull_stripped": True}})
    with pytest.raises(ValueError, match=r"m\.safetensors has words on its training images"):
        Segmenter.load(tmp_path / "m.safetensors")
