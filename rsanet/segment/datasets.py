"""Data sets on disk: readers of layouts, and what is asked of a case before it is used.

A reader of a layout returns `Case` objects, complete or not; nothing after it knows a layout.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rsanet.segment.volumes import SUFFIXES, read_image, read_mask, same_grid, stem

# The order of channels where the user names none; other contrasts follow alphabetically.
CONTRASTS = ("FLAIR", "T1w", "T2w")


@dataclass(frozen=True)
class Case:
    """One subject, or one session: an image per contrast, in channel order, and a lesion mask where there is one.

    A contrast with several images is in ``several`` instead: which of them is meant is not ours to say.
    """

    id: str
    images: dict[str, Path] = field(default_factory=dict)
    mask: Path | None = None
    several: dict[str, list[Path]] = field(default_factory=dict)

    def pick(self, contrasts: Sequence[str]) -> dict[str, Path]:
        """The images of some contrasts, in their order, or an error that says which one is missing."""
        for name in contrasts:
            if name in self.several:
                files = ", ".join(path.name for path in self.several[name])
                raise ValueError(f"{self.id} has several {name} images ({files}): leave one.")
        missing = [name for name in contrasts if name not in self.images]
        if missing or not contrasts:
            raise ValueError(f"{self.id} has no {' and no '.join(missing) or 'images'}.")
        return {name: self.images[name] for name in contrasts}


def read_bids(folder: Path) -> list[Case]:
    """Cases of ``sub-*/anat/*_CONTRAST.nii.gz``, masks in ``derivatives/*/sub-*/anat/*label-lesion*_mask.nii.gz``.

    With sessions, each ``sub-*/ses-*`` is a case, likewise.
    """
    cases = []
    for subject in sorted(path for path in folder.glob("sub-*") if path.is_dir()):
        sessions = sorted(path for path in subject.glob("ses-*") if path.is_dir())
        for place in [subject, *sessions] if (subject / "anat").is_dir() or not sessions else sessions:
            found: dict[str, list[Path]] = {}
            for path in sorted((place / "anat").glob("[!.]*")):
                if path.name.endswith(SUFFIXES):
                    found.setdefault(stem(path).rpartition("_")[2], []).append(path)
            where = place.relative_to(folder)
            masks = [
                path
                for path in sorted(folder.glob(f"derivatives/*/{where.as_posix()}/anat/*_mask.nii*"))
                if "label-lesion" in path.name and path.name.endswith(SUFFIXES)
            ]
            cases.append(
                Case(
                    "_".join(where.parts),
                    {name: paths[0] for name, paths in found.items() if len(paths) == 1},
                    masks[0] if masks else None,
                    {name: paths for name, paths in found.items() if len(paths) > 1},
                )
            )
    return cases


def list_cases(path: str | Path, contrasts: Sequence[str] | None = None) -> tuple[list[Case], list[str]]:
    """All the cases of a data set, complete or not.

    Args:
        path: folder of the data set.
        contrasts: the wanted contrasts in channel order; None takes every contrast that occurs.

    Returns:
        The cases, each with those of the wanted contrasts that it has, and the wanted contrasts.
    """
    path = Path(path)
    if twice := sorted({name for name in contrasts or () if list(contrasts or ()).count(name) > 1}):
        raise ValueError(f"--contrasts has {' and '.join(twice)} more than once: name each channel once.")
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder: give the folder of a cohort, with sub-*/anat/ inside.")
    cases = read_bids(path)
    if not cases:
        raise ValueError(f"{path} has no cases: expected images named sub-001/anat/sub-001_FLAIR.nii.gz inside.")
    if contrasts is None:
        found = {name for case in cases for name in (*case.images, *case.several)}
        contrasts = sorted(found, key=lambda name: (CONTRASTS.index(name) if name in CONTRASTS else 99, name))
    return [
        replace(case, images={name: case.images[name] for name in contrasts if name in case.images}) for case in cases
    ], list(contrasts)


def check_case(case: Case, contrasts: Sequence[str], *, require_mask: bool) -> None:
    """Reads every file of a case once and raises on the first that cannot serve."""
    images = [read_image(path)[1] for path in case.pick(contrasts).values()]
    if not require_mask:
        return
    if case.mask is None:
        raise ValueError(f"{case.id} has no lesion mask.")
    mask = read_mask(case.mask)[1]
    if not same_grid(images[0], mask):
        name, shape = contrasts[0], "×".join(map(str, mask.shape[:3]))
        raise ValueError(
            f"{case.mask} ({shape}) is on another grid than the {name} image "
            f"({'×'.join(map(str, images[0].shape[:3]))}): put the contrast it was drawn on first in --contrasts."
        )


def find_cases(path: str | Path, contrasts: Sequence[str] | None = None, *, require_mask: bool) -> list[Case]:
    """The cases of a data set, every file of them read and found good.

    Args:
        path: folder of the data set.
        contrasts: the wanted contrasts in channel order; None wants every contrast that occurs.
        require_mask: whether a case needs a lesion mask on the grid of its first contrast.

    Raises:
        ValueError: naming every case that cannot serve, each with its reason.
    """
    cases, contrasts = list_cases(path, contrasts)
    problems = []
    for case in cases:
        try:
            check_case(case, contrasts, require_mask=require_mask)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    if problems:
        raise ValueError(f"{len(problems)} of {len(cases)} cases in {path} cannot be used:\n  " + "\n  ".join(problems))
    return cases


def is_simulated(path: str | Path) -> bool:
    """Whether a path is in a cohort of `rsanet simulate`, by the ``dataset_description.json`` above it."""
    path = Path(path).resolve()
    for folder in (path, *path.parents):
        try:
            description = json.loads((folder / "dataset_description.json").read_text())
            makers = [entry["Name"] for entry in description["GeneratedBy"]]
        except (OSError, ValueError, LookupError, TypeError):
            continue  # no description here, or one that names no maker
        if "rsanet simulate" in makers:
            return True
    return False
