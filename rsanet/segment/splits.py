"""Which cases a run trains on, and which it holds out."""

import random
from collections.abc import Sequence

from rsanet.segment.cases import Case
from rsanet.segment.datasets import read_split
from rsanet.segment.recipe import Recipe
from rsanet.segment.words import counted


def divide_cases(cases: Sequence[Case], recipe: Recipe) -> tuple[list[Case], list[Case]]:
    """The cases to train on and those held out, each in their order.

    The sessions of a subject stay on one side: a network that saw one of them knows the others.

    Raises:
        ValueError: there are too few subjects, or the split file does not fit the cases.
    """
    if recipe.split is not None:
        parts = read_split(recipe.split, cases, recipe.fold)
        return parts["train"], parts["validation"]
    subjects = sorted({subject_of(case) for case in cases})
    random.Random(recipe.seed).shuffle(subjects)
    if recipe.folds is not None:
        if recipe.folds > len(subjects):
            raise ValueError(f"--folds is {recipe.folds}, but there are {len(subjects)} subjects: give fewer folds.")
        held_out = set(subjects[recipe.fold :: recipe.folds])
    else:
        count = round(recipe.val_fraction * len(subjects)) or (1 if recipe.val_fraction else 0)
        if count >= len(subjects):
            raise ValueError(
                f"{counted(len(subjects), 'subject')} cannot be split into training and held-out ones: "
                "give more, or --val-fraction 0."
            )
        held_out = set(subjects[:count])
    return (
        [case for case in cases if subject_of(case) not in held_out],
        [case for case in cases if subject_of(case) in held_out],
    )


def subject_of(case: Case) -> str:
    """The subject of a case, which may be one of their sessions."""
    return case.subject or case.id.partition("_ses-")[0]
