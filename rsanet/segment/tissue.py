"""Where an image shows tissue: one rule for every scale, offset, storage type and kind of background.

The background is looked for where a field of view ends. It has a level, and a width, which is 0 where the background
is constant and that of the noise where it is air. Tissue is what stands out of it, without specks and without holes.
Every step depends on shares of many voxels, so that single voxels change nothing.
"""

import numpy as np
from scipy import ndimage

WIDTHS = 2.5  # of the background's own: what is farther from its level stands out
DARKEST = 0.12  # of the typical tissue: what is nearer to the background's level is background
BELOW = 0.3  # likewise, on its dark side: splines swing below it beside an edge, by a tenth of the edge
NARROW = 0.4  # of the typical tissue: a background is not as wide
NEAR = 0.2  # of the typical tissue: the air around a head is not farther from a padding beside it
LEAST_TISSUE = 0.001  # of the voxels of an image; the head in a generous field of view takes a tenth
SPIKE = 0.05  # of the voxels at the rims: one value that so many have is a constant background
PIECE = 0.01  # of the largest piece of tissue: smaller ones are specks


def tissue_mask(voxels: np.ndarray) -> np.ndarray:
    """Where an image ``(X, Y, Z)`` shows tissue, not background, as booleans; its finite voxels decide.

    Dark fluid, bone and single voxels of any value are tissue where tissue encloses them, and background where
    background does. An image without a background is tissue everywhere. A change of scale or offset, mirrored or
    permuted axes and a margin of background change nothing.

    Args:
        voxels: real numbers of any scale and sign; what is NaN or infinite is no tissue.
    """
    finite = np.isfinite(voxels)
    voxels = np.where(finite, voxels, 0).astype(np.float32)
    shown = _standing_out(voxels, finite)
    if shown is None:
        return finite
    return _filled(_without_specks(shown), finite)


def _standing_out(voxels: np.ndarray, region: np.ndarray) -> np.ndarray | None:
    """What stands out of the background in a part of an image; None where it has no background."""
    found: np.ndarray | None = None
    constant: float | None = None
    for _ in range(3):  # a padding, a background that another program made constant, and air
        rim = voxels[region & (_around(region, 2) <= 0.45 * 125)]
        if rim.size < 20:
            break
        value = _spike(rim)
        flat = np.zeros(0)
        if value is not None:
            same = region & (voxels == value)
            flat = same & (_around(_around(same, 1, edge=True) >= 14, 1) > 0)
            if np.count_nonzero(flat) < 0.5 * np.count_nonzero(same):  # one of the values of noise in integers
                value = None
        level, width = (value, 0.0) if value is not None else _level(rim)
        shown = _apart(voxels, region, level, width, constant)
        if shown is None and (value is None or constant is not None):
            break
        found = shown if shown is not None else np.zeros_like(region)
        if value is None:
            break
        region, constant = region & ~flat, value
    return found


def _spike(rim: np.ndarray) -> float | None:
    """The value that many voxels have exactly."""
    values, counts = np.unique(rim, return_counts=True)
    most = int(counts.argmax())
    return float(values[most]) if counts[most] >= SPIKE * rim.size else None


def _level(rim: np.ndarray) -> tuple[float, float]:
    """Level and width (a standard deviation) of the population that at least half of the values belong to."""
    values = np.sort(rim)
    half = values.size // 2
    start = int((values[half:] - values[: values.size - half]).argmin())
    centre, width = np.median(values[start : start + half]), values[start + half] - values[start]
    own = values[np.abs(values - centre) <= 3 * width]
    level = np.median(own)
    return float(level), float(1.4826 * np.median(np.abs(own - level)))


def _apart(
    voxels: np.ndarray, region: np.ndarray, level: float, width: float, padding: float | None
) -> np.ndarray | None:
    """What stands out of a level that may be the background's; None where it is not.

    Args:
        voxels: the image.
        region: the part of it to look at.
        level: of the background, perhaps.
        width: likewise.
        padding: the constant around the region, where there is one.
    """
    offset = np.where(region, voxels - np.float32(level), 0)
    far = np.abs(offset[np.abs(offset) > max(3 * width, 0.0)])
    if far.size == 0:
        return None
    far = far[far > 0.05 * np.percentile(far, 99)]
    typical = float(np.median(far))
    above = max(WIDTHS * width, DARKEST * typical)
    below = max(WIDTHS * width, BELOW * typical)
    bright, dark = offset > above, offset < -below
    if width > 0 or padding is not None:
        voxels_in = np.count_nonzero(region)
        count, darker = np.count_nonzero(bright), np.count_nonzero(dark)
        if WIDTHS * width > NARROW * typical or darker > 0.05 * max(count, 1):
            return None
        if padding is None:
            least = LEAST_TISSUE if abs(level) <= max(2.5 * width, NEAR * typical) else 0.05
        else:
            if level - padding > NEAR * typical:
                return None
            if padding - level > DARKEST * typical and count > 0.7 * voxels_in:
                return None
            least = 0.1
        if count < least * voxels_in:
            return None
    return bright | dark


def _without_specks(shown: np.ndarray) -> np.ndarray:
    """The pieces of tissue that are no specks; all of them where nothing else is."""
    solid = shown & (_around(shown, 1, edge=True) >= 8)  # a corner has as many
    labels, count = ndimage.label(solid)
    if count == 0:
        return shown
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (sizes >= PIECE * sizes.max())[labels]


def _filled(tissue: np.ndarray, finite: np.ndarray) -> np.ndarray:
    """Tissue with what it encloses in space or in a plane of voxels."""
    if not tissue.any():
        return tissue
    box = ndimage.find_objects(tissue.astype(np.uint8))[0]
    inside = tissue[box]
    holes = np.zeros_like(inside)
    for plane in (None, 0, 1, 2):
        axes = [axis for axis in range(3) if axis != plane]
        links = ndimage.generate_binary_structure(3, 1)
        if plane is not None:
            links[tuple(slice(None) if axis != plane else [0, 2] for axis in range(3))] = False
        # Around the box there is background, except along the axis across a plane.
        padded = np.pad(~inside, [(1, 1) if axis in axes else (0, 0) for axis in range(3)], constant_values=True)
        labels, count = ndimage.label(padded, links)
        open_ = np.zeros(count + 1, bool)
        for axis in axes:
            for end in (0, -1):
                open_[np.unique(labels.take(end, axis))] = True
        open_[0] = True
        holes |= ~open_[labels][tuple(slice(1, -1) if axis in axes else slice(None) for axis in range(3))]
    filled = tissue.copy()
    filled[box] |= holes
    return filled & finite


def _around(mask: np.ndarray, reach: int, *, edge: bool = False) -> np.ndarray:
    """How many voxels of a mask are in the cube around each voxel, itself included.

    Args:
        mask: (X, Y, Z) bool.
        reach: voxels from the middle of the cube to its faces.
        edge: whether the mask goes on beyond the field of view as it ends there; else nothing is there.
    """
    counts = mask.view(np.uint8)
    for axis in range(3):
        length = counts.shape[axis]
        padded = np.pad(
            counts, [(reach, reach) if a == axis else (0, 0) for a in range(3)], mode="edge" if edge else "constant"
        )
        counts = sum(
            padded[(slice(None),) * axis + (slice(step, step + length),)] for step in range(2 * reach + 1)
        ).astype(np.uint8)
    return counts
