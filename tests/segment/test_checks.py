import functools
import itertools
import json

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from segment.heads import heads
from support import shared_data

from rsanet.segment.cases import Case
from rsanet.segment.checks import best_order, doubts, edges, is_summary, reordered, shell_of, summary
from rsanet.segment.data import preprocessing

CONTRASTS = ("FLAIR", "T1w", "T2w")
SKULL, BRAIN = (
    "show a head with its skull, but run was trained on skull-stripped",
    "show a skull-stripped brain, but run",
)


def looked(images, **options):
    return preprocessing(looked=True, **options)(Case("x", images))["look"]


@pytest.fixture(scope="module")
def stripped():
    return summary([looked(heads(seed=seed)) for seed in (1, 2, 3)])


@pytest.fixture(scope="module")
def whole():
    return summary([looked(heads(seed=seed, skull=True)) for seed in (1, 2, 3)])


def said(found, trained, contrasts=CONTRASTS):
    return list(doubts(found, trained, contrasts, "run"))


@functools.cache
def plain(skull=False):
    return heads(seed=9, skull=skull)


def changed(images, change):
    return {name: nib.Nifti1Image(change(image.get_fdata(dtype=np.float32).copy()), image.affine)
            for name, image in images.items()}  # fmt: skip


def offset(voxels):
    return voxels + 300


def integers(voxels):
    return np.round(voxels / 4).astype(np.int16)


def one_negative(voxels):
    voxels[0, 0, 0] = -0.5
    return voxels


def cut(voxels):
    return voxels[:, :, 12:26]


def tight(voxels):
    return voxels[ndimage.find_objects((voxels > 200).astype(int))[0]]


def air(voxels):
    rng = np.random.default_rng(0)
    return np.hypot(voxels + 10 * rng.standard_normal(voxels.shape), 10 * rng.standard_normal(voxels.shape))


def shaded(voxels):
    """As of a coil near the surface: half as bright again at the rim."""
    places = np.moveaxis(np.indices(voxels.shape), 0, -1) - (np.array(voxels.shape) - 1) / 2
    return voxels * (1 + 0.5 * (np.linalg.norm(places, axis=-1) / (max(voxels.shape) / 2)) ** 2)


@pytest.mark.parametrize("change", [np.asarray, offset, integers, one_negative, cut, tight, air, shaded])
def test_a_head_with_skull_is_told_from_a_stripped_brain_however_it_is_stored(stripped, whole, change):
    brain, head = looked(changed(plain(), change)), looked(changed(plain(skull=True), change))
    assert said(brain, stripped) == []
    assert len(said(head, stripped)) == 1
    assert SKULL in said(head, stripped)[0]
    if change not in (cut, tight):  # too little of a scalp is left for a model of whole heads to be compared with
        assert said(head, whole) == []
    assert len(said(brain, whole)) == 1
    assert BRAIN in said(brain, whole)[0]


@pytest.mark.parametrize("options", [{"spacing": 2.5}, {"scale": 0.75}, {"noise": 0.06}])
def test_the_size_of_voxels_and_heads_and_noise_change_nothing(stripped, whole, options):
    brain, head = looked(heads(seed=9, **options)), looked(heads(seed=9, skull=True, **options))
    assert said(brain, stripped) == []
    assert SKULL in said(head, stripped)[0]
    assert BRAIN in said(brain, whole)[0]
    assert said(head, whole) == []


def around(voxels, first, last, value=1.0):
    """A shell of one brightness, by how many voxels it begins and ends beyond the brain."""
    brain = ndimage.binary_fill_holes(voxels > 0)
    far = ndimage.distance_transform_edt(~brain)
    voxels[(far > first) & (far <= last)] = value * np.percentile(voxels[brain], 95)
    return air(voxels)


@pytest.mark.parametrize(("first", "last", "value"), [(0, 1, 1.0), (0, 2, 1.5), (1, 2, 1.0), (2, 4, 0.6)])
def test_any_bright_shell_around_a_brain_is_told_of(stripped, first, last, value):
    found = said(looked(changed(plain(), lambda voxels: around(voxels, first, last, value))), stripped)
    assert len(found) == 1
    assert SKULL in found[0]


@pytest.mark.parametrize("scores", ["mean", "median", "white matter"])
def test_scores_of_a_brain_with_0_around_it_are_no_skull(stripped, scores):
    def scored(voxels):
        brain = voxels[voxels != 0]
        counts, values = np.histogram(brain, 100)
        middle = {"mean": brain.mean(), "median": np.median(brain), "white matter": values[counts.argmax()]}[scores]
        return np.where(voxels != 0, (voxels - middle) / brain.std(), 0)

    found = looked(changed(plain(), scored))
    assert said(found, stripped) == []
    assert said(reordered(found, (1, 0, 2)), stripped)[0].startswith("the image given as FLAIR looks like T1w")
    assert summary([found])["skull_stripped"] is None


def test_a_few_remains_of_a_skull_are_not_told_of(stripped):
    def remains(voxels):
        far = ndimage.distance_transform_edt(voxels == 0) + ndimage.distance_transform_edt(voxels > 0)
        place = np.indices(voxels.shape)
        left = (voxels == 0) & (far > 1) & (far < 3) & (place[2] > 0.7 * voxels.shape[2])
        voxels[left & (place[1] > 0.6 * voxels.shape[1])] = 900
        return voxels

    images = changed(plain(), remains)
    assert not np.array_equal(images["T1w"].dataobj, plain()["T1w"].dataobj)
    assert said(looked(images), stripped) == []


def test_training_images_of_both_kinds_and_a_head_that_does_not_tell_give_no_claim(stripped):
    both = summary([looked(heads(seed=seed, skull=seed > 1)) for seed in (1, 2)])
    assert both["skull_stripped"] is None
    assert said(looked(plain()), both) == said(looked(plain(skull=True)), both) == []
    nothing = {**looked(plain()), "shell": [None] * 3}
    assert shell_of(nothing) is None
    assert list(doubts(nothing, stripped, CONTRASTS, "run")) == []


@pytest.mark.parametrize("skull", [False, True])
def test_contrasts_in_another_order_are_told_of_and_in_the_right_one_never(stripped, whole, skull):
    found, trained = looked(plain(skull)), whole if skull else stripped
    for order in itertools.permutations(range(3)):
        given = reordered(found, order)
        assert [order[number] for number in best_order(given, trained)] == [0, 1, 2]
        told = list(doubts(given, trained, CONTRASTS, "run"))
        assert len(told) == (order != (0, 1, 2))
    given = reordered(found, (1, 0, 2))
    assert list(doubts(given, trained, CONTRASTS, "run")) == [
        "the image given as FLAIR looks like T1w and the image given as T1w looks like FLAIR, by what run was trained "
        "on: check the order of -i, or the names of the files"
    ]
    (cycle,) = doubts(reordered(found, (1, 2, 0)), trained, CONTRASTS, "run")
    assert cycle.startswith(
        "the image given as FLAIR looks like T1w, the image given as T1w looks like T2w and the image given as T2w "
        "looks like FLAIR, by what run"
    )


def test_two_contrasts_and_many_are_compared_too(stripped):
    found, two = looked(heads(("FLAIR", "T1w"), seed=9)), summary([looked(heads(("FLAIR", "T1w"), seed=1))])
    assert best_order(found, two) == (0, 1)
    assert best_order(reordered(found, (1, 0)), two) == (1, 0)
    images = plain()
    many = {f"{name}{copy}": images[name] for copy in "ab" for name in CONTRASTS}
    six = looked(many)
    trained = summary([six])
    assert best_order(six, trained) == tuple(range(6))
    assert best_order(reordered(six, (1, 0, 2, 3, 4, 5)), trained) == (1, 0, 2, 3, 4, 5)


def test_a_contrast_alone_has_no_order_but_a_skull(stripped):
    one = summary([looked(heads(("FLAIR",), seed=seed)) for seed in (1, 2)])
    assert said(looked(heads(("FLAIR",), seed=9)), one, ("FLAIR",)) == []
    assert SKULL in said(looked(heads(("FLAIR",), seed=9, skull=True)), one, ("FLAIR",))[0]


def test_contrasts_that_are_alike_in_training_are_not_told_apart():
    images = [heads(("T1w",), seed=seed)["T1w"] for seed in (1, 2)]
    pairs = [{"T1w": image, "T1ce": nib.Nifti1Image(image.get_fdata() * 1.1, image.affine)} for image in images]
    trained = summary([looked(pairs[0])])
    assert best_order(reordered(looked(pairs[1]), (1, 0)), trained) == (0, 1)


def test_a_summary_travels_in_a_model_file_and_a_broken_one_is_known(stripped):
    again = json.loads(json.dumps(stripped, allow_nan=False))
    assert again == stripped
    assert is_summary(again, 3)
    assert not is_summary(again, 2)
    for broken in (None, "yes", {}, {**again, "rim": [[1.0]] * 3}, {**again, "skull_stripped": "no"}):
        assert not is_summary(broken, 3)


def test_a_tiny_image_gives_a_look_without_nan_in_a_file():
    found = looked({"FLAIR": nib.Nifti1Image(np.pad(np.ones((3, 3, 3), np.float32), 2) * 5, np.eye(4))})
    trained = summary([found])
    json.dumps(trained, allow_nan=False)
    assert is_summary(json.loads(json.dumps(trained)), 1)
    assert list(doubts(found, trained, ("FLAIR",), "run")) == []
    assert edges(found).shape == (1,)


DATA = shared_data()
REAL = pytest.mark.skipif(DATA is None, reason="the real scans, ../shared/data, are not there")


@REAL
def test_real_scans_are_told_apart():
    mni = DATA / "ljubljana" / "mni" / "patient26"
    brain = looked({"FLAIR": mni / "FLAIR.nii.gz", "T1w": mni / "T1.nii.gz"}, spacing=(2.0, 2.0, 2.0))
    folder = DATA / "ljubljana" / "longitudinal"
    head = looked(
        {"FLAIR": folder / "patient20" / "study2_FLAIR.nii.gz", "T1w": folder / "patient20" / "study2_T1W.nii.gz"}
    )
    of_brains, of_heads = summary([brain]), summary([head])
    assert (of_brains["skull_stripped"], of_heads["skull_stripped"]) == (True, False)
    assert shell_of(brain) < 0.1
    assert shell_of(head) > 0.3
    assert SKULL in next(doubts(head, of_brains, ("FLAIR", "T1w"), "run"))
    assert BRAIN in next(doubts(brain, of_heads, ("FLAIR", "T1w"), "run"))
    for found, trained in ((brain, of_brains), (head, of_heads)):
        assert list(doubts(found, trained, ("FLAIR", "T1w"), "run")) == []
        assert best_order(reordered(found, (1, 0)), trained) == (1, 0)
