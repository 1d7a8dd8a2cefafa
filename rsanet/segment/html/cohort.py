"""The report of a cohort: a page for each case, written as it is made, and one for all of them."""

import csv
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from rsanet.segment import files
from rsanet.segment.cohort import TABLE as PREDICTIONS
from rsanet.segment.datasets import Case, is_simulated, list_cases, reference_words
from rsanet.segment.evaluation import FEW, Evaluation
from rsanet.segment.html.charts import histogram, spread_loads
from rsanet.segment.html.lesions import STATUS
from rsanet.segment.html.page import Page, make_page, page_file, render
from rsanet.segment.html.scan import Scan, read_scan
from rsanet.segment.metrics import PROTOCOLS, Protocol
from rsanet.segment.overview import choose_cases
from rsanet.segment.pairs import masks_of_cases, only_mask
from rsanet.segment.segmenter import Segmenter
from rsanet.segment.words import counted, some

INDEX = "index.html"
# What the cohort's page says of the agreement, by the names of the numbers.
SCORES = {
    "dice": "Dice",
    "ppv": "PPV",
    "tpr": "TPR",
    "hd95_mm": "HD95 (mm)",
    "assd_mm": "ASSD (mm)",
    "ltpr": "LTPR",
    "lfpr": "LFPR",
    "lesion_f1": "Lesion-wise F1",
}


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        index: the cohort's page.
        pages: of the cases, by name.
        failures: why a case has none, by name.
    """

    index: Path
    pages: dict[str, Path] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def write_report(
    out: str | Path,
    data: str | Path,
    predictions: str | Path,
    model: Segmenter | None = None,
    *,
    subjects: Sequence[str] = (),
    protocol: Protocol = PROTOCOLS["custom"],
    layout: str = "auto",
    raters: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int, str, str], None] | None = None,
) -> Report:
    """Writes a page for each case of a cohort that has a predicted mask, and ``index.html``.

    Each page is a single file: pictures and all else are in it, and it loads nothing. A bad case does not stop the
    others. A session is compared with the one before it.

    Args:
        out: folder of the pages; made where it does not exist.
        data: the cohort, with or without reference masks.
        predictions: folder of predicted masks.
        model: whose attention to draw, in the window around a case's largest lesion; None draws no maps.
        subjects: which cases; by default all that have a predicted mask.
        protocol: how lesions are counted.
        layout: how the cohort lies on disk; see `rsanet.segment.layouts.read_cases`.
        raters: whose masks are the reference; see `rsanet.segment.datasets.list_cases`.
        overwrite: whether pages that exist are replaced.
        progress: called as ``progress(number, cases, name, words)`` after each case.

    Raises:
        ValueError: no case has a page, ``out`` is a file, or a page exists without ``overwrite``.
        OSError: a folder does not exist or cannot be written.
    """
    out = Path(out)
    cases, contrasts = list_cases(data, layout=layout, raters=raters)
    if not Path(predictions).is_dir():
        raise FileNotFoundError(f"{predictions} is not a folder: give the folder that predict wrote.")
    masks = masks_of_cases(Path(predictions), cases)
    # The order of sessions is that of their names.
    every = list(subjects) or [case.id for case in cases if case.id in masks]
    chosen = sorted(choose_cases(cases, masks, every), key=lambda case: case.id)
    _check_folder(out, chosen, overwrite=overwrite)
    rows = _read_rows(Path(predictions) / PREDICTIONS)
    simulated = is_simulated(data)
    whose = [f"Reference: {words}."] if (words := reference_words(cases, raters)) else []
    report = Report(out / INDEX)
    pages: list[Page] = []
    before: Scan | None = None
    files.remove_stale(out)
    for number, case in enumerate(chosen, start=1):
        start = time.perf_counter()
        try:
            scan = read_scan(case, contrasts, only_mask(masks[case.id], case.id))
            maps, remarks = _attention(model, case, masks[case.id][0])
            page = make_page(
                scan,
                protocol,
                before=before if before and _subject(before.name) == _subject(case.id) else None,
                maps=maps,
                row=rows.get(case.id),
                simulated=simulated,
                remarks=[*whose, *remarks],
            )
            out.mkdir(parents=True, exist_ok=True)
            files.write_text(out / page.file, page.html)
        except (ValueError, OSError) as error:
            known = isinstance(error, OSError) and error.strerror
            words = f"{error.filename}: {error.strerror.lower()}." if known else str(error)
            report.failures[case.id] = words
            before = None
            words = f"no page: {words}"
        else:
            before = scan
            report.pages[case.id] = out / page.file
            pages.append(replace(page, html=""))
            seconds = time.perf_counter() - start
            words = f"{counted(page.count, 'lesion')}, {page.load_mm3 / 1000:.2f} mL, {seconds:.1f} s"
        if progress:
            progress(number, len(chosen), case.id, words)
    if not pages:
        raise ValueError(f"No case has a page: {next(iter(report.failures.values()))}")
    left_out = [case.id for case in cases if case.id not in masks]
    title = f"Lesion segmentation of {Path(data).resolve().name}"
    files.write_text(report.index, make_index(pages, report.failures, protocol, title, simulated, left_out, whose))
    return report


def _check_folder(out: Path, cases: Sequence[Case], *, overwrite: bool) -> None:
    """Refuses a folder that cannot hold the pages, before the first is made."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder for the pages, or a picture's name (.png, .pdf, .svg).")
    names = [INDEX, *(page_file(case.id) for case in cases)]
    there = [name for name in names if (out / name).exists()]
    if there and not overwrite:
        raise ValueError(
            f"{out} already has {there[0]}{' and other pages' if len(there) > 1 else ''}: give another folder, or "
            "--overwrite to replace them."
        )
    files.check_writable(out / INDEX)


def _subject(case: str) -> str:
    """The subject of a case, which is a session where its name says so."""
    return re.sub(r"_ses-[^_]+$", "", case)


def _attention(model: Segmenter | None, case: Case, mask: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """The attention maps of a case, or the remark why there are none; the page is worth having without."""
    if model is None:
        return {}, []
    try:
        return model.attention_maps(replace(case, mask=mask)), []
    except ValueError as error:
        return {}, [f"No attention maps: {error}"]


def _read_rows(path: Path) -> dict[str, dict[str, str]]:
    """The rows of ``predictions.csv`` by case; none where it is not there, or another table."""
    if not path.is_file():
        return {}
    try:
        with path.open(**files.ENCODING, newline="") as file:
            return {row["case"]: row for row in csv.DictReader(file)}
    except (KeyError, csv.Error):
        return {}


def make_index(
    pages: Sequence[Page],
    failures: dict[str, str],
    protocol: Protocol,
    title: str,
    simulated: bool,
    left_out: Sequence[str] = (),
    remarks: Sequence[str] = (),
) -> str:
    """The cohort's page.

    Args:
        pages: of the cases, at least one.
        failures: why a case has none, by name.
        protocol: how lesions were counted.
        title: of the page.
        simulated: whether to say that the data are simulated.
        left_out: cases of the cohort that have no predicted mask.
        remarks: further sentences on the cohort.
    """
    measured = [page.metrics for page in pages if page.metrics]
    lesions = [lesion for page in pages for lesion in page.lesions]
    present = {lesion.status for lesion in lesions}
    without = [f"{counted(len(left_out), 'case')} of the cohort without a predicted mask."] if left_out else []
    doubtful = [page.name for page in pages if page.warnings]
    if doubtful:
        without.append(f"{counted(len(doubtful), 'mask')} with warnings, which the pages show: {some(doubtful)}.")
    return render(
        "index.html",
        pages=pages,
        failures=failures,
        title=title,
        simulated=simulated,
        remarks=[*remarks, *without],
        layers=[(key, words, 0) for key, words in STATUS.items() if key in present],
        loads=spread_loads([(page.name, page.load_mm3 / 1000) for page in pages]),
        bars=histogram([(one.status, one.volume_mm3) for one in lesions if one.status != "reference"], list(STATUS)),
        scores=_summarize(Evaluation(protocol, measured, {})) if measured else [],
        few=len(measured) < FEW,
        protocol=protocol.describe(),
    )


def _summarize(evaluation: Evaluation) -> list[tuple[str, dict[str, Any]]]:
    """The scores of a cohort: words, and the numbers as they are printed."""
    summaries = evaluation.summaries()

    def words(value: float) -> str:
        return f"{value:.3f}" if math.isfinite(value) else "–"

    return [
        (
            name,
            {
                "mean": words(summaries[key].mean),
                "deviation": words(summaries[key].deviation),
                "interval": f"{words(summaries[key].low)} to {words(summaries[key].high)}",
                "n": summaries[key].n,
            },
        )
        for key, name in SCORES.items()
    ]
