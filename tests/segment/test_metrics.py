"""Metrics against masks small enough to count by hand."""

import csv
import json
import math

import nibabel
import numpy as np
import pytest

from rsanet.segment import metrics
from rsanet.segment.metrics import PROTOCOLS, Protocol, choose_protocol, evaluate_case, evaluate_paths

ONE_MM = (1.0, 1.0, 1.0)


def volume(*boxes, shape=(12, 12, 12)):
    mask = np.zeros(shape, np.uint8)
    for box in boxes:
        mask[tuple(slice(a, b) for a, b in box)] = 1
    return mask


def save(path, mask, spacing=ONE_MM, shift=0.0):
    affine = np.diag([*spacing, 1.0])
    affine[0, 3] = shift
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(mask, affine), path)
    return path


CUBE = ((1, 3), (1, 3), (1, 3))  # 8 voxels
SHIFTED = ((2, 4), (1, 3), (1, 3))  # shares 4 of them
FAR = ((8, 10), (8, 10), (8, 10))


def test_voxel_wise_numbers_of_two_half_overlapping_cubes():
    case = evaluate_case(volume(SHIFTED, FAR), volume(CUBE), ONE_MM)
    assert case.dice == pytest.approx(2 * 4 / (16 + 8))
    assert case.ppv == pytest.approx(4 / 16)
    assert case.tpr == pytest.approx(4 / 8)
    assert case.volume_difference == pytest.approx(1.0)
    assert (case.reference_mm3, case.predicted_mm3) == (8, 16)


def test_volumes_are_in_mm3_on_anisotropic_voxels():
    case = evaluate_case(volume(SHIFTED), volume(CUBE), (0.5, 1.0, 3.0))
    assert case.reference_mm3 == pytest.approx(8 * 1.5)


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
    assert ("IoU" if protocol.overlap else "any overlap") in line
    assert "minimum" in line


def test_protocols_are_those_of_the_challenges():
    assert (PROTOCOLS["shifts"].connectivity, PROTOCOLS["shifts"].overlap) == (6, 0.25)
    assert (PROTOCOLS["wmh2017"].connectivity, PROTOCOLS["wmh2017"].overlap) == (26, 0)
    assert PROTOCOLS["isbi2015"].overlap == 0


def test_a_changed_preset_is_called_custom():
    changed = choose_protocol("shifts", connectivity=26)
    assert (changed.name, changed.connectivity, changed.overlap) == ("custom", 26, 0.25)
    assert choose_protocol("shifts", connectivity=6, overlap=None) is PROTOCOLS["shifts"]
    with pytest.raises(ValueError, match="isbi2015"):
        choose_protocol("isbi")
    with pytest.raises(ValueError, match="6, 18 or 26"):
        choose_protocol("custom", connectivity=8)


def test_empty_masks_are_defined():
    empty, some = volume(), volume(CUBE)
    both = evaluate_case(empty, empty, ONE_MM)
    assert both.dice == 1
    assert all(math.isnan(x) for x in (both.ppv, both.tpr, both.volume_difference, both.ltpr, both.lesion_f1))
    missed = evaluate_case(empty, some, ONE_MM)
    assert (missed.dice, missed.tpr, missed.ltpr, missed.lesion_f1, missed.volume_difference) == (0, 0, 0, 0, 1)
    assert math.isnan(missed.ppv)
    assert math.isnan(missed.lfpr)
    invented = evaluate_case(some, empty, ONE_MM)
    assert (invented.dice, invented.ppv, invented.lfpr, invented.lesion_f1) == (0, 0, 1, 0)
    assert math.isnan(invented.ltpr)


@pytest.mark.parametrize(
    ("pred", "message"),
    [
        (volume().astype(np.float32) + 0.5, "not a binary mask.*0.5.*threshold"),
        (volume(CUBE) * 255, "not a binary mask.*255"),
        (np.full((12, 12, 12), np.nan), "not a binary mask"),
        (volume()[0], "three dimensions"),
        (volume(shape=(12, 12, 11)), r"\(12, 12, 11\).*\(12, 12, 12\)"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_sentence(pred, message):
    with pytest.raises(ValueError, match=message):
        evaluate_case(pred, volume(CUBE), ONE_MM)


@pytest.fixture
def cohort(tmp_path):
    """Three reference masks as in a simulated cohort, four predictions, one of each without a partner."""
    boxes = {"sub-001": CUBE, "sub-002": FAR, "sub-003": CUBE}
    for name, box in boxes.items():
        masks = tmp_path / "cohort" / "derivatives" / "lesions" / name / "anat"
        save(masks / f"{name}_label-lesion_mask.nii.gz", volume(box), (1, 1, 2))
        save(tmp_path / "cohort" / name / "anat" / f"{name}_FLAIR.nii.gz", volume(box) * 100, (1, 1, 2))
    predictions = tmp_path / "predictions"
    save(predictions / "sub-001_label-lesion_mask.nii.gz", volume(SHIFTED), (1, 1, 2))
    save(predictions / "sub-001_probseg.nii.gz", volume(SHIFTED).astype(np.float32) / 3, (1, 1, 2))
    save(predictions / "sub-002_pred.nii", volume(FAR), (1, 1, 2))
    save(predictions / "sub-004_label-lesion_mask.nii.gz", volume(FAR), (1, 1, 2))
    return predictions, tmp_path / "cohort"


def test_a_folder_is_matched_to_a_cohort_and_missing_partners_are_named(cohort):
    evaluation = evaluate_paths(*cohort)
    assert [case.subject for case in evaluation.cases] == ["sub-001", "sub-002"]
    assert [case.dice for case in evaluation.cases] == [0.5, 1.0]
    assert evaluation.cases[0].reference_mm3 == pytest.approx(16)
    assert list(evaluation.failures) == ["sub-003", "sub-004"]
    assert "no prediction" in evaluation.failures["sub-003"]
    assert "no reference" in evaluation.failures["sub-004"]


def test_a_bad_case_does_not_stop_the_others(cohort):
    predictions, reference = cohort
    save(predictions / "sub-003_mask.nii.gz", volume(CUBE), (1, 1, 3))
    (predictions / "sub-001_label-lesion_mask.nii.gz").write_bytes(b"not an image")
    evaluation = evaluate_paths(predictions, reference)
    assert [case.subject for case in evaluation.cases] == ["sub-002"]
    assert "cannot be read" in evaluation.failures["sub-001"]
    assert "affine" in evaluation.failures["sub-003"]
    assert "3.0" in evaluation.failures["sub-003"]
    table = metrics.format_table(evaluation)
    assert "3 of 4 cases could not be compared" in table
    assert "sub-003" in table


def test_two_files_and_a_flat_folder(tmp_path):
    pred = save(tmp_path / "p" / "anna.nii.gz", volume(SHIFTED))
    ref = save(tmp_path / "r" / "anna_label-lesion_mask.nii.gz", volume(CUBE))
    assert evaluate_paths(pred, ref).cases[0].dice == 0.5
    assert evaluate_paths(pred.parent, ref.parent).cases[0].subject == "anna"
    with pytest.raises(ValueError, match="two files or two folders"):
        evaluate_paths(pred, ref.parent)
    with pytest.raises(ValueError, match="does not exist"):
        evaluate_paths(tmp_path / "nowhere", ref)
    save(tmp_path / "q" / "bert.nii.gz", volume(CUBE))
    with pytest.raises(ValueError, match="bert"):
        evaluate_paths(tmp_path / "q", ref.parent)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no masks"):
        evaluate_paths(tmp_path / "empty", ref.parent)


def test_several_masks_of_one_subject_are_a_failure(cohort):
    predictions, reference = cohort
    save(predictions / "other" / "sub-002_pred.nii.gz", volume(CUBE), (1, 1, 2))
    assert "several masks" in evaluate_paths(predictions, reference).failures["sub-002"]


def test_csv_and_json_hold_the_numbers_and_the_protocol(cohort, tmp_path):
    predictions, reference = cohort
    save(predictions / "sub-003_mask.nii.gz", volume(), (1, 1, 2))
    evaluation = evaluate_paths(predictions, reference, PROTOCOLS["shifts"])
    metrics.write_csv(evaluation, tmp_path / "out.csv")
    metrics.write_json(evaluation, tmp_path / "out.json")
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["subject"] for row in rows] == ["sub-001", "sub-002", "sub-003"]
    assert float(rows[0]["dice"]) == 0.5
    assert rows[0]["protocol"] == "shifts"
    assert (rows[0]["connectivity"], rows[0]["overlap"]) == ("6", "0.25")
    assert math.isnan(float(rows[2]["ppv"]))
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["cases"][2]["ppv"] is None
    assert content["means"]["dice"] == pytest.approx(0.5)
    assert content["means"]["ppv"] == pytest.approx(0.75), "the mean leaves out the undefined case"
    assert content["protocol"]["overlap"] == 0.25
    assert list(content["failures"]) == ["sub-004"]


def test_table_shows_protocol_cases_and_mean(cohort):
    table = metrics.format_table(evaluate_paths(*cohort))
    lines = table.splitlines()
    assert "26-connected" in lines[0]
    assert any(line.startswith("sub-001") and "0.500" in line for line in lines)
    assert any(line.startswith("mean") and "0.750" in line for line in lines)


def test_isbi_score_is_the_weighted_sum_of_its_parts():
    protocol = PROTOCOLS["isbi2015"]
    pairs = [(SHIFTED, CUBE), (FAR, FAR), (((1, 6), (1, 4), (1, 4)), ((1, 5), (1, 4), (1, 4)))]
    cases = [evaluate_case(volume(p), volume(r), ONE_MM, protocol) for p, r in pairs]
    means = metrics.Evaluation(protocol, cases, {}).means()
    dice, ppv = (0.5 + 1 + 2 * 36 / 81) / 3, (0.5 + 1 + 36 / 45) / 3
    correlation = np.corrcoef([8, 8, 36], [8, 8, 45])[0, 1]
    assert means["isbi_score"] == pytest.approx(dice / 8 + ppv / 8 + 1 / 4 + 1 / 4 + correlation / 4)
    assert math.isnan(metrics.Evaluation(protocol, cases[:2], {}).means()["isbi_score"])


def test_mask_files_may_store_any_one_number_and_no_more(tmp_path):
    paths = {}
    for name, voxels in (
        ("one", volume(CUBE)),
        ("many", volume(CUBE) * 255),
        ("labels", volume(CUBE) + volume(FAR) * 2),
    ):
        paths[name] = tmp_path / f"{name}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(voxels.astype(np.uint8), np.eye(4)), paths[name])
    assert evaluate_paths(paths["many"], paths["one"]).cases[0].dice == 1
    (reason,) = evaluate_paths(paths["labels"], paths["one"]).failures.values()
    assert reason.startswith(f"{paths['labels']} is not a binary mask: besides 0 it has 1, 2; ")
