"""What the images of a case look like, and a warning of one sentence where that is doubtful for a model.

A look is taken of a case before its images are normalized, in the same way when a model is trained and when it
predicts; the model file keeps what its training images looked like. A look has no length in mm, so that it is that of
a child as of an adult: depths are shares of the distance from the surface of the head to its middle.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from nibabel.affines import from_matvec, voxel_sizes
from scipy import ndimage

from rsanet.segment.words import listed

TINY = np.finfo(np.float32).tiny
COARSE = 2.5  # mm; a look takes voxels together up to this size
BIN = 0.04  # of the way from the surface to the middle; about 2 mm in an adult
BINS = 10  # scalp, skull and the fluid beneath are in these
INNER = 0.4  # of the way; deeper than this, all is brain
DARK = 0.35  # of the brain's intensity
BELOW = 0.3  # likewise, below the background; splines swing less
STANDS_OUT = 0.1  # of the brain's intensity, by which scalp is brighter than what is below it
CLOSED = 0.08  # of a head's radius; gaps of the tissue up to twice as wide are inside
LEAST = 30  # voxels that a mean is taken of
QUANTILES = (0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98)
# Of the darkest layer below the surface, the dark share: real heads have 0.29 to 0.81 in each contrast, stripped brains
# up to 0.08.
SKULL, STRIPPED = 0.15, 0.12
EDGE = 0.2  # of the brain's intensity: where the outermost layers stand out so much more than in any training image
MOST_ALIKE = 0.8  # of the training cases that are stripped, or are not, for a word on all of them
# Another order of the contrasts is told of where it differs from the training images by less than CLEARLY of what the
# given one does, by at least MARGIN less, and is near them at all.
CLEARLY, MARGIN, NEAR = 0.75, 0.12, 0.7
MOST_ORDERS = 5  # contrasts whose orders are all tried; of more, two at a time are exchanged


def coarse(voxels: np.ndarray, affine: np.ndarray, most: float = COARSE) -> tuple[np.ndarray, np.ndarray]:
    """Means of blocks of voxels ``(..., X, Y, Z)`` that are up to ``most`` mm long, and the affine of the blocks."""
    shape = voxels.shape[-3:]
    length = np.maximum(1, np.floor(most / voxel_sizes(affine))).astype(int)
    length = np.minimum(length, np.maximum(1, np.array(shape) // 16))  # a small volume keeps its voxels
    kept = [extent // step * step for extent, step in zip(shape, length, strict=True)]
    blocks = voxels[..., : kept[0], : kept[1], : kept[2]]
    split = [part for extent, step in zip(kept, length, strict=True) for part in (extent // step, step)]
    means = blocks.reshape(*voxels.shape[:-3], *split).mean((-5, -3, -1), dtype=np.float32)
    return means, affine @ from_matvec(np.diag(length), (length - 1) / 2)


def fill(mask: np.ndarray) -> np.ndarray:
    """A mask with what it encloses."""
    outside, _ = ndimage.label(np.pad(~mask, 1, constant_values=True))
    return (outside != outside[0, 0, 0])[1:-1, 1:-1, 1:-1]


def hull(tissue: np.ndarray, size: Sequence[float]) -> np.ndarray:
    """The head of a tissue mask: its largest part, gaps closed and holes filled."""
    radius = (tissue.sum() * np.prod(size) * 0.75 / math.pi) ** (1 / 3)
    steps = max(1, round(CLOSED * radius / float(np.mean(size))))
    margin = steps + 1
    closed = ndimage.binary_closing(np.pad(tissue, margin), iterations=steps)
    labels, count = ndimage.label(fill(closed))
    if count > 1:
        labels = labels == np.bincount(labels.ravel())[1:].argmax() + 1
    return labels[margin:-margin, margin:-margin, margin:-margin] > 0


def look(channels: np.ndarray, tissue: np.ndarray, affine: np.ndarray) -> dict[str, Any]:
    """What the images of a case look like.

    Args:
        channels: ``(C, X, Y, Z)``, a contrast each.
        tissue: where they show tissue.
        affine: from voxels to mm.
    """
    small, own = coarse(channels, affine)
    shown = coarse(tissue.astype(np.float32), affine)[0] > 0.5
    size = voxel_sizes(own)
    found: dict[str, Any] = {"shell": [], "rim": [], "quantiles": []}
    for channel, voxels, there, low in zip(channels, tissue, shown, small, strict=True):
        values = channel[voxels]
        values = values[:: max(1, values.size // 100_000)]
        scaled = (np.quantile(values, QUANTILES) - values.mean()) / max(values.std(), 1e-6 * np.abs(values).max(), TINY)
        found["quantiles"].append(rounded(scaled))
        shell, rim = rim_of(low, there, size)
        found["shell"].append(shell)
        found["rim"].append(rim)
    both = shown.all(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        alike = np.atleast_2d(np.corrcoef(small[:, both])) if both.sum() > LEAST else np.eye(len(small))
    found["alike"] = [rounded(np.nan_to_num(row)) for row in alike]
    return found


def rim_of(voxels: np.ndarray, tissue: np.ndarray, size: Sequence[float]) -> tuple[float | None, list[float | None]]:
    """How dark the darkest layer below the surface is, and the mean intensity of each layer beside the brain's."""
    head = hull(tissue, size)
    # Where the field of view cuts the head, there is no surface.
    depth = ndimage.distance_transform_edt(np.pad(head, 1, mode="edge"), sampling=size)[1:-1, 1:-1, 1:-1]
    depth -= min(size) / 2
    share = depth / depth.max()
    air = np.median(voxels[~head]) if (~head).any() else 0.0
    inner = voxels[share > INNER] - air
    brain = np.median(inner) if inner.size else 0.0
    # Where values of a brain lie on both sides of the background, as of z-scores, none of them is dark.
    if not brain > 0 or np.quantile(inner, QUANTILES[0]) < -BELOW * brain:
        return None, [None] * BINS
    relative = (voxels - air) / brain
    layers = [relative[head & (share > BIN * number) & (share <= BIN * (number + 1))] for number in range(BINS)]
    rim = [float(layer.mean()) if layer.size >= LEAST else None for layer in layers]
    # Fluid at the surface of a brain is dark, too, but not as deep, and nothing bright is around it.
    known = [value for value in rim[:2] if value is not None]
    under = rim[2] is not None and bool(known) and rim[2] < max(known) - STANDS_OUT
    dark = [float((layer < DARK).mean()) for layer in layers[2 if under else 3 : 6] if layer.size >= LEAST]
    return (round(max(dark), 4) if dark else None), [None if value is None else round(value, 4) for value in rim]


def rounded(values: Sequence[float]) -> list[float]:
    """For a file that people may read."""
    return [round(float(value), 4) for value in values]


def summary(looks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a model file keeps of the looks of its training cases, in JSON types."""
    shells = [shell for shell in map(shell_of, looks) if shell is not None]
    stripped = np.mean([shell < STRIPPED for shell in shells]) if shells else 0.5
    whole = np.mean([shell > SKULL for shell in shells]) if shells else 0.5
    rims = np.array([each["rim"] for each in looks], float)  # None becomes NaN
    known = np.isfinite(rims)
    middle = np.where(known.any(0), np.where(known, rims, 0).sum(0) / np.maximum(known.sum(0), 1), np.nan)
    return {
        "skull_stripped": True if stripped >= MOST_ALIKE else False if whole >= MOST_ALIKE else None,
        "rim": [_plain(row) for row in middle],
        "edge": _plain(np.fmax.reduce([edges(each) for each in looks])),
        "quantiles": [rounded(row) for row in np.mean([each["quantiles"] for each in looks], 0)],
        "alike": [rounded(row) for row in np.mean([each["alike"] for each in looks], 0)],
    }


def is_summary(value: Any, contrasts: int) -> bool:
    """Whether a value from a file can be what `summary` makes of so many contrasts."""
    lengths = {"rim": BINS, "quantiles": len(QUANTILES), "alike": contrasts}
    try:
        arrays = {name: np.array(value[name], float) for name in lengths}
        edge, stripped = np.array(value["edge"], float), value["skull_stripped"]
    except (KeyError, TypeError, ValueError):
        return False
    return (
        stripped in (True, False, None)
        and edge.shape == (contrasts,)
        and all(
            array.shape == (contrasts, lengths[name]) and not np.isinf(array).any() for name, array in arrays.items()
        )
    )


def reordered(found: Mapping[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """A look with its contrasts in another order."""
    rows = {name: [found[name][number] for number in order] for name in ("shell", "rim", "quantiles")}
    return {**rows, "alike": [[found["alike"][one][other] for other in order] for one in order]}


def shell_of(found: Mapping[str, Any]) -> float | None:
    """How dark the darkest layer below the surface is, over the contrasts; None where no contrast tells."""
    shells = [shell for shell in found["shell"] if shell is not None]
    return float(np.mean(shells)) if shells else None


def doubts(found: Mapping[str, Any], trained: Mapping[str, Any], contrasts: Sequence[str], model: str) -> Iterator[str]:
    """What is doubtful in the look of a case for a model: a sentence each.

    Args:
        found: the look; its contrasts in the model's order.
        trained: of the model's training images.
        contrasts: their names.
        model: its name.
    """
    order = best_order(found, trained)
    if order != tuple(range(len(contrasts))):
        wrong = [
            f"the image given as {name} looks like {contrasts[order.index(number)]}"
            for number, name in enumerate(contrasts)
            if order[number] != number
        ]
        yield (f"{listed(wrong)}, by what {model} was trained on: check the order of -i, or the names of the files")
    shell = shell_of(found)
    if shell is None:
        return
    if trained["skull_stripped"] is True and (shell > SKULL or stands_out(found, trained, order) > EDGE):
        yield (
            f"the images show a head with its skull, but {model} was trained on skull-stripped images, and may mark "
            "scalp and bone: extract the brain first, for example with HD-BET or SynthStrip, or take a model for whole "
            "heads"
        )
    if trained["skull_stripped"] is False and shell < STRIPPED:
        yield (
            f"the images show a skull-stripped brain, but {model} was trained on whole heads with their skull: give "
            "the images before the brain extraction, or take a model for skull-stripped images"
        )


def best_order(found: Mapping[str, Any], trained: Mapping[str, Any]) -> tuple[int, ...]:
    """Which of the images given goes where, by the training images: as given unless another order fits clearly better.

    Returns:
        For each contrast of the model the number of the image that looks like it.
    """
    count = len(found["shell"])
    given = tuple(range(count))
    if count <= MOST_ORDERS:
        orders = list(itertools.permutations(given))
    else:
        orders = [given]
        for one, other in itertools.combinations(given, 2):
            swapped = list(given)
            swapped[one], swapped[other] = other, one
            orders.append(tuple(swapped))
    differences = {order: difference(found, trained, order) for order in orders}
    best = min(orders, key=lambda order: differences[order])
    clear = differences[best] < min(CLEARLY * differences[given], differences[given] - MARGIN, NEAR)
    return best if clear else given


def difference(found: Mapping[str, Any], trained: Mapping[str, Any], order: Sequence[int]) -> float:
    """How far the images, in some order, are from the training images: histograms, layers, and correlations."""
    order = list(order)
    histograms = np.abs(np.array(found["quantiles"])[order] - np.array(trained["quantiles"])).mean()
    layers = np.abs(np.array(found["rim"], float)[order] - np.array(trained["rim"], float))[:, 1:6]
    total = float(histograms) + (float(np.nanmean(layers)) if np.isfinite(layers).any() else 0.0)
    pairs = np.triu_indices(len(order), 1)
    if len(order) > 1:
        total += float(
            np.abs(np.array(found["alike"])[np.ix_(order, order)] - np.array(trained["alike"]))[pairs].mean()
        )
    return total


def edges(found: Mapping[str, Any]) -> np.ndarray:
    """By how much the two outermost layers of each contrast are brighter than the next two; NaN where none tells."""
    rim = np.array(found["rim"], float)
    known = np.isfinite(rim)
    outer, inner = (
        np.where(known, rim, 0)[:, part].sum(1) / np.where(known[:, part].any(1), known[:, part].sum(1), np.nan)
        for part in (slice(0, 2), slice(2, 4))
    )
    return outer - inner


def stands_out(found: Mapping[str, Any], trained: Mapping[str, Any], order: Sequence[int]) -> float:
    """By how much the outermost layers stand out more than in any training image, over the contrasts."""
    more = edges(found)[list(order)] - np.array(trained["edge"], float)
    return float(np.nanmean(more)) if np.isfinite(more).any() else 0.0


def _plain(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), 4) for value in values]
