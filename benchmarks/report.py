"""The block's measurements as Markdown: the README's table and one of everything that was measured."""

import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cases import LARGE, SHAPES
from benchmarks.providers import COMPILED, EAGER
from benchmarks.rows import (
    ALL_AXES,
    DAGGER,
    NOISE,
    is_measured,
    is_noisy,
    milliseconds,
    number,
    of_main_setting,
    read,
    select,
    settings,
    shape_of,
    times,
    volume_label,
    where,
)
from benchmarks.table import Row, Table

NOT_YET = "not yet measured"
# Where the reason stands in a cell beside.
NOTHING = "–"
PASSES = {
    "full": "forward + backward",
    "forward": "forward, for gradients",
    "backward": "backward",
    "no_grad": "forward, no gradients",
}
AXIS_NAMES = {"2": "axial", "3": "coronal", "4": "sagittal"}
# What a network meets: the odd volumes, batches and allocations just below a limit are for the table of everything.
USUAL = ("tiny 512", "wide 256", "middle 128", "middle 64", "narrow 32", *LARGE)
# Whom the table of whole networks shows: the yardstick first, what `rsanet` does by default last.
NETWORKS = {
    "published eager fp32": "published, float32",
    "published compiled fp32": "compiled",
    "published eager autocast bf16": "published, autocast bfloat16",
    "ours fp32": "ours, float32",
    "ours bf16": "ours, bfloat16",
}
# The backend that ``auto`` takes where it runs, the fastest device's first.
OWN = ("triton", "cuda", "cpp", "torch")


def markdown(table: Table) -> str:
    """The README's table: the whole block, full and no_grad passes of the usual volumes.

    On a CPU of contiguous float32 volumes, on a GPU of bfloat16 ones in channels_last_3d, as networks run there.
    """
    rows = of_main_setting(read(table.path))
    dtype, memory_format = ("bfloat16", "channels_last_3d") if _of_gpu(rows) else ("float32", "contiguous")
    rows = select(rows, dtype=dtype, format=memory_format, axes=ALL_AXES)
    rows = [row for row in rows if row["case"] in USUAL and row["mode"] in ("full", "no_grad")]
    if not any(map(is_measured, rows)):
        return "Not yet measured."
    own = own_provider(rows)
    columns = list(dict.fromkeys((EAGER, COMPILED, "torch", own)))
    remembered = (EAGER, COMPILED, own)
    headings = [EAGER, *(f"`{name}`" for name in columns[1:])]
    lines = [
        *_heading("volume", "pass", *headings, f"`{own}` to eager", "of the floor's speed", _memory_heading(own)),
    ]
    missing = [case for case in USUAL if all(row["case"] != case for row in rows)]
    for case in USUAL:
        for mode in () if case in missing else ("full", "no_grad"):
            found = {row["provider"]: row for row in rows if (row["case"], row["mode"]) == (case, mode)}
            fastest = _fastest(found, columns)
            cells = [f"**{cell}**" if name == fastest else cell for name, cell in _times(found, columns)]
            memory = ", ".join(_memory(found.get(name)) for name in remembered)
            measures = [_ratio(found, EAGER, own), _percent(found.get(own)), memory]
            if number(found.get(own), "graph_ms"):  # the floor's share is that of the graph
                measures[1] = NOTHING
            lines.append(_line(volume_label(SHAPES[case]), PASSES[mode], *cells, *measures))
            if number(found.get(own), "graph_ms"):
                graphs = [number(found.get(name), "graph_ms") for name in columns]
                cells = [NOTHING if graph is None else milliseconds(graph) for graph in graphs]
                measures = [_ratio(found, EAGER, own, "graph_ms"), _percent(found.get(own)), NOTHING]
                lines.append(_line(volume_label(SHAPES[case]), f"{PASSES[mode]}, CUDA graph", *cells, *measures))
    notes = [f"{where(rows)}; medians, the fastest of a row in bold."]
    if missing:
        notes += ["", f"Not yet measured: {'; '.join(volume_label(SHAPES[case]) for case in missing)}."]
    return "\n".join([*lines, "", *notes, *_noise(rows)])


def markdown_all(table: Table) -> str:
    """Every named volume that was measured, in every dtype, memory format and mode, the steps of one axis too."""
    rows = read(table.path)
    lines = [f"# The block on {' and '.join(sorted({row['device'] for row in rows})) or 'nothing yet'}", ""]
    lines += [
        f"Written by `python -m benchmarks plot` from [{table.path.name}]({table.path.name}),",
        "which has all columns, the sweeps and the other providers too. Medians; ratios say how many times as fast as",
        "the other one it is; the error is the largest relative one against float64, over eager's.",
    ]
    for device, threads in settings(rows):
        setting = [row for row in select(rows, device=device, threads=threads) if row["case"] in SHAPES]
        if any(map(is_measured, setting)):
            lines += ["", where(setting) + ".", "", *_all_of_a_setting(setting), *_noise(setting, before=[""])]
    return "\n".join(lines) + "\n"


def _all_of_a_setting(rows: Sequence[Row]) -> list[str]:
    own = own_provider(rows)
    columns = list(dict.fromkeys((EAGER, COMPILED, "torch", own)))
    ratios = [f"`{own}` to eager", f"`{own}` to compiled", "of the floor's speed", "error to eager's"]
    headings = [EAGER, *(f"`{name}`" for name in columns[1:])]
    lines = _heading("volume", "dtype", "memory format", "pass", *headings, *ratios)
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        group = tuple(row[column] for column in ("case", "axes", "dtype", "format", "mode"))
        groups.setdefault(group, {})[row["provider"]] = row
    order = {name: [*names] for name, names in (("case", SHAPES), ("mode", PASSES))}
    place = {group: (order["case"].index(group[0]), *group[1:4], order["mode"].index(group[4])) for group in groups}
    for group in sorted(groups, key=lambda group: place[group]):
        found = groups[group]
        if not any(is_measured(found.get(name)) for name in columns):
            continue
        volume = volume_label(shape_of(next(filter(is_measured, found.values()))))
        if group[1] != ALL_AXES:
            volume += f", {' and '.join(AXIS_NAMES.get(axis, axis) for axis in group[1])} only"
        cells = [cell for _, cell in _times(found, columns)]
        cells += [_ratio(found, EAGER, own), _ratio(found, COMPILED, own)]
        cells += [_percent(found.get(own)), _ratio(found, own, EAGER, "error")]
        lines.append(_line(volume, *group[2:4], PASSES[group[4]], *cells))
    return lines


def network_markdown(rows: Sequence[Row]) -> str:
    """The whole network's table: a line for each case, of the device and number of threads that most rows have."""
    rows = of_main_setting(rows)
    if not any(map(is_measured, rows)):
        return "Not yet measured."
    yardstick, *_, own = NETWORKS
    ratio, share, memory = "ours to published", "RSA's share of ours", "MiB: published, ours"
    lines = _heading("", *NETWORKS.values(), ratio, "Dice of the two masks", share, memory)
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row["case"], row["shape"], row["window"]), {})[row["provider"]] = row
    for (case, shape, window), found in cases.items():
        batch, channels, size = shape.split("x", 2)
        words = [case, f"{channels} × {size.replace('x', ' × ')}" + (f", batch {batch}" if batch != "1" else "")]
        if case == "windows":
            words.append(f"in {window.replace('x', ' × ')}")
        fastest = _fastest(found, list(NETWORKS))
        cells = [f"**{cell}**" if name == fastest else cell for name, cell in _times(found, list(NETWORKS))]
        ours = found.get(own)
        attention = number(ours, "attention_percent")
        cells += [_ratio(found, yardstick, own), (ours or {}).get("dice") or NOTHING]
        cells += [NOTHING if attention is None else f"{attention:.1f} %"]
        lines.append(_line(", ".join(words), *cells, ", ".join(_memory(found.get(name)) for name in (yardstick, own))))
    return "\n".join([*lines, "", f"{where(rows)}; medians, the fastest of a row in bold.", *_noise(rows)])


def _of_gpu(rows: Sequence[Row]) -> bool:
    return any(row.get("driver") for row in rows)


def own_provider(rows: Sequence[Row]) -> str:
    """The backend that stands for this package: the first of ``OWN`` that was measured."""
    measured = {row["provider"] for row in rows if is_measured(row)}
    return next((name for name in OWN if name in measured), OWN[-1])


def time_words(row: Row | None) -> str:
    """The median, marked if noisy, or why there is none."""
    median = number(row, "median_ms")
    if row is None or median is None:
        return row["status"] if row else NOT_YET
    return milliseconds(median) + (DAGGER if is_noisy(row) else "")


def fill(readme: Path, name: str, text: str) -> None:
    """Replaces what stands between ``<!-- benchmark:NAME -->`` and ``<!-- /benchmark:NAME -->``.

    Args:
        readme: the Markdown file.
        name: of the place.
        text: what is to stand there, in lines of its own.

    Raises:
        ValueError: if the file does not have both lines once, in this order.
    """
    start, end = markers(name)
    content = readme.read_text(encoding="utf-8")
    head, *tails = content.split(start)
    if len(tails) != 1 or content.count(end) != 1 or end not in tails[0]:
        raise ValueError(f"{readme} has no single place for the table {name}: put {start} and {end} around it, once.")
    whole = "\n".join((head + start, text.strip("\n"), end + tails[0].split(end)[1]))
    replace(readme, whole)


def markers(name: str) -> tuple[str, str]:
    """The comments around a table's place."""
    return f"<!-- benchmark:{name} -->", f"<!-- /benchmark:{name} -->"


def replace(path: Path, text: str) -> None:
    """Writes a file that is whole at any moment."""
    beside = path.with_name(path.name + ".new")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _heading(*cells: str) -> list[str]:
    return [_line(*cells), _line(*("---" for _ in cells))]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _memory_heading(own: str) -> str:
    return f"MiB: eager, compiled, `{own}`"


def _times(found: dict[str, Row], columns: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, time_words(found.get(name))) for name in columns]


def _fastest(found: dict[str, Row], columns: Sequence[str]) -> str | None:
    measured = [name for name in columns if is_measured(found.get(name))]
    return min(measured, key=lambda name: number(found[name], "median_ms") or 0, default=None)


def _ratio(found: dict[str, Row], above: str, below: str, column: str = "median_ms") -> str:
    if above not in found or below not in found:
        return NOT_YET
    first, second = number(found[above], column), number(found[below], column)
    return NOTHING if first is None or not second else times(first / second)


def _percent(row: Row | None) -> str:
    percent = number(row, "percent_of_floor")
    return (NOTHING if row else NOT_YET) if percent is None else f"{percent:.0f} %"


def _memory(row: Row | None) -> str:
    peak = number(row, "peak_extra_mib")
    if peak is None:
        return row["status"] if row and not is_measured(row) else NOT_YET
    return f"{peak:.{0 if peak >= 10 else 1}f}"


def _noise(rows: Sequence[Row], before: Sequence[str] = ("",)) -> list[str]:
    return [*before, NOISE] if any(is_measured(row) and is_noisy(row) for row in rows) else []
