"""One picture of a cohort's predictions, with the attention maps of the model behind them."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from rsanet.segment.datasets import Case, is_simulated, list_cases
from rsanet.segment.metrics import PROTOCOLS, Protocol
from rsanet.segment.pairs import masks_of_cases, only_mask
from rsanet.segment.report import View, draw_report
from rsanet.segment.segmenter import Segmenter

SUBJECTS = 3  # rows of a picture that still reads at a glance
PICTURES = (".png", ".pdf", ".svg")


def is_picture(out: Path) -> bool:
    """Whether a name is that of a picture, and not of a folder for pages.

    Raises:
        ValueError: it ends as a file does that is neither.
    """
    if out.suffix.lower() in PICTURES:
        return True
    if not out.is_dir() and re.fullmatch(r"\.[A-Za-z]{2,5}|\.gz", out.suffix):
        raise ValueError(
            f"{out} is neither a picture nor a folder: end its name in {', '.join(PICTURES)}, or give a "
            "folder for HTML pages."
        )
    return False


def choose_cases(cases: Sequence[Case], predicted: dict[str, list[Path]], subjects: Sequence[str]) -> list[Case]:
    """The subjects asked for, else the first few; all need a prediction."""
    by_id = {case.id: case for case in cases}
    unknown = [subject for subject in subjects if subject not in by_id]
    if unknown:
        raise ValueError(f"There is no subject {', '.join(unknown)}: give some of {', '.join(by_id)}.")
    chosen = [by_id[subject] for subject in subjects] or [case for case in cases if case.id in predicted][:SUBJECTS]
    without = [case.id for case in chosen if case.id not in predicted]
    if without or not chosen:
        raise ValueError(f"There is no predicted mask of {', '.join(without) or 'any subject'}: run predict first.")
    return chosen


def draw_cohort(
    out: str | Path,
    data: str | Path,
    predictions: str | Path,
    model: Segmenter | None = None,
    *,
    subjects: Sequence[str] = (),
    protocol: Protocol = PROTOCOLS["custom"],
    layout: str = "auto",
    raters: str | None = None,
) -> Path:
    """Draws subjects of a cohort, a row each, and the attention maps of the first.

    Args:
        out: picture to write.
        data: the cohort, with or without reference masks.
        predictions: folder of predicted masks.
        model: whose attention to draw, in the window around the largest lesion; None draws no maps.
        subjects: which subjects; by default the first three that have a prediction.
        protocol: how lesions are counted.
        layout: how the cohort lies on disk; see `rsanet.segment.layouts.read_cases`.
        raters: whose masks are the reference; see `rsanet.segment.datasets.list_cases`.
    """
    cases, contrasts = list_cases(data, layout=layout, raters=raters)
    if not Path(predictions).is_dir():
        raise FileNotFoundError(f"{predictions} is not a folder: give the folder that predict wrote.")
    predicted = masks_of_cases(Path(predictions), cases)
    chosen = choose_cases(cases, predicted, subjects)
    shown = "FLAIR" if "FLAIR" in contrasts else contrasts[0]
    masks = {case.id: only_mask(predicted[case.id], case.id) for case in chosen}
    views = [
        View.of(case.pick([shown])[shown], case.pick_mask(), masks[case.id], name=case.id, protocol=protocol)
        for case in chosen
    ]
    maps: dict[str, np.ndarray] = {}
    if model is not None:
        first = chosen[0]
        maps = model.attention_maps(replace(first, mask=first.mask or masks[first.id]))
    title = f"Lesion segmentation of {data}"
    return draw_report(views, maps, out, title=title, protocol=protocol, simulated=is_simulated(data))
