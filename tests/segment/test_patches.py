import numpy as np
import pytest
import torch

from rsanet.segment.data import patch_transforms, preparing_to_train
from rsanet.segment.datasets import find_cases
from rsanet.segment.patches import Patches, choose_patch

PUBLISHED = (32, 64, 128, 256, 512)
PLENTY = 2**40


@pytest.fixture(scope="module")
def volumes(cohort):
    prepare = preparing_to_train()
    return [prepare(case) for case in find_cases(cohort, require_mask=True)[:3]]


def equal(one, other):
    return one["case"] == other["case"] and torch.equal(one["image"], other["image"])


def dealt(volumes, *, seed=0, batch=2, steps=range(12), rank=0, world=1, augment=True):
    patches = Patches(volumes, patch_transforms((8, 8, 8), augment=augment), seed, batch, steps, rank, world)
    return [patches[index] for index in range(len(patches))]


def test_half_of_the_patches_hold_lesion_and_all_follow_the_seed(volumes):
    first, again, other = (dealt(volumes, seed=seed, steps=range(15)) for seed in (1, 1, 2))
    assert all(patch["image"].shape == (3, 8, 8, 8) for patch in first)
    assert all(equal(*pair) for pair in zip(first, again, strict=True))
    assert not all(equal(*pair) for pair in zip(first, other, strict=True))
    assert sum(bool(patch["mask"].any()) for patch in first) >= 15


def test_each_patch_of_a_case_is_another(volumes):
    patches = dealt(volumes, augment=False)
    for name in {patch["case"] for patch in patches}:
        seen = {patch["image"].numpy().tobytes() for patch in patches if patch["case"] == name}
        assert len(seen) > 4


def test_no_case_is_seen_again_before_all_were(volumes):
    names = [patch["case"] for patch in dealt(volumes)]
    turns = [names[start : start + 3] for start in range(0, 24, 3)]
    assert all(len(set(turn)) == 3 for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 1


def test_a_run_taken_up_again_sees_what_it_would_have_seen(volumes):
    assert all(equal(*pair) for pair in zip(dealt(volumes)[10:], dealt(volumes, steps=range(5, 12)), strict=True))


def test_processes_share_the_batch_of_one(volumes):
    alone = dealt(volumes, batch=4, steps=range(3))
    first, second = (dealt(volumes, batch=4, steps=range(3), rank=rank, world=2) for rank in (0, 1))
    shared = [patch for step in range(3) for part in (first, second) for patch in part[2 * step : 2 * step + 2]]
    assert all(equal(*pair) for pair in zip(alone, shared, strict=True))


def test_augmentation_leaves_the_prepared_volumes_alone(volumes):
    before = [volume["image"].clone() for volume in volumes]
    dealt(volumes, steps=range(60))
    assert all(torch.equal(volume["image"], image) for volume, image in zip(volumes, before, strict=True))


def test_a_patch_without_augmentation_is_a_piece_of_its_volume(volumes):
    patch = dealt(volumes, steps=range(1), augment=False)[0]
    volume = next(volume for volume in volumes if volume["case"] == patch["case"])
    windows = volume["image"].unfold(1, 8, 1).unfold(2, 8, 1).unfold(3, 8, 1)
    same = (windows == patch["image"].reshape(3, 1, 1, 1, 8, 8, 8)).flatten(4).all(-1).all(0)
    assert int(same.sum()) >= 1


def test_augmentation_changes_what_is_seen_and_keeps_masks_binary(volumes):
    plain, augmented = dealt(volumes, augment=False), dealt(volumes)
    assert sum(not torch.equal(a["image"], b["image"]) for a, b in zip(plain, augmented, strict=True)) > 20
    assert all(set(patch["mask"].unique().tolist()) <= {0, 1} for patch in augmented)
    assert all(torch.isfinite(patch["image"]).all() for patch in augmented)


def test_a_volume_smaller_than_the_patch_is_padded(volumes):
    patch = patch_transforms((40, 32, 48))(volumes[0])[0]
    assert patch["image"].shape == (3, 40, 32, 48)
    assert patch["mask"].shape == (1, 40, 32, 48)


def test_a_case_without_lesions_gives_patches_too(volumes):
    empty = {**volumes[0], "mask_fg_indices": np.empty(0, np.int64), "mask": torch.zeros_like(volumes[0]["mask"])}
    assert not patch_transforms((8, 8, 8))(empty)[0]["mask"].any()


def test_few_centres_are_kept_of_the_many_without_lesion(cohort, monkeypatch):
    monkeypatch.setattr("rsanet.segment.data.CENTRES", 100)
    prepared = preparing_to_train()(find_cases(cohort, require_mask=True)[0])
    assert 100 <= len(prepared["mask_bg_indices"]) < 200
    assert len(prepared["mask_fg_indices"]) == prepared["mask"].sum()


@pytest.mark.parametrize(
    ("shape", "memory", "device", "patch"),
    [
        ((150, 180, 150), PLENTY, "cuda", (112, 144, 128)),
        ((150, 180, 150), PLENTY, "cpu", (64, 64, 64)),
        ((24, 400, 400), PLENTY, "cpu", (32, 80, 96)),  # of 16 slices, attention would see one
        ((12, 400, 400), PLENTY, "cpu", (16, 128, 128)),
        ((40, 44, 40), PLENTY, "cpu", (48, 48, 48)),
        ((150, 180, 150), 2 * 64 * 64 * 64 * 4300, "cuda", (64, 64, 64)),
        ((150, 180, 150), 1, "cuda", (16, 16, 16)),
    ],
)
def test_the_patch_fills_volume_memory_or_limit(shape, memory, device, patch):
    chosen = choose_patch([shape, shape], PUBLISHED, memory, 2, device)
    assert chosen == patch
    assert all(isinstance(size, int) for size in chosen)
