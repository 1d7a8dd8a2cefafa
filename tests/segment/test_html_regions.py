"""Where lesions lie, told on a brain that is built for it and on a simulated one, and the sentence where it is not."""

import nibabel as nib
import numpy as np
import pytest

from rsanet.segment.html.lesions import components
from rsanet.segment.html.regions import NO_T1W, REGIONS, tell_regions
from rsanet.segment.metrics import label_lesions
from rsanet.segment.scenario import Scenario
from rsanet.segment.simulation import simulate_patient, subject_seed

AFFINE = nib.affines.from_matvec(np.diag([2.0, 2.0, 2.0]), [-80, -100, -80])
SHAPE = (80, 100, 80)


def ball(centre, radii):
    """Voxels within an ellipsoid, in world mm."""
    points = nib.affines.apply_affine(AFFINE, np.moveaxis(np.indices(SHAPE), 0, -1))
    return (((points - np.array(centre)) / np.array(radii)) ** 2).sum(-1) < 1


@pytest.fixture(scope="module")
def brain():
    """White matter in a rind of grey, two ventricles and a thin sheet of fluid around it: FLAIR and T1w."""
    outer, cortex = ball((0, -10, 0), (68, 86, 66)), ball((0, -10, 0), (64, 82, 62))
    white = ball((0, -10, 0), (59, 77, 57))
    ventricles = ball((-14, -15, 12), (7, 30, 9)) | ball((14, -15, 12), (7, 30, 9))
    labels = outer.astype(int) + cortex + white
    labels[ventricles] = 1
    noise = np.random.default_rng(0).normal(1, 0.02, SHAPE)
    flair = np.array([0, 20, 110, 100])[labels] * noise
    t1w = np.array([0, 30, 65, 90])[labels] * noise
    return {"FLAIR": flair.astype(np.float32), "T1w": t1w.astype(np.float32)}


SPOTS = {
    (28, -15, 12): "periventricular",
    (-14, 22, 12): "periventricular",
    (55, -10, 0): "juxtacortical",
    (0, -10, 53): "juxtacortical",
    (36, 15, 10): "deep white matter",
    (-36, -40, 14): "deep white matter",
    (5, -45, -40): "infratentorial",
    (-20, -65, -35): "infratentorial",
}


def spots(images=None):
    """The lesions of ``SPOTS``, painted into copies of images."""
    found = []
    for centre in SPOTS:
        mask = ball(centre, (6, 6, 6))
        found.append(np.argwhere(mask))
        for name, value in (("FLAIR", 160.0), ("T1w", 50.0)):
            if images:
                images[name][mask] = value
    return found


def test_lesions_of_a_built_brain_are_told_where_they_were_put(brain):
    images = {name: image.copy() for name, image in brain.items()}
    lesions = spots(images)
    told = tell_regions(images, AFFINE, lesions)
    assert told.names == list(SPOTS.values())
    assert told.reason == ""
    both = ball((-14, -15, 12), (7, 30, 9)) | ball((14, -15, 12), (7, 30, 9))
    assert 2 * (told.ventricles & both).sum() / (told.ventricles.sum() + both.sum()) > 0.9


def test_without_t1w_what_needs_the_cortex_is_not_told(brain):
    told = tell_regions({"FLAIR": brain["FLAIR"]}, AFFINE, spots())
    expected = [name if name in (REGIONS[0], REGIONS[3]) else "" for name in SPOTS.values()]
    assert told.names == expected
    assert told.reason == NO_T1W


def test_where_it_cannot_be_told_a_sentence_says_why(brain):
    lesions = spots()
    rng = np.random.default_rng(0)
    air = {name: (image + np.abs(rng.normal(0, 2, SHAPE))).astype(np.float32) for name, image in brain.items()}
    full = {name: np.where(image > 0, 100, 0).astype(np.float32) for name, image in brain.items()}
    half = {name: image[:, :50] for name, image in brain.items()}
    for images, words in (
        (air, "skull-stripped"),
        (full, "ventricles were not found"),
        (half, "whole adult brain"),
        ({"T2w": brain["T1w"]}, "neither"),
    ):
        told = tell_regions(images, AFFINE, [voxels[:1] % 40 for voxels in lesions])
        assert told.names == [""] * len(lesions)
        assert words in told.reason
        assert told.reason.endswith(".")
    cut = {name: image[:, :, :68] for name, image in brain.items()}
    assert "cut off" in tell_regions(cut, AFFINE, lesions[:1]).reason
    assert tell_regions(brain, AFFINE, []).names == []


def test_the_regions_of_a_simulated_patient_are_mostly_those_of_the_truth():
    pytest.importorskip("nilearn", reason="the simulator's anatomy is in nilearn")
    kinds = dict(zip(("periventricular", "juxtacortical", "deep", "infratentorial"), REGIONS, strict=True))
    scenario = Scenario(spacing=(2.0, 2.0, 2.0), contrasts=("FLAIR", "T1w"), load="heavy")
    patient = simulate_patient(subject_seed(1, 1), scenario)
    session = patient.sessions[0]
    lesions = [voxels for _, voxels in components(label_lesions(session.mask > 0)[0])]
    names = tell_regions(session.images, patient.affine, lesions).names
    truth = [kinds[lesion["kind"]] for lesion in session.lesions]  # in the order of the labels, too
    agree = np.array([told == true for told, true in zip(names, truth, strict=True)])
    assert agree.mean() > 0.8
    below = np.array([true == REGIONS[3] for true in truth])
    assert np.array_equal(np.array(names) == REGIONS[3], below)
