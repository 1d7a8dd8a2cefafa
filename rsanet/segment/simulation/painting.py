"""Lesions on a grid of voxels: how much of each voxel they fill, and which voxels a reader would label."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage, special

from rsanet.segment.simulation.grid import Grid, average, repeat
from rsanet.segment.simulation.lesions import Lesion

Array = np.ndarray
Box = tuple[slice, ...]

LABEL_THRESHOLD = 0.35  # of the soft lesion profile
SMALLEST_LESION = 3  # labelled voxels; a blob that leaves fewer is not painted either
NEIGHBOURS = np.ones((3, 3, 3))  # 26-connected


@dataclass(frozen=True)
class Painting:
    """The soft union of all lesions.

    Attributes:
        soft: (X·a, Y·b, Z·c) float32, from 0 to 1, on the parts of the voxels.
        owner: the same shape, int32: which lesion is the strongest there, -1 for none.
        mask: (X, Y, Z) uint8, 1 in labelled voxels.
        mask_owner: (X, Y, Z) int32, as ``owner``.
    """

    soft: Array
    owner: Array
    mask: Array
    mask_owner: Array


def paint_lesions(lesions: Sequence[Lesion], white: Array, grid: Grid) -> Painting:
    """Paint lesions into white matter.

    Args:
        lesions: in the patient's millimetres.
        white: fraction of white matter on ``grid.cut(grid.parts())``.
        grid: of the images.
    """
    parts = grid.parts()
    fine, coarse = (np.zeros(shape, np.float32) for shape in (white.shape, grid.shape))
    fine_owner, coarse_owner = (np.full(shape, -1, np.int32) for shape in (white.shape, grid.shape))
    for number, lesion in enumerate(lesions):
        found = _profile(lesion, white, grid, parts)
        if found is None:
            continue
        box, profile = found
        parts_of_box = tuple(slice(s.start * n, s.stop * n) for s, n in zip(box, parts, strict=True))
        _add(profile, number, fine[parts_of_box], fine_owner[parts_of_box])
        _add(average(profile, parts), number, coarse[box], coarse_owner[box])
    return Painting(fine, fine_owner, (coarse > LABEL_THRESHOLD).astype(np.uint8), coarse_owner)


def _add(profile: Array, number: int, soft: Array, owner: Array) -> None:
    """Give a lesion the voxels where it is the strongest so far."""
    stronger = profile > soft
    soft[stronger] = profile[stronger]
    owner[stronger] = number


def _profile(lesion: Lesion, white: Array, grid: Grid, parts: Array) -> tuple[Box, Array] | None:
    """The soft profile of one lesion: its box of voxels and the values in their parts; None if too small."""
    reach = 1.5 * lesion.semi_axes.max() + grid.step
    first = np.maximum(np.floor((lesion.centre - reach - grid.origin) / grid.step), 0).astype(int)
    last = np.minimum(np.ceil((lesion.centre + reach - grid.origin) / grid.step) + 1, grid.shape).astype(int)
    if (last <= first).any():
        return None
    fine = grid.cut(parts)
    lines = [
        o + s * np.arange(a, b) - c
        for o, s, a, b, c in zip(fine.origin, fine.step, first * parts, last * parts, lesion.centre, strict=True)
    ]
    offset = np.stack(np.meshgrid(*lines, indexing="ij"))
    local = np.tensordot(lesion.axes, offset, axes=1) / lesion.semi_axes[:, None, None, None]
    bumps = ndimage.map_coordinates(lesion.outline, 2 + local, order=3, mode="nearest")
    radius = np.sqrt((local**2).sum(0)) * (1 + 0.13 * bumps)
    depth = (1 - radius) * np.cbrt(lesion.semi_axes.prod())
    profile = special.expit(depth / max(lesion.edge_mm, 0.35 * float(fine.step.max())))
    inside = tuple(slice(a, b) for a, b in zip(first * parts, last * parts, strict=True))
    profile = profile * np.clip(1.25 * white[inside], 0, 1)
    profile = np.where(profile > 0.02, profile, 0).astype(np.float32)
    labels, count = ndimage.label(average(profile, parts) > LABEL_THRESHOLD, NEIGHBOURS)
    if count == 0:
        return None
    voxels = np.bincount(labels.ravel())[1:]
    if voxels.max() < SMALLEST_LESION:
        return None
    # Tissue can cut a blob in pieces; only the largest stays, with its soft edge.
    largest = labels == voxels.argmax() + 1
    body = ndimage.binary_dilation(largest, NEIGHBOURS, iterations=2) & ~((labels > 0) & ~largest)
    return tuple(slice(a, b) for a, b in zip(first, last, strict=True)), np.where(repeat(body, parts), profile, 0)
