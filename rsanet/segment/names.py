"""What the names of files and columns say of their content: a contrast, a lesion mask, a subject."""

import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from rsanet.segment.formats import is_other_format
from rsanet.segment.volumes import DataWarning, is_nifti, names_volume, stem

# The contrasts that go by several names, in lower case; any other name stays as it is written.
ALIASES = {
    **dict.fromkeys(("flair", "3dflair"), "FLAIR"),
    **dict.fromkeys(("t1", "t1w", "3dt1"), "T1w"),
    **dict.fromkeys(("t2", "t2w"), "T2w"),
    **dict.fromkeys(("pd", "pdw", "dp"), "PDw"),
    **dict.fromkeys(("t1ce", "t1gd", "t1c", "t1wks", "gado", "3dt1gado"), "T1ce"),
}

UNREAD = (".mgz", ".mgh", ".hdr", ".mnc", ".mif")  # of volumes; .img goes with .hdr

# Words in the names of files and columns, in lower case.
MASK = re.compile(r"(masks?|lesions?|labels?|consensus|manual|seg|segmentation|gt|wmh)\d*")
OTHER_MASK = re.compile(r"(brain|brainmask|head|skull|csf|gm|wm|bet|hdbet|synthstrip|fg|foreground|ventricles)\d*")
LESION = re.compile(r"(lesions?|wmh)\d*")  # of a part of the brain are lesions, too
NO_SCAN = ("prob", "probability", "probabilities", "probseg", "softmax")
AGENT = ("ce", "gd", "gado", "gadolinium")  # beside T1w, which is a T1ce then
REGISTERED_TO = ("to", "in", "on", "2")  # T1_to_FLAIR is a T1w


def canonical(contrast: str) -> str:
    """The one name of a contrast that goes by several: ``T1w`` for ``t1``."""
    return ALIASES.get(contrast.strip().lower(), contrast.strip())


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder that are not hidden, in order; none where it does not exist."""
    there = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in there if not path.name.startswith(".") and path.is_dir())


def volumes_in(folder: Path) -> list[Path]:
    """The volumes in a folder that are not hidden, in order; none where it does not exist.

    Other formats than NIfTI, and folders of DICOM series, are left out beside NIfTI files: those were made of them.
    """
    there = sorted(folder.iterdir()) if folder.is_dir() else ()
    shown = [path for path in there if not path.name.startswith(".")]
    return [path for path in shown if is_nifti(path)] or [path for path in shown if is_other_format(path)]


def unread_in(folder: Path) -> list[Path]:
    """The volumes in a folder in a format that wants another program first, without those that NIfTI was made of."""
    there = sorted(folder.iterdir()) if folder.is_dir() else ()
    shown = [path for path in there if not path.name.startswith(".")]
    read = {stem(path) for path in shown if names_volume(path.name)}
    return [path for path in shown if path.name.lower().endswith(UNREAD) and path.stem not in read]


def volumes_below(folder: Path, *, unread: bool = False) -> list[Path]:
    """The volumes in a folder and all below it that are not hidden, in order; links to folders are followed.

    Args:
        folder: that is searched.
        unread: whether those of formats that want another program first are meant, instead of those that are read.
    """
    found, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(root)) in seen:
            folders.clear()  # a link leads in a circle
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        if unread:
            found += unread_in(Path(root))
        else:
            found += [Path(root, name) for name in names if names_volume(name) and not name.startswith(".")]
    return sorted(found)


def tell_left_out(files: Sequence[Path], folder: Path, why: str) -> None:
    """Warns of files that are left out, in one line: how many, why, and the first of them."""
    if files:
        names = [os.path.relpath(file, folder) for file in files]
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        are = "1 file is" if len(names) == 1 else f"{len(names)} files are"
        warnings.warn(f"{folder}: {are} left out, {why}: {shown}.", DataWarning, stacklevel=1)


def words_of(name: str) -> list[re.Match]:
    """The words of a name, and where each stands."""
    return list(re.finditer(r"[^_\-. ]+", name))


def _read_name(name: str) -> tuple[str, str]:
    """What a name says that it names, a contrast, ``mask`` or nothing known, and what stands before that."""
    matches = words_of(name)
    words = [match[0].lower() for match in matches]
    if any(word in NO_SCAN for word in words):
        return "", name
    masks = [place for place, word in enumerate(words) if MASK.fullmatch(word)]
    if masks and is_other_mask(name):
        other = min(place for place, word in enumerate(words) if OTHER_MASK.fullmatch(word) or place in masks)
        return "", name[: matches[other].start()].rstrip("_-. ")
    for place, word in enumerate(words):
        if word in REGISTERED_TO and place and words[place - 1] in ALIASES:
            words = words[:place]
            break
    contrasts = [place for place, word in enumerate(words) if word in ALIASES]
    if not masks and not contrasts:
        return "", name
    start = masks[0] if masks else contrasts[-1]
    kind = "mask" if masks else ALIASES[words[start]]
    if kind == "T1w" and any(word in AGENT for word in words[max(0, start - 1) : start + 2]):
        kind = "T1ce"
        while start and words[start - 1] in AGENT:
            start -= 1
    return kind, name[: matches[start].start()].rstrip("_-. ")


def is_other_mask(name: str) -> bool:
    """Whether a name says that it names a mask of something else than lesions, as of the brain."""
    words = [match[0].lower() for match in words_of(name)]
    other = any(OTHER_MASK.fullmatch(word) for word in words) and any(MASK.fullmatch(word) for word in words)
    return other and not any(LESION.fullmatch(word) for word in words)


def is_probability(name: str) -> bool:
    """Whether a name says that it names a map of probabilities."""
    return any(match[0].lower() in NO_SCAN for match in words_of(name))


def name_before_kind(name: str) -> str:
    """What a name has before the words that say what it names; nothing where it says only that, as ``T1_mask``."""
    return _read_name(name)[1]


def kind_of(name: str) -> str:
    """What a name says that it names: a contrast, ``mask``, or nothing known."""
    return _read_name(name)[0]


def subject_of_name(path: Path) -> str:
    """The subject that a file name begins with, or that of its folder where the name begins with what it holds."""
    name = stem(path)
    if entities := re.match(r"sub-[^\W_]+(_ses-[^\W_]+)?", name):
        return entities[0]
    return _read_name(name)[1] or path.resolve().parent.name
