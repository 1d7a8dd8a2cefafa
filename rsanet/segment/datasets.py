"""Data sets: their cases in a layout that is understood, whether each can be used, and which are held out."""

import json
import os
import re
import sys
import unicodedata
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from rsanet.segment.cases import Case
from rsanet.segment.geometry import align, has_voxels_of
from rsanet.segment.layouts import UNDERSTOOD, read_cases, resembled, tell_unused
from rsanet.segment.lists import read_json
from rsanet.segment.names import canonical
from rsanet.segment.public_datasets import PUBLIC
from rsanet.segment.raters import RULES, RatersMask
from rsanet.segment.volumes import DataWarning, check_views, read_image, read_mask
from rsanet.segment.words import counted, some

# The order of channels where the user names none; other contrasts follow alphabetically.
CONTRASTS = ("FLAIR", "T1w", "T2w")

READERS = 4  # cases that are checked at once


def list_cases(
    path: str | Path,
    contrasts: Sequence[str] | None = None,
    *,
    layout: str = "auto",
    raters: str | None = None,
    masks_alone: bool = False,
) -> tuple[list[Case], list[str]]:
    """All the cases of a data set, complete or not.

    Args:
        path: the data set: a folder or a list of files, as `read_cases` understands them.
        contrasts: the wanted contrasts in channel order, by any of their names; None takes every one that occurs.
        layout: how it lies on disk; see `read_cases`.
        raters: whose lesion masks to take where several drew them: a rater's name, or one of `RULES`.
        masks_alone: whether masks count that lie in BIDS derivatives of a place that the data set has not; else they
            are left out with a warning.

    Returns:
        The cases, each with those of the wanted contrasts that it has, and the wanted contrasts.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: it is in no layout that is understood, or not in that which is named, names cases twice or as no
            file can be named, or no case has a mask of the rater.
    """
    path = Path(path)
    wanted = [canonical(name) for name in contrasts or ()]
    if twice := [name for name, times in Counter(wanted).items() if times > 1]:
        raise ValueError(f"--contrasts has {' and '.join(twice)} more than once: name each channel once.")
    cases = read_cases(path, layout)
    if not cases:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: {UNDERSTOOD}.")
        raise ValueError(f"{path} has no cases in a layout that is understood: {_advice(path)}.")
    for case in cases:
        check_name(case.id, path)
    if twice := [name for name, times in Counter(case.id for case in cases).items() if times > 1]:
        raise ValueError(f"{path} names {some(twice)} more than once: give each case its own name.")
    found = {name for case in cases for name in (*case.images, *case.several) if name != "mask"}
    if not found:
        raise ValueError(f"{path} has no images of its {counted(len(cases), 'case')}: {_advice(path)}.")
    if not masks_alone and layout not in PUBLIC:
        tell_unused(path, cases)
    if not masks_alone and (alone := [case for case in cases if is_derived_alone(case, path)]):
        names = some([case.id for case in alone])
        warnings.warn(
            f"{path} has lesion masks in derivatives, but no folder, of {names}: left out.", DataWarning, stacklevel=1
        )
        cases = [case for case in cases if case not in alone]
    if raters is not None:
        cases = choose_raters(cases, raters, path)
    wanted = wanted or sorted(found, key=lambda name: (CONTRASTS.index(name) if name in CONTRASTS else 99, name))
    return [
        replace(case, images={name: case.images[name] for name in wanted if name in case.images}) for case in cases
    ], wanted


def is_derived_alone(case: Case, path: Path) -> bool:
    """Whether a case of BIDS is in the derivatives alone: the data set has no such subject or session."""
    return bool(case.place) and not (path / case.place).parent.is_dir()


def _advice(path: Path) -> str:
    """What to do where no case with images was found."""
    if name := resembled(path):
        return f"it looks like the data set {name}, so give --layout {name}"
    return UNDERSTOOD


def choose_raters(cases: Sequence[Case], raters: str, path: Path) -> list[Case]:
    """The cases with the masks of one rater, or with what a rule makes of all; see `Case.with_raters`."""
    chosen = [case.with_raters(raters) for case in cases]
    there = list(dict.fromkeys(name for case in cases for name in case.raters))
    if there and not any(case.mask for case in chosen):
        raise ValueError(
            f"No case of {path} has a mask of {raters!r}: give one of {some(there)}, or {', '.join(RULES)}."
        )
    return chosen


def reference_words(cases: Sequence[Case], raters: str | None) -> str:
    """Whose masks are the reference, in a few words: ``majority of mask1, mask2``; nothing where nobody asked."""
    if raters not in RULES:
        return raters or ""
    made = [mask for case in cases if isinstance(mask := case.mask, RatersMask)]
    if not made:
        return "one mask of each case"
    voters = list(dict.fromkeys(name for mask in made for name in mask.masks))
    return f"{raters} of {some(voters, 9)}" + (", a tie is no lesion" if raters == "majority" else "")


def check_name(name: str, path: Path) -> None:
    """Refuses a case whose name, which a list of anybody's may give, would lead a file written for it astray."""
    if not name or name.startswith(".") or ".." in name or re.search(r"[/\\]", name):
        raise ValueError(
            f"{path} has a case named {name!r}, and files are named by it: give a name without /, \\ and '..', and "
            "with no dot in front."
        )
    if not name.isprintable() or len(name.encode()) > 150:
        raise ValueError(
            f"{path} has a case named {name[:40]!r}, and files are named by it: give a name of up to 150 bytes of "
            "printable characters."
        )


def check_case(case: Case, contrasts: Sequence[str], *, require_mask: bool) -> None:
    """Reads every file of a case once and raises on the first that cannot serve."""
    paths = case.pick(contrasts)
    images = {name: read_image(path)[1] for name, path in paths.items()}
    first = contrasts[0]
    for name in contrasts[1:]:
        check_views(paths[first], images[first], paths[name], images[name])
    if not require_mask:
        return
    path = case.pick_mask()
    if path is None:
        raise ValueError(f"{case.id} has no lesion mask.")
    mask, image = read_mask(path)
    drawn = next((name for name in contrasts[1:] if has_voxels_of(image, images[name])), None)
    advice = f"put {drawn} first in --contrasts" if drawn else "resample it to that image, or repair its header"
    align(mask, image, images[first], str(path), f"the {first} image", advice)


def find_cases(
    path: str | Path,
    contrasts: Sequence[str] | None = None,
    *,
    require_mask: bool,
    layout: str = "auto",
    raters: str | None = None,
) -> list[Case]:
    """The cases of a data set, every file of them read and found good.

    Several are read at once, and their number bounds the memory. On a terminal a bar shows how far it is.

    Args:
        path: the data set, as for `list_cases`.
        contrasts: the wanted contrasts in channel order; None wants every contrast that occurs.
        require_mask: whether a case needs a lesion mask on the grid of its first contrast.
        layout: see `list_cases`.
        raters: see `list_cases`.

    Raises:
        ValueError: naming every case that cannot serve, each with its reason.
    """
    cases, contrasts = list_cases(path, contrasts, layout=layout, raters=raters)

    def problem(case: Case) -> str:
        try:
            check_case(case, contrasts, require_mask=require_mask)
        except (ValueError, OSError) as error:
            return str(error)
        return ""

    pool = ThreadPoolExecutor(min(READERS, os.cpu_count() or 1))
    try:
        bar = tqdm(pool.map(problem, cases), "check", len(cases), unit="case", delay=2, disable=not sys.stderr.isatty())
        problems = [reason for reason in bar if reason]
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the whole cohort
    if problems:
        every = len(problems) == len(cases) and layout == "auto" and resembled(Path(path))
        advice = f" (it looks like the data set {every}: give --layout {every})" if every else ""
        raise ValueError(
            f"{len(problems)} of {len(cases)} cases in {path} cannot be used{advice}:\n  " + "\n  ".join(problems)
        )
    return cases


def read_split(path: str | Path, cases: Sequence[Case], fold: int | None = None) -> dict[str, list[Case]]:
    """Divides cases as a file says; those that it does not name are in no part.

    Args:
        path: JSON, ``{"train": [names], "validation": [names], "test": [names]}``, the last two optional; or
            nnU-Net's ``splits_final.json``, a list of ``{"train": [names], "val": [names]}``.
        cases: the cases of the data set.
        fold: which entry of a list, from 0, which is also the default.

    Returns:
        The cases of ``train``, ``validation`` and ``test``, each in the order of ``cases``.

    Raises:
        ValueError: the file is something else, or names an unknown case, or one in two parts.
    """
    path = Path(path)
    content = read_json(path)
    if isinstance(content, list):
        if not 0 <= (fold or 0) < len(content):
            raise ValueError(
                f"{path} has {counted(len(content), 'fold')}, counted from 0: there is no fold {fold or 0}."
            )
        content = content[fold or 0]
    elif fold is not None:
        raise ValueError(f"{path} has no folds, but one split: leave out --fold.")
    if not isinstance(content, dict) or "train" not in content:
        raise ValueError(f'{path} is no split: give {{"train": [names], "validation": [names], "test": [names]}}.')
    parts: dict[str, set[str]] = {"train": set(), "validation": set(), "test": set()}
    for key, names in content.items():
        part = "validation" if key == "val" else key
        if part not in parts or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{path} has {key!r}: give lists of names under train, validation and test.")
        parts[part] |= {unicodedata.normalize("NFC", name) for name in names}
    times = Counter(name for names in parts.values() for name in names)
    if unknown := sorted(times.keys() - {case.id for case in cases}):
        raise ValueError(
            f"{path} names {some(unknown)}, not in the data set: give some of {some([c.id for c in cases])}."
        )
    if twice := sorted(name for name in times if times[name] > 1):
        raise ValueError(f"{path} has {some(twice)} in two parts: leave each in one.")
    if not parts["train"]:
        raise ValueError(f"{path} has no case under train: give some.")
    return {part: [case for case in cases if case.id in names] for part, names in parts.items()}


def read_test_part(path: str | Path, cases: Sequence[Case]) -> list[Case]:
    """The cases that a split file keeps for the end; see `read_split`.

    Raises:
        ValueError: also where the file keeps none.
    """
    test = read_split(path, cases)["test"]
    if not test:
        raise ValueError(f"{path} has no test part: leave out --split to take every case.")
    return test


def is_simulated(path: str | Path) -> bool:
    """Whether a path is in a cohort of `rsanet simulate`, by the ``dataset_description.json`` above it.

    A list of files is simulated where one of its images is.
    """
    path = Path(path)
    if path.suffix.lower() in (".csv", ".tsv", ".json") or path.parent.suffix.lower() == ".json":
        return any(is_simulated(image) for case in read_cases(path) for image in case.images.values())
    path = path.resolve()
    for folder in (path, *path.parents):
        try:
            description = json.loads((folder / "dataset_description.json").read_text(encoding="utf-8"))
            makers = [entry["Name"] for entry in description["GeneratedBy"]]
        except (OSError, ValueError, LookupError, TypeError):
            continue  # no description here, or one that names no maker
        if "rsanet simulate" in makers:
            return True
    return False
