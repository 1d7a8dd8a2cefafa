"""Which predicted mask belongs to which reference."""

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from rsanet.segment.datasets import list_cases, reference_words
from rsanet.segment.raters import files_of
from rsanet.segment.volumes import SUFFIXES, MaskSource, stem

NOT_MASKS = re.compile(r"(prob|FLAIR|T1w|T2w|PDw|T1|T2|flair)(seg)?\.nii(\.gz)?$")


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


def find_references(
    source: Path, layout: str = "auto", raters: str | None = None
) -> tuple[dict[str, list[Path | MaskSource]], str]:
    """The lesion masks of a data set by case, else of a folder of masks; and whose they are, where that was asked."""
    chosen = layout != "auto" or raters is not None
    if chosen or not (source / "derivatives" / "lesions").is_dir():
        try:
            cases, _ = list_cases(source, layout=layout, raters=raters)
        except ValueError:
            if source.is_file() or chosen:
                raise
            cases = []  # masks alone are no data set
        masks = {case.id: [case.mask] if case.mask else case.several.get("mask", []) for case in cases}
        if masks := {case: paths for case, paths in masks.items() if paths}:
            return masks, reference_words(cases, raters)
    return find_masks(source) if source.is_dir() else {}, ""


def find_masks(folder: str | os.PathLike) -> dict[str, list[Path]]:
    """The mask files of a folder by subject: of a cohort, those of ``derivatives/lesions``."""
    folder = Path(folder)
    root = folder / "derivatives" / "lesions"
    found: dict[str, list[Path]] = {}
    for file in sorted((root if root.is_dir() else folder).rglob("*.nii*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.name.endswith(SUFFIXES) and not hidden and not NOT_MASKS.search(file.name):
            found.setdefault(subject_of_mask(file), []).append(file)
    # Where some of a subject's files are named as lesion masks, the others are something else.
    for subject, masks in found.items():
        named = [mask for mask in masks if "label-lesion" in mask.name]
        found[subject] = named or masks
    return found


def subject_of_mask(file: Path) -> str:
    """The subject that the name of a mask's file begins with."""
    # macOS takes letters with accents apart, and other systems do not.
    name = unicodedata.normalize("NFC", stem(file))
    entities = re.match(r"(sub-[^\W_]+)(_ses-[^\W_]+)?", name)
    return entities.group(0) if entities else re.sub(r"(_label-lesion)?(_mask)?$", "", name)
