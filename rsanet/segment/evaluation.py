"""Predicted masks against references: which files belong together, and what all cases say together.

The numbers of one case are those of ``rsanet.segment.metrics``.
"""

import json
import math
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rsanet.segment import files
from rsanet.segment.datasets import list_cases, read_test_part
from rsanet.segment.metrics import CaseMetrics, Protocol, SizeClass, choose_protocol, evaluate_case
from rsanet.segment.pairs import find_masks, find_references, name_as, pair_masks, subject_of_mask
from rsanet.segment.raters import ignored_voxels
from rsanet.segment.statistics import PairedTest, Summary, compare_paired, summarize
from rsanet.segment.volumes import MaskSource, names_volume, read_mask, read_mask_on
from rsanet.segment.words import counted

Array = np.ndarray
PathLike = str | os.PathLike

NUMBERS = tuple(entry.name for entry in fields(CaseMetrics) if entry.name not in ("subject", "size_classes"))
WIDTH = 118
FEW = 10  # below this, resampled cases repeat each other so much that a percentile interval covers too little

# The columns of the terminal's table; everything else is in the CSV and the JSON.
TABLE = {
    "dice": ("Dice", "{:.3f}"),
    "ppv": ("PPV", "{:.3f}"),
    "tpr": ("TPR", "{:.3f}"),
    "volume_difference": ("VD", "{:.2f}"),
    "hd95_mm": ("HD95", "{:.1f}"),
    "assd_mm": ("ASSD", "{:.2f}"),
    "reference_mm3": ("ref mm³", "{:.0f}"),
    "predicted_mm3": ("pred mm³", "{:.0f}"),
    "reference_lesions": ("lesions", "{:.4g}"),
    "detected_lesions": ("found", "{:.4g}"),
    "false_lesions": ("false", "{:.4g}"),
    "ltpr": ("LTPR", "{:.3f}"),
    "lfpr": ("LFPR", "{:.3f}"),
    "lesion_f1": ("F1", "{:.3f}"),
}
LEGEND = (
    "VD: |predicted - reference| / reference volume. HD95, ASSD: surface distances in mm. LTPR: found / lesions. "
    "LFPR: false / predicted lesions. F1: of LTPR and 1 - LFPR. -: not defined there."
)
# What two methods are compared by.
COMPARED = ("dice", "ppv", "tpr", "volume_difference", "hd95_mm", "assd_mm", "ltpr", "lfpr", "lesion_f1")


@dataclass(frozen=True)
class Evaluation:
    """A cohort's numbers. As a string, the tables of the terminal.

    Attributes:
        protocol: how lesions were counted.
        cases: the cases that could be compared with their reference.
        failures: the others, and why in a sentence each.
        comparison: the same cases of another method, if one was given.
        reference: whose masks the reference is, and what of them does not count; empty where there is one complete
            mask of each case, and nobody asked.
    """

    protocol: Protocol
    cases: list[CaseMetrics]
    failures: dict[str, str]
    comparison: "Comparison | None" = None
    reference: str = ""

    def summaries(self) -> dict[str, Summary]:
        """Mean, deviation and interval of each number over the cases where it is defined."""
        return {name: summarize([getattr(case, name) for case in self.cases]) for name in NUMBERS}

    def means(self) -> dict[str, float]:
        """The mean of each number over the cases where it is defined; for isbi2015, its score too."""
        result = {name: summary.mean for name, summary in self.summaries().items()}
        if self.protocol.name == "isbi2015":
            correlation = volume_correlation(self.cases)
            result["volume_correlation"] = correlation
            result["isbi_score"] = (
                result["dice"] / 8 + result["ppv"] / 8 + (1 - result["lfpr"]) / 4 + result["ltpr"] / 4 + correlation / 4
            )
        return result

    def size_classes(self) -> list[SizeClass]:
        """The lesion-wise numbers by lesion volume, the lesions of all cases together."""
        counts = ("reference_lesions", "detected_lesions", "predicted_lesions", "false_lesions")
        return [
            replace(classes[0], **{name: sum(getattr(entry, name) for entry in classes) for name in counts})
            for classes in zip(*(case.size_classes for case in self.cases), strict=True)
        ]

    def __str__(self) -> str:
        return format_table(self)


@dataclass(frozen=True)
class Comparison:
    """Another method on the same references.

    Attributes:
        name: what it is called, its path for example.
        other: its numbers.
        tests: for each number of ``COMPARED``, the first method minus this one.
    """

    name: str
    other: Evaluation
    tests: dict[str, PairedTest]


def volume_correlation(cases: Sequence[CaseMetrics]) -> float:
    """Pearson correlation of predicted and reference lesion loads; NaN below 3 cases or without spread."""
    loads = np.array([(case.reference_mm3, case.predicted_mm3) for case in cases])
    if len(loads) < 3 or (loads.std(axis=0) == 0).any():
        return math.nan
    return float(np.corrcoef(loads.T)[0, 1])


def evaluate(
    pred: PathLike | Array,
    ref: PathLike | Array,
    *,
    spacing: Sequence[float] | Array | None = None,
    protocol: str | Protocol = "custom",
    compare: PathLike | Array | None = None,
    split: PathLike | None = None,
    layout: str = "auto",
    raters: str | None = None,
    progress: bool = False,
) -> Evaluation:
    """Compare two masks, two mask files, or the masks of two folders subject by subject.

    Files of a folder are matched by the ``sub-`` and ``ses-`` in their names, else by the name without its ending and
    ``_label-lesion_mask``. The reference may be a data set: its lesion masks are taken. A bad case does not stop the
    others. A mask whose axes are flipped or swapped is turned to its reference, and one whose header puts it less
    than a voxel away is taken with a warning; one on other voxels is not resampled, but a failure.

    Args:
        pred: a NIfTI file or a folder; or an array (X, Y, Z) of 0 and one other number.
        ref: likewise, or a data set of any layout that training reads, by its folder or its list.
        spacing: voxel size in mm, or the affine (4, 4), for arrays; files carry their own.
        protocol: how lesions are counted, a key of ``PROTOCOLS`` or a protocol.
        compare: another prediction of the same references, of the kind of ``pred``.
        split: a split file of the data set ``ref``, of which the test part alone is compared.
        layout: how the data set ``ref`` lies on disk; see `rsanet.segment.layouts.read_cases`.
        raters: whose masks of the data set ``ref`` are the reference; see `rsanet.segment.datasets.list_cases`.
        progress: show a bar on a terminal where it takes longer than two seconds.

    Returns:
        The cases, and by subject the reason for each pair that could not be compared or has no partner.

    Raises:
        ValueError: a path does not exist, or one holds many masks and the other is one, or nothing matches, or arrays
            cannot be compared.
    """
    chosen = choose_protocol(protocol) if isinstance(protocol, str) else protocol
    given = [pred, ref] if compare is None else [pred, ref, compare]
    paths = [isinstance(masks, (str, os.PathLike)) for masks in given]
    if all(paths):
        if spacing is not None:
            raise ValueError("spacing is for arrays: files carry their own voxel size, so leave it out.")
        reads = {"split": split, "layout": layout, "raters": raters, "progress": progress}
        evaluation = _evaluate_paths(Path(pred), Path(ref), chosen, **reads)
        if compare is not None:
            name = subject_of_mask(Path(pred)) if Path(pred).is_file() else None
            other = _evaluate_paths(Path(compare), Path(ref), chosen, name=name, **reads)
            evaluation = replace(evaluation, comparison=_compare(evaluation, other, str(compare)))
        return evaluation
    if any(paths):
        raise ValueError("Some masks are arrays and others are paths: give one kind.")
    if spacing is None:
        raise ValueError("The masks are arrays without a voxel size: give spacing=(1, 1, 1), for example, in mm.")
    evaluation = Evaluation(chosen, [evaluate_case(pred, ref, spacing, chosen, subject="case")], {})
    if compare is not None:
        other = Evaluation(chosen, [evaluate_case(compare, ref, spacing, chosen, subject="case")], {})
        evaluation = replace(evaluation, comparison=_compare(evaluation, other, "the other mask"))
    return evaluation


def _compare(evaluation: Evaluation, other: Evaluation, name: str) -> Comparison:
    others = {case.subject: case for case in other.cases}
    pairs = [(case, others[case.subject]) for case in evaluation.cases if case.subject in others]
    tests = {
        number: compare_paired([getattr(one, number) for one, _ in pairs], [getattr(two, number) for _, two in pairs])
        for number in COMPARED
    }
    return Comparison(name, other, tests)


# --- files ------------------------------------------------------------------------------------------------


def _evaluate_paths(
    pred: Path,
    ref: Path,
    protocol: Protocol,
    *,
    name: str | None = None,
    split: PathLike | None = None,
    layout: str = "auto",
    raters: str | None = None,
    progress: bool = False,
) -> Evaluation:
    """Two files, then called ``name``, or two folders."""
    for path in (pred, ref):
        if not path.exists():
            raise ValueError(f"{path} does not exist: give a mask or a folder of masks.")
    listed = ref.is_file() and not names_volume(ref.name)
    if pred.is_dir() != (ref.is_dir() or listed):
        several, one = (pred, ref) if pred.is_dir() else (ref, pred)
        raise ValueError(f"{several} holds many masks and {one} is one file: give two files or two folders.")
    if not pred.is_dir() and (layout != "auto" or raters or split):
        option = "--raters" if raters else "--split" if split else "--layout"
        raise ValueError(f"{ref} is one mask, and {option} is for a data set: leave it out, or give the data set.")
    failures: dict[str, str] = {}
    words = ""
    pairs: dict[str, tuple[Path, Path | MaskSource]] = {name or subject_of_mask(pred): (pred, ref)}
    if pred.is_dir():
        predictions = find_masks(pred)
        references, words = find_references(ref, layout, raters, predictions)
        predictions = name_as(predictions, references)
        references = name_as(references, predictions)
        if split:
            every = list_cases(ref, layout=layout)[0]
            test = {case.id for case in read_test_part(split, every)}
            others = {case.id for case in every} - test  # of which nobody asks
            references, predictions = (
                {name: masks for name, masks in found.items() if name not in others}
                for found in (references, predictions)
            )
            for name in sorted(test - references.keys() - predictions.keys()):
                failures[name] = f"{name} has neither a prediction in {pred} nor a reference in {ref}."
        pairs = pair_masks(pred, predictions, ref, references, failures)
    cases = []
    left_out = False
    quiet = not (progress and sys.stderr.isatty())
    for subject, (pred_file, ref_file) in tqdm(pairs.items(), "evaluate", unit="case", delay=2, disable=quiet):
        try:
            found, incomplete = _evaluate_files(pred_file, ref_file, protocol, subject)
        except (ValueError, OSError) as error:
            failures[subject] = str(error)
        else:
            cases.append(found)
            left_out |= incomplete
    notes = [words] * bool(words) + ["voxels of other pathology count neither for nor against"] * left_out
    return Evaluation(protocol, cases, dict(sorted(failures.items())), reference="; ".join(notes))


def _evaluate_files(
    pred_file: Path, ref_file: Path | MaskSource, protocol: Protocol, subject: str
) -> tuple[CaseMetrics, bool]:
    """The numbers of a case, and whether some voxels of its reference do not count."""
    ref, grid = read_mask(ref_file)
    pred = read_mask_on(pred_file, grid, str(ref_file), "bring the prediction to the reference's grid")
    ignored = ignored_voxels(ref_file)
    if ignored is not None:
        pred = pred & ~ignored
    return evaluate_case(pred, ref, grid.affine, protocol, subject=subject), ignored is not None


# --- results ----------------------------------------------------------------------------------------------


def write_csv(evaluation: Evaluation, path: PathLike) -> None:
    """Write one row per case, the protocol in each; an undefined number is ``nan``.

    Raises:
        ValueError: there is no case to write.
    """
    if not evaluation.cases:
        raise ValueError(f"No case could be compared, so there is nothing to write to {path}.")
    protocol = asdict(evaluation.protocol)
    rules = {"protocol": protocol.pop("name"), **protocol}
    del rules["note"]
    rows = []
    for case in evaluation.cases:
        row = _printed(case)
        for entry in row.pop("size_classes"):
            low, high = entry.pop("low_mm3"), entry.pop("high_mm3")
            row |= {f"{name}_{low:g}_{high:g}_mm3": count for name, count in entry.items()}
        rows.append(row | rules | ({"reference": evaluation.reference} if evaluation.reference else {}))
    files.write_csv(Path(path), rows)


def write_json(evaluation: Evaluation, path: PathLike) -> None:
    """Write protocol, cases, summaries and failures; an undefined number is ``null``, since JSON has no NaN."""
    content = {"protocol": asdict(evaluation.protocol), "reference": evaluation.reference, **_content(evaluation)}
    if evaluation.comparison:
        comparison = evaluation.comparison
        tests = {name: asdict(test) for name, test in comparison.tests.items()}
        content["comparison"] = {"other": comparison.name, "tests": tests, **_content(comparison.other)}
    files.write_text(Path(path), json.dumps(_plain(content), indent=2, allow_nan=False) + "\n")


def _content(evaluation: Evaluation) -> dict[str, Any]:
    summaries = evaluation.summaries()
    return {
        "means": evaluation.means(),
        "deviations": {name: summary.deviation for name, summary in summaries.items()},
        "intervals": {name: [summary.low, summary.high] for name, summary in summaries.items()},
        "counts": {name: summary.n for name, summary in summaries.items()},
        "size_classes": [_size_class(entry) for entry in evaluation.size_classes()],
        "cases": [
            _printed(case) | {"size_classes": [_size_class(entry) for entry in case.size_classes]}
            for case in evaluation.cases
        ],
        "failures": evaluation.failures,
    }


def _printed(case: CaseMetrics) -> dict[str, Any]:
    """The numbers of a case, volumes to the digit that `rsanet predict` prints."""
    numbers = asdict(case)
    return numbers | {name: round(value, 3) for name, value in numbers.items() if name.endswith("_mm3")}


def _size_class(entry: SizeClass) -> dict[str, Any]:
    return asdict(entry) | {"ltpr": entry.ltpr, "lfpr": entry.lfpr, "lesion_f1": entry.lesion_f1}


def _plain(value: Any) -> Any:
    """The same without the numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def format_table(evaluation: Evaluation) -> str:
    """The tables for the terminal: protocol, cases and their means, lesion sizes, comparison, then the failures."""
    blocks = [textwrap.wrap(evaluation.protocol.describe(), WIDTH)]
    if evaluation.reference:
        blocks[0] += textwrap.wrap(f"Reference: {evaluation.reference}.", WIDTH)
    if evaluation.cases:
        blocks += [_case_lines(evaluation), _size_lines(evaluation)]
    if evaluation.comparison:
        blocks += [_comparison_lines(evaluation.comparison), _failure_lines(evaluation.comparison.other)]
    blocks.append(_failure_lines(evaluation))
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _case_lines(evaluation: Evaluation) -> list[str]:
    rows = [[case.subject, *_cells(asdict(case))] for case in evaluation.cases]
    feet: list[list[str]] = []
    if len(rows) > 1:
        summaries = evaluation.summaries()
        for title, part in (("mean", "mean"), ("SD", "deviation"), ("95 % from", "low"), ("95 % to", "high")):
            feet.append([title, *_cells({name: getattr(summaries[name], part) for name in TABLE})])
        feet.append(["n", *(str(summaries[name].n) for name in TABLE)])
    lines = _align(["case", *(title for title, _ in TABLE.values())], rows, feet)
    means = evaluation.means()
    if "isbi_score" in means:
        lines.append(
            f"volume correlation {_number('{:.3f}', means['volume_correlation'])}, "
            f"ISBI 2015 score {_number('{:.3f}', means['isbi_score'])}"
        )
    notes = LEGEND
    if feet:
        notes += " Means are over the n cases where a number is defined; 95 %: bootstrap interval of the mean"
        notes += ", too narrow for so few cases." if len(rows) < FEW else "."
    return lines + textwrap.wrap(notes, WIDTH)


def _size_lines(evaluation: Evaluation) -> list[str]:
    rows = []
    for entry in evaluation.size_classes():
        found, false = (_number("{:.3f}", ratio) for ratio in (entry.ltpr, entry.lfpr))
        counts = [str(entry.reference_lesions), str(entry.detected_lesions), found]
        counts += [str(entry.predicted_lesions), str(entry.false_lesions), false]
        rows.append([f"{entry.name} mm³", *counts, _number("{:.3f}", entry.lesion_f1)])
    title = "By lesion volume: lesions by their volume in the reference, predicted ones by theirs; all cases together."
    return [title, *_align(["volume", "lesions", "found", "LTPR", "predicted", "false", "LFPR", "F1"], rows)]


def _comparison_lines(comparison: Comparison) -> list[str]:
    if not any(test.n for test in comparison.tests.values()):
        return [f"{comparison.name} has no case in common."]
    rows = []
    for name, test in comparison.tests.items():
        means = [_number("{:.3f}", value) for value in (test.first_mean, test.second_mean)]
        # Adding 0 turns a negative zero, which would print as -0.000.
        differences = [
            _number("{:+.3f}", round(value, 3) + 0.0)
            for value in (test.median_difference, test.mean_difference, test.low, test.high)
        ]
        p_value = test.remark or (f"{test.p_value:.4f}" if test.p_value >= 1e-4 else "<0.0001")
        rows.append([TABLE[name][0], *means, *differences, str(test.n), p_value])
    head = ["number", "this", "other", "median diff", "mean diff", "95 % from", "95 % to", "n", "p"]
    made = sum(not test.remark for test in comparison.tests.values())
    notes = "Difference: this minus other, case by case. 95 %: bootstrap interval of the mean difference"
    notes += ", too narrow for so few cases." if max(test.n for test in comparison.tests.values()) < FEW else "."
    if made:
        notes += (
            f" p: Wilcoxon's signed-rank test, two-sided. No p is corrected for the {counted(made, 'test')} made: "
            f"to claim a single difference at 5 %, look for p < {0.05 / made:.2g}."
        )
    title = textwrap.wrap(f"Compared with {comparison.name} on the cases that both have:", WIDTH)
    return title + _align(head, rows) + textwrap.wrap(notes, WIDTH)


def _failure_lines(evaluation: Evaluation) -> list[str]:
    count = len(evaluation.failures)
    if not count:
        return []
    title = f"{count} of {counted(count + len(evaluation.cases), 'case')} could not be compared:"
    return [title, *(f"  {reason}" for reason in evaluation.failures.values())]


def _align(head: list[str], rows: list[list[str]], feet: Sequence[list[str]] = ()) -> list[str]:
    """Columns of equal width, the first to the left, with rules below the head and above the feet."""
    every = [head, *rows, *feet]
    widths = [max(len(row[column]) for row in every) for column in range(len(head))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(v.rjust(w) for v, w in zip(row[1:], widths[1:], strict=True))])
        for row in every
    ]
    rule = "-" * len(lines[0])
    body = len(rows) + 1
    return [lines[0], rule, *lines[1:body], *([rule] if feet else []), *lines[body:]]


def _cells(numbers: Mapping[str, Any]) -> list[str]:
    return [_number(form, numbers[key]) for key, (_, form) in TABLE.items()]


def _number(form: str, value: float) -> str:
    return "-" if math.isnan(value) else form.format(value)
