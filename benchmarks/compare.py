"""What two tables of the block tell apart: slower, larger, less exact, gone."""

import math
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.rows import (
    ALL_AXES,
    DAGGER,
    NOISE,
    TableError,
    block_paths,
    checked,
    is_measured,
    is_noisy,
    milliseconds,
    number,
    read,
    times,
)
from benchmarks.table import BLOCK_KEY, MEASURED, Row

# Less than these is no change.
LEAST_PERCENT, LEAST_MIB, LEAST_ERROR = 5.0, 1.0, 2.0
# What may differ between tables without a row of its own being another row.
SURROUNDINGS = ("device", "threads", "driver", "torch", "triton", "cuda")


class Change(NamedTuple):
    """A difference between two rows of one thing.

    Attributes:
        row: the later one, or the earlier one where that is gone.
        what: time, memory, error, status or row.
        before: as it is read.
        after: as it is read.
        factor: after over before; infinite where nothing is left, and 0 where there was nothing.
        worse: or better.
        beyond_percent: of times, by how much the two quartiles that are nearest to each other differ; None of anything
            else.
        noisy: whether one of the rows is.
    """

    row: Row
    what: str
    before: str
    after: str
    factor: float
    worse: bool
    beyond_percent: float | None = None
    noisy: bool = False


def compare(before: list[Row], after: list[Row]) -> list[Change]:
    """All changes, the worst first.

    Rows of two devices, or of two numbers of threads, are compared where each table has one only.

    Args:
        before: rows of a block table.
        after: rows of another.
    """
    key = _key(before, after)
    earlier, later = ({_identity(row, key): row for row in rows} for rows in (before, after))
    changes = []
    for identity, old in earlier.items():
        new = later.get(identity)
        if new is None:
            if is_measured(old):
                changes.append(Change(old, "row", MEASURED, "missing", math.inf, True, noisy=is_noisy(old)))
            continue
        noisy = is_noisy(old) or is_noisy(new)
        changes += [change._replace(noisy=noisy) for change in _changes(old, new)]
    return sorted(changes, key=_badness)


def main(paths: Sequence[Path]) -> int:
    """Compares two tables, or one or all of ``benchmarks/results`` with what was committed last; prints the changes.

    Args:
        paths: two tables, the earlier one first; one table; or none for all.

    Returns:
        the exit status: 1 if anything became worse, 2 if a table cannot be read, else 0.
    """
    if len(paths) > 2:
        print(f"{len(paths)} tables were given: give two, one to compare with its last commit, or none for all.")
        return 2
    if not paths and not block_paths():
        print("there is no block table in benchmarks/results: measure with `python -m benchmarks` first.")
        return 2
    statuses = []
    for pair in [paths] if len(paths) == 2 else [[path] for path in paths or block_paths()]:
        try:
            after = read(pair[-1])
            before = read(pair[0]) if len(pair) == 2 else committed(pair[0])
        except TableError as error:
            print(error)
            statuses.append(2)
            continue
        print(f"{pair[0]} and {pair[1]}:" if len(pair) == 2 else f"{pair[0]} since its last commit:")
        statuses.append(_tell(before, after))
    return max(statuses)


def committed(path: Path) -> list[Row]:
    """The rows of a table as they were committed last.

    Raises:
        TableError: if git has none.
    """
    command = ["git", "show", f"HEAD:./{path.name}"]
    try:
        found = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, encoding="utf-8", check=False)
    except FileNotFoundError:
        raise TableError("git is not installed: give two tables to compare.") from None
    except UnicodeDecodeError:
        raise TableError(f"{path} as committed last is not text: give two tables to compare.") from None
    if found.returncode:
        raise TableError(f"{path} has no committed version: commit it first, or give two tables to compare.")
    return checked(found.stdout, f"{path} as committed last")


def _tell(before: list[Row], after: list[Row]) -> int:
    """Prints changes, what to know of them, and a summary; returns 1 if anything is worse."""
    changes = compare(before, after)
    for line in _lines(changes):
        print(line)
    for note in _notes(before, after, changes):
        print(note)
    key = _key(before, after)
    matched = len(set.intersection(*({_identity(row, key) for row in rows} for rows in (before, after))))
    kinds = Counter((change.what, change.worse) for change in changes)
    slower, faster = kinds["time", True], kinds["time", False]
    worse = sum(change.worse for change in changes)
    better = len(changes) - worse
    print(
        f"rows in both: {matched}; slower: {slower}, faster: {faster}, "
        f"otherwise worse: {worse - slower}, otherwise better: {better - faster}"
    )
    return int(worse > 0)


def _key(before: Sequence[Row], after: Sequence[Row]) -> tuple[str, ...]:
    """The columns that tell rows apart, without device or threads where each table has one of its own."""

    def another(column: str) -> bool:
        values = [{row[column] for row in rows} for rows in (before, after)]
        return all(len(found) == 1 for found in values) and values[0] != values[1]

    return tuple(column for column in BLOCK_KEY if column not in ("device", "threads") or not another(column))


def _identity(row: Row, key: Sequence[str]) -> tuple[str, ...]:
    return tuple(row[column] for column in key)


def _changes(old: Row, new: Row) -> Iterator[Change]:
    if is_measured(old) != is_measured(new):
        worse = is_measured(old)
        yield Change(new, "status", old["status"], new["status"], math.inf if worse else 0.0, worse)
        return
    if not is_measured(old):
        return
    yield from _time(old, new)
    yield from _memory(old, new)
    yield from _error(old, new)


def _time(old: Row, new: Row) -> Iterator[Change]:
    """Where neither the quartiles overlap nor the medians are close."""
    low, median, high = ((float(old[column]), float(new[column])) for column in ("low_ms", "median_ms", "high_ms"))
    beyond = max(low[1] / high[0], low[0] / high[1]) - 1
    factor = median[1] / median[0]
    if beyond > 0 and max(factor, 1 / factor) > 1 + LEAST_PERCENT / 100:
        yield Change(new, "time", *map(milliseconds, median), factor, factor > 1, 100 * beyond)


def _memory(old: Row, new: Row) -> Iterator[Change]:
    first, second = number(old, "peak_extra_mib"), number(new, "peak_extra_mib")
    if first is None or second is None or abs(second - first) <= LEAST_MIB:
        return
    factor = second / first if first > 0 else math.inf
    if factor > 1 + LEAST_PERCENT / 100 or factor < 1 / (1 + LEAST_PERCENT / 100):
        yield Change(new, "memory", f"{first:.1f} MiB", f"{second:.1f} MiB", factor, factor > 1)


def _error(old: Row, new: Row) -> Iterator[Change]:
    first, second = number(old, "error"), number(new, "error")
    if first is None or second is None or first == second:
        return
    factor = second / first if first else math.inf
    if factor > LEAST_ERROR or factor < 1 / LEAST_ERROR:
        yield Change(new, "error", old["error"], new["error"], factor, factor > 1)


def _badness(change: Change) -> tuple[bool, bool, float]:
    """Sorts the worst first: what is gone or grew most, rows that are only missing, what shrank least."""
    return not change.worse, change.what == "row", -change.factor


def _lines(changes: Sequence[Change]) -> list[str]:
    """A table in columns as wide as their longest cell."""
    cells = [_cells(change) for change in changes]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]


def _cells(change: Change) -> list[str]:
    row = change.row
    judged = {"time": ("slower", "faster"), "memory": ("larger", "smaller"), "error": ("less exact", "more exact")}
    worse, better = judged.get(change.what, ("gone", "measured now"))
    place = f"{row['case']} {row['shape']}" + ("" if row["axes"] == ALL_AXES else f" along {row['axes']}")
    beyond = "" if change.beyond_percent is None else f"{change.beyond_percent:.0f} % beyond the spread"
    return [
        worse if change.worse else better,
        times(change.factor) if 0 < change.factor < math.inf else "",
        *(place, row["dtype"], row["format"], row["mode"], row["provider"]),
        f"{change.before} -> {change.after}{DAGGER if change.noisy else ''}",
        beyond,
    ]


def _notes(before: Sequence[Row], after: Sequence[Row], changes: Sequence[Change]) -> list[str]:
    """What else differs between the tables, and whether the machine was quiet."""
    notes = []
    for column in SURROUNDINGS:
        old, new = (
            sorted({row.get(column, "") for row in rows if is_measured(row)} - {""}) for rows in (before, after)
        )
        if old != new:
            notes.append(f"note: {column} was {' and '.join(old) or 'unknown'}, is {' and '.join(new) or 'unknown'}.")
    ignored = [column for column in ("device", "threads") if column not in _key(before, after)]
    if ignored:
        notes.append(f"note: rows are compared whatever their {' and '.join(ignored)}; times of two do not tell why.")
    noisy = sum(change.noisy for change in changes)
    if noisy:
        notes.append(f"note: changes from noisy rows: {noisy}. {NOISE}")
    return notes
