"""The rows of a block table as pictures, reports and comparisons read them."""

import csv
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.cases import BLOCK_AXES
from benchmarks.devices import NOISY_DRIFT, NOISY_LOAD
from benchmarks.table import BLOCK_KEY, MEASURED, RESULTS, Row, parse

DAGGER = "†"
NOISE = (
    f"{DAGGER} noisy: others took more than {NOISY_LOAD:.0f} % of the processor's time, "
    f"or the machine's speed changed by more than {NOISY_DRIFT:.0f} % during the case."
)
ALL_AXES = "".join(map(str, BLOCK_AXES))
TIMES = ("median_ms", "low_ms", "high_ms")
NEEDED = (*BLOCK_KEY, "status", *TIMES)
NUMBERS = (*TIMES, "floor_ms", "percent_of_floor", "peak_extra_mib", "error", "load_percent", "drift_percent")


class TableError(Exception):
    """A file that is no block table; the message is a sentence for the user."""


def block_paths(folder: Path = RESULTS) -> list[Path]:
    """The block tables of a folder, in the order of their names; those of networks are others."""
    return sorted(path for path in folder.glob("*.csv") if not path.stem.endswith("-network"))


def network_path(block: Path) -> Path:
    """The network's table of the device of a block table."""
    return block.with_name(f"{block.stem}-network.csv")


def read_network(path: Path) -> list[Row]:
    """The rows of a network's table; none where there is no such file.

    Raises:
        TableError: if it is something else.
    """
    rows = parse(path.read_text(encoding="utf-8")) if path.is_file() else []
    for column in ("device", "threads", "case", "shape", "window", "provider", "status", "median_ms"):
        if rows and column not in rows[0]:
            raise TableError(
                f"{path} is no network table, it has no column {column}: measure with `python -m benchmarks network`."
            )
    return rows


def read(path: Path) -> list[Row]:
    """The rows of a block table.

    Raises:
        TableError: if the file cannot be read, or is something else.
    """
    try:
        return checked(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError:
        raise TableError(f"{path} is not text: give a table as `python -m benchmarks` writes it.") from None
    except OSError as error:
        raise TableError(f"{path} cannot be read ({error.strerror}): give a table of benchmarks/results.") from None


def checked(text: str, name: str) -> list[Row]:
    """The rows of a block table's text.

    Args:
        text: of the CSV file.
        name: of the file, for messages.

    Raises:
        TableError: if a column that every table has is missing, or a row has something else than its columns' numbers.
    """
    wanted = "measure again with `python -m benchmarks`, or give another file."
    try:
        header = next(csv.reader(text.splitlines()), [])
        rows = parse(text)
    except csv.Error as error:
        raise TableError(f"{name} is no CSV file ({error}): {wanted}") from None
    missing = [column for column in NEEDED if column not in header]
    if missing:
        raise TableError(f"{name} is no block table, it has no column {', '.join(missing)}: {wanted}")
    for line, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise TableError(f"{name}, row {line}: {len(header)} cells are wanted, others are there: {wanted}")
        sizes = row["shape"].split("x")
        if row["status"] == MEASURED and not (len(sizes) == 5 and all(size.isdecimal() for size in sizes)):
            raise TableError(f"{name}, row {line}: the shape {row['shape']!r} is not N x C x D x H x W: {wanted}")
        for column in NUMBERS:
            _check_number(row, column, f"{name}, row {line}: {column}", wanted)
    return rows


def _check_number(row: Row, column: str, where: str, wanted: str) -> None:
    text = row.get(column, "")
    needed = row["status"] == MEASURED and column in TIMES
    if not text and not needed:
        return
    try:
        value = float(text)
    except ValueError:
        raise TableError(f"{where} is {text!r}, no number: {wanted}") from None
    if needed and not 0 < value < math.inf:
        raise TableError(f"{where} is {text}, no time: {wanted}")


def select(rows: Iterable[Row], **cells: str) -> list[Row]:
    """The rows with these cells."""
    return [row for row in rows if all(row[column] == cell for column, cell in cells.items())]


def number(row: Row | None, column: str) -> float | None:
    """A cell as a number; None where the row or the number is missing."""
    return float(row[column]) if row is not None and row.get(column) else None


def is_measured(row: Row | None) -> bool:
    """Whether there are times."""
    return row is not None and row["status"] == MEASURED


def is_noisy(row: Row) -> bool:
    """Whether others used the machine, or its speed changed, so much that the times say little."""
    return (number(row, "load_percent") or 0) > NOISY_LOAD or (number(row, "drift_percent") or 0) > NOISY_DRIFT


def shape_of(row: Row) -> tuple[int, ...]:
    """``(N, C, D, H, W)``."""
    return tuple(map(int, row["shape"].split("x")))


def volume_label(shape: Sequence[int]) -> str:
    """A volume ``(N, C, D, H, W)`` in words: ``512 channels, 10 × 14 × 10``."""
    batch, channels, *spatial = shape
    counted = f"{channels} channel{'' if channels == 1 else 's'}"
    return f"{counted}, {' × '.join(map(str, spatial))}" + (f", batch {batch}" if batch > 1 else "")


def milliseconds(value: float) -> str:
    """A time with three digits: ``27.6 ms``, from ten seconds on in seconds."""
    if value >= 10_000:
        return f"{value / 1000:.{1 if value < 100_000 else 0}f} s"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f} ms"


def times(ratio: float) -> str:
    """A ratio: ``7.9×``."""
    return f"{ratio:.{2 if ratio < 2 else 1 if ratio < 100 else 0}f}×"


def settings(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """Device and threads of the rows, those with the most rows first."""
    counts = Counter((row["device"], row["threads"]) for row in rows)
    return sorted(counts, key=lambda setting: (-counts[setting], setting))


def of_main_setting(rows: Sequence[Row]) -> list[Row]:
    """The rows of the device and number of threads that most rows have: others' times cannot stand beside them."""
    main = settings(rows)[:1]
    return [row for row in rows if (row["device"], row["threads"]) in main]


def where(rows: Sequence[Row]) -> str:
    """On what, with what and when rows were measured, in one line."""

    def values(column: str) -> list[str]:
        return sorted({row.get(column, "") for row in rows if is_measured(row)} - {""})

    parts = values("device")
    threads = values("threads")
    if threads and not values("driver"):
        parts.append(f"{' and '.join(threads)} thread{'' if threads == ['1'] else 's'}")
    for column in ("torch", "triton", "driver"):
        # Triton computes nothing on a CPU.
        if column != "triton" or values("driver"):
            parts += [f"{column} {' and '.join(values(column))}"] if values(column) else []
    dates = values("date")
    parts += [f"measured {dates[0]}" + (f" to {dates[-1]}" if len(dates) > 1 else "")] if dates else []
    parts += [f"commit {' and '.join(found)}" for found in [values("commit")] if found]
    return ", ".join(parts)
