import json
import threading
import time
import unicodedata

import numpy as np
import pytest

from rsanet.segment import datasets
from rsanet.segment.cases import Case
from rsanet.segment.datasets import find_cases, is_simulated, list_cases, read_split


def test_a_cohort_is_read_with_its_contrasts_in_channel_order(cohort, phantoms):
    cases = find_cases(cohort, require_mask=True)
    assert [case.id for case in cases] == ["sub-001", "sub-002", "sub-003", "sub-004"]
    assert list(cases[0].images) == ["FLAIR", "T1w", "T2w"]
    assert cases[2].mask == phantoms.mask_path(cohort, "sub-003")
    assert list(find_cases(cohort, ["T2w", "FLAIR"], require_mask=True)[0].images) == ["T2w", "FLAIR"]


def test_all_bad_cases_are_named_at_once(tmp_path, phantoms):
    root = phantoms.write_cohort(tmp_path, 6)
    phantoms.image_path(root, "sub-001", "T1w").unlink()
    phantoms.mask_path(root, "sub-002").unlink()
    broken = phantoms.image_path(root, "sub-003", "T2w")
    broken.write_bytes(broken.read_bytes()[:2000])
    phantoms.save(phantoms.mask_path(root, "sub-004"), np.ones((26, 30, 23)))
    shifted = np.eye(4)
    shifted[0, 3] = 1
    phantoms.save(phantoms.mask_path(root, "sub-005"), np.ones((26, 30, 24)), shifted)
    with pytest.raises(ValueError, match="5 of 6 cases") as error:
        find_cases(root, require_mask=True)
    lines = str(error.value).splitlines()[1:]
    for line, name, reason in zip(
        lines,
        ["sub-001", "sub-002", "sub-003", "sub-004", "sub-005"],
        ["no T1w", "no lesion mask", "cannot be read", "another grid", "another grid"],
        strict=True,
    ):
        assert name in line
        assert reason in line


def test_a_missing_contrast_is_named_although_no_case_has_it(cohort):
    with pytest.raises(ValueError, match="sub-001 has no PDw"):
        find_cases(cohort, ["FLAIR", "PDw"], require_mask=False)


def test_masks_are_not_asked_for_where_none_are_needed(tmp_path, phantoms):
    phantoms.write_subject(tmp_path, "sub-001", 1, mask=False)
    assert find_cases(tmp_path, require_mask=False)[0].mask is None


def test_simulated_cohorts_are_known_by_their_description(cohort, tmp_path, phantoms):
    assert is_simulated(cohort)
    assert is_simulated(phantoms.mask_path(cohort, "sub-001"))
    assert not is_simulated(tmp_path)
    for description in ("no json", "[]", '{"GeneratedBy": [{"Name": "fMRIPrep"}]}', '{"GeneratedBy": null}'):
        (tmp_path / "dataset_description.json").write_text(description)
        assert not is_simulated(tmp_path)


def test_a_contrast_is_named_once(cohort):
    with pytest.raises(ValueError, match="--contrasts has FLAIR more than once"):
        find_cases(cohort, ["FLAIR", "T1w", "FLAIR"], require_mask=True)


def test_a_contrast_may_be_asked_for_by_any_of_its_names(cohort):
    cases, contrasts = list_cases(cohort, ["t1", "flair"])
    assert contrasts == list(cases[0].images) == ["T1w", "FLAIR"]
    with pytest.raises(ValueError, match="T1w more than once"):
        list_cases(cohort, ["T1", "T1w"])


def test_contrasts_that_lie_apart_make_a_bad_case(tmp_path, phantoms):
    root = phantoms.write_cohort(tmp_path, 2)
    path = phantoms.image_path(root, "sub-002", "T2w")
    apart = np.eye(4)
    apart[2, 3] = 200
    phantoms.save(path, phantoms.make_subject(2)[0]["T2w"], apart)
    with pytest.raises(ValueError, match=r"1 of 2 cases .*\n.*sub-002_T2w.* covers 0 % of .*sub-002_FLAIR"):
        find_cases(root, require_mask=True)


def test_cases_are_checked_side_by_side_and_stay_in_order(cohort, monkeypatch):
    monkeypatch.setattr(datasets.os, "cpu_count", lambda: 2)
    pair = threading.Barrier(2, timeout=30)  # breaks where a case waits for the one before it to end

    def check(case, contrasts, *, require_mask):
        pair.wait()
        raise ValueError(case.id)

    monkeypatch.setattr(datasets, "check_case", check)
    with pytest.raises(ValueError, match=r"4 of 4 .*:\n  sub-001\n  sub-002\n  sub-003\n  sub-004$"):
        find_cases(cohort, require_mask=True)


def test_an_interrupted_check_reads_no_further_case(cohort, monkeypatch):
    seen = []

    def check(case, contrasts, *, require_mask):
        seen.append(case.id)
        if len(seen) > 1:
            time.sleep(0.3)

    def bar(results, *args, **options):
        for _ in results:
            raise KeyboardInterrupt  # by Ctrl-C, while the bar is drawn

    monkeypatch.setattr(datasets.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(datasets, "check_case", check)
    monkeypatch.setattr(datasets, "tqdm", bar)
    with pytest.raises(KeyboardInterrupt):
        find_cases(cohort, require_mask=True)
    assert len(seen) < 4


CASES = [Case(name) for name in "abcde"]


def split(folder, content, fold=None):
    path = folder / "split.json"
    path.write_text(json.dumps(content))
    return {part: [case.id for case in cases] for part, cases in read_split(path, CASES, fold).items()}


def test_a_split_file_divides_the_cases_it_names_in_their_order(tmp_path):
    parts = {"train": ["c", "a"], "validation": ["b"], "test": ["d"]}
    assert split(tmp_path, parts) == {"train": ["a", "c"], "validation": ["b"], "test": ["d"]}
    assert split(tmp_path, {"train": ["a"]}) == {"train": ["a"], "validation": [], "test": []}


def test_letters_with_accents_match_however_a_system_stores_them(tmp_path, phantoms):
    for form in ("NFC", "NFD"):
        folder = tmp_path / form
        phantoms.save(folder / unicodedata.normalize(form, "Zoë") / "FLAIR.nii.gz", np.ones((2, 2, 2)))
        cases, _ = list_cases(folder)
        (folder / "split.json").write_text(json.dumps({"train": [unicodedata.normalize("NFD", "Zoë")]}))
        assert [case.id for case in read_split(folder / "split.json", cases)["train"]] == [
            "Zo\N{LATIN SMALL LETTER E WITH DIAERESIS}"
        ]


def test_a_fold_of_nnunet_is_a_split(tmp_path):
    folds = [{"train": ["a", "b"], "val": ["c"]}, {"train": ["b", "c"], "val": ["a"]}]
    assert split(tmp_path, folds) == {"train": ["a", "b"], "validation": ["c"], "test": []}
    assert split(tmp_path, folds, 1) == {"train": ["b", "c"], "validation": ["a"], "test": []}


@pytest.mark.parametrize(
    ("content", "fold", "reason"),
    [
        ({"train": ["a", "x", "y"]}, None, "names x, y, not in the data set: give some of a, b, c, d, e"),
        ({"train": ["a", "b"], "test": ["b"]}, None, "has b in two parts"),
        ({"validation": ["a"]}, None, "is no split"),
        ({"train": []}, None, "no case under train"),
        ({"train": ["a"], "dev": ["b"]}, None, "has 'dev': give lists of names under train, validation and test"),
        ({"train": "a"}, None, "has 'train': give lists"),
        ({"train": [1]}, None, "has 'train': give lists"),
        ({"train": ["a"]}, 0, "has no folds"),
        ([{"train": ["a"]}], 1, "has 1 fold, counted from 0: there is no fold 1"),
        ([{"train": ["a"]}], -1, "there is no fold -1"),
        ([], None, "has 0 folds"),
        (3, None, "is no split"),
    ],
)
def test_a_split_that_does_not_fit_is_refused_in_one_sentence(tmp_path, content, fold, reason):
    with pytest.raises(ValueError, match=reason) as error:
        split(tmp_path, content, fold)
    assert "split.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_split_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        read_split(tmp_path / "nowhere.json", CASES)
