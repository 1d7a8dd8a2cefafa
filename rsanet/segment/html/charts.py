"""The numbers behind the charts of a page; the template draws them as SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from rsanet.segment.html.pictures import coloured, png

Array = np.ndarray

SIZES_MM3 = (10, 30, 100, 300, 1000, 3000)  # between the bars of a histogram of lesion volumes
MAP_COLOURS = "magma"
# The network sees volumes with axes to superior, anterior, right.
ENDS = {"axial": ("I", "S"), "coronal": ("P", "A"), "sagittal": ("L", "R")}


@dataclass(frozen=True)
class Bar:
    """A bar of a histogram, of parts above each other.

    Attributes:
        label: of the class.
        parts: layer and number of lesions.
        total: number of lesions.
    """

    label: str
    parts: tuple[tuple[str, int], ...]
    total: int


def histogram(volumes: Sequence[tuple[str, float]], order: Sequence[str]) -> list[Bar]:
    """How many lesions have which volume.

    Args:
        volumes: layer and volume in mm³ of each lesion.
        order: the layers, from the lowest part of a bar on.
    """
    labels = [f"<{SIZES_MM3[0]}", *(f"{low}–{high}" for low, high in pairwise(SIZES_MM3))]
    labels.append(f"≥{SIZES_MM3[-1]}")
    # A lesion of exactly a bound belongs above it, whatever the rounding of the voxel volume.
    classes = [(layer, int(np.searchsorted(SIZES_MM3, volume * (1 + 1e-6), "right"))) for layer, volume in volumes]
    bars = []
    for number, label in enumerate(labels):
        parts = tuple((layer, classes.count((layer, number))) for layer in order)
        bars.append(Bar(label, parts, sum(count for _, count in parts)))
    return bars


@dataclass(frozen=True)
class Dot:
    """A case among the lesion loads of a cohort: its name, load in mL, place from 0 to 1, and row from 0 up."""

    name: str
    load: float
    place: float
    row: int


@dataclass(frozen=True)
class Loads:
    """The lesion loads of a cohort on one scale.

    Attributes:
        dots: a dot for each case.
        ticks: load in mL and place from 0 to 1.
        median: place of the median.
        words: the numbers in a sentence.
    """

    dots: list[Dot]
    ticks: list[tuple[str, float]]
    median: float
    words: str


def spread_loads(loads: Sequence[tuple[str, float]], columns: int = 60) -> Loads:
    """Dots above a scale, those of about the same load above each other.

    Args:
        loads: name and load in mL of each case.
        columns: number of places for dots.
    """
    values = np.array([load for _, load in loads])
    step = nice_step(float(values.max()) / 5)
    end = step * max(1, math.ceil(values.max() / step))
    taken: dict[int, int] = {}
    dots = []
    for name, load in sorted(loads, key=lambda pair: pair[1]):
        column = round(load / end * columns)
        dots.append(Dot(name, load, column / columns, taken.get(column, 0)))
        taken[column] = taken.get(column, 0) + 1
    ticks = [(f"{n * step:g}", n * step / end) for n in range(round(end / step) + 1)]
    low, median, high = np.percentile(values, (25, 50, 75))
    words = f"Median {median:.1f} mL, middle half {low:.1f} to {high:.1f} mL, "
    words += f"from {values.min():.1f} to {values.max():.1f} mL."
    return Loads(dots, ticks, float(median) / end, words)


def nice_step(rough: float) -> float:
    """The least of 1, 2 or 5 times a power of ten that is not below a number."""
    if rough <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


@dataclass(frozen=True)
class AttentionMap:
    """A map of the RSA block along one axis.

    Attributes:
        axis: axial, coronal or sagittal.
        ends: letters of the direction that the first slice lies in, and the last.
        size: number of slices.
        image: data URI, a pixel for each pair of slices.
        least: the value drawn darkest, in multiples of attending to all slices alike.
        most: the value drawn brightest.
        words: what this map shows, in a sentence.
    """

    axis: str
    ends: tuple[str, str]
    size: int
    image: str
    least: float
    most: float
    words: str


def draw_attention(axis: str, weights: Array) -> AttentionMap:
    """A map and a sentence on it.

    Args:
        axis: name of the axis.
        weights: (S, S); row i says where slice i looks, and adds up to 1.
    """
    size = len(weights)
    relative = weights.astype(np.float64) * size
    least, most = float(relative.min()), float(np.percentile(relative, 99.5))
    scaled = (relative - least) / max(most - least, 1e-9)
    distance = np.abs(np.subtract.outer(np.arange(size), np.arange(size)))
    near = 100 * float(weights[distance <= 1].sum()) / size
    alike = 100 * float((distance <= 1).sum()) / size**2
    looked_at = relative.mean(0)
    words = (
        f"A slice gives {near:.0f} % of its attention to itself and its neighbours, where looking everywhere alike "
        f"would give {alike:.0f} %; slice {int(looked_at.argmax())} is looked at most, {looked_at.max():.2f} times as "
        "much as the average slice."
    )
    # The first slice at the bottom, as in the slices' own order.
    return AttentionMap(
        axis, ENDS[axis], size, png(coloured(scaled[::-1], MAP_COLOURS)), least, max(most, least), words
    )
