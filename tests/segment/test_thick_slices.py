"""Scans of few thick slices: how unequal voxels are augmented, and that the way to a mask is the usual one."""

import json
import re

import nibabel as nib
import numpy as np
import pytest
import torch

from rsanet.segment import environment
from rsanet.segment.data import patch_transforms, rotations

THICK = (5.0, 1.0, 1.0)  # along z, y, x


@pytest.fixture
def thick(tmp_path, phantoms):
    """Three subjects of 24 slices of 5 mm, with voxels of 1 mm in them."""
    for number in (1, 2, 3):
        images, lesions = phantoms.make_subject(number, (40, 44, 24))
        affine = np.diag([1.0, 1.0, 5.0, 1.0])
        for name, image in images.items():
            phantoms.save(tmp_path / "data" / f"P{number}" / f"{name}.nii.gz", image, affine)
        phantoms.save(tmp_path / "data" / f"P{number}" / "mask.nii.gz", lesions, affine, np.uint8)
    return tmp_path / "data"


def test_turns_stay_within_a_slice_of_where_thick_slices_lie():
    about_z, about_y, about_x = rotations(THICK)
    assert about_z == 0.3
    assert rotations((1.0, 1.0, 1.0)) == (0.3, 0.3, 0.3)
    assert about_y == about_x
    assert 50 * np.sin(about_x) < 1, "50 mm from the middle, a turn is off by less than a slice"


@pytest.mark.parametrize(("spacing", "moves"), [(THICK, False), ((1.0, 1.0, 1.0), True)])
def test_augmentation_moves_no_lesion_into_another_thick_slice(spacing, moves):
    mask = torch.zeros(1, 16, 48, 48)
    mask[:, 8, 8:40, 8:40] = 1
    cut = patch_transforms((16, 48, 48), spacing=spacing)
    names = [type(step).__name__ for step in cut.transforms]
    assert ("OneOf" in names) == moves  # what bends, in all directions alike
    data = {"image": mask.clone(), "mask": mask, "case": "P1"}
    indices = {"mask_fg_indices": mask.flatten().nonzero().flatten(), "mask_bg_indices": torch.tensor([0])}
    far = 0
    for seed in range(60):
        cut.set_random_state(seed)
        patch = cut({**data, **{name: values.numpy() for name, values in indices.items()}})[0]
        slices = np.flatnonzero(np.asarray(patch["mask"]).any((0, 2, 3)))
        far = max(far, int(np.ptp(slices)) if slices.size else 0)
    assert (far > 4) == moves


def test_a_cohort_of_thick_slices_trains_and_predicts_on_its_own_grid(thick, tmp_path, rsanet):
    options = ["--steps", "1", "--channels", "8", "8", "8", "8", "--dropout", "0"]
    code, out, err = rsanet("train", thick, "-o", tmp_path / "run", *options)
    assert (code, err) == (0, "")
    patch = [int(size) for size in re.search(r"patch (\d+)×(\d+)×(\d+)", out).groups()]
    assert patch[0] == 24, "every slice, where that costs little"
    images = [thick / "P1" / f"{name}.nii.gz" for name in ("FLAIR", "T1w", "T2w")]
    code, _, err = rsanet("predict", tmp_path / "run", "-i", *images, "-o", tmp_path / "m.nii.gz")
    assert code == 0
    assert all("found to be lesion, and left out" in line for line in err.splitlines())  # in the air, after one step
    mask = nib.load(tmp_path / "m.nii.gz")
    assert mask.shape == (40, 44, 24)
    said = json.loads((tmp_path / "m.json").read_text())
    assert said["VoxelSize"] == [1.0, 1.0, 5.0]
    assert said["LesionLoad"] == 5 * np.count_nonzero(np.asarray(mask.dataobj))


def test_a_model_of_thick_slices_is_not_given_thin_ones_without_a_word(thick, cohort, phantoms, tmp_path, rsanet):
    options = ["--steps", "1", "--channels", "8", "8", "--dropout", "0", "--patch", "8", "--contrasts", "FLAIR"]
    assert rsanet("train", thick, "-o", tmp_path / "run", *options)[0] == 0
    flair = phantoms.image_path(cohort, "sub-001")
    code, _, err = rsanet("predict", tmp_path / "run", "-i", flair, "-o", tmp_path / "m.nii.gz")
    assert code == 0
    assert f"{flair} has voxels of 1×1×1 mm along z, y, x, and {tmp_path / 'run'}" in err
    assert "saw voxels of 5×1×1 mm: its masks may be poor" in err
    assert rsanet("train", thick, "-o", tmp_path / "even", *options, "--spacing", "2")[0] == 0
    code, _, err = rsanet("predict", tmp_path / "even", "-i", flair, "-o", tmp_path / "n.nii.gz")
    assert code == 0
    assert "saw voxels" not in err


def test_a_patch_that_leaves_attention_a_single_slice_is_remarked(thick, tmp_path, rsanet):
    options = ["--steps", "1", "--channels", "8", "8", "8", "--dropout", "0", "--patch", "4", "16", "16"]
    code, _, err = rsanet("train", thick, "-o", tmp_path / "run", *options)
    assert code == 0
    assert "warning: a patch of 4×16×16 is one voxel wide at the coarsest of 3 levels" in err


def test_where_bf16_is_wrong_shallow_patches_train_in_fp32_and_say_so(thick, tmp_path, rsanet, monkeypatch):
    monkeypatch.setattr(environment, "has_bf16_instructions", lambda device: True)
    monkeypatch.setattr(environment, "shallow_gradient_is_wrong", lambda: True)
    options = ["--steps", "1", "--channels", "8", "8", "8", "--dropout", "0", "--patch", "8", "16", "16"]
    code, out, err = rsanet("train", thick, "-o", tmp_path / "run", *options)
    assert (code, err) == (0, "")
    assert "precision fp32 (a patch of 8 slices has wrong gradients in this CPU's bf16)" in out
    code, _, err = rsanet("train", thick, "-o", tmp_path / "other", *options, "--precision", "bf16")
    assert code == 1
    assert "this CPU's bf16 convolutions give wrong gradients" in err
