"""Where an image shows tissue: one rule for every scale, offset, storage type and kind of background.

The background is looked for at the rims of the field of view. It has a level, and a width, which is 0 where the
background is constant and that of the noise where it is air. Tissue is what stands out of it, without specks and
without holes. Every step depends on shares of many voxels, so that single voxels change nothing.
"""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

LEAST_TISSUE = 0.001  # of the voxels of an image; the head in a generous field of view takes a tenth

WIDTHS = 2.5  # of the background's own: what is farther from its level stands out
DARKEST = 0.12  # of the typical tissue: what is nearer to the background's level is background
BELOW = 0.3  # likewise, on its dark side: splines swing below it beside an edge, by a tenth of the edge
ABOUT = 0.05  # likewise, on both sides, where tissue is on both sides
NARROW = 0.3  # of the typical tissue: air is not wider
LEAST_OFFSET = 0.1  # of a region whose air is far from zero, or padded: less than that is no head
SHARES_TURNED = 0.25, 0.7  # of a padded region that may be a brain: less is lesions, more is its inner part
FULL = 0.62  # of the box around it: a padded field of view fills more, a brain less
NEAR = 0.2  # of the typical tissue: air is not farther above zero, or above the padding around it

FEWEST = 8  # voxels at the rims: of fewer, nothing is said
SPIKE = 0.05  # of the voxels at the rims: a value that so many have may be a constant background
PIECE = 0.01  # of the largest piece of tissue: smaller ones are specks


class _Background(NamedTuple):
    """What the background may be.

    Attributes:
        level: the value in its middle.
        width: its standard deviation.
        share: of the voxels at the rims that belong to it.
    """

    level: float
    width: float
    share: float


def tissue_mask(voxels: np.ndarray) -> np.ndarray:
    """Where an image ``(X, Y, Z)`` shows tissue, not background, as booleans; its finite voxels decide.

    Dark fluid, bone and single voxels of any value are tissue where tissue encloses them, and background where
    background does. An image without a background is tissue everywhere. Another scale or offset, mirrored or
    permuted axes and a margin of background change nothing.

    Args:
        voxels: real numbers of any scale and sign; what is NaN or infinite is no tissue.
    """
    finite = np.isfinite(voxels)
    shown, dim = _standing_out(np.where(finite, voxels, 0).astype(np.float32), finite)
    if shown is None:
        return finite
    tissue = _without_specks(shown)
    if dim is not None:
        near = _around(tissue, 1) > 0
        tissue = tissue | (dim & (_around(near, 1, beyond=True) == 27))
    return _filled(tissue) & finite


def _standing_out(voxels: np.ndarray, region: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
    """What stands out of the background in a part of an image, and what does not but is no background by its value.

    Where there is no background, the first is None; where the background has no value of its own, the second is: what
    is as dark as air may be air. Beside a constant it is fluid where tissue is on both sides, and else of an edge.
    """
    shown: np.ndarray | None = None
    padding: float | None = None
    for _ in range(3):  # a padding, a background that another program made constant, and air
        rim = voxels[_rims(region)]
        if rim.size < FEWEST:
            break
        value, flat = _constant(voxels, region, rim)
        if value is None:
            # Where a view is cut close, most of its rims may be tissue.
            air = (_apart(voxels, region, _air(rim, part), padding) for part in ((2, 4) if padding is None else (2,)))
            found = next((found for found in air if found is not None), None)
            if found is not None:
                return found, None
            break
        found = _apart(voxels, region, _Background(value, 0.0, 1.0), padding)
        if found is None:
            break
        shown, padding, region = found, value, region & ~flat
    return shown, None if shown is None else region


def _rims(region: np.ndarray) -> np.ndarray:
    """The edges and corners of a region, where less than half of what is around belongs to it."""
    thin = [length for length in region.shape if length < 3]  # one or two slices have no edges but their sides
    around = 125 * np.prod([length / 5 for length in thin])
    return region & (_around(region, 2) <= (0.62 if thin else 0.45) * around)


def _constant(voxels: np.ndarray, region: np.ndarray, rim: np.ndarray) -> tuple[float | None, np.ndarray]:
    """The value of a constant background, and where it is; None where nothing at the rims is constant."""
    values, counts = np.unique(rim, return_counts=True)
    most = int(counts.argmax())
    same = region & (voxels == values[most])
    flat = same & (_around(_around(same, 1, beyond=True) >= 14, 1) > 0)  # in the midst of its like, or beside
    # Noise in integers has each of its values often, too, but not side by side.
    constant = counts[most] >= SPIKE * rim.size and np.count_nonzero(flat) >= 0.5 * np.count_nonzero(same)
    return float(values[most]) if constant else None, flat


def _air(rim: np.ndarray, part: int) -> _Background:
    """The air at the rims: what gathers around the ``1 / part`` of the values that are closest together."""
    values = np.sort(rim)
    count = max(2, values.size // part)
    spread = values[count - 1 :] - values[: values.size - count + 1]
    start = int(spread.argmin())
    own = values[np.abs(values - np.median(values[start : start + count])) <= 3 * spread[start]]
    level = float(np.median(own))
    return _Background(level, float(1.4826 * np.median(np.abs(own - level))), own.size / values.size)


def _apart(voxels: np.ndarray, region: np.ndarray, background: _Background, padding: float | None) -> np.ndarray | None:
    """What stands out of a background in a region of an image; None where that is no background.

    Args:
        voxels: the image.
        region: the part to look at.
        background: what the background may be.
        padding: the constant around the region, where there is one.
    """
    level, width, share = background
    offset = np.where(region, voxels - np.float32(level), 0)
    far = np.abs(offset[np.abs(offset) > 4 * width])
    if far.size == 0:
        return None if width or padding is not None else np.zeros_like(region)
    typical = float(np.median(far[far > 0.05 * np.percentile(far, 99)]))
    bright = offset > max(WIDTHS * width, DARKEST * typical)
    dark = offset < -max(WIDTHS * width, BELOW * typical)
    if padding is None and width == 0:
        # Values of a brain may lie about the constant: then hardly any is as near to it as the background.
        about = np.count_nonzero(dark) > 0.05 * np.count_nonzero(bright)
        return np.abs(offset) > ABOUT * typical if about else bright | dark
    # Air is narrow, and nothing is darker.
    area, count = np.count_nonzero(region), np.count_nonzero(bright)
    if WIDTHS * width > NARROW * typical or np.count_nonzero(dark) > 0.05 * count:
        return None
    if padding is None:
        # What is far from zero may as well be tissue without a background, and the bright part of it a few lesions.
        near = abs(level) <= max(WIDTHS * width, NEAR * typical)
        least, most = (LEAST_TISSUE if near else LEAST_OFFSET if share > 0.6 else 1.0), 1.0
    elif level > padding + NEAR * typical:  # the outer part of a brain
        return None
    elif area > FULL * _box_of(region):
        least, most = LEAST_OFFSET, 1.0
    else:  # a turned field of view, or a brain
        least, most = SHARES_TURNED
    return bright | dark if least * area <= count <= most * area else None


def _box_of(region: np.ndarray) -> int:
    """How many voxels the box around a region has; specks of it do not widen the box."""
    boxes = ndimage.find_objects((_around(region, 1) >= 14).view(np.uint8))
    return region[boxes[0]].size if boxes else region.size


def _without_specks(shown: np.ndarray) -> np.ndarray:
    """The pieces of tissue that are no specks; all of them where nothing else is."""
    labels, count = ndimage.label(shown & (_around(shown, 1, beyond=True) >= 8))  # a corner has as many
    if count == 0:
        return shown
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    pieces = (sizes >= PIECE * sizes.max())[labels]
    return shown & (_around(pieces, 1) > 0)


def _filled(tissue: np.ndarray) -> np.ndarray:
    """Tissue with what it encloses in space, or in planes across two of the axes.

    A hole that reaches a face of the field of view is closed where it is one within that face. The sinuses are open in
    space, through the nose; a groove between two lobes of a brain is enclosed in the planes across one axis at most.
    """
    labels, count = ndimage.label(~tissue)
    open_ = np.zeros(count + 1, bool)
    for axis in range(3):
        for end in (0, -1):
            face = labels.take(end, axis)
            parts, _ = ndimage.label(face)
            outer = np.unique(np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]]))
            open_[face[np.isin(parts, outer[outer > 0])]] = True
    filled = ~open_[labels]
    if not filled.any():
        return filled
    box = ndimage.find_objects(filled.view(np.uint8))[0]
    inside = filled[box]
    times = np.zeros(inside.shape, np.uint8)
    for across in range(3):
        links = ndimage.generate_binary_structure(3, 1)
        links[(slice(None),) * across + ([0, 2],)] = False
        margins = [(0, 0) if axis == across else (1, 1) for axis in range(3)]  # of background
        labels, count = ndimage.label(np.pad(~inside, margins, constant_values=True), links)
        enclosed = np.ones(count + 1, bool)
        for axis in {0, 1, 2} - {across}:
            enclosed[labels.take(0, axis)] = False
        times += enclosed[labels][tuple(slice(before, -before or None) for before, _ in margins)]
    filled[box] = times >= 2  # of tissue, which has the label 0, all three
    return filled


def _around(mask: np.ndarray, reach: int, *, beyond: bool = False) -> np.ndarray:
    """How many voxels of a mask are in the cube around each voxel, itself included.

    Args:
        mask: (X, Y, Z) bool.
        reach: voxels from the middle of the cube to its faces.
        beyond: whether the mask goes on beyond the field of view as it ends there; else nothing is there.
    """
    counts = mask.view(np.uint8)
    for axis in range(3):
        margins = [(reach, reach) if other == axis else (0, 0) for other in range(3)]
        wide = np.pad(counts, margins, mode="edge" if beyond else "constant")
        counts = np.zeros_like(counts)
        for step in range(2 * reach + 1):
            counts += wide[(slice(None),) * axis + (slice(step, step + counts.shape[axis]),)]
    return counts
