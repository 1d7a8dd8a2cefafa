"""Which predicted mask belongs to which reference."""

import os
import re
import unicodedata
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from rsanet.segment.cases import Case
from rsanet.segment.datasets import list_cases, reference_words
from rsanet.segment.names import (
    is_other_mask,
    is_probability,
    kind_of,
    name_before_kind,
    subject_of_name,
    tell_left_out,
    volumes_below,
)
from rsanet.segment.raters import files_of
from rsanet.segment.volumes import DataWarning, MaskSource, read_volume, stem
from rsanet.segment.words import some

MOST_LABELS = 20  # of a mask, binary or not; an image or a probability has thousands of values
LESION_MASK = "label-lesion"  # in BIDS
Masks = TypeVar("Masks", bound=Path | MaskSource)


def pair_masks(
    pred: Path,
    predictions: Mapping[str, Sequence[Path]],
    ref: Path,
    references: Mapping[str, Sequence[Path | MaskSource]],
    failures: dict[str, str],
) -> dict[str, tuple[Path, Path | MaskSource]]:
    """A predicted mask and its reference by subject.

    Args:
        pred: where the predicted masks are, for messages.
        predictions: the predicted masks by subject.
        ref: where the references are, for messages.
        references: likewise.
        failures: gets the subjects without a partner, or with more than one, each with the reason.

    Raises:
        ValueError: there are no masks, or none has a partner.
    """
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
            folder, several = (pred, here) if len(here) > 1 else (ref, there)
            names = ", ".join(
                os.path.relpath(file, folder if folder.is_dir() else folder.parent)
                for mask in several
                for file in files_of(mask)
            )
            advice = "leave one" if folder == pred else "leave one, or give --raters"
            failures[subject] = f"{subject} has several masks in {folder} ({names}): {advice}."
        else:
            pairs[subject] = (here[0], there[0])
    return pairs


def name_as(found: Mapping[str, list[Masks]], others: Collection[str]) -> dict[str, list[Masks]]:
    """Masks by the names that the other side has for their subjects.

    A mask that has no partner by its own name goes by the shorter ones that it may be meant for: ``P1_FLAIR_seg`` is
    of ``P1`` where the other side has that, and nothing here is called ``P1``.
    """
    meant: dict[str, set[str]] = {}
    for other in others:
        for name in (other, *_shorter_names(Path("/", other))):
            meant.setdefault(name, set()).add(other)
    named: dict[str, list[Masks]] = {}
    for subject, masks in found.items():
        for mask in masks:
            names = _names(mask) if subject not in others and isinstance(mask, Path) else []
            partners = [other for name in names for other in meant.get(name, ()) if len(meant[name]) == 1]
            free = [other for other in partners if other not in found]
            named.setdefault(free[0] if free else subject, []).append(mask)
    return named


def _shorter_names(file: Path) -> list[str]:
    """What the subject of a mask may be called, by what its name begins with; the longest first.

    Without the last word, where that is a contrast or says that it is a mask; but T1 and T2 are time points, too.
    """
    names = []
    name = stem(file)
    while name and (shorter := subject_of_name(file.with_name(name))) != name and len(names) < 3:
        if re.fullmatch(r"[_\-. ]*t\d+", name.removeprefix(shorter), re.IGNORECASE):
            break
        name = shorter
        names.append(unicodedata.normalize("NFC", name))
    return list(filter(None, names))


def find_references(
    source: Path, layout: str = "auto", raters: str | None = None, wanted: Collection[str] = ()
) -> tuple[dict[str, list[Path | MaskSource]], str]:
    """The lesion masks of a data set by case, else of a folder of masks; and whose they are, where that was asked.

    Args:
        source: the data set, or the folder.
        layout: see `list_cases`.
        raters: see `list_cases`.
        wanted: the subjects that have a prediction. A folder is one of masks where more of them are found so: its
            files may be named as the images of a data set are.
    """
    chosen = layout != "auto" or raters is not None
    if chosen or not (source / "derivatives" / "lesions").is_dir():
        try:
            cases, _ = list_cases(source, layout=layout, raters=raters, masks_alone=True)
        except ValueError:
            if source.is_file() or chosen:
                raise
            cases = []  # masks alone are no data set
        masks = {case.id: [case.mask] if case.mask else case.several.get("mask", []) for case in cases}
        if masks := {case: paths for case, paths in masks.items() if paths}:
            paired = set(wanted) & masks.keys()
            all_paired = chosen or source.is_file() or len(paired) == len(wanted)
            if all_paired or not paired < set(wanted) & find_masks(source, quiet=True).keys():
                return masks, reference_words(cases, raters)
    return find_masks(source) if source.is_dir() else {}, ""


def masks_of_cases(folder: Path, cases: Sequence[Case]) -> dict[str, list[Path]]:
    """The predicted masks in a folder, by the case of a data set that they are of; a warning tells of others."""
    ids = [case.id for case in cases]
    masks = name_as(find_masks(folder), ids)
    if strange := sorted(masks.keys() - set(ids)):
        warnings.warn(
            f"{folder} has {'a mask' if len(strange) == 1 else 'masks'} of {some(strange)}, which the data set has "
            f"not: its cases are {some(ids)}.",
            DataWarning,
            stacklevel=1,
        )
    return masks


def only_mask(masks: Sequence[Path], case: str) -> Path:
    """The predicted mask of a case, which has to be one."""
    if len(masks) > 1:
        names = ", ".join(mask.name for mask in masks)
        raise ValueError(f"{case} has several predicted masks ({names}): leave one.")
    return masks[0]


def find_masks(folder: str | os.PathLike, *, quiet: bool = False) -> dict[str, list[Path]]:
    """The mask files of a folder by subject: of a cohort, those of ``derivatives/lesions``.

    Where files in several folders have one name that says only what they hold, as ``P1/mask.nii.gz``, their folders
    name the subjects. A file that is named as an image or a probability is a mask if it has few values. Where a
    subject has a file named ``label-lesion``, its images, probabilities and masks with another label are none.
    Everything else that is left out is told of in a warning.

    Args:
        folder: that is searched, with all below it.
        quiet: whether to leave the warning out.
    """
    folder = Path(folder)
    root = folder / "derivatives" / "lesions"
    every: dict[str, list[Path]] = {}
    for file in volumes_below(root if root.is_dir() else folder):
        every.setdefault(subject_of_mask(file), []).append(file)
    for name in [name for name, files in every.items() if len({file.parent for file in files}) > 1]:
        if not name_before_kind(name):  # SUBJECT/mask.nii.gz
            for file in every.pop(name):
                every.setdefault(unicodedata.normalize("NFC", file.resolve().parent.name), []).append(file)
    twins = {(file.parent, stem(file)) for files in every.values() for file in files}
    known = {name for files in every.values() for file in files if _is_plain(file) for name in _names(file)}
    found: dict[str, list[Path]] = {}
    images, others, elsewhere = [], [], []
    for subject, files in every.items():
        files = [file for file in files if not _is_twin(file, twins)]
        named = [file for file in files if LESION_MASK in file.name and not _is_doubtful(file)]
        for file in files:
            if named and file not in named:
                others += [file] * (not _is_doubtful(file) and "_label-" not in file.name)
            elif is_other_mask(stem(file)) and known & set(_names(file)):
                elsewhere.append(file)
            elif _is_doubtful(file) and not has_few_values(file):
                images.append(file)
            else:
                found.setdefault(subject, []).append(file)
    if not quiet:
        tell_left_out(images, folder, "being named as images or probabilities and having more values than a mask has")
        tell_left_out(others, folder, f"lying beside masks that are named {LESION_MASK}")
        tell_left_out(elsewhere, folder, "being named as masks of the brain or another part, beside other masks")
        unread = volumes_below(folder, unread=True)
        tell_left_out(unread, folder, "being in a format that is not read: convert it to .nii.gz")
    return found


def has_few_values(file: Path) -> bool:
    """Whether a file has as few values as a mask, or cannot be read, which whoever reads it will tell."""
    try:
        voxels = read_volume(file)[0]
    except (ValueError, OSError):
        return True
    return np.unique(voxels[voxels != 0]).size <= MOST_LABELS


def _is_doubtful(file: Path) -> bool:
    """Whether a file is named as an image or a probability; masks are, too, where a tool names them as their image."""
    return kind_of(stem(file)) not in ("", "mask") or is_probability(stem(file))


def _is_plain(file: Path) -> bool:
    return not _is_doubtful(file) and not is_other_mask(stem(file))


def _is_twin(file: Path, stems: Collection[tuple[Path, str]]) -> bool:
    """Whether a file is the probability that predict writes beside a mask."""
    name = stem(file).removesuffix("_probseg")
    return name != stem(file) and any((file.parent, name + end) in stems for end in ("", "_mask"))


def _names(file: Path) -> list[str]:
    """All the names that the subject of a mask may have."""
    return [subject_of_mask(file), *_shorter_names(file)]


def subject_of_mask(file: Path) -> str:
    """The subject that the name of a mask's file begins with."""
    # macOS takes letters with accents apart, and other systems do not.
    name = unicodedata.normalize("NFC", stem(file))
    entities = re.match(r"(sub-[^\W_]+)(_ses-[^\W_]+)?", name)
    return entities.group(0) if entities else re.sub(r"(_label-lesion)?(_mask)?$", "", name)
