"""Lists of files: tables and JSON, of which each row or entry is a case."""

import csv
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rsanet.segment.cases import Case, make_case
from rsanet.segment.names import MASK, canonical, is_other_mask, is_probability, kind_of, subject_of_name, words_of
from rsanet.segment.volumes import DataWarning, names_volume, stem
from rsanet.segment.words import counted, some

# Headers that say whose images a row has, as `_key` makes them: the subject's, the scan's, or which of several.
CALLED = "(id|ids|identifier|code|key|name|label|no|nr|num|number)"
SUBJECTS = re.compile(rf"(subject|subj|sub|participant|patient|pat|person|proband|pseudonym|anon){CALLED}?")
SCANS = re.compile(
    rf"(id|case|scan|mrn|uid){CALLED}?|(image|study|exam|series|record|file|bids){CALLED}|name|key|identifier"
)
SESSIONS = re.compile(rf"(session|ses|visit|timepoint|tp){CALLED}?")
MISSING = ("", "n/a", "na", "nan", "none", "null", "nil", "-", "--", ".", "?", "#n/a", "<na>")  # in lower case
SEPARATOR = re.compile(r'"?sep=(.)"?', re.IGNORECASE)  # Excel's first line

HEADER = "id,FLAIR,T1w,mask"  # of a table, for example

CHANNELS = ("channel_names", "modality")  # keys of nnU-Net and of the Medical Segmentation Decathlon
LISTS = ("training", "validation")  # of a datalist, read together where none is named


def read_table(path: Path) -> list[Case]:
    """Cases of a table with a header: a column per contrast and, where there are, ``id`` and ``mask``.

    Other columns are left out, and so are Excel's line ``sep=;`` and lines that begin with ``#``. ``n/a`` and the like
    are missing values. Paths are relative to the table's folder.
    """
    lines = read_text(path).splitlines(keepends=True)
    declared = SEPARATOR.fullmatch(lines[0].rstrip("\r\n")) if lines else None
    lines[: 1 if declared else 0] = ["\n"] * bool(declared)
    comments = [line for line in lines if re.match(r"\s*#(?!n/a)", line, re.IGNORECASE)]
    first, *others = re.split("[,;\t]", next((line for line in lines if line.strip()), ""))
    if comments and others and _names_cases(first):  # a header of its own kind: #subject,FLAIR
        comments = [line for line in comments if not line.startswith(first)]
    if told := [
        line.strip() for line in comments if any(names_volume(word) for word in re.split(r"[,;\t\s\"]+", line))
    ]:
        warnings.warn(
            f"{path}: {counted(len(told), 'line')} with files left out, the # in front making it a comment: "
            f"{some(told, 3)}.",
            DataWarning,
            stacklevel=1,
        )
    lines = ["\n" if line in comments else line for line in lines]
    head = re.sub(r'"[^"]*"', "", next((line for line in lines if line.strip()), ""))
    delimiter = declared[1] if declared else max(",;\t", key=head.count)  # Excel writes ; where the comma is decimal
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] = []
    rows = []
    try:
        for cells in reader:
            row = [cell.strip() for cell in cells]
            where = f"{path}, line {reader.line_num},"
            if not any(row):
                continue
            if not header:
                if files := [cell for cell in row if names_volume(cell)]:
                    raise ValueError(f"{where} names no columns, but {files[0]}: put a header such as {HEADER} above.")
                header = row
                continue
            if not any(row[len(header) :]):
                del row[len(header) :]  # separators at the end of a line
            if len(row) != len(header):
                raise ValueError(f"{where} has {counted(len(row), 'cell')}, but the header has {len(header)}.")
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
    channels = channels_of(content, path) if isinstance(content, dict) else []
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


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: save it in that encoding.") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error.msg.lower()} in line {error.lineno}.") from error
    except RecursionError as error:
        raise ValueError(f"{path} is no list of cases: it is nested too deeply.") from error


def channels_of(content: Any, path: Path) -> list[str]:
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
            names = [kind_of(stem(Path(str(images[0]))))]
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

    A column that names the scans tells those of one subject apart, where there are several. Without any that names
    the cases, the name of the first image gives that of the case.
    """
    given = {column: [dict(columns).get(column) for _, columns in rows] for _, columns in rows for column, _ in columns}
    case_column, subject_column, session_column = _naming_columns(given)
    numbers = {column for column, values in given.items() if _are_numbers(values, path)}
    cases, unknown = [], dict.fromkeys(())
    for where, columns in rows:
        name, images, masks = "", [], []
        for column, value in sorted(columns, key=lambda pair: pair[0] == session_column):  # the subject comes first
            kind = kind_of(column)
            file = isinstance(value, str) and names_volume(value)
            missing = _is_missing(value)
            if column in (case_column, session_column):
                if missing:
                    raise ValueError(f"{where} has nothing as {column}: give each case its name there.")
                name += f"_ses-{str(value).removeprefix('ses-')}" if column == session_column else str(value)
            elif column == subject_column or (_names_cases(column) and not file):
                continue  # another name of the same
            elif not kind and (not file or is_other_mask(column) or _is_part(column)):
                unknown |= {column: None} if not missing else {}
                continue  # an age, a site, a mask of the brain
            elif missing or column in numbers:
                continue  # a number beside a word as lesion is a volume
            elif not isinstance(value, str):
                raise ValueError(f"{where} has {value!r} as {column}: give the path of a file.")
            elif kind == "mask":
                masks.append(path.parent / value)
            else:
                images.append((kind or canonical(column), path.parent / value))
        if not name:
            if not images:
                raise ValueError(f"{where} has no image: name a column by each contrast, for example FLAIR.")
            name = subject_of_name(images[0][1])
        whose = dict(columns).get(subject_column)
        cases.append(make_case(name, images, masks, subject="" if _is_missing(whose) else str(whose)))
    if unknown and not case_column:
        warnings.warn(
            f"{path} has no column that is called subject or id, so that its cases are named by their files "
            f"({some([case.id for case in cases])}); left out: {', '.join(unknown)}.",
            DataWarning,
            stacklevel=1,
        )
    return cases


def _naming_columns(given: Mapping[str, Sequence[Any]]) -> tuple[str | None, str | None, str | None]:
    """The column that names the cases, one that says whose they are where that is another, and one of their sessions.

    Args:
        given: the values of each column.
    """
    texts = {
        column: [str(value) for value in values]
        for column, values in given.items()
        if not any(isinstance(value, str) and names_volume(value) for value in values)
    }
    subjects = [column for column in texts if SUBJECTS.fullmatch(_key(column))]
    scans = [column for column in texts if SCANS.fullmatch(_key(column))]
    sessions = [column for column in texts if SESSIONS.fullmatch(_key(column))]
    every = [*subjects, *scans]
    if not every:
        return None, None, None
    case = next((column for column in every if len(set(texts[column])) == len(texts[column])), None)
    if case is None and sessions:
        both = set(zip(texts[every[0]], texts[sessions[0]], strict=True))
        if len(both) == len(texts[every[0]]):
            return every[0], None, sessions[0]
    case = case or every[0]
    return case, subjects[0] if subjects and case in scans else None, None


def _names_cases(column: str) -> bool:
    return any(words.fullmatch(_key(column)) for words in (SUBJECTS, SCANS, SESSIONS))


def _key(column: str) -> str:
    """A header without what people write differently: case, spaces, underscores, hyphens, dots and signs."""
    return re.sub(r"[\W_]+", "", column).lower()


def _is_missing(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and value.strip().lower() in MISSING)


def _is_part(column: str) -> bool:
    """Whether a column is of a mask that is none of lesions, or of a probability."""
    return is_probability(column) or any(MASK.fullmatch(word[0].lower()) for word in words_of(column))


def _are_numbers(values: Sequence[Any], path: Path) -> bool:
    """Whether a column of a table holds numbers, and no files of such names."""
    there = [value for value in values if not _is_missing(value)]
    numbers = all(isinstance(value, str) and re.fullmatch(r"[-+]?[\d.,]+([eE][-+]?\d+)?%?", value) for value in there)
    return bool(there) and numbers and not (path.parent / there[0]).exists()
