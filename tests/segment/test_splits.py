import json

import pytest

from rsanet.segment.cases import Case
from rsanet.segment.recipe import Recipe
from rsanet.segment.splits import divide_cases

CASES = [Case(f"sub-{number}") for number in range(10)]


def ids(cases):
    return [case.id for case in cases]


def test_the_split_divides_the_cases_and_follows_the_seed():
    training, held_out = divide_cases(CASES, Recipe(seed=1))
    assert len(held_out) == 2
    assert sorted(training + held_out, key=CASES.index) == CASES
    assert divide_cases(CASES, Recipe(seed=1)) == (training, held_out)
    assert any(divide_cases(CASES, Recipe(seed=seed))[1] != held_out for seed in range(2, 6))
    assert len(divide_cases(CASES[:3], Recipe(val_fraction=0.1))[1]) == 1
    assert divide_cases(CASES, Recipe(val_fraction=0.0)) == (CASES, [])
    with pytest.raises(ValueError, match="1 subject cannot be split"):
        divide_cases(CASES[:1], Recipe())


def test_every_case_is_held_out_in_one_fold():
    held_out = []
    for fold in range(4):
        training, fold_cases = divide_cases(CASES, Recipe(folds=4, fold=fold, seed=2))
        assert not set(ids(training)) & set(ids(fold_cases))
        assert len(fold_cases) in (2, 3)
        held_out += ids(fold_cases)
    assert sorted(held_out) == ids(CASES)
    with pytest.raises(ValueError, match="--folds is 11, but there are 10 subjects"):
        divide_cases(CASES, Recipe(folds=11, fold=0))


def test_the_sessions_of_a_subject_stay_together():
    cases = [Case(f"sub-{number}_ses-{session}") for number in range(6) for session in (1, 2)]
    for recipe in (Recipe(val_fraction=0.3), Recipe(folds=3, fold=1)):
        training, held_out = divide_cases(cases, recipe)
        assert len(held_out) == 4
        assert not {name[:5] for name in ids(training)} & {name[:5] for name in ids(held_out)}


def test_a_split_file_divides_as_it_says(tmp_path):
    file = tmp_path / "split.json"
    file.write_text(json.dumps({"train": ["sub-3", "sub-1"], "validation": ["sub-2"], "test": ["sub-0"]}))
    training, held_out = divide_cases(CASES, Recipe(split=str(file)))
    assert sorted(ids(training)) == ["sub-1", "sub-3"]
    assert ids(held_out) == ["sub-2"]
