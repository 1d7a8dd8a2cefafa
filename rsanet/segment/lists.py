"""Lists of files: tables and JSON, of which each row or entry is a case."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rsanet.segment.cases import Case, make_case
from rsanet.segment.names import MASK, canonical, kind_of, subject_of_name, words_of
from rsanet.segment.volumes import names_volume, stem
from rsanet.segment.words import counted

IDS = ("id", "subject", "case", "participant_id", "subject_id", "case_id")

HEADER = "id,FLAIR,T1w,mask"  # of a table, for example

CHANNELS = ("channel_names", "modality")  # keys of nnU-Net and of the Medical Segmentation Decathlon
LISTS = ("training", "validation")  # of a datalist, read together where none is named


def read_table(path: Path) -> list[Case]:
    """Cases of a table with a header: a column per contrast and, where there are, ``id`` and ``mask``.

    Other columns are left out. Paths are relative to the table's folder.
    """
    text = read_text(path)
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
                if files := [cell for cell in row if names_volume(cell)]:
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

    Without an ``id``, the name of the first image gives that of the case.
    """
    cases = []
    for where, columns in rows:
        name, images, masks = "", [], []
        for column, value in columns:
            kind = kind_of(column)
            file = isinstance(value, str) and names_volume(value)
            if column.lower() in IDS:
                name = str(value)
            elif not kind and (not file or any(MASK.fullmatch(word[0].lower()) for word in words_of(column))):
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
            name = subject_of_name(images[0][1])
        cases.append(make_case(name, images, masks))
    return cases
