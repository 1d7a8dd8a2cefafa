"""Simulated patients: lesions where and as bright as the disease makes them, and settings that do one thing each."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from rsanet.segment.scenario import CONTRASTS, KINDS, Scenario
from rsanet.segment.simulation import lesions as drawing
from rsanet.segment.simulation import load_anatomy, simulate_patient, subject_seed
from rsanet.segment.simulation.contrasts import SIGNALS
from rsanet.segment.simulation.grid import Grid, average
from rsanet.segment.simulation.streams import stream
from rsanet.segment.simulation.warp import draw_warp, sample

AT_2_MM = Scenario(spacing=(2.0, 2.0, 2.0))
AT_3_MM = Scenario(spacing=(3.0, 3.0, 3.0))
SEED = subject_seed(11, 1)


def first(seed, scenario):
    """The first session."""
    return simulate_patient(seed, scenario).sessions[0]


@pytest.fixture(scope="module")
def patient():
    return first(SEED, AT_2_MM)


@pytest.fixture(scope="module")
def plain():
    """A patient at 3 mm, to compare with others of the same seed."""
    return first(SEED, AT_3_MM)


# --- anatomy and tissue -------------------------------------------------------------------------------------


def test_background_is_zero_and_the_brain_is_not(patient):
    brain = patient.images["FLAIR"] > 0
    for image in patient.images.values():
        np.testing.assert_array_equal(image > 0, brain)
    litres = brain.sum() * 8 / 1e6
    assert 1.4 < litres < 2.3
    edges = np.ones(brain.shape, bool)
    edges[1:-1, 1:-1, 1:-1] = False
    assert not (brain & edges).any(), "the head lies within the field of view"


def test_tissues_have_the_signal_of_each_contrast():
    anatomy = load_anatomy()
    still = replace(AT_2_MM, noise=0.0, bias=0.0, texture=0.0, warp_mm=(0.0, 0.0), enlargement_mm=(0.0, 0.0))
    session = first(3, replace(still, contrasts=CONTRASTS))
    healthy = ~ndimage.binary_dilation(session.mask > 0, iterations=2)
    points = Grid.over_field_of_view(still.voxel_size).points()
    warp = draw_warp(stream(3, "shape"), anatomy, still)
    grey, white, csf = sample(anatomy.maps[1:4], anatomy.origin, 1.0, warp(points)).numpy()
    mean = {
        name: {
            tissue: image[healthy & (share > 0.95) & (image > 0)].mean()
            for tissue, share in (("grey", grey), ("white", white), ("csf", csf))
        }
        for name, image in session.images.items()
    }
    assert mean["FLAIR"]["csf"] < 0.6 * mean["FLAIR"]["white"] < 0.6 * mean["FLAIR"]["grey"]
    assert mean["T2w"]["csf"] > 1.3 * mean["T2w"]["grey"] > 1.3 * mean["T2w"]["white"]
    assert mean["T1w"]["white"] > mean["T1w"]["grey"] > mean["T1w"]["csf"]
    assert mean["PDw"]["grey"] > 1.1 * mean["PDw"]["white"]
    assert mean["PDw"]["white"] < mean["PDw"]["csf"] < mean["PDw"]["grey"]


def test_patients_are_not_symmetric_though_the_template_is(patient):
    template = load_anatomy().maps[0].numpy()
    np.testing.assert_allclose(template, template[::-1], atol=1e-6)
    t1 = patient.images["T1w"].astype(float)
    assert np.corrcoef(t1.ravel(), t1[::-1].ravel())[0, 1] < 0.97
    brain = t1 > 0
    assert (brain ^ brain[::-1]).sum() / brain.sum() > 0.02
    bend = draw_warp(stream(SEED, "shape"), load_anatomy(), AT_2_MM).displacement[1]
    assert (bend - bend.flip(0)).std() > 1, "not by their position alone"


# --- lesions ------------------------------------------------------------------------------------------------


def test_lesions_are_bright_on_flair_t2_and_pd_and_dark_on_t1():
    session = first(SEED, replace(AT_2_MM, contrasts=CONTRASTS))
    mask, t1 = session.mask > 0, session.images["T1w"]
    lesion = ndimage.binary_erosion(mask)  # away from the soft edge
    near = ndimage.binary_dilation(mask, iterations=4) & ~ndimage.binary_dilation(mask, iterations=2)
    white = near & (t1 > np.percentile(t1[t1 > 0], 65))
    assert lesion.sum() > 20
    level = {name: (np.median(image[lesion]), np.median(image[white])) for name, image in session.images.items()}
    assert level["FLAIR"][0] > 1.3 * level["FLAIR"][1]
    assert level["T2w"][0] > 1.2 * level["T2w"][1]
    assert level["PDw"][0] > 1.2 * level["PDw"][1]
    assert level["T1w"][0] < 0.85 * level["T1w"][1]


def test_lesions_lie_inside_the_brain_and_off_the_csf(patient):
    mask = patient.mask > 0
    assert not (mask & (patient.images["FLAIR"] == 0)).any()
    outside = ndimage.distance_transform_edt(patient.images["FLAIR"] > 0, sampling=2.0)
    assert outside[mask].min() > 2
    t2 = patient.images["T2w"].astype(float)
    assert (t2[mask] > 0.95 * np.percentile(t2[t2 > 0], 99)).mean() < 0.05, "few labels on bright fluid"


def test_lesions_arise_where_their_kind_does():
    anatomy = load_anatomy()
    ventricles, cortex = anatomy.maps[5].numpy(), anatomy.cortex_distance
    near = {name: ventricles.ravel()[places] for name, places in anatomy.candidates.items()}
    assert near["periventricular"].max() < 4
    assert near["deep"].min() > 6
    assert cortex.ravel()[anatomy.candidates["juxtacortical"]].max() < 4
    index = np.stack(np.unravel_index(anatomy.candidates["infratentorial"], ventricles.shape), -1)
    infratentorial = ndimage.distance_transform_edt(~_voxels(anatomy, index))

    def distance(point):
        return infratentorial[tuple((np.array(point) - anatomy.origin).astype(int))]

    pons, peduncle, cerebellum, medulla = (4, -25, -30), (-20, -38, -32), (20, -55, -35), (2, -40, -50)
    assert max(map(distance, (pons, peduncle, cerebellum, medulla))) < 3
    fusiform, temporal, occipital, thalamus, spinal_cord = (
        (38, -45, -18),
        (45, -20, -25),
        (20, -85, -5),
        (10, -20, 6),
        (0, -44, -70),
    )
    assert min(map(distance, (fusiform, temporal, occipital, thalamus, spinal_cord))) > 6


def _voxels(anatomy, index):
    found = np.zeros(anatomy.cortex_distance.shape, bool)
    found[tuple(index.T)] = True
    return found


def test_most_lesions_are_periventricular_and_few_infratentorial():
    drawn = [
        lesion.kind
        for seed in range(5)
        for lesion in drawing.draw_lesions(seed, load_anatomy(), _identity(), Scenario(load="heavy"))
    ]
    share = {kind: drawn.count(kind) / len(drawn) for kind in KINDS}
    assert 0.35 < share["periventricular"] < 0.55
    assert 0.05 < share["infratentorial"] < 0.15
    assert max(share, key=share.get) == "periventricular"
    assert min(share, key=share.get) == "infratentorial"


def _identity():
    return draw_warp(stream(0, "shape"), load_anatomy(), Scenario(warp_mm=(0.0, 0.0), enlargement_mm=(0.0, 0.0)))


def test_long_axes_of_periventricular_lesions_point_away_from_the_ventricle():
    anatomy, warp = load_anatomy(), _identity()
    angles = []
    for lesion in drawing.draw_lesions(1, anatomy, warp, Scenario(load="heavy", kinds=("periventricular",))):
        assert lesion.semi_axes[0] == lesion.semi_axes.max()
        ends = [lesion.centre + side * lesion.semi_axes[0] * lesion.axes[0] for side in (-1, 1)]
        near, far = (
            sample(anatomy.maps[5:6], anatomy.origin, 1.0, warp(torch.tensor(end, dtype=torch.float32))) for end in ends
        )
        angles.append(float((far - near) / (2 * lesion.semi_axes[0])))
    assert len(angles) > 10
    assert np.median(angles) > 0.7


def test_unlabelled_blobs_are_not_painted(monkeypatch):
    for name, kind in drawing.LESION_KINDS.items():
        monkeypatch.setitem(drawing.LESION_KINDS, name, replace(kind, median_mm3=5.0, spread=0.0))
    quiet = replace(AT_3_MM, noise=0.0, contrasts=("FLAIR",))
    with_tiny = first(5, quiet)
    assert with_tiny.mask.sum() == 0
    assert with_tiny.lesions == []
    np.testing.assert_array_equal(with_tiny.images["FLAIR"], first(5, replace(quiet, load="none")).images["FLAIR"])


# --- what the user sets -------------------------------------------------------------------------------------


def test_the_same_seed_is_the_same_patient_at_every_spacing(patient):
    coarse = first(SEED, replace(AT_2_MM, spacing=(2.0, 2.0, 4.0)))
    load = [sum(lesion["volume_mm3"] for lesion in one.lesions) for one in (patient, coarse)]
    assert load[1] == pytest.approx(load[0], rel=0.35)
    large = max(patient.lesions, key=lambda lesion: lesion["volume_mm3"])["centre_mm"]
    nearest = min(np.linalg.norm(np.subtract(lesion["centre_mm"], large)) for lesion in coarse.lesions)
    assert nearest < 6


def test_noise_is_rician_and_leaves_anatomy_and_lesions_as_they_are(plain):
    quiet, noisy = (first(SEED, replace(AT_3_MM, noise=noise)) for noise in (0.0, 0.1))
    for session in (quiet, noisy):
        np.testing.assert_array_equal(session.mask, plain.mask)
        assert session.lesions == plain.lesions
    sigma = 0.1 * SIGNALS["T1w"].gain
    before, after = (session.images["T1w"].astype(float) for session in (quiet, noisy))
    bright = before > 8 * sigma
    dark = (before > 0) & (before < 4 * sigma)
    assert (after - before)[bright].std() == pytest.approx(sigma, rel=0.05)
    assert abs((after - before)[bright].mean()) < 0.1 * sigma
    assert (after**2 - before**2)[dark].mean() == pytest.approx(2 * sigma**2, rel=0.15), "the floor under dark fluid"


def test_a_choice_of_contrasts_leaves_the_others_and_the_lesions_as_they_are(plain):
    session = first(SEED, replace(AT_3_MM, contrasts=("PDw", "T1w")))
    assert list(session.images) == ["T1w", "PDw"], "in the order of the table"
    np.testing.assert_array_equal(session.images["T1w"], plain.images["T1w"])
    np.testing.assert_array_equal(session.mask, plain.mask)


def test_kinds_are_the_only_places_where_lesions_arise():
    session = first(SEED, replace(AT_3_MM, kinds=("infratentorial",), load="heavy"))
    assert {lesion["kind"] for lesion in session.lesions} == {"infratentorial"}
    assert all(lesion["centre_mm"][2] < -5 for lesion in session.lesions), "below the tentorium"


def test_a_heavier_load_is_more_and_larger_lesions_and_leaves_the_head_as_it_is(plain):
    volume = {}
    for load in ("none", "light", "typical", "heavy"):
        session = plain if load == "typical" else first(SEED, replace(AT_3_MM, load=load))
        volume[load] = sum(lesion["volume_mm3"] for lesion in session.lesions)
        healthy = ~ndimage.binary_dilation((session.mask | plain.mask) > 0, iterations=3)
        assert (session.images["FLAIR"] == plain.images["FLAIR"])[healthy].mean() > 0.999, "but for faint edges"
    assert 0 == volume["none"] < volume["light"] < volume["typical"] < volume["heavy"]
    light, typical = (
        drawing.draw_lesions(SEED, load_anatomy(), _identity(), Scenario(load=load)) for load in ("light", "typical")
    )
    assert len(typical) == pytest.approx(2.5 * len(light), abs=2), "the patient has the same place in every cohort"
    for small, large in zip(light, typical, strict=False):
        assert small.kind == large.kind
        np.testing.assert_array_equal(small.outline, large.outline)


@pytest.fixture(scope="module")
def thin():
    """A quiet patient without lesions, in thin slices: the scenario and the image."""
    scenario = replace(AT_2_MM, noise=0.0, load="none", contrasts=("T2w",))
    return scenario, first(SEED, scenario).images["T2w"]


@pytest.mark.parametrize(("plane", "axis"), [("sagittal", 0), ("coronal", 1), ("axial", 2)])
def test_thick_slices_are_the_mean_of_the_thin_brain_that_they_cover(thin, plane, axis):
    scenario, image = thin
    thick = first(SEED, replace(scenario, slice_thickness=8.0, plane=plane)).images["T2w"]
    assert thick.shape[axis] == image.shape[axis] // 4
    parts = np.ones(3, int)
    parts[axis] = 4
    share = average((image > 0).astype(np.float32), parts)
    np.testing.assert_array_equal(thick > 0, share > 0.5)
    brain = thick > 0
    np.testing.assert_allclose(thick[brain], average(image, parts)[brain] / share[brain], atol=1)
    assert (share[brain] < 1).sum() > 100, "the border of the brain is averaged over the brain alone, too"


def test_lesions_of_thick_slices_are_painted_in_part_and_labelled_where_they_fill_enough():
    thin = Scenario(spacing=(2.0, 2.0, 4.0), noise=0.0, texture=0.0, load="heavy", contrasts=("FLAIR",))
    thick = replace(thin, slice_thickness=8.0)
    session, without = first(SEED, thick), first(SEED, replace(thick, load="none"))
    mask, added = session.mask > 0, session.images["FLAIR"].astype(float) - without.images["FLAIR"]
    fullness = average(first(SEED, thin).mask.astype(np.float32), np.array([1, 1, 2]))
    painted = added > 60
    assert mask[painted & (fullness == 1)].mean() > 0.95
    assert (fullness[mask] == 0).mean() < 0.01
    assert 0.7 < mask.sum() / fullness.sum() < 1.1, "as much volume as in thin slices"
    full, half = (mask & (fullness == share) for share in (1, 0.5))
    assert min(full.sum(), half.sum()) > 20
    assert added[half].mean() < 0.8 * added[full].mean()
