"""Patients with several sessions: what changes between the scans is the lesions, and the truth about them is told."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from rsanet.segment.scenario import Scenario
from rsanet.segment.simulation import lesions as drawing
from rsanet.segment.simulation import load_anatomy, simulate_patient, subject_seed
from rsanet.segment.simulation.streams import stream
from rsanet.segment.simulation.truth import compare_sessions, describe_lesions
from rsanet.segment.simulation.warp import draw_warp

SEED = subject_seed(1, 1)
PAIR = Scenario(spacing=(3.0, 3.0, 3.0), contrasts=("FLAIR",), load="heavy", sessions=2, noise=0.0, bias=0.0)


@pytest.fixture(scope="module")
def pair():
    return simulate_patient(SEED, PAIR).sessions


def labelled(mask):
    return ndimage.label(mask, np.ones((3, 3, 3)))[0]


def test_the_first_session_is_the_same_however_many_follow(pair):
    alone = simulate_patient(SEED, replace(PAIR, sessions=1)).sessions[0]
    np.testing.assert_array_equal(alone.images["FLAIR"], pair[0].images["FLAIR"])
    np.testing.assert_array_equal(alone.mask, pair[0].mask)
    assert alone.lesions == pair[0].lesions
    assert pair[0].new_mask is None
    assert pair[0].vanished == []
    assert "fate" not in pair[0].lesions[0]


def test_the_fate_of_every_lesion_is_what_the_masks_show(pair):
    first, second = pair
    before, after = labelled(first.mask), labelled(second.mask)
    volume = {lesion["id"]: lesion["volume_mm3"] for lesion in first.lesions}
    for lesion in second.lesions:
        met = set(np.unique(before[after == lesion["id"]])) - {0}
        assert set(lesion["before"]) == met
        assert lesion["volume_before_mm3"] == pytest.approx(sum(volume[number] for number in met))
        change = lesion["volume_mm3"] - lesion["volume_before_mm3"]
        assert lesion["fate"] == ("new" if not met else {1: "growing", 0: "stable", -1: "shrinking"}[np.sign(change)])
    gone = set(volume) - set(np.unique(before[second.mask > 0]))
    assert {lesion["id"] for lesion in second.vanished} == gone
    new = [lesion["id"] for lesion in second.lesions if lesion["fate"] == "new"]
    np.testing.assert_array_equal(second.new_mask > 0, np.isin(after, new))


def test_lesions_appear_grow_shrink_vanish_and_most_stay():
    fates = []
    for session in simulate_patient(SEED, replace(PAIR, sessions=5)).sessions[1:]:
        fates += [lesion["fate"] for lesion in session.lesions] + ["vanished"] * len(session.vanished)
    assert set(fates) == {"new", "growing", "shrinking", "vanished", "stable"}
    assert fates.count("stable") > len(fates) / 3


def test_images_of_two_sessions_differ_where_lesions_do_and_nowhere_else(pair):
    first, second = pair
    change = second.images["FLAIR"].astype(float) - first.images["FLAIR"]
    differing = (first.mask != second.mask) | (second.new_mask > 0)
    far = ndimage.binary_dilation(differing, iterations=5)
    assert (change[~far] != 0).mean() < 1e-3, "unless a lesion changed without a change of its label"
    assert change[second.new_mask > 0].mean() > 60, "new lesions are brighter than the tissue that was there"
    gone = np.isin(labelled(first.mask), [lesion["id"] for lesion in second.vanished])
    assert not gone.any() or change[gone].mean() < -60


@pytest.mark.parametrize("disturbance", [{"bias": 0.1}, {"noise": 0.05}])
def test_bias_and_noise_are_drawn_anew_in_every_session(disturbance):
    first, second = simulate_patient(SEED, replace(PAIR, load="none", **disturbance)).sessions
    quiet = simulate_patient(SEED, replace(PAIR, load="none", sessions=1)).sessions[0].images["FLAIR"].astype(float)
    brain = quiet > 100
    errors = [session.images["FLAIR"][brain] - quiet[brain] for session in (first, second)]
    assert min(error.std() for error in errors) > 10
    assert abs(np.corrcoef(*errors)[0, 1]) < 0.5


def test_lesions_are_drawn_clear_of_those_that_are_there():
    anatomy, scenario = load_anatomy(), Scenario(load="heavy", sessions=2)
    warp = draw_warp(stream(SEED, "shape"), anatomy, scenario)
    before = drawing.draw_lesions(SEED, anatomy, warp, scenario)
    after = drawing.follow_lesions(before, 2, SEED, anatomy, warp, scenario)
    places = {tuple(lesion.centre) for lesion in before}
    new = [lesion for lesion in after if tuple(lesion.centre) not in places]
    assert new
    assert places - {tuple(lesion.centre) for lesion in after}, "some vanish"
    for lesion in new:
        for other in (*before, *after):
            if other is not lesion:
                between = np.linalg.norm(lesion.centre - other.centre)
                assert between > lesion.semi_axes.max() + other.semi_axes.max() + drawing.CLEARANCE_MM


def test_lesions_that_merge_or_split_are_compared_by_all_their_volume():
    before, after = np.zeros((12, 5, 5), np.uint8), np.zeros((12, 5, 5), np.uint8)
    before[0:2, 2, 2] = before[3:5, 2, 2] = 1  # two that merge
    after[0:5, 2, 2] = 1
    before[6:12, 2, 2] = 1  # one that splits
    after[7:9, 2, 2] = after[10:11, 2, 2] = 1
    kinds = np.zeros_like(before)
    lesions, there = (describe_lesions(mask, np.eye(4), kinds, ["deep"]) for mask in (after, before))
    followed, vanished, new = compare_sessions(after, lesions, before, there)
    told = [(lesion["fate"], lesion["before"], lesion["volume_before_mm3"]) for lesion in followed]
    assert told == [("growing", [1, 2], 4.0), ("shrinking", [3], 6.0), ("shrinking", [3], 6.0)]
    assert vanished == []
    assert not new.any()
