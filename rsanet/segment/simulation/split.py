"""Which patients of a cohort are for training, for validation and for testing."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rsanet.segment.scenario import PARTS, check_shares
from rsanet.segment.words import counted


def divide(subjects: int, shares: Sequence[float]) -> list[str]:
    """The part of each subject, from the first on.

    Every subject goes to the part that is furthest behind its share. So the shares are kept as closely as whole
    subjects can, and a subject stays in their part when the cohort grows. Subjects are drawn independently of their
    numbers, and need no shuffling.

    Args:
        subjects: how many there are.
        shares: of train, validation and test, adding up to 1.

    Raises:
        ValueError: the shares are no shares, or so few subjects leave one of them without any.
    """
    check_shares(shares)
    parts: list[str] = []
    for number in range(1, subjects + 1):
        behind = [round(share * number - parts.count(part), 9) for part, share in zip(PARTS, shares, strict=True)]
        parts.append(PARTS[behind.index(max(behind))])
    for part, share in zip(PARTS, shares, strict=True):
        if share > 0 and part not in parts:
            raise ValueError(
                f"With {counted(subjects, 'subject')} the {part} part of the split would be empty: "
                "ask for more subjects, or give it a larger share, or 0."
            )
    return parts


def check_kept(path: Path, split: Mapping[str, Sequence[str]]) -> None:
    """Refuses to move a case from one part of a split on disk to another: a model may have been trained on it."""
    if not path.exists():
        return
    try:
        there = {case: part for part, cases in json.loads(path.read_text()).items() for case in cases}
    except (ValueError, AttributeError, TypeError):
        raise ValueError(f"{path} holds no split: move it away first.") from None
    for part, cases in split.items():
        for case in cases:
            if there.get(case, part) != part:
                raise ValueError(
                    f"{path} has {case} in {there[case]}, and --split would move it to {part}: "
                    "give the same shares again, or move the file away first."
                )
