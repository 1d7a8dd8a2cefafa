"""Pictures of the block's measurements, from the tables alone; they tell in black and white, too."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.cases import SHAPES, SWEEPS
from benchmarks.providers import AUTOCAST, COMPILED, EAGER, NON_LOCAL, RECOMPUTE, SDPA
from benchmarks.report import (
    PASSES,
    USUAL,
    fill,
    markdown,
    markdown_all,
    markers,
    network_markdown,
    replace,
    time_words,
)
from benchmarks.rows import (
    ALL_AXES,
    DAGGER,
    NOISE,
    TableError,
    block_paths,
    is_measured,
    is_noisy,
    milliseconds,
    network_path,
    number,
    of_main_setting,
    read,
    read_network,
    select,
    shape_of,
    times,
    volume_label,
    where,
)
from benchmarks.table import BLOCK, BLOCK_KEY, OUT_OF_MEMORY, SKIPPED, UNUSABLE, Row, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PICTURES = ROOT / "docs" / "benchmarks"


class Style(NamedTuple):
    """How a provider looks in lines and bars."""

    colour: str
    line: str
    marker: str
    hatch: str


# Colours of Okabe and Ito. No two lines of a picture share line and marker.
STYLES = {
    EAGER: Style("#000000", "-", "o", ""),
    AUTOCAST: Style("#7A7A7A", "--", "o", "---"),
    COMPILED: Style("#E69F00", "--", "s", "///"),
    SDPA: Style("#CC79A7", "-.", "^", "xxx"),
    NON_LOCAL: Style("#7A7A7A", ":", "v", "..."),
    "reference": Style("#7A7A7A", "-", "x", "|||"),
    "torch": Style("#56B4E9", "--", "D", "\\\\\\"),
    "cpp": Style("#0072B2", "-", "P", ""),
    "triton": Style("#0072B2", "-", "P", ""),
    "cuda": Style("#009E73", "-.", "X", "ooo"),
    f"cpp {RECOMPUTE}": Style("#D55E00", ":", "*", "++"),
    f"triton {RECOMPUTE}": Style("#D55E00", ":", "*", "++"),
    f"torch {RECOMPUTE}": Style("#D55E00", ":", "*", "++"),
    f"cuda {RECOMPUTE}": Style("#D55E00", ":", "*", "++"),
}
OTHER = Style("#7A7A7A", "-", ".", "")
# Eager is what the bars stand beside, the reference computes the same as it, a non-local block something else.
NO_BARS = (EAGER, "reference", NON_LOCAL)
FLOOR_WORDS = "the time for the least operations or bytes at the speed of a large matrix product or copy."
TEXT, QUIET = "#1A1A1A", "#555555"
SETTINGS = {
    "font.size": 8,
    # Each text of the file repeats the list; Verdana is as wide.
    "font.sans-serif": ["DejaVu Sans", "Verdana"],
    "axes.edgecolor": QUIET,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "rsanet",
    "text.color": TEXT,
}
GRID = {"color": "#DDDDDD", "linewidth": 0.5, "zorder": 0}
# Inches.
SLOT, PANEL_WIDTH, CURVES_HEIGHT = 0.155, 5.0, 3.9
# Height of a line of words beside or in a panel, as a share of the panel's.
LABEL = 0.052


def draw(table: Table, folder: Path) -> list[Path]:
    """Draws ``speed-``, ``memory-`` and ``sweeps-<table>.svg``; says in a line which of them has no rows.

    Args:
        table: of a device.
        folder: for the pictures; made if missing.

    Returns:
        the pictures that were drawn.

    Raises:
        TableError: if the file is none.
    """
    rows = of_main_setting(select(read(table.path), axes=ALL_AXES, format="contiguous"))
    pictures = {"speed": _speed, "memory": _memory, "sweeps": _sweeps}
    paths = []
    for kind, picture in pictures.items():
        path = folder / f"{kind}-{table.path.stem}.svg"
        with _figure_settings():
            figure = picture(rows)
            if figure is None:
                print(f"not drawn: {path.name}, since {table.path.name} has no measured rows for it")
                continue
            _save(figure, path)
        paths.append(path)
    return paths


def main(tables: Sequence[Path] = ()) -> int:
    """Draws tables, writes each as Markdown beside it and into the README where that has its markers; prints the paths.

    Args:
        tables: CSV files; all block tables in ``benchmarks/results`` if none is given.

    Returns:
        the exit status: 2 if there is no table, or one cannot be drawn.
    """
    paths = list(tables) or block_paths()
    if not paths:
        print("there is no block table in benchmarks/results: measure with `python -m benchmarks` first.")
        return 2
    status = 0
    for path in paths:
        try:
            for written in _all_of(Table(path, tuple(BLOCK), BLOCK_KEY)):
                print(written)
        except ModuleNotFoundError as error:
            print(f'pictures need {error.name}, which is not installed: pip install ".[segment]"')
            return 2
        except (TableError, ValueError, OSError) as error:
            print(error)
            status = 2
    return status


def _all_of(table: Table) -> Iterator[Path]:
    yield from draw(table, PICTURES)
    everything, network = table.path.with_suffix(".md"), read_network(network_path(table.path))
    texts = [markdown_all(table)]
    if network:
        texts += ["## The whole network\n", network_markdown(network) + "\n"]
    replace(everything, "\n".join(texts))
    yield everything
    for name, text in ((table.path.stem, markdown(table)), (network_path(table.path).stem, network_markdown(network))):
        if README.is_file() and any(marker in README.read_text(encoding="utf-8") for marker in markers(name)):
            fill(README, name, text)
            yield README


@contextmanager
def _figure_settings() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **SETTINGS}):
        yield


def _save(figure: "Figure", path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    try:
        # White, since a transparent picture cannot be read on a dark page; no date: equal pictures are equal files.
        figure.savefig(beside, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _figure(width: float, height: float, title: str, notes: Sequence[str]) -> "Figure":
    """Inches; a title at the top and notes at the foot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    figure.supxlabel("\n".join(notes), fontsize=7.5, color=QUIET, x=0.01, ha="left")
    return figure


def _providers(rows: Sequence[Row]) -> list[str]:
    """Those of the rows, in the order of ``STYLES``, unknown ones last."""
    order = list(STYLES)
    return sorted(
        {row["provider"] for row in rows}, key=lambda name: (order.index(name) if name in order else 99, name)
    )


def _notes(rows: Sequence[Row], *texts: str) -> list[str]:
    noisy = [NOISE] if any(is_measured(row) and is_noisy(row) for row in rows) else []
    return [*texts, *noisy, where(rows)]


# Speed -------------------------------------------------------------------------------------------------------------


def _speed(rows: Sequence[Row]) -> "Figure | None":
    """Bars: how many times as fast as eager, a panel for each pass and dtype that has rows."""
    rows = [row for row in rows if row["case"] in USUAL]
    bars = [row for row in rows if row["provider"] not in NO_BARS]
    panels = {
        (mode, dtype): select(rows, mode=mode, dtype=dtype)
        for mode in ("full", "no_grad")
        for dtype in ("float32", "bfloat16")
        if any(map(is_measured, select(bars, mode=mode, dtype=dtype)))
    }
    if not panels:
        return None
    modes, dtypes = (list(dict.fromkeys(column)) for column in zip(*panels, strict=True))
    heights = [max(len(_slots(panels[key])) for key in panels if key[0] == mode) for mode in modes]
    shown = [row for panel in panels.values() for row in panel]
    notes = _notes(
        shown,
        "Bars: eager's median time over the provider's. Whiskers: the provider's quartiles. Grey: eager's.",
        f"Thick line: the floor, {FLOOR_WORDS}",
        "Other volumes (odd sizes, batches) stand in the table.",
    )
    height = sum(heights) * SLOT + 0.75 * len(heights) + 0.4 + 0.15 * len(notes)
    figure = _figure(PANEL_WIDTH * len(dtypes) + 0.6, height, "The RSA block: how many times as fast as eager", notes)
    grid = figure.subplots(len(modes), len(dtypes), squeeze=False, gridspec_kw={"height_ratios": heights})
    for mode, line in zip(modes, grid, strict=True):
        for dtype, axes in zip(dtypes, line, strict=True):
            if (mode, dtype) in panels:
                slots = _slots(panels[mode, dtype])
                _bars(axes, slots)
                axes.set_ylim(max(heights[modes.index(mode)], len(slots)) - 0.3, -0.7)
                axes.set_title(f"{PASSES[mode]}, {dtype}", loc="left", fontsize=9, fontweight="bold")
            else:
                axes.set_axis_off()
    return figure


class Slot(NamedTuple):
    """A line of a panel of bars: a volume's heading if there is no row, else a provider beside eager."""

    case: str
    found: dict[str, Row]
    row: Row | None


def _slots(rows: Sequence[Row]) -> list[Slot]:
    slots = []
    for case in USUAL:
        found = {row["provider"]: row for row in select(rows, case=case)}
        absent = (UNUSABLE, SKIPPED)
        names = [name for name in _providers(select(rows, case=case)) if name not in NO_BARS]
        shown = [found[name] for name in names if found[name]["status"] not in absent]
        if shown:
            slots += [Slot(case, found, None), *(Slot(case, found, row) for row in shown)]
    return slots


def _bars(axes: "Axes", slots: Sequence[Slot]) -> None:
    """Bars from 1 on a logarithmic axis: twice as fast is as long as half as fast."""
    from matplotlib.ticker import FuncFormatter, NullFormatter
    from matplotlib.transforms import blended_transform_factory

    axes.set_xscale("log", base=2)
    beside = blended_transform_factory(axes.transAxes, axes.transData)
    reach = [0.8, 1.25]
    ticks, names = [], []
    for place, (case, found, row) in enumerate(slots):
        eager = found.get(EAGER)
        if row is None:
            heading = f"{volume_label(SHAPES[case])} (eager: {time_words(eager)})"
            axes.text(0, place + 0.2, heading, transform=beside, va="center", fontweight="bold")
            last = place + max(index for index, slot in enumerate(slots[place:]) if slot.case == case)
            reach += _group(axes, found, place + 0.55, last + 0.45)
            continue
        ticks.append(place)
        names.append(row["provider"])
        if not is_measured(row):
            axes.text(1.05, place, row["status"], va="center", style="italic", zorder=4)
            continue
        median, low, high = (number(row, column) or 0.0 for column in ("median_ms", "low_ms", "high_ms"))
        words = time_words(row)
        base = number(eager, "median_ms")
        if base is not None:
            style = STYLES.get(row["provider"], OTHER)
            ratio = base / median
            axes.barh(
                *(place, ratio - 1),
                left=1,
                height=0.78,
                color=style.colour,
                hatch=style.hatch,
                edgecolor="white" if style.hatch else style.colour,
                linewidth=0,
                zorder=2,
            )
            axes.plot([base / high, base / low], [place, place], color="black", linewidth=1, zorder=3)
            reach += [base / high, base / low]
            words = f"{times(ratio)}  {words}"
        axes.text(1.01, place, words, transform=beside, va="center", fontsize=7.5)
    axes.set_yticks(ticks, names, fontsize=7.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(min(reach) / 1.05, max(reach) * 1.08)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", **GRID)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _group(axes: "Axes", found: dict[str, Row], top: float, foot: float) -> list[float]:
    """Eager's quartiles and the floor, over all bars of a volume; returns how far they reach."""
    from matplotlib.patches import Rectangle

    axes.plot([1, 1], [top, foot], color="black", linewidth=1, zorder=3)
    eager = found.get(EAGER)
    median, low, high = (number(eager, column) for column in ("median_ms", "low_ms", "high_ms"))
    if median is None or low is None or high is None:
        return []
    left, right = median / high, median / low
    axes.add_patch(Rectangle((left, top), right - left, foot - top, color="#BBBBBB", linewidth=0, zorder=1))
    floor = _floor(found.values())
    if floor is None:
        return [left, right]
    axes.plot([median / floor] * 2, [top, foot], color="black", linewidth=2.6, solid_capstyle="butt", zorder=3)
    return [left, right, median / floor]


def _floor(rows: Any) -> float | None:
    """Of a case and pass: the same in every provider's row that has it."""
    floors = [number(row, "floor_ms") for row in rows if is_measured(row)]
    return next((floor for floor in floors if floor), None)


# Curves ------------------------------------------------------------------------------------------------------------


def _memory(rows: Sequence[Row]) -> "Figure | None":
    """Peak memory and time of a full pass against voxels, with the volumes at which a provider ran out of memory."""
    rows = _sweep(rows, "V")
    if not any(number(row, "peak_extra_mib") for row in rows):
        return None
    notes = _notes(
        rows,
        "Memory: the largest use above that of the inputs. Cross: the smallest volume for which it did not suffice.",
        "eager, torch.compile: the published code. recompute: keeps its input alone for backward. "
        "non-local: another function, every voxel attends to every other one.",
        f"Grey dashes: the floor, {FLOOR_WORDS}",
    )
    title = f"Forward and backward at {shape_of(rows[0])[1]} channels: memory and time of the RSA block, float32"
    figure = _figure(2 * PANEL_WIDTH + 2.2, CURVES_HEIGHT + 0.8 + 0.15 * len(notes), title, notes)
    left, right = figure.subplots(1, 2)
    _curves(left, rows, "V", "peak_extra_mib", _mebibytes)
    left.set_title("peak memory (MiB)", loc="left", fontsize=9, fontweight="bold")
    _curves(right, rows, "V", "median_ms", milliseconds)
    right.set_title("time (ms)", loc="left", fontsize=9, fontweight="bold")
    for axes in (left, right):
        axes.set_xlabel("volume D × H × W")
    return figure


def _sweeps(rows: Sequence[Row]) -> "Figure | None":
    """Time of a full pass against slices, channels, voxels and batch."""
    panels = {kind: _sweep(rows, kind) for kind in SWEEPS}
    panels = {kind: found for kind, found in panels.items() if any(map(is_measured, found))}
    if not panels:
        return None
    lines, columns = math.ceil(len(panels) / 2), min(2, len(panels))
    notes = _notes(
        [row for found in panels.values() for row in found],
        f"Grey dashes: the floor, {FLOOR_WORDS}",
    )
    height = lines * CURVES_HEIGHT + 0.8 + 0.15 * len(notes)
    title = "Forward and backward: time (ms) of the RSA block as its volume grows, float32"
    figure = _figure((PANEL_WIDTH + 1.1) * columns, height, title, notes)
    places = figure.subplots(lines, columns, squeeze=False).flat
    for axes, (kind, found) in zip(places, panels.items(), strict=False):
        _curves(axes, found, kind, "median_ms", milliseconds)
        axes.set_title(_sweep_title(kind), loc="left", fontsize=9, fontweight="bold")
    for axes in list(places)[len(panels) :]:
        axes.set_axis_off()
    return figure


def _sweep(rows: Sequence[Row], kind: str) -> list[Row]:
    """The rows of a sweep's full passes, smallest volume first."""
    found = select(rows, case=f"sweep {kind}", dtype="float32", mode="full")
    return sorted(found, key=lambda row: _grown(row, kind))


def _grown(row: Row, kind: str) -> int:
    """What grows in a sweep."""
    batch, channels, *spatial = shape_of(row)
    return {"S": spatial[0], "C": channels, "V": math.prod(spatial), "N": batch}[kind]


def _sweep_title(kind: str) -> str:
    _, channels, slices, height, width = SWEEPS[kind][0]
    sizes = {
        "S": f"slices: {channels} channels, S × {height} × {width}",
        "C": f"channels: {slices} × {height} × {width}",
        "V": f"voxels: {channels} channels",
        "N": f"batch: {channels} channels, {slices} × {height} × {width}",
    }
    return sizes[kind]


def _mebibytes(value: float) -> str:
    return f"{value / 1024:.1f} GiB" if value >= 1024 else f"{value:.0f} MiB"


def _curves(axes: "Axes", rows: Sequence[Row], kind: str, column: str, words: Callable[[float], str]) -> None:
    """A line for each provider, named where it ends, and those without memory in a strip above.

    Args:
        axes: to draw on.
        rows: of a sweep.
        kind: of the sweep.
        column: of the rows to draw.
        words: a value of the column as it is read.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    stops: dict[str, Row] = {}
    for name in _providers(rows):
        own = select(rows, provider=name)
        values = [(_grown(row, kind), number(row, column)) for row in own if is_measured(row)]
        curves[name] = [(place, value) for place, value in values if value]
        ends_at = max((place for place, _ in curves[name]), default=0)
        beyond = [row for row in own if _grown(row, kind) > ends_at]
        if beyond and beyond[0]["status"] == OUT_OF_MEMORY:
            stops[name] = beyond[0]
    curves = {name: points for name, points in curves.items() if points or name in stops}
    floors = _floors(rows, kind) if column == "median_ms" else []
    places = sorted({_grown(row, kind) for row in rows if is_measured(row) or row in stops.values()})
    heights = [value for points in [*curves.values(), floors] for _, value in points]
    strip = LABEL * (len(stops) + 0.6) if stops else 0.0
    to_share = _scales(axes, places, heights, strip)
    if floors:
        axes.plot(*zip(*floors, strict=True), color="#999999", linestyle=(0, (6, 3)), linewidth=1, zorder=2)
    noisy = {(row["provider"], _grown(row, kind)) for row in rows if is_measured(row) and is_noisy(row)}
    ends = {}
    for name, points in curves.items():
        style = STYLES.get(name, OTHER)
        if points:
            look = {"color": style.colour, "linestyle": style.line, "marker": style.marker, "markersize": 6}
            axes.plot(
                *zip(*points, strict=True),
                linewidth=1.6,
                markeredgecolor="white",
                markeredgewidth=0.5,
                zorder=3,
                **look,
            )
            if name not in stops:
                mark = DAGGER if any((name, place) in noisy for place, _ in points) else ""
                ends[name] = (points[-1], f"{name}: {words(points[-1][1])}{mark}")
    if floors:
        ends["floor"] = (floors[-1], f"floor: {words(floors[-1][1])}")
    _names(axes, ends, to_share, places[-1])
    _strip(axes, stops, curves, kind, strip)
    labels = {_grown(row, kind): _place_label(row, kind) for row in rows}
    shown = _apart(places)
    axes.set_xticks(shown, [labels[place] for place in shown])
    axes.set_xticks([], minor=True)
    axes.grid(**GRID)
    axes.spines[["top", "right"]].set_visible(False)


def _floors(rows: Sequence[Row], kind: str) -> list[tuple[int, float]]:
    places = sorted({_grown(row, kind) for row in rows})
    found = [(place, _floor(row for row in rows if _grown(row, kind) == place)) for place in places]
    return [(place, floor) for place, floor in found if floor]


def _scales(axes: "Axes", places: Sequence[int], heights: Sequence[float], strip: float) -> Callable[[float], float]:
    """Sets logarithmic axes with room for the strip; returns a height's share of the panel."""
    low, high = math.log10(min(heights, default=1.0)), math.log10(max(heights, default=1.0))
    room = 0.05
    span = max(high - low, 0.3) / (1 - strip - 2 * room)
    start = low - room * span
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(10**start, 10 ** (start + span))
    axes.set_xlim(places[0] / 1.15, places[-1] * 1.15)
    # In the strip a height says nothing.
    top = start + span * (1 - strip)
    steps = (1,) if top - start > 2 else (1, 2, 5)
    ticks = [step * 10.0**power for power in range(math.floor(start), math.ceil(top) + 1) for step in steps]
    ticks = [tick for tick in ticks if start <= math.log10(tick) <= top]
    axes.set_yticks(ticks, [f"{tick:,.12g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    return lambda height: (math.log10(height) - start) / span


def _names(axes: "Axes", ends: dict[str, Any], to_share: Callable[[float], float], last: int) -> None:
    """Names lines at the right where they reach the last place, else where they end."""
    reaching = {name: end for name, end in ends.items() if end[0][0] == last}
    shares = spread([to_share(point[1]) for point, _ in reaching.values()], LABEL)
    for share, (name, (point, label)) in zip(shares, reaching.items(), strict=True):
        colour = STYLES.get(name, OTHER).colour
        axes.annotate(
            label,
            point,
            (1.05, share),
            textcoords=axes.transAxes,
            va="center",
            annotation_clip=False,
            arrowprops=_leader(colour),
        )
    for point, label in (end for name, end in ends.items() if name not in reaching):
        legible = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
        axes.annotate(label, point, (6, 0), textcoords="offset points", va="center", bbox=legible, zorder=5)


def _strip(
    axes: "Axes", stops: dict[str, Row], curves: dict[str, list[tuple[int, float]]], kind: str, height: float
) -> None:
    """Above the curves: who found too little memory, at which volume first."""
    if not stops:
        return
    from matplotlib.patches import Rectangle
    from matplotlib.transforms import blended_transform_factory

    above = blended_transform_factory(axes.transData, axes.transAxes)
    axes.add_patch(Rectangle((0, 1 - height), 1, height, transform=axes.transAxes, color="#EEEEEE", zorder=1))
    # The first to stop stands at the top, so that the ways up do not cross.
    order = sorted(stops, key=lambda name: _grown(stops[name], kind))
    for line, name in enumerate(order):
        row, style = stops[name], STYLES.get(name, OTHER)
        place, share = _grown(row, kind), 1 - LABEL * (line + 0.8)
        axes.plot([place], [share], transform=above, color="black", marker="x", markersize=6, linestyle="", zorder=5)
        axes.annotate(
            f"{name}: out of memory at {_place_label(row, kind)}",
            (place, share),
            (1.05, share),
            xycoords=above,
            textcoords=axes.transAxes,
            va="center",
            annotation_clip=False,
            arrowprops=_leader(style.colour, shrinkB=5),
        )
        if curves[name]:
            axes.annotate(
                "",
                (place, share),
                curves[name][-1],
                xycoords=above,
                textcoords="data",
                arrowprops=_leader(style.colour, linestyle=":", linewidth=1.2),
                zorder=2,
            )


def _leader(colour: str, **look: Any) -> dict[str, Any]:
    """A thin line between a point and its words."""
    return {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 3, **look}


def _place_label(row: Row, kind: str) -> str:
    sides = shape_of(row)[2:]
    if kind != "V":
        return str(_grown(row, kind))
    return f"{sides[0]}³" if len(set(sides)) == 1 else "×".join(map(str, sides))


def _apart(places: Sequence[int]) -> list[int]:
    """Those that have room for their words on a logarithmic axis; the last one always."""
    least = math.log(places[-1] / places[0]) / 9
    shown = [places[-1]]
    for place in reversed(places[:-1]):
        if math.log(shown[-1] / place) >= least:
            shown.append(place)
    return shown[::-1]


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Moves places apart so that neighbours are a gap from each other, in the same order, about where they were.

    Args:
        places: in any order.
        gap: the least distance.

    Returns:
        the new places, in the order in which the old ones were given.
    """
    order = sorted(range(len(places)), key=lambda index: places[index])
    # Groups of neighbours that touch: each sits where its members are on average.
    groups: list[list[int]] = []
    for index in order:
        groups.append([index])
        while (
            len(groups) > 1
            and _centre(groups[-1], places) - _centre(groups[-2], places)
            < gap * (len(groups[-1]) + len(groups[-2])) / 2 - 1e-12
        ):
            groups[-2:] = [groups[-2] + groups[-1]]
    moved = dict.fromkeys(order, 0.0)
    for group in groups:
        start = _centre(group, places) - gap * (len(group) - 1) / 2
        moved.update({index: start + gap * number for number, index in enumerate(group)})
    return [moved[index] for index in range(len(places))]


def _centre(group: Sequence[int], places: Sequence[float]) -> float:
    return sum(places[index] for index in group) / len(group)
