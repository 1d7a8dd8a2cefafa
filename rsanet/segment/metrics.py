"""How well a lesion mask agrees with a reference, voxel by voxel and lesion by lesion.

Lesion-wise numbers have no one definition: which voxels form one lesion, what counts as found, and what is
too small to count differ between challenges. A :class:`Protocol` names these three, and is printed with the
numbers.

Empty masks: Dice is 1 if both are empty and 0 if one is. A ratio whose denominator is zero is NaN: sensitivity
and LTPR without a reference lesion, PPV and LFPR without a predicted one. Means leave NaN out.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from scipy import ndimage, sparse

from rsanet.segment import files
from rsanet.segment.volumes import SUFFIXES, read_mask, same_grid, stem

Array = np.ndarray

CONNECTIVITY_RANK = {6: 1, 18: 2, 26: 3}
NOT_MASKS = re.compile(r"(prob|FLAIR|T1w|T2w|PDw|T1|T2|flair)(seg)?\.nii(\.gz)?$")


@dataclass(frozen=True)
class Protocol:
    """What a lesion is, and when it is found.

    Attributes:
        name: name of the protocol.
        connectivity: 6, 18 or 26 neighbours join voxels into one lesion.
        overlap: 0 where any common voxel detects a lesion; otherwise the least intersection over union of a
            reference lesion with one predicted lesion.
        minimum_mm3: lesions below this volume, in either mask, are left out of the lesion-wise numbers.
        note: what else to know before comparing with published numbers.
    """

    name: str = "custom"
    connectivity: int = 26
    overlap: float = 0.0
    minimum_mm3: float = 0.0
    note: str = ""

    def __post_init__(self) -> None:
        if self.connectivity not in CONNECTIVITY_RANK:
            raise ValueError(f"connectivity is {self.connectivity}: give 6, 18 or 26.")
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"overlap is {self.overlap}: give 0 for any overlap, or a least IoU of up to 1.")
        if not (math.isfinite(self.minimum_mm3) and self.minimum_mm3 >= 0):
            raise ValueError(f"minimum_mm3 is {self.minimum_mm3}: give a volume in mm³, 0 for no minimum.")

    def describe(self) -> str:
        """One line to print beside the numbers."""
        rule = f"IoU of at least {self.overlap:g}" if self.overlap else "any overlap"
        least = f"lesions below {self.minimum_mm3:g} mm³ left out" if self.minimum_mm3 else "no minimum size"
        line = f"Protocol {self.name}: {self.connectivity}-connected lesions, detected by {rule}, {least}."
        return f"{line} {self.note}" if self.note else line


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("custom"),
        Protocol("isbi2015", connectivity=18, note="The 18-connectivity is this package's choice."),
        Protocol("wmh2017", connectivity=26),
        Protocol("shifts", connectivity=6, overlap=0.25),
    )
}


def choose_protocol(name: str = "custom", **changes: float | None) -> Protocol:
    """A preset by name, or one with changes, which is then called custom.

    Args:
        name: a key of ``PROTOCOLS``.
        **changes: ``connectivity``, ``overlap``, ``minimum_mm3``; None keeps the preset's.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"protocol is {name!r}: give one of {', '.join(PROTOCOLS)}.")
    preset = PROTOCOLS[name]
    changes = {key: value for key, value in changes.items() if value not in (None, getattr(preset, key))}
    return replace(preset, name="custom", note="", **changes) if changes else preset


@dataclass(frozen=True)
class CaseMetrics:
    """The numbers of one case. ``nan`` is a ratio without a denominator.

    Attributes:
        subject: name of the case.
        dice: 2 |P ∩ R| / (|P| + |R|).
        ppv: |P ∩ R| / |P|, the precision of the predicted voxels.
        tpr: |P ∩ R| / |R|, the sensitivity.
        reference_mm3: lesion load of the reference.
        predicted_mm3: lesion load of the prediction.
        volume_difference: | |P| - |R| | / |R|.
        reference_lesions: number of lesions in the reference.
        predicted_lesions: number of lesions in the prediction.
        detected_lesions: reference lesions that the prediction found.
        false_lesions: predicted lesions that found none.
        ltpr: detected / reference lesions, the lesion-wise sensitivity.
        lfpr: false / predicted lesions, the lesion-wise false discovery rate; challenges call it LFPR.
        lesion_f1: harmonic mean of LTPR and 1 - LFPR; 0 if only one of the masks has lesions.
    """

    subject: str
    dice: float
    ppv: float
    tpr: float
    reference_mm3: float
    predicted_mm3: float
    volume_difference: float
    reference_lesions: int
    predicted_lesions: int
    detected_lesions: int
    false_lesions: int
    ltpr: float
    lfpr: float
    lesion_f1: float


@dataclass(frozen=True)
class Evaluation:
    """A cohort's numbers.

    Attributes:
        protocol: how lesions were counted.
        cases: the cases that could be compared.
        failures: the others, and why in a sentence each.
    """

    protocol: Protocol
    cases: list[CaseMetrics]
    failures: dict[str, str]

    def means(self) -> dict[str, float]:
        """The mean of each number over the cases where it is defined; for isbi2015, its score too."""
        result = {}
        for name in NUMBERS:
            values = [getattr(case, name) for case in self.cases]
            values = [value for value in values if not math.isnan(value)]
            result[name] = sum(values) / len(values) if values else math.nan
        if self.protocol.name == "isbi2015":
            correlation = volume_correlation(self.cases)
            result["volume_correlation"] = correlation
            result["isbi_score"] = (
                result["dice"] / 8 + result["ppv"] / 8 + (1 - result["lfpr"]) / 4 + result["ltpr"] / 4 + correlation / 4
            )
        return result


NUMBERS = tuple(entry.name for entry in fields(CaseMetrics) if entry.name != "subject")


def volume_correlation(cases: Sequence[CaseMetrics]) -> float:
    """Pearson correlation of predicted and reference lesion loads; NaN below 3 cases or without spread."""
    loads = np.array([(case.reference_mm3, case.predicted_mm3) for case in cases])
    if len(loads) < 3 or (loads.std(axis=0) == 0).any():
        return math.nan
    return float(np.corrcoef(loads.T)[0, 1])


# --- one case ---------------------------------------------------------------------------------------------


def label_lesions(mask: Array, connectivity: int = 26) -> tuple[Array, int]:
    """Number the connected components of a mask from 1; returns the labels and their count."""
    structure = ndimage.generate_binary_structure(3, CONNECTIVITY_RANK[connectivity])
    labels, count = ndimage.label(mask, structure)
    return labels, int(count)


def dice(one: Any, other: Any) -> float:
    """Dice of two boolean arrays or tensors; 1 where both are empty."""
    total = int(one.sum() + other.sum())
    return 2 * int((one & other).sum()) / total if total else 1.0


def evaluate_case(
    pred: Array,
    ref: Array,
    spacing: Sequence[float],
    protocol: Protocol = PROTOCOLS["custom"],
    *,
    subject: str = "",
) -> CaseMetrics:
    """Compare a predicted lesion mask with a reference on the same voxel grid.

    Args:
        pred: (X, Y, Z), only 0 and 1.
        ref: same shape.
        spacing: voxel size in mm.
        protocol: how lesions are counted.
        subject: name of the case.
    """
    pred, ref = _binary(pred, "the prediction"), _binary(ref, "the reference")
    if pred.shape != ref.shape:
        raise ValueError(
            f"The prediction has shape {pred.shape} and the reference {ref.shape}: "
            "bring the prediction to the reference's grid."
        )
    if len(spacing) != 3 or not all(math.isfinite(size) and size > 0 for size in spacing):
        raise ValueError(f"spacing is {tuple(spacing)}: give three voxel sizes in mm.")
    voxel_mm3 = math.prod(float(size) for size in spacing)
    both, predicted, reference = (int(np.count_nonzero(mask)) for mask in (pred & ref, pred, ref))
    lesions = _match_lesions(pred, ref, voxel_mm3, protocol)
    ltpr = _ratio(lesions["detected_lesions"], lesions["reference_lesions"])
    lfpr = _ratio(lesions["false_lesions"], lesions["predicted_lesions"])
    return CaseMetrics(
        subject=subject,
        dice=dice(pred, ref),
        ppv=_ratio(both, predicted),
        tpr=_ratio(both, reference),
        reference_mm3=reference * voxel_mm3,
        predicted_mm3=predicted * voxel_mm3,
        volume_difference=_ratio(abs(predicted - reference), reference),
        **lesions,
        ltpr=ltpr,
        lfpr=lfpr,
        lesion_f1=_lesion_f1(ltpr, lfpr),
    )


def _binary(mask: Array, what: str) -> Array:
    mask = np.asarray(mask)
    if mask.ndim != 3:
        raise ValueError(f"{what.capitalize()} has shape {mask.shape}: give a mask with three dimensions.")
    if mask.dtype == bool:
        return mask
    binary = mask == 1
    other = mask[~binary & (mask != 0)]
    if other.size:
        advice = "cut a probability map at a threshold, or keep one label, first"
        raise ValueError(
            f"{what.capitalize()} is not a binary mask: it has {other.size} voxels that are neither 0 nor 1, "
            f"such as {other.flat[0]:g}; {advice}."
        )
    return binary


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _lesion_f1(ltpr: float, lfpr: float) -> float:
    if math.isnan(ltpr) and math.isnan(lfpr):
        return math.nan
    if math.isnan(ltpr) or math.isnan(lfpr) or ltpr + 1 - lfpr == 0:
        return 0.0
    return 2 * ltpr * (1 - lfpr) / (ltpr + 1 - lfpr)


def _match_lesions(pred: Array, ref: Array, voxel_mm3: float, protocol: Protocol) -> dict[str, int]:
    """Count reference, predicted, detected and false lesions.

    A pair matches by the overlap rule alone, so a lesion may match several: one large prediction over two
    reference lesions detects both under any overlap.
    """
    pred_labels, pred_sizes = _large_lesions(pred, voxel_mm3, protocol)
    ref_labels, ref_sizes = _large_lesions(ref, voxel_mm3, protocol)
    common = (pred_labels > 0) & (ref_labels > 0)
    pairs = (ref_labels[common], pred_labels[common])
    shape = (ref_sizes.size, pred_sizes.size)
    shared = sparse.coo_array((np.ones(pairs[0].size, np.int64), pairs), shape=shape)
    shared.sum_duplicates()
    union = ref_sizes[shared.row] + pred_sizes[shared.col] - shared.data
    match = shared.data / union >= protocol.overlap
    detected = np.unique(shared.row[match]).size
    correct = np.unique(shared.col[match]).size
    reference, predicted = int((ref_sizes > 0).sum()), int((pred_sizes > 0).sum())
    return {
        "reference_lesions": reference,
        "predicted_lesions": predicted,
        "detected_lesions": detected,
        "false_lesions": predicted - correct,
    }


def _large_lesions(mask: Array, voxel_mm3: float, protocol: Protocol) -> tuple[Array, Array]:
    """Labels of the lesions that count, and the voxels of each label: 0 for what does not count."""
    labels, count = label_lesions(mask, protocol.connectivity)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    sizes[0] = 0
    # A lesion of exactly the minimum counts, whatever the rounding of the voxel volume.
    sizes[sizes * voxel_mm3 < protocol.minimum_mm3 * (1 - 1e-6)] = 0
    return np.where(sizes[labels] > 0, labels, 0), sizes


# --- files ------------------------------------------------------------------------------------------------


def evaluate_paths(
    pred: str | os.PathLike,
    ref: str | os.PathLike,
    protocol: Protocol = PROTOCOLS["custom"],
) -> Evaluation:
    """Compare two mask files, or the masks of two folders subject by subject.

    Files of a folder are matched by the ``sub-`` and ``ses-`` in their names, else by the name without its
    ending and ``_label-lesion_mask``. A folder with ``derivatives/lesions`` is a cohort: its masks are there. A
    bad case does not stop the others.

    Args:
        pred: a NIfTI file or a folder.
        ref: likewise.
        protocol: how lesions are counted.

    Returns:
        The cases, and by subject the reason for each pair that could not be compared or has no partner.

    Raises:
        ValueError: a path does not exist, or one is a file and the other a folder, or nothing matches.
    """
    pred, ref = Path(pred), Path(ref)
    for path in (pred, ref):
        if not path.exists():
            raise ValueError(f"{path} does not exist: give a mask or a folder of masks.")
    if pred.is_dir() != ref.is_dir():
        file, folder = (ref, pred) if pred.is_dir() else (pred, ref)
        raise ValueError(f"{folder} is a folder and {file} is a file: give two files or two folders.")
    failures: dict[str, str] = {}
    pairs = _pair(pred, ref, failures) if pred.is_dir() else {_subject(pred): (pred, ref)}
    cases = []
    for subject, (pred_file, ref_file) in pairs.items():
        try:
            cases.append(_evaluate_files(pred_file, ref_file, protocol, subject))
        except (ValueError, OSError) as error:
            failures[subject] = str(error)
    return Evaluation(protocol, cases, dict(sorted(failures.items())))


def _pair(pred: Path, ref: Path, failures: dict[str, str]) -> dict[str, tuple[Path, Path]]:
    """Masks of two folders by subject; subjects without a partner go to ``failures``."""
    predictions, references = find_masks(pred), find_masks(ref)
    for folder, found in ((pred, predictions), (ref, references)):
        if not found:
            raise ValueError(f"{folder} has no masks: expected .nii or .nii.gz files, such as sub-001*.nii.gz.")
    if not predictions.keys() & references.keys():
        raise ValueError(
            f"No mask in {pred} has a partner in {ref}: the first names are {next(iter(predictions))} and "
            f"{next(iter(references))}; name both after the subject, such as sub-001*.nii.gz."
        )
    pairs = {}
    for subject in sorted(predictions.keys() | references.keys()):
        here, there = predictions.get(subject, []), references.get(subject, [])
        if not here:
            failures[subject] = f"{subject} has a reference but no prediction in {pred}."
        elif not there:
            failures[subject] = f"{subject} has a prediction but no reference in {ref}."
        elif len(here) > 1 or len(there) > 1:
            names = ", ".join(file.name for file in (here if len(here) > 1 else there))
            failures[subject] = f"{subject} has several masks ({names}): leave one."
        else:
            pairs[subject] = (here[0], there[0])
    return pairs


def find_masks(folder: str | os.PathLike) -> dict[str, list[Path]]:
    """The mask files of a folder by subject: of a cohort, those of ``derivatives/lesions``."""
    folder = Path(folder)
    if (folder / "derivatives" / "lesions").is_dir():
        folder = folder / "derivatives" / "lesions"
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*.nii*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.name.endswith(SUFFIXES) and not hidden and not NOT_MASKS.search(file.name):
            found.setdefault(_subject(file), []).append(file)
    # Where some of a subject's files are named as lesion masks, the others are something else.
    for subject, masks in found.items():
        named = [mask for mask in masks if "label-lesion" in mask.name]
        found[subject] = named or masks
    return found


def _subject(file: Path) -> str:
    name = stem(file)
    entities = re.match(r"(sub-[A-Za-z0-9]+)(_ses-[A-Za-z0-9]+)?", name)
    return entities.group(0) if entities else re.sub(r"(_label-lesion)?(_mask)?$", "", name)


def _evaluate_files(pred_file: Path, ref_file: Path, protocol: Protocol, subject: str) -> CaseMetrics:
    (pred, pred_image), (ref, ref_image) = read_mask(pred_file), read_mask(ref_file)
    if pred.shape != ref.shape:
        raise ValueError(
            f"{pred_file} has shape {pred.shape} and {ref_file} {ref.shape}: "
            "bring the prediction to the reference's grid."
        )
    if not same_grid(pred_image, ref_image):
        raise ValueError(
            f"{pred_file} has the affine {np.round(pred_image.affine, 3).tolist()} and {ref_file} "
            f"{np.round(ref_image.affine, 3).tolist()}: bring the prediction to the reference's grid."
        )
    return evaluate_case(pred, ref, nibabel.affines.voxel_sizes(ref_image.affine), protocol, subject=subject)


# --- results ----------------------------------------------------------------------------------------------


def _protocol_columns(protocol: Protocol) -> dict[str, Any]:
    return {
        "protocol": protocol.name,
        "connectivity": protocol.connectivity,
        "overlap": protocol.overlap,
        "minimum_mm3": protocol.minimum_mm3,
    }


def write_csv(evaluation: Evaluation, path: str | os.PathLike) -> None:
    """Write one row per case, the protocol in each; an undefined number is ``nan``."""
    if not evaluation.cases:
        raise ValueError(f"No case could be compared, so there is nothing to write to {path}.")
    rows = [asdict(case) | _protocol_columns(evaluation.protocol) for case in evaluation.cases]
    files.write_csv(Path(path), rows)


def write_json(evaluation: Evaluation, path: str | os.PathLike) -> None:
    """Write protocol, means, cases and failures; an undefined number is ``null``, since JSON has no NaN."""
    content = {
        "protocol": asdict(evaluation.protocol),
        "means": _without_nan(evaluation.means()),
        "cases": [_without_nan(asdict(case)) for case in evaluation.cases],
        "failures": evaluation.failures,
    }
    files.write_text(Path(path), json.dumps(content, indent=2, allow_nan=False) + "\n")


def _without_nan(numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in numbers.items()}


TABLE = {
    "dice": ("Dice", "{:.3f}"),
    "ppv": ("PPV", "{:.3f}"),
    "tpr": ("TPR", "{:.3f}"),
    "volume_difference": ("VD", "{:.2f}"),
    "reference_mm3": ("ref mm³", "{:.0f}"),
    "predicted_mm3": ("pred mm³", "{:.0f}"),
    "reference_lesions": ("lesions", "{:.4g}"),
    "detected_lesions": ("detected", "{:.4g}"),
    "false_lesions": ("false", "{:.4g}"),
    "ltpr": ("LTPR", "{:.3f}"),
    "lfpr": ("LFPR", "{:.3f}"),
    "lesion_f1": ("F1", "{:.3f}"),
}


def format_table(evaluation: Evaluation) -> str:
    """A table for the terminal: the protocol, each case, the mean, then what could not be compared."""
    means = evaluation.means()
    rows = [["case", *(title for title, _ in TABLE.values())]]
    rows += [_row(case.subject, asdict(case)) for case in evaluation.cases]
    rows.append(_row("mean", means))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(v.rjust(w) for v, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    rule = "-" * len(lines[0])
    lines = [evaluation.protocol.describe(), "", lines[0], rule, *lines[1:-1], rule, lines[-1]]
    if "isbi_score" in means:
        lines.append(
            f"volume correlation {_number('{:.3f}', means['volume_correlation'])}, "
            f"ISBI 2015 score {_number('{:.3f}', means['isbi_score'])}"
        )
    if evaluation.failures:
        count, total = len(evaluation.failures), len(evaluation.failures) + len(evaluation.cases)
        lines += ["", f"{count} of {total} cases could not be compared:"]
        lines += [f"  {reason}" for reason in evaluation.failures.values()]
    return "\n".join(lines)


def _row(name: str, numbers: Mapping[str, Any]) -> list[str]:
    return [name, *(_number(form, numbers[key]) for key, (_, form) in TABLE.items())]


def _number(form: str, value: float) -> str:
    return "-" if math.isnan(value) else form.format(value)
