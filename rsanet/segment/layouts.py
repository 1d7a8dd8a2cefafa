"""The layouts of data sets on disk: what a folder or a list of files holds, as cases.

A reader returns `Case` objects, complete or not, with contrasts by one name each; nothing after it knows a layout.
"""

import csv
import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rsanet.segment.volumes import SUFFIXES, stem
from rsanet.segment.words import counted

# The contrasts that go by several names, in lower case; any other name stays as it is written.
ALIASES = {
    **dict.fromkeys(("flair", "3dflair"), "FLAIR"),
    **dict.fromkeys(("t1", "t1w", "3dt1"), "T1w"),
    **dict.fromkeys(("t2", "t2w"), "T2w"),
    **dict.fromkeys(("pd", "pdw", "dp"), "PDw"),
    **dict.fromkeys(("t1ce", "t1gd", "t1c", "t1wks", "gado", "3dt1gado"), "T1ce"),
}

# Words in the names of files and columns, in lower case.
MASK = re.compile(r"(masks?|lesions?|labels?|consensus|manual|seg|segmentation|gt|wmh)\d*")
OTHER_MASK = re.compile(r"(brain|brainmask|head|skull|csf|gm|wm)\d*")  # no lesion mask with one of these
NO_SCAN = ("prob", "probability")
AGENT = ("ce", "gd", "gado", "gadolinium")  # beside T1w, which is a T1ce then
REGISTERED_TO = ("to", "in", "on", "2")  # T1_to_FLAIR is a T1w
IDS = ("id", "subject", "case", "participant_id", "subject_id", "case_id")

HEADER = "id,FLAIR,T1w,mask"  # of a table, for example

CHANNELS = ("channel_names", "modality")  # keys of nnU-Net and of the Medical Segmentation Decathlon
LISTS = ("training", "validation")  # of a datalist, read together where none is named

UNDERSTOOD = (
    "give a BIDS folder (sub-001/anat/sub-001_FLAIR.nii.gz), an nnU-Net folder (dataset.json, imagesTr), a folder with "
    "SUBJECT/FLAIR.nii.gz or SUBJECT_FLAIR.nii.gz inside, or a list of files, .csv or .json"
)


@dataclass(frozen=True)
class Case:
    """One subject, or one session: an image per contrast, in channel order, and a lesion mask where there is one.

    A contrast with several images is in ``several`` instead, and so are several masks, as ``mask``: which of them is
    meant is not ours to say.
    """

    id: str
    images: dict[str, Path] = field(default_factory=dict)
    mask: Path | None = None
    several: dict[str, list[Path]] = field(default_factory=dict)

    def pick(self, contrasts: Sequence[str]) -> dict[str, Path]:
        """The images of some contrasts, in their order, or an error that says which one is missing or given twice."""
        for name in contrasts:
            if name in self.several:
                files = ", ".join(path.name for path in self.several[name])
                raise ValueError(
                    f"{self.id} has several {name} images ({files}): leave one, or list the files in a .csv."
                )
        missing = [name for name in contrasts if name not in self.images]
        if missing or not contrasts:
            raise ValueError(f"{self.id} has no {' and no '.join(missing) or 'images'}.")
        files: dict[Path, str] = {}
        for name in contrasts:
            path = self.images[name]
            if isinstance(path, Path) and (other := files.setdefault(path.resolve(), name)) != name:
                raise ValueError(f"{self.id} has {path} as {other} and as {name}: give each contrast its own file.")
        return {name: self.images[name] for name in contrasts}

    def pick_mask(self) -> Path | None:
        """The lesion mask, None where there is none, or an error where there are several."""
        if "mask" in self.several:
            files = ", ".join(map(str, self.several["mask"]))
            raise ValueError(f"{self.id} has several lesion masks ({files}): leave one, or list the files in a .csv.")
        return self.mask


def canonical(contrast: str) -> str:
    """The one name of a contrast that goes by several: ``T1w`` for ``t1``."""
    return ALIASES.get(contrast.strip().lower(), contrast.strip())


def read_cases(path: Path) -> list[Case]:
    """The cases of a data set in any layout that is understood, none where it is another.

    Args:
        path: a folder, a ``.csv``, ``.tsv`` or ``.json`` file, or the latter and the name of a list in it.
    """
    if path.is_file() and path.suffix.lower() in (".csv", ".tsv"):
        return read_table(path)
    if path.is_file() and path.suffix.lower() == ".json":
        return read_datalist(path)
    if path.parent.suffix.lower() == ".json" and path.parent.is_file():
        return read_datalist(path.parent, path.name)
    if not path.is_dir():
        return []
    if any(path.glob("sub-*/anat")) or any(path.glob("sub-*/ses-*/anat")):
        return read_bids(path)
    if (path / "dataset.json").is_file() and (path / "imagesTr").is_dir():
        return read_nnunet(path / "imagesTr")
    if path.name.startswith("images") and (path.parent / "dataset.json").is_file():
        return read_nnunet(path)
    return read_folder(path)


def read_bids(folder: Path) -> list[Case]:
    """Cases of ``sub-*/anat/*_CONTRAST.nii.gz``, masks in ``derivatives/*/sub-*/anat/*label-lesion*_mask.nii.gz``.

    With sessions, each ``sub-*/ses-*`` is a case, likewise. A T1w with contrast agent (``ce-``) is a T1ce.
    """
    pipelines = _subfolders(folder / "derivatives")
    cases = []
    for subject in (path for path in _subfolders(folder) if path.name.startswith("sub-")):
        sessions = [path for path in _subfolders(subject) if path.name.startswith("ses-")]
        for place in [subject, *sessions] if (subject / "anat").is_dir() or not sessions else sessions:
            where = place.relative_to(folder)
            images, masks = [], []
            for path in _volumes(place / "anat"):
                contrast = canonical(stem(path).rpartition("_")[2])
                if not contrast.lower().endswith(("mask", "seg")):
                    images.append(("T1ce" if contrast == "T1w" and "_ce-" in path.name else contrast, path))
            for pipeline in pipelines:
                masks += [
                    path
                    for path in _volumes(pipeline / where / "anat")
                    if "label-lesion" in path.name and stem(path).endswith("_mask")
                ]
            cases.append(_case("_".join(where.parts), images, masks))
    return cases


def read_nnunet(images: Path) -> list[Case]:
    """Cases of nnU-Net's ``imagesTr/CASE_0000.nii.gz``, or ``imagesTs``, with ``labelsTr/CASE.nii.gz``.

    ``dataset.json`` beside the folder names the channels. With a single one, files may lack the number.
    """
    description = images.parent / "dataset.json"
    channels = _channels(read_json(description), description)
    if not channels:
        raise ValueError(f'{description} names no channels: add "channel_names", for example {{"0": "FLAIR"}}.')
    found: dict[str, list[tuple[str, Path]]] = {}
    for path in _volumes(images):
        match = re.fullmatch(r"(.+)_(\d{4})", stem(path))
        case, channel = (match[1], int(match[2])) if match else (stem(path), 0)
        if channel >= len(channels) or (not match and len(channels) > 1):
            last = f" to _{len(channels) - 1:04d}" if len(channels) > 1 else ""
            raise ValueError(f"{path} is no channel that {description} names: end its name in _0000{last}.")
        found.setdefault(case, []).append((channels[channel], path))
    if not found:
        raise ValueError(f"{images} has no images: put them there as CASE_0000.nii.gz.")
    labels: dict[str, list[Path]] = {}
    for path in _volumes(images.parent / images.name.replace("images", "labels")):
        labels.setdefault(stem(path), []).append(path)
    return [_case(case, found.get(case, []), labels.get(case, [])) for case in sorted(found.keys() | labels.keys())]


def read_folder(folder: Path) -> list[Case]:
    """Cases of ``SUBJECT/FLAIR.nii.gz``, ``SUBJECT/SUBJECT_FLAIR.nii.gz`` and ``SUBJECT_FLAIR.nii.gz``, masks beside.

    The words of a file name say what it holds, a contrast or a lesion mask; other files are left out.
    """
    cases = []
    for subject in _subfolders(folder):
        if files := [(_kind(stem(path).removeprefix(subject.name)), path) for path in _volumes(subject)]:
            images = [(kind, path) for kind, path in files if kind not in ("", "mask")]
            cases.append(_case(subject.name, images, [path for kind, path in files if kind == "mask"]))
    flat: dict[str, list[tuple[str, Path]]] = {}
    masks: dict[str, list[Path]] = {}
    for path in _volumes(folder):
        if (kind := _kind(stem(path))) == "mask":
            masks.setdefault(_subject(path), []).append(path)
        elif kind:
            flat.setdefault(_subject(path), []).append((kind, path))
    for subject in [name for name in masks if name not in flat]:
        if (shorter := _subject(Path(subject))) in flat:  # SUBJECT_FLAIR_mask
            masks.setdefault(shorter, []).extend(masks.pop(subject))
    return cases + [_case(name, flat.get(name, []), masks.get(name, [])) for name in sorted(flat.keys() | masks.keys())]


def read_table(path: Path) -> list[Case]:
    """Cases of a table with a header: a column per contrast and, where there are, ``id`` and ``mask``.

    Other columns are left out. Paths are relative to the table's folder.
    """
    text = _read_text(path)
    delimiter = max(",;\t", key=text.partition("\n")[0].count)  # Excel writes ; where the comma is decimal
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    rows = []
    try:
        for cells in reader:
            row = [cell.strip() for cell in cells]
            where = f"{path}, line {reader.line_num},"
            if not any(row):
                continue
            if not header:
                if files := [cell for cell in row if cell.endswith(SUFFIXES)]:
                    raise ValueError(f"{where} names no columns, but {files[0]}: put a header such as {HEADER} above.")
                header = row
            elif len(row) != len(header):
                raise ValueError(f"{where} has {counted(len(row), 'cell')}, but the header has {len(header)}.")
            else:
                rows.append((where, list(zip(header, row, strict=True))))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}, cannot be read as CSV: {error}.") from error
    if not rows:
        raise ValueError(f"{path} has no rows: give a header such as {HEADER} and a row per case.")
    return _listed(rows, path)


def read_datalist(path: Path, name: str | None = None) -> list[Case]:
    """Cases of a JSON list of ``{"id": ..., "FLAIR": path, "mask": path}``, or of a datalist as MONAI's.

    A datalist has ``channel_names`` and lists of ``{"image": [path, ...], "label": path}`` under ``training``,
    ``validation``, ``test`` or other names. Paths are relative to the file's folder.

    Args:
        path: the file.
        name: which list; None takes those for training and validation, or the only one.
    """
    content = read_json(path)
    channels = _channels(content, path) if isinstance(content, dict) else []
    parts = content if isinstance(content, dict) else {"": content}
    lists = {key: value for key, value in parts.items() if isinstance(value, list) and key not in CHANNELS}
    chosen = [name] if name else [key for key in LISTS if key in lists] or list(lists)
    if not lists.keys() >= set(chosen):
        raise ValueError(f"{path} has no list {name!r}: give one of {', '.join(filter(None, lists)) or path}.")
    if len(chosen) > 1 and chosen[0] not in LISTS:
        raise ValueError(f"{path} has the lists {', '.join(chosen)}: name one, as in {path}/{chosen[0]}.")
    rows = []
    for key in chosen:
        for number, entry in enumerate(lists[key], 1):
            where = f"{path}, entry {number}{f' of {key}' if key else ''},"
            if not isinstance(entry, (dict, str)):
                raise ValueError(f'{where} is {entry!r}: give {{"image": path, "label": path}}.')
            rows.append((where, list(_pairs({"image": entry} if isinstance(entry, str) else entry, channels, where))))
    if not rows:
        raise ValueError(
            f'{path} lists no cases: give [{{"id": "1", "FLAIR": path, "mask": path}}], or of an nnU-Net data set its '
            "folder."
        )
    return _listed(rows, path)


def _subfolders(folder: Path) -> list[Path]:
    """The folders in a folder that are not hidden, in order; none where it does not exist."""
    there = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in there if not path.name.startswith(".") and path.is_dir())


def _volumes(folder: Path) -> list[Path]:
    """The NIfTI files in a folder that are not hidden, in order; none where it does not exist."""
    there = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in there if not path.name.startswith(".") and path.name.endswith(SUFFIXES))


def _case(name: str, images: Sequence[tuple[str, Path]], masks: Sequence[Path]) -> Case:
    """A case of all the images and masks found for it. Of several masks, a consensus is the one that is meant."""
    found: dict[str, list[Path]] = {}
    for contrast, path in images:
        found.setdefault(contrast, []).append(path)
    for word in ("consensus", "lesion"):
        masks = [path for path in masks if word in path.name.lower()] or masks
    if masks:
        found["mask"] = list(masks)
    single = {key: paths[0] for key, paths in found.items() if len(paths) == 1}
    several = {key: paths for key, paths in found.items() if len(paths) > 1}
    # macOS stores letters and their accents apart, where lists and other systems have them as one.
    return Case(
        unicodedata.normalize("NFC", name),
        {key: path for key, path in single.items() if key != "mask"},
        single.get("mask"),
        several,
    )


def _words(name: str) -> list[re.Match]:
    return list(re.finditer(r"[^_\-. ]+", name))


def _read_name(name: str) -> tuple[str, str]:
    """What a name says that it names, a contrast, ``mask`` or nothing known, and what stands before that."""
    matches = _words(name)
    words = [match[0].lower() for match in matches]
    if any(word in NO_SCAN for word in words):
        return "", name
    masks = [place for place, word in enumerate(words) if MASK.fullmatch(word)]
    if masks and any(OTHER_MASK.fullmatch(word) for word in words):
        return "", name
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


def _kind(name: str) -> str:
    return _read_name(name)[0]


def _subject(path: Path) -> str:
    """The subject that a file name begins with, or that of its folder where the name begins with what it holds."""
    name = stem(path)
    if entities := re.match(r"sub-[^\W_]+(_ses-[^\W_]+)?", name):
        return entities[0]
    return _read_name(name)[1] or path.resolve().parent.name


def _read_text(path: Path) -> str:
    """A text file in UTF-8, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: save it in that encoding.") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    try:
        return json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error.msg.lower()} in line {error.lineno}.") from error
    except RecursionError as error:
        raise ValueError(f"{path} is no list of cases: it is nested too deeply.") from error


def _channels(content: Any, path: Path) -> list[str]:
    """The contrasts that ``channel_names`` or ``modality`` gives, in order; none where there is neither."""
    names = next((content[key] for key in CHANNELS if key in content), []) if isinstance(content, dict) else []
    if isinstance(names, dict) and all(str(key).isdecimal() for key in names):
        names = [names[key] for key in sorted(names, key=int)]
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f'{path} names its channels {names!r}: give them as {{"0": "FLAIR", "1": "T1w"}}.')
    channels = [canonical(name) for name in names]
    if twice := [name for name, times in Counter(channels).items() if times > 1]:
        raise ValueError(f"{path} has several channels named {' and '.join(twice)}: give each its own name.")
    return channels


def _pairs(entry: dict[str, Any], channels: Sequence[str], where: str) -> Iterator[tuple[str, Any]]:
    """The columns of a datalist's entry, those of ``image`` named by the channels."""
    for key, value in entry.items():
        if key.lower() not in ("image", "images"):
            yield key, value[0] if isinstance(value, list) and len(value) == 1 else value
            continue
        images = value if isinstance(value, list) else [value]
        names: Sequence[str] = channels
        if not channels and len(images) == 1:
            names = [_kind(stem(Path(str(images[0]))))]
        if not any(names) or "mask" in names:
            raise ValueError(f'{where} has images whose contrast nothing names: add "channel_names": {{"0": "FLAIR"}}.')
        if len(images) != len(names):
            raise ValueError(
                f"{where} has {counted(len(images), 'image')}, but there are {counted(len(names), 'channel')} "
                f"({', '.join(names)}): give a 3-D file per channel."
            )
        yield from zip(names, images, strict=True)


def _listed(rows: Sequence[tuple[str, Sequence[tuple[str, Any]]]], path: Path) -> list[Case]:
    """Cases of rows, each the words that say where it stands, and its columns with their values.

    Without an ``id``, the name of the first image gives that of the case.
    """
    cases = []
    for where, columns in rows:
        name, images, masks = "", [], []
        for column, value in columns:
            kind = _kind(column)
            file = isinstance(value, str) and value.endswith(SUFFIXES)
            if column.lower() in IDS:
                name = str(value)
            elif not kind and (not file or any(MASK.fullmatch(word[0].lower()) for word in _words(column))):
                continue  # an age, a site, a mask of the brain
            elif value is None or value == "":
                continue
            elif not isinstance(value, str):
                raise ValueError(f"{where} has {value!r} as {column}: give the path of a file.")
            elif kind == "mask":
                masks.append(path.parent / value)
            else:
                images.append((kind or canonical(column), path.parent / value))
        if not name:
            if not images:
                raise ValueError(f"{where} has no image: name a column by each contrast, for example FLAIR.")
            name = _subject(images[0][1])
        cases.append(_case(name, images, masks))
    return cases
