"""The numbers of one case, against masks small enough to count by hand."""

import math

import numpy as np
import pytest

from rsanet.segment.metrics import PROTOCOLS, Protocol, choose_protocol, evaluate_case

ONE_MM = (1.0, 1.0, 1.0)


def volume(*boxes, shape=(12, 12, 12)):
    mask = np.zeros(shape, np.uint8)
    for box in boxes:
        mask[tuple(slice(a, b) for a, b in box)] = 1
    return mask


CUBE = ((1, 3), (1, 3), (1, 3))  # 8 voxels
SHIFTED = ((2, 4), (1, 3), (1, 3))  # shares 4 of them
FAR = ((8, 10), (8, 10), (8, 10))


def test_voxel_wise_numbers_of_two_half_overlapping_cubes():
    case = evaluate_case(volume(SHIFTED, FAR), volume(CUBE), ONE_MM)
    assert case.dice == pytest.approx(2 * 4 / (16 + 8))
    assert case.ppv == pytest.approx(4 / 16)
    assert case.tpr == pytest.approx(4 / 8)
    assert (case.reference_mm3, case.predicted_mm3) == (8, 16)


def test_volumes_are_in_mm3_on_anisotropic_voxels():
    case = evaluate_case(volume(SHIFTED), volume(CUBE), (0.5, 1.0, 3.0))
    assert case.reference_mm3 == pytest.approx(8 * 1.5)


def test_volume_differences_are_relative_to_the_reference_signed_and_absolute():
    under = evaluate_case(volume(CUBE), volume(CUBE, FAR), (1.0, 1.0, 2.0))
    assert (under.volume_error_mm3, under.relative_volume_error, under.volume_difference) == (-16, -0.5, 0.5)
    over = evaluate_case(volume(CUBE, FAR), volume(CUBE), ONE_MM)
    assert (over.volume_error_mm3, over.relative_volume_error, over.volume_difference) == (8, 1, 1)


def test_surface_distances_of_a_shifted_plate_are_its_shift_in_mm():
    plate, shifted = ((1, 9), (1, 9), (3, 4)), ((1, 9), (1, 9), (5, 6))
    case = evaluate_case(volume(shifted), volume(plate), (1.0, 1.0, 3.0))
    assert (case.hd95_mm, case.assd_mm) == (6, 6)
    same = evaluate_case(volume(plate), volume(plate), (1.0, 1.0, 3.0))
    assert (same.hd95_mm, same.assd_mm) == (0, 0)


def test_the_inside_of_a_lesion_is_no_surface():
    solid = ((1, 8), (1, 8), (1, 8))
    hollow = volume(solid)
    hollow[4, 4, 4] = 0  # its six neighbours become surface, each two voxels from the surface outside
    case = evaluate_case(hollow, volume(solid), ONE_MM)
    outer = 7**3 - 5**3
    assert case.assd_mm == pytest.approx(6 * 2 / (2 * outer + 6))
    assert case.hd95_mm == 0, "six of 224 are less than a twentieth"


def surface_points(mask, spacing):
    """The surface by its definition, voxel by voxel."""
    padded = np.pad(mask, 1)
    points = []
    for index in np.argwhere(padded):
        steps = [index + sign * np.eye(3, dtype=int)[axis] for axis in range(3) for sign in (-1, 1)]
        if not all(padded[tuple(step)] for step in steps):
            points.append(index * spacing)
    return np.array(points)


@pytest.mark.parametrize("seed", range(4))
def test_surface_distances_are_those_of_every_pair_of_surface_voxels(seed):
    rng = np.random.default_rng(seed)
    spacing = rng.uniform(0.5, 3, 3)
    pred, ref = rng.random((2, 7, 8, 9)) > np.array([0.4, 0.8]).reshape(2, 1, 1, 1)
    ones, others = surface_points(pred, spacing), surface_points(ref, spacing)
    apart = np.linalg.norm(ones[:, None] - others[None], axis=-1)
    there, back = apart.min(1), apart.min(0)
    case = evaluate_case(pred, ref, spacing)
    assert case.hd95_mm == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)))
    assert case.assd_mm == pytest.approx((there.sum() + back.sum()) / (there.size + back.size))


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")
def test_surface_distances_are_those_of_monai():
    torch, monai = pytest.importorskip("torch"), pytest.importorskip("monai.metrics")
    rng = np.random.default_rng(0)
    pred, ref = volume(), volume()
    pred[2:9, 3:7, 1:8], ref[1:7, 4:9, 2:9] = rng.random((7, 4, 7)) > 0.3, rng.random((6, 5, 7)) > 0.3
    spacing = (0.9, 1.2, 3.0)
    one, two = (torch.from_numpy(mask)[None, None] for mask in (pred, ref))
    hd95 = monai.compute_hausdorff_distance(one, two, include_background=True, percentile=95, spacing=spacing)
    assd = monai.compute_average_surface_distance(one, two, include_background=True, symmetric=True, spacing=spacing)
    case = evaluate_case(pred, ref, spacing)
    assert (case.hd95_mm, case.assd_mm) == pytest.approx((hd95.item(), assd.item()))


def test_numbers_do_not_depend_on_the_empty_space_around_lesions():
    small = evaluate_case(volume(SHIFTED, FAR), volume(CUBE, FAR), (1.0, 2.0, 3.0))
    wide = [np.pad(volume(*boxes), ((9, 0), (4, 7), (0, 3))) for boxes in ((SHIFTED, FAR), (CUBE, FAR))]
    assert evaluate_case(*wide, (1.0, 2.0, 3.0)) == small


def test_lesion_wise_numbers_of_a_hit_a_miss_and_a_false_lesion():
    missed = ((1, 3), (8, 10), (1, 3))
    case = evaluate_case(volume(SHIFTED, FAR), volume(CUBE, missed), ONE_MM)
    assert (case.reference_lesions, case.predicted_lesions) == (2, 2)
    assert (case.detected_lesions, case.false_lesions) == (1, 1)
    assert (case.ltpr, case.lfpr, case.lesion_f1) == (0.5, 0.5, 0.5)


def test_one_prediction_over_two_reference_lesions_detects_both():
    bridge = ((1, 10), (1, 3), (1, 3))
    case = evaluate_case(volume(bridge), volume(CUBE, ((7, 10), (1, 3), (1, 3))), ONE_MM)
    assert (case.detected_lesions, case.false_lesions, case.ltpr, case.lfpr) == (2, 0, 1.0, 0.0)


@pytest.mark.parametrize(("connectivity", "lesions"), [(6, 3), (18, 2), (26, 1)])
def test_connectivity_decides_what_one_lesion_is(connectivity, lesions):
    mask = volume()
    mask[2, 2, 2] = mask[3, 3, 2] = mask[4, 4, 3] = 1  # joined along an edge, then at a corner
    assert evaluate_case(mask, mask, ONE_MM, Protocol(connectivity=connectivity)).reference_lesions == lesions


def test_iou_rule_counts_a_pair_at_the_threshold_and_not_below():
    pred, ref = volume(SHIFTED), volume(CUBE)  # 4 common voxels of 12
    assert evaluate_case(pred, ref, ONE_MM, Protocol(overlap=1 / 3)).detected_lesions == 1
    below = evaluate_case(pred, ref, ONE_MM, Protocol(overlap=0.34))
    assert (below.detected_lesions, below.false_lesions, below.lesion_f1) == (0, 1, 0.0)


def test_minimum_size_is_in_mm3_and_leaves_voxel_wise_numbers_alone():
    pred, ref = volume(CUBE, FAR), volume(CUBE)
    protocol = Protocol(minimum_mm3=12)
    fine = evaluate_case(pred, ref, ONE_MM, protocol)
    assert (fine.reference_lesions, fine.predicted_lesions) == (0, 0)
    coarse = evaluate_case(pred, ref, (0.5, 1.0, 3.0), protocol)  # 8 voxels of 1.5 mm³ are exactly 12
    assert (coarse.reference_lesions, coarse.predicted_lesions, coarse.false_lesions) == (1, 2, 1)
    assert fine.dice == coarse.dice == pytest.approx(2 * 8 / 24)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_gives_a_perfect_mask_a_perfect_score_and_says_its_rules(name):
    protocol = PROTOCOLS[name]
    case = evaluate_case(volume(CUBE, FAR), volume(CUBE, FAR), ONE_MM, protocol)
    assert (case.dice, case.ltpr, case.lfpr, case.lesion_f1) == (1, 1, 0, 1)
    line = protocol.describe()
    assert name in line
    assert f"{protocol.connectivity}-connected" in line
    rule = "more than 10 % is covered" if name == "msseg2016" else "IoU" if protocol.overlap else "any overlap"
    assert rule in line
    assert ("minimum" in line) or f"{protocol.minimum_mm3:g} mm³" in line


def test_protocols_are_those_of_the_challenges():
    assert (PROTOCOLS["shifts"].connectivity, PROTOCOLS["shifts"].overlap) == (6, 0.25)
    assert (PROTOCOLS["wmh2017"].connectivity, PROTOCOLS["wmh2017"].overlap) == (26, 0)
    assert (PROTOCOLS["isbi2015"].connectivity, PROTOCOLS["isbi2015"].overlap) == (18, 0)
    msseg = PROTOCOLS["msseg2016"]
    assert (msseg.rule, msseg.connectivity, msseg.overlap, msseg.minimum_mm3) == ("msseg", 6, 0.1, 3)


def bar(start, stop, row=0):
    """A lesion one voxel thick along the first axis, in a row of its own."""
    return ((start, stop), (3 * row, 3 * row + 1), (0, 1))


def msseg(pred, ref, spacing=ONE_MM):
    shape = (60, 12, 1)
    return evaluate_case(volume(*pred, shape=shape), volume(*ref, shape=shape), spacing, PROTOCOLS["msseg2016"])


def test_msseg_finds_a_lesion_of_which_more_than_a_tenth_is_covered():
    ref = [bar(10, 50)]
    assert msseg([bar(6, 14)], ref).detected_lesions == 0, "4 of 40 are a tenth"
    above = msseg([bar(7, 15)], ref)
    assert (above.detected_lesions, above.false_lesions) == (1, 1), "of the prediction's own partner 35 lie outside it"


def test_msseg_does_not_count_lesions_by_predictions_that_lie_mostly_outside():
    ref = [bar(20, 24)]
    most = msseg([((20, 24), (0, 4), (0, 1))], ref)  # 16 voxels, 12 of them outside
    assert most.detected_lesions == 0
    at = msseg([bar(21, 31)], ref)  # 3 of 10 inside
    assert at.detected_lesions == 1, "70 % outside are allowed"
    above = msseg([bar(21, 32)], ref)
    assert above.detected_lesions == 0


def test_msseg_measures_what_lies_outside_every_reference_lesion():
    ref = [bar(0, 20), bar(21, 25)]
    assert msseg([bar(0, 24)], ref).detected_lesions == 2, "most of it is in the other lesion"


def test_msseg_forgives_partners_after_those_with_65_percent_of_the_cover():
    ref = [bar(0, 20)]
    outside = ((18, 20), (0, 12), (0, 1))  # 24 voxels, 22 of them outside, 2 inside
    assert msseg([bar(0, 8), outside], ref).detected_lesions == 1, "8 of the 10 covered are enough"
    wide = ((12, 20), (0, 12), (0, 1))
    assert msseg([bar(0, 8), wide], ref).detected_lesions == 0, "8 of 16 are not"
    alone = msseg([outside], ref)
    assert alone.detected_lesions == 0


def test_msseg_judges_predicted_lesions_by_the_same_rule_with_the_masks_swapped():
    case = msseg([bar(0, 30)], [bar(29, 40), bar(0, 2, row=2)])
    assert (case.reference_lesions, case.detected_lesions) == (1, 0), "the second has 2 mm³"
    assert (case.predicted_lesions, case.false_lesions) == (1, 1)
    swapped = msseg([bar(29, 40)], [bar(0, 30)])
    assert (swapped.detected_lesions, swapped.false_lesions) == (0, 1)


def test_msseg_leaves_out_lesions_of_3_mm3_and_less():
    case = msseg([bar(0, 3), bar(10, 14)], [bar(0, 3), bar(10, 14)])
    assert (case.reference_lesions, case.predicted_lesions) == (1, 1)
    finer = msseg([bar(0, 3)], [bar(0, 3)], (1.0, 1.0, 1.01))
    assert finer.reference_lesions == 1


def test_lesions_are_classed_by_their_own_volume():
    one, other = ((0, 1), (0, 3), (0, 3)), ((3, 8), (0, 2), (0, 1))  # 9 mm³ and 10 mm³
    big = ((0, 12), (4, 8), (4, 8))  # 192 mm³
    pred = volume(one, other, ((0, 12), (4, 7), (4, 5)))  # the last of 36 mm³ finds the big one
    pred[11, 11, 11] = 1
    classes = evaluate_case(pred, volume(one, other, big), ONE_MM).size_classes
    assert [entry.name for entry in classes] == ["<10", "10-50", "50-100", ">=100"]
    assert [(entry.reference_lesions, entry.detected_lesions) for entry in classes] == [(1, 1), (1, 1), (0, 0), (1, 1)]
    assert [(entry.predicted_lesions, entry.false_lesions) for entry in classes] == [(2, 1), (2, 0), (0, 0), (0, 0)]
    assert (classes[0].ltpr, classes[0].lfpr, classes[0].lesion_f1) == (1, 0.5, pytest.approx(2 / 3))
    assert math.isnan(classes[2].ltpr)
    assert math.isnan(classes[2].lesion_f1)


def test_a_changed_preset_is_called_custom():
    changed = choose_protocol("shifts", connectivity=26)
    assert (changed.name, changed.connectivity, changed.overlap) == ("custom", 26, 0.25)
    assert choose_protocol("shifts", connectivity=6, overlap=None) is PROTOCOLS["shifts"]
    with pytest.raises(ValueError, match="isbi2015"):
        choose_protocol("isbi")
    with pytest.raises(ValueError, match="6, 18 or 26"):
        choose_protocol("custom", connectivity=8)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_number_is_defined_for_empty_masks(name):
    empty, some = volume(), volume(CUBE)
    nothing = dict.fromkeys(("predicted_mm3", "reference_mm3", "predicted_lesions", "reference_lesions"), 0)
    nothing |= {"detected_lesions": 0, "false_lesions": 0, "volume_error_mm3": 0}
    ratios = ("ppv", "tpr", "hd95_mm", "assd_mm", "relative_volume_error", "volume_difference", "ltpr", "lfpr")
    undefined = dict.fromkeys((*ratios, "lesion_f1"), math.nan)
    expected = {
        "both": ((empty, empty), nothing | undefined | {"dice": 1}),
        "missed": (
            (empty, some),
            nothing
            | undefined
            | {"dice": 0, "tpr": 0, "ltpr": 0, "lesion_f1": 0, "reference_mm3": 8, "reference_lesions": 1}
            | {"volume_error_mm3": -8, "relative_volume_error": -1, "volume_difference": 1},
        ),
        "invented": (
            (some, empty),
            nothing
            | undefined
            | {"dice": 0, "ppv": 0, "lfpr": 1, "lesion_f1": 0, "predicted_mm3": 8, "predicted_lesions": 1}
            | {"false_lesions": 1, "volume_error_mm3": 8},
        ),
    }
    for (pred, ref), numbers in expected.values():
        case = vars(evaluate_case(pred, ref, ONE_MM, PROTOCOLS[name]))
        assert {key: case[key] for key in numbers} == pytest.approx(numbers, nan_ok=True)
        assert case.keys() - numbers.keys() == {"subject", "size_classes"}


@pytest.mark.parametrize(
    ("pred", "message"),
    [
        (volume().astype(np.float32) + 0.5, "not a binary mask.*0.5.*threshold"),
        (volume(CUBE) * 255 + volume(FAR), "not a binary mask: besides 0 it has 1, 255"),
        (np.full((12, 12, 12), np.nan), "not a binary mask"),
        (volume()[0], "three dimensions"),
        (volume(shape=(12, 12, 11)), r"\(12, 12, 11\).*\(12, 12, 12\)"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_sentence(pred, message):
    with pytest.raises(ValueError, match=message):
        evaluate_case(pred, volume(CUBE), ONE_MM)
