"""What the images of a case look like, and a warning of one sentence where that is doubtful for a model.

A look is taken of a case before its images are normalized, in the same way when a model is trained and when it
predicts; the model file keeps what its training images looked like. A look has no length in mm, so that it is that of
a child as of an adult: depths are shares of the distance from the surface of the head to its middle.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from nibabel.affines import from_matvec, voxel_sizes
from scipy import ndimage

COARSE = 2.5  # mm; a look takes voxels together up to this size
BIN = 0.04  # of the way from the surface to the middle; about 2 mm in an adult
BINS = 10  # scalp, skull and the fluid beneath are in these
INNER = 0.4  # of the way; deeper than this, all is brain
DARK = 0.35  # of the brain's intensity
CLOSED = 0.08  # of a head's radius; gaps of the tissue up to twice as wide are inside
LEAST = 30  # voxels that a mean is taken of
QUANTILES = (0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98)


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
        scaled = (np.quantile(values, QUANTILES) - values.mean()) / max(values.std(), 1e-6)
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
    brain = np.median(voxels[share > INNER]) - air
    if not brain > 0:
        return None, [None] * BINS
    relative = (voxels - air) / brain
    layers = [relative[head & (share > BIN * number) & (share <= BIN * (number + 1))] for number in range(BINS)]
    rim = [float(layer.mean()) if layer.size >= LEAST else None for layer in layers]
    dark = [float((layer < DARK).mean()) for layer in layers[2:6] if layer.size >= LEAST]
    return (round(max(dark), 4) if dark else None), [None if value is None else round(value, 4) for value in rim]


def rounded(values: Sequence[float]) -> list[float]:
    """For a file that people may read."""
    return [round(float(value), 4) for value in values]
