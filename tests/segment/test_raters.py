"""Several raters' masks of one scan: which is the reference, and that it is said."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest

from rsanet.segment.datasets import find_cases, list_cases, reference_words
from rsanet.segment.volumes import read_mask


@pytest.fixture
def drawn(tmp_path, phantoms):
    """Two subjects in folders, each with the masks of three raters; returns the folder and the first one's masks."""
    folder = tmp_path / "data"
    for number in (1, 2):
        images, lesions = phantoms.make_subject(number)
        phantoms.save(folder / f"P{number}" / "FLAIR.nii.gz", images["FLAIR"])
        masks = [np.roll(lesions, shift, axis=0) for shift in (0, 1, 2)]
        for rater, mask in enumerate(masks, 1):
            phantoms.save(folder / f"P{number}" / f"mask{rater}.nii.gz", mask, dtype=np.uint8)
        if number == 1:
            first = masks
    return folder, first


def mask_of(folder, raters):
    return read_mask(find_cases(folder, require_mask=True, raters=raters)[0].mask)[0]


def test_several_raters_are_refused_with_the_option_that_chooses(drawn):
    with pytest.raises(ValueError, match=r"P1 has several lesion masks \(.*mask1.*mask3.*\): give --raters mask1, or"):
        find_cases(drawn[0], require_mask=True)


def test_one_rater_or_a_rule_makes_the_mask(drawn):
    folder, masks = drawn
    votes = sum(mask.astype(int) for mask in masks)
    assert np.array_equal(mask_of(folder, "mask2"), masks[1])
    assert np.array_equal(mask_of(folder, "majority"), votes >= 2)
    assert np.array_equal(mask_of(folder, "union"), votes >= 1)
    assert np.array_equal(mask_of(folder, "intersection"), votes == 3)


def test_a_tie_is_no_lesion(drawn):
    folder, masks = drawn
    for number in (1, 2):
        (folder / f"P{number}" / "mask3.nii.gz").unlink()
    assert np.array_equal(mask_of(folder, "majority"), masks[0] & masks[1])


def test_a_single_mask_is_its_own_majority(cohort):
    with_rule = find_cases(cohort, require_mask=True, raters="majority")
    assert [case.mask for case in with_rule] == [case.mask for case in find_cases(cohort, require_mask=True)]


def test_raters_on_different_grids_make_a_bad_case(drawn, phantoms):
    folder, masks = drawn
    phantoms.save(folder / "P2" / "mask3.nii.gz", masks[0][1:], dtype=np.uint8)
    with pytest.raises(ValueError, match=r"1 of 2 cases .*\n  .*mask3.nii.gz \(25×30×24\) is on another grid than .*"):
        find_cases(folder, require_mask=True, raters="union")
    assert len(find_cases(folder, require_mask=True, raters="mask1")) == 2


def test_a_rater_that_nobody_is_is_refused_and_one_who_left_some_out_makes_bad_cases(drawn):
    folder, _ = drawn
    with pytest.raises(ValueError, match=r"No case of .* has a mask of 'anna': give one of mask1, .*, or maj"):
        list_cases(folder, raters="anna")
    (folder / "P2" / "mask3.nii.gz").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 cases .*\n  P2 has no mask of that rater: it has mask1, mask2\."):
        find_cases(folder, require_mask=True, raters="mask3")


def test_a_rater_of_some_subjects_alone_goes_by_one_name(drawn, phantoms, tmp_path):
    folder, _ = drawn
    for rater in (2, 3):
        (folder / "P2" / f"mask{rater}.nii.gz").unlink()
    assert [list(case.raters) for case in list_cases(folder)[0]] == [["mask1", "mask2", "mask3"], ["mask1"]]
    assert reference_words(list_cases(folder, raters="union")[0], "union") == "union of mask1, mask2, mask3"
    root = phantoms.write_cohort(tmp_path / "bids", 2)
    assert [list(case.raters) for case in list_cases(root)[0]] == [["lesions"], ["lesions"]]
    assert reference_words(list_cases(root, raters="union")[0], "union") == "one mask of each case"
    assert len(find_cases(root, require_mask=True, raters="lesions")) == 2


def test_two_masks_of_one_bids_pipeline_are_two_raters(tmp_path, phantoms):
    root = phantoms.write_cohort(tmp_path, 1)
    path = phantoms.mask_path(root, "sub-001")
    for name in ("anna", "bert"):
        phantoms.save(path.with_name(f"sub-001_desc-{name}_label-lesion_mask.nii.gz"), phantoms.make_subject(2)[1])
    path.unlink()
    assert (
        find_cases(root, require_mask=True, raters="bert")[0].mask.name == "sub-001_desc-bert_label-lesion_mask.nii.gz"
    )
    assert list_cases(root, raters="majority")[0][0].mask.rule == "majority"


def test_raters_of_bids_go_by_the_folder_of_their_derivatives(tmp_path, phantoms):
    root = phantoms.write_cohort(tmp_path, 1)
    other = root / "derivatives" / "rater2" / "sub-001" / "anat" / "sub-001_label-lesion_mask.nii.gz"
    phantoms.save(other, phantoms.make_subject(2)[1])
    assert list(list_cases(root)[0][0].raters) == ["lesions", "rater2"]
    assert find_cases(root, require_mask=True, raters="rater2")[0].mask == other


def test_what_predict_wrote_into_the_derivatives_is_no_reference(tmp_path, phantoms):
    root = phantoms.write_cohort(tmp_path, 1)
    ours = root / "derivatives" / "rsanet"
    phantoms.save(ours / "sub-001" / "anat" / "sub-001_label-lesion_mask.nii.gz", phantoms.make_subject(2)[1])
    (ours / "dataset_description.json").write_text('{"GeneratedBy": [{"Name": "rsanet"}]}')
    assert find_cases(root, require_mask=True)[0].mask == phantoms.mask_path(root, "sub-001")


def test_scores_say_whose_masks_they_are_against(drawn, tmp_path, rsanet):
    folder, _ = drawn
    for number in (1, 2):
        grid = nib.load(folder / f"P{number}" / "mask2.nii.gz")
        (tmp_path / "masks").mkdir(exist_ok=True)
        nib.save(grid, tmp_path / "masks" / f"P{number}_label-lesion_mask.nii.gz")
    tables = ["--csv", tmp_path / "s.csv", "--json", tmp_path / "s.json", "--overwrite"]
    code, _, err = rsanet("evaluate", tmp_path / "masks", folder, *tables)
    assert code == 1
    assert "2 cases could not be compared" in err
    for raters, words in (
        ("mask2", "mask2"),
        ("union", "union of mask1, mask2, mask3"),
        ("majority", "majority of mask1, mask2, mask3, a tie is no lesion"),
    ):
        code, out, err = rsanet("evaluate", tmp_path / "masks", folder, "--raters", raters, *tables)
        assert (code, err) == (0, "")
        assert f"\nReference: {words}.\n" in out
        with (tmp_path / "s.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert {row["reference"] for row in rows} == {words}
        assert json.loads((tmp_path / "s.json").read_text())["reference"] == words
        assert (float(rows[0]["dice"]) == 1) == (raters == "mask2")
    code, _, err = rsanet("evaluate", *[tmp_path / "masks" / "P1_label-lesion_mask.nii.gz"] * 2, "--raters", "union")
    assert code == 1
    assert "is one mask, and --raters is for a data set" in err


def test_training_says_whose_masks_it_learns_from_and_a_resumed_run_keeps_to_them(drawn, tmp_path, rsanet, tiny):
    folder, _ = drawn
    options = ["--steps", "1", "--layout", "folders", "--raters", "majority", *tiny[:-2], "--val-fraction", "0.5"]
    code, out, err = rsanet("train", folder, "-o", tmp_path / "run", *options)
    assert code == 0
    assert err.startswith("rsanet: warning: The model finds next to none of the lesions")  # in one step
    assert "1 held out, masks: majority of mask1, mask2, mask3, a tie is no lesion: " in out
    code, out, err = rsanet("train", folder, "-o", tmp_path / "run", "--resume")
    assert (code, err) == (0, "")
    code, _, err = rsanet("train", folder, "-o", tmp_path / "run", "--resume", "--raters", "union")
    assert code == 1
    assert "--raters is union, but" in err
