"""Cohorts of tiny masks: which files are compared, what is said of all, and what another method changes."""

import csv
import json
import math
import unicodedata

import nibabel
import numpy as np
import pytest
from scipy import stats

from rsanet.segment import evaluation as work
from rsanet.segment.evaluation import Evaluation, evaluate, write_csv, write_json
from rsanet.segment.metrics import PROTOCOLS, CaseMetrics, evaluate_case
from rsanet.segment.statistics import bootstrap_interval, compare_paired, summarize

ONE_MM = (1.0, 1.0, 1.0)
TALL = (1.0, 1.0, 2.0)


def volume(*boxes, shape=(12, 12, 12)):
    mask = np.zeros(shape, np.uint8)
    for box in boxes:
        mask[tuple(slice(a, b) for a, b in box)] = 1
    return mask


def save(path, mask, spacing=ONE_MM, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(mask, np.diag([*spacing, 1.0]) if affine is None else affine), path)
    return path


CUBE = ((1, 3), (1, 3), (1, 3))  # 8 voxels
SHIFTED = ((2, 4), (1, 3), (1, 3))  # shares 4 of them
FAR = ((8, 10), (8, 10), (8, 10))


@pytest.fixture
def cohort(tmp_path):
    """Three reference masks as in a simulated cohort, three predictions, one of each without a partner."""
    boxes = {"sub-001": CUBE, "sub-002": FAR, "sub-003": CUBE}
    for name, box in boxes.items():
        masks = tmp_path / "cohort" / "derivatives" / "lesions" / name / "anat"
        save(masks / f"{name}_label-lesion_mask.nii.gz", volume(box), TALL)
        save(tmp_path / "cohort" / name / "anat" / f"{name}_FLAIR.nii.gz", volume(box) * 100, TALL)
    predictions = tmp_path / "predictions"
    save(predictions / "sub-001_label-lesion_mask.nii.gz", volume(SHIFTED), TALL)
    save(predictions / "sub-001_probseg.nii.gz", volume(SHIFTED).astype(np.float32) / 3, TALL)
    save(predictions / "sub-002_pred.nii", volume(FAR), TALL)
    save(predictions / "sub-004_label-lesion_mask.nii.gz", volume(FAR), TALL)
    return predictions, tmp_path / "cohort"


def write_folder(folder, masks):
    for number, mask in enumerate(masks, 1):
        save(folder / f"sub-{number:03d}.nii.gz", mask)
    return folder


# --- files ------------------------------------------------------------------------------------------------


def test_a_folder_is_matched_to_a_cohort_and_missing_partners_are_named(cohort):
    evaluation = evaluate(*cohort)
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
    evaluation = evaluate(predictions, reference)
    assert [case.subject for case in evaluation.cases] == ["sub-002"]
    assert "cannot be read" in evaluation.failures["sub-001"]
    assert "affine" in evaluation.failures["sub-003"]
    assert "3.0" in evaluation.failures["sub-003"]
    table = str(evaluation)
    assert "3 of 4 cases could not be compared" in table
    assert "sub-003" in table


def test_two_files_and_a_flat_folder(tmp_path):
    pred = save(tmp_path / "p" / "anna.nii.gz", volume(SHIFTED))
    ref = save(tmp_path / "r" / "anna_label-lesion_mask.nii.gz", volume(CUBE))
    assert evaluate(pred, ref).cases[0].dice == 0.5
    assert evaluate(str(pred.parent), str(ref.parent)).cases[0].subject == "anna"
    with pytest.raises(ValueError, match="two files or two folders"):
        evaluate(pred, ref.parent)
    with pytest.raises(ValueError, match="does not exist"):
        evaluate(tmp_path / "nowhere", ref)
    save(tmp_path / "q" / "bert.nii.gz", volume(CUBE))
    with pytest.raises(ValueError, match="bert"):
        evaluate(tmp_path / "q", ref.parent)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no masks"):
        evaluate(tmp_path / "empty", ref.parent)


def test_references_are_the_masks_of_a_data_set_of_any_layout(tmp_path):
    for name in ("ms_1", "ms_2"):
        save(tmp_path / "nnunet" / "imagesTr" / f"{name}_0000.nii.gz", volume(FAR) * 100)
        save(tmp_path / "nnunet" / "labelsTr" / f"{name}.nii.gz", volume(CUBE))
        save(tmp_path / "predictions" / f"{name}_label-lesion_mask.nii.gz", volume(SHIFTED))
    (tmp_path / "nnunet" / "dataset.json").write_text('{"channel_names": {"0": "FLAIR"}, "file_ending": ".nii.gz"}')
    rows = [f"{name},imagesTr/{name}_0000.nii.gz,labelsTr/{name}.nii.gz" for name in ("ms_1", "ms_2")]
    (tmp_path / "nnunet" / "cases.csv").write_text("\n".join(["id,FLAIR,mask", *rows]))
    for reference in ("nnunet", "nnunet/labelsTr", "nnunet/cases.csv"):
        evaluation = evaluate(tmp_path / "predictions", tmp_path / reference)
        assert [(case.subject, case.dice) for case in evaluation.cases] == [("ms_1", 0.5), ("ms_2", 0.5)]
        assert evaluation.failures == {}


def test_several_masks_of_one_subject_are_a_failure_that_names_the_files(cohort):
    predictions, reference = cohort
    save(predictions / "other" / "sub-002_pred.nii", volume(CUBE), TALL)
    reason = evaluate(predictions, reference).failures["sub-002"]
    assert f"several masks in {predictions} (other/sub-002_pred.nii, sub-002_pred.nii): leave one" in reason


def test_spaces_and_letters_beyond_ascii_are_names_like_others(tmp_path):
    subjects = ("sub-Zoë", "sub-Zoé", "Łukasz Ż")
    for name in subjects:
        save(tmp_path / "vor her" / f"{unicodedata.normalize('NFD', name)}.nii.gz", volume(SHIFTED))
        save(tmp_path / "référence" / f"{name}_label-lesion_mask.nii.gz", volume(CUBE))
    evaluation = evaluate(tmp_path / "vor her", tmp_path / "référence")
    assert {case.subject for case in evaluation.cases} == set(subjects)
    write_csv(evaluation, tmp_path / "scörés 1.csv")
    write_json(evaluation, tmp_path / "scörés 1.json")
    assert "sub-Zoë" in (tmp_path / "scörés 1.csv").read_text(encoding="utf-8")


@pytest.mark.parametrize("axes", ["LAS", "PIR", "SLA"])
def test_a_mask_with_flipped_or_swapped_axes_is_turned_to_its_reference(tmp_path, axes):
    shape = (10, 12, 9)
    image = nibabel.Nifti1Image(volume(SHIFTED, shape=shape), np.diag([1, 2, 3, 1.0]) + np.eye(4, k=3) * 5)
    turned = image.as_reoriented(nibabel.orientations.axcodes2ornt(axes))
    nibabel.save(turned, tmp_path / "pred.nii.gz")
    ref = save(tmp_path / "ref.nii.gz", volume(CUBE, shape=shape), affine=image.affine)
    assert evaluate(tmp_path / "pred.nii.gz", ref).cases[0].dice == 0.5


def test_masks_on_other_voxels_are_not_resampled(tmp_path):
    ref = save(tmp_path / "ref.nii.gz", volume(CUBE))
    flipped = save(tmp_path / "flip.nii.gz", volume(CUBE), affine=np.diag([-1.0, 1, 1, 1]))  # about the origin
    (reason,) = evaluate(flipped, ref).failures.values()
    assert "bring the prediction to the reference's grid" in reason
    smaller = save(tmp_path / "small.nii.gz", volume(CUBE, shape=(12, 12, 11)))
    (reason,) = evaluate(smaller, ref).failures.values()
    assert "12×12×11 voxels" in reason
    assert "bring the prediction to the reference's grid" in reason


def test_mask_files_may_store_any_one_number_and_no_more(tmp_path):
    one = save(tmp_path / "one.nii.gz", volume(CUBE))
    many = save(tmp_path / "many.nii.gz", volume(CUBE) * 255)
    labels = save(tmp_path / "labels.nii.gz", volume(CUBE) + volume(FAR) * 2)
    soft = save(tmp_path / "soft.nii.gz", volume(CUBE) * np.float32(0.7) + volume(FAR) * np.float32(0.2))
    assert evaluate(many, one).cases[0].dice == 1
    (reason,) = evaluate(labels, one).failures.values()
    assert reason.startswith(f"{labels} is not a binary mask: besides 0 it has 1, 2; ")
    (reason,) = evaluate(soft, one).failures.values()
    assert "cut a probability map at a threshold" in reason


def test_two_arrays_are_compared_with_the_spacing_given():
    evaluation = evaluate(volume(SHIFTED), volume(CUBE) > 0, spacing=TALL, protocol="wmh2017")
    assert evaluation.cases == [
        evaluate_case(volume(SHIFTED), volume(CUBE), TALL, PROTOCOLS["wmh2017"], subject="case")
    ]
    compared = evaluate(volume(SHIFTED), volume(CUBE), spacing=TALL, compare=volume(CUBE))
    assert compared.comparison.tests["dice"].mean_difference == -0.5


def test_arrays_without_a_spacing_and_mixed_kinds_are_refused_in_one_sentence(tmp_path):
    ref = save(tmp_path / "ref.nii.gz", volume(CUBE))
    with pytest.raises(ValueError, match=r"without a voxel size: give spacing="):
        evaluate(volume(CUBE), volume(CUBE))
    with pytest.raises(ValueError, match="give one kind"):
        evaluate(volume(CUBE), ref, spacing=ONE_MM)
    with pytest.raises(ValueError, match="leave it out"):
        evaluate(ref, ref, spacing=ONE_MM)
    with pytest.raises(ValueError, match="msseg2016"):
        evaluate(ref, ref, protocol="msseg")


# --- cohorts ----------------------------------------------------------------------------------------------


def test_a_summary_leaves_out_nan_and_says_how_many_are_left():
    summary = summarize([1.0, math.nan, 3.0, 8.0])
    assert (summary.n, summary.mean, summary.deviation) == (3, 4, pytest.approx(math.sqrt(13)))
    assert 1 <= summary.low < 4 < summary.high <= 8
    alone = summarize([2.0])
    assert (alone.n, alone.mean) == (1, 2)
    assert all(math.isnan(value) for value in (alone.deviation, alone.low, alone.high, summarize([math.nan]).mean))


def test_the_bootstrap_interval_is_that_of_scipy_and_the_same_on_every_run():
    values = np.random.default_rng(3).gamma(2.0, size=40)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=50_000).confidence_interval
    assert bootstrap_interval(values) == pytest.approx(tuple(theirs), abs=0.03)
    assert bootstrap_interval(values) == bootstrap_interval(values)


def test_csv_and_json_hold_the_numbers_and_the_protocol(cohort, tmp_path):
    predictions, reference = cohort
    save(predictions / "sub-003_mask.nii.gz", volume(), TALL)
    evaluation = evaluate(predictions, reference, protocol="shifts")
    write_csv(evaluation, tmp_path / "out.csv")
    write_json(evaluation, tmp_path / "out.json")
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["subject"] for row in rows] == ["sub-001", "sub-002", "sub-003"]
    assert float(rows[0]["dice"]) == 0.5
    assert (rows[0]["protocol"], rows[0]["rule"]) == ("shifts", "iou")
    assert (rows[0]["connectivity"], rows[0]["overlap"]) == ("6", "0.25")
    assert (rows[0]["reference_lesions_10_50_mm3"], rows[0]["reference_lesions_0_10_mm3"]) == ("1", "0")
    assert math.isnan(float(rows[2]["ppv"]))
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["cases"][2]["ppv"] is None
    assert content["means"]["dice"] == pytest.approx(0.5)
    assert content["means"]["ppv"] == pytest.approx(0.75), "the mean leaves out the undefined case"
    assert (content["counts"]["dice"], content["counts"]["ppv"]) == (3, 2)
    assert content["deviations"]["dice"] == pytest.approx(0.5)
    assert content["intervals"]["dice"] == pytest.approx([0, 1])
    assert content["size_classes"][1]["reference_lesions"] == 3
    assert content["size_classes"][-1]["high_mm3"] is None
    assert content["protocol"]["overlap"] == 0.25
    assert list(content["failures"]) == ["sub-004"]


def test_lesions_of_one_size_are_counted_over_all_cases(cohort):
    small, medium, *larger = evaluate(*cohort).size_classes()
    assert (medium.name, medium.reference_lesions, medium.detected_lesions, medium.ltpr) == ("10-50", 2, 2, 1)
    assert not any(entry.reference_lesions + entry.predicted_lesions for entry in (small, *larger))


def test_table_shows_protocol_cases_means_deviations_intervals_and_sizes(cohort):
    lines = str(evaluate(*cohort)).splitlines()
    assert "26-connected" in lines[0]
    starts = {line.split()[0]: line for line in reversed(lines) if line.strip()}
    assert "0.500" in starts["sub-001"]
    assert "0.750" in starts["mean"]
    assert "0.354" in starts["SD"]
    assert starts["n"].split()[1:] == ["2"] * 14
    assert any(line.startswith("95 % from") for line in lines)
    assert any(line.startswith("10-50 mm³") and line.split()[2:5] == ["2", "2", "1.000"] for line in lines)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_tables_fit_a_terminal_of_120_columns(cohort, protocol):
    predictions, reference = cohort
    (predictions / "sub-004_label-lesion_mask.nii.gz").unlink()
    save(predictions / "sub-003_mask.nii.gz", volume(FAR), TALL)
    table = str(evaluate(predictions, reference, protocol=protocol, compare=predictions))
    assert max(map(len, table.splitlines())) <= 120


def test_isbi_score_is_the_weighted_sum_of_its_parts():
    protocol = PROTOCOLS["isbi2015"]
    pairs = [(SHIFTED, CUBE), (FAR, FAR), (((1, 6), (1, 4), (1, 4)), ((1, 5), (1, 4), (1, 4)))]
    cases = [evaluate_case(volume(p), volume(r), ONE_MM, protocol) for p, r in pairs]
    means = Evaluation(protocol, cases, {}).means()
    dice, ppv = (0.5 + 1 + 2 * 36 / 81) / 3, (0.5 + 1 + 36 / 45) / 3
    correlation = np.corrcoef([8, 8, 36], [8, 8, 45])[0, 1]
    assert means["isbi_score"] == pytest.approx(dice / 8 + ppv / 8 + 1 / 4 + 1 / 4 + correlation / 4)
    assert math.isnan(Evaluation(protocol, cases[:2], {}).means()["isbi_score"])


def test_every_number_is_summarized():
    numbers = CaseMetrics.__dataclass_fields__.keys() - {"subject", "size_classes"}
    assert set(work.NUMBERS) == numbers
    assert set(work.TABLE) | {"predicted_lesions", "volume_error_mm3", "relative_volume_error"} == numbers


# --- another method ---------------------------------------------------------------------------------------


def test_a_paired_test_is_wilcoxon_on_the_differences():
    first = [0.1, 0.5, 0.6, 0.7, 0.4, 0.9, 0.8, math.nan]
    second = [0.2, 0.4, 0.3, 0.5, 0.0, 0.4, 0.2, 0.5]
    test = compare_paired(first, second)
    differences = np.subtract(first, second)[:7]
    assert test.n == 7
    assert test.p_value == pytest.approx(stats.wilcoxon(differences.round(12)).pvalue)
    assert test.median_difference == pytest.approx(np.median(differences))
    assert (test.first_mean, test.second_mean) == pytest.approx((np.mean(first[:7]), np.mean(second[:7])))
    assert test.mean_difference == pytest.approx(differences.mean())
    assert test.low < test.mean_difference < test.high
    assert test.remark == ""


@pytest.mark.parametrize(
    ("first", "second", "remark"),
    [
        ([0.1] * 8, [0.1] * 8, "equal in every case"),
        ([0.1 + 0.2] * 8, [0.3] * 8, "equal in every case"),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.1, 0, 0, 0, 0, 0], "5 differ, a test needs 6"),
        ([0.1], [0.2], "1 differ, a test needs 6"),
        ([math.nan, 0.1], [0.1, math.nan], "no case has the number in both"),
        ([], [], "no case has the number in both"),
    ],
)
def test_too_few_or_equal_pairs_are_said_in_words_without_a_p(first, second, remark):
    test = compare_paired(first, second)
    assert math.isnan(test.p_value)
    assert test.remark == remark


def test_two_methods_are_compared_case_by_case_on_the_same_references(tmp_path):
    starts = range(1, 9)
    ref = write_folder(tmp_path / "ref", [volume(((1, 10), (1, 3), (1, 3))) for _ in starts])
    one = write_folder(tmp_path / "one", [volume(((1, 10), (1, 3), (1, 3))) for _ in starts])
    two = write_folder(tmp_path / "two", [volume(((start, 10), (1, 3), (1, 3))) for start in starts])
    save(two / "sub-008.nii.gz", volume(shape=(3, 3, 3)))
    evaluation = evaluate(one, ref, compare=two)
    test = evaluation.comparison.tests["dice"]
    expected = [1 - case.dice for case in evaluation.comparison.other.cases]
    assert (test.n, len(expected)) == (7, 7)
    assert test.mean_difference == pytest.approx(np.mean(expected))
    assert test.p_value == pytest.approx(1 / 2**5), "six pairs that differ, all in one direction"
    assert list(evaluation.comparison.other.failures) == ["sub-008"]
    table = str(evaluation)
    assert f"Compared with {two}" in table
    assert "0.0312" in table
    assert "No p is corrected for the" in table
    assert "1 of 8 cases could not be compared" in table
    write_json(evaluation, tmp_path / "out.json")
    content = json.loads((tmp_path / "out.json").read_text())["comparison"]
    assert content["tests"]["dice"]["p_value"] == pytest.approx(test.p_value)
    assert content["tests"]["ppv"]["p_value"] is None
    assert content["tests"]["ppv"]["remark"] == "equal in every case"
    assert [case["subject"] for case in content["cases"]] == [f"sub-{n:03d}" for n in range(1, 8)]
    assert list(content["failures"]) == ["sub-008"]


def test_two_files_of_any_names_are_compared_as_one_case(tmp_path):
    ref = save(tmp_path / "ref.nii.gz", volume(CUBE))
    one, two = save(tmp_path / "one.nii.gz", volume(CUBE)), save(tmp_path / "two.nii.gz", volume(SHIFTED))
    evaluation = evaluate(one, ref, compare=two)
    assert evaluation.comparison.tests["dice"].mean_difference == 0.5
    assert "1 differ, a test needs 6" in str(evaluation)


def test_another_method_without_a_case_in_common_is_said(tmp_path):
    masks = [volume(CUBE), volume(FAR)]
    ref, one = write_folder(tmp_path / "ref", masks), write_folder(tmp_path / "one", masks)
    two = write_folder(tmp_path / "two", [volume(shape=(3, 3, 3))] * 2)
    assert f"{two} has no case in common." in str(evaluate(one, ref, compare=two))
