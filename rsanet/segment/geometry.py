"""Where voxels lie: volumes and distances by all of the affine, and volumes that are stored otherwise than another.

One place computes them, so that every command gives one mask the same numbers. Grids are compared in voxels, at the
corners: a header's rounding moves the far corner of a large volume more than its origin.
"""

import warnings
from collections.abc import Sequence
from fractions import Fraction

import nibabel as nib
import numpy as np
from nibabel import orientations
from nibabel.affines import apply_affine, voxel_sizes

from rsanet.segment.words import DataWarning, sizes

Array = np.ndarray

ALIKE = 0.01  # of a voxel: grids whose corners are less apart are one, and differ by the rounding of their headers
TURNED = 2e-3  # radians between the axes of two headers; a qform, whose numbers are of 32 bits, may be 1.2e-3 off
SHEARED = 1e-5  # cosine of the angle between two axes; the rounding of a header leaves less of a right angle


def affine_of(spacing: Sequence[float] | Array) -> Array:
    """The affine (4, 4) of voxels in mm.

    Args:
        spacing: three voxel sizes, or an affine, which is returned as it is.

    Raises:
        ValueError: it is neither.
    """
    given = np.asarray(spacing, np.float64)
    if given.shape == (4, 4) and np.isfinite(given).all() and np.linalg.det(given[:3, :3]) != 0:
        return given
    if given.shape != (3,) or not (np.isfinite(given) & (given > 0)).all():
        raise ValueError(f"spacing is {tuple(given.tolist())}: give three voxel sizes in mm, or an affine.")
    return np.diag([*given, 1.0])


def voxel_volume(affine: Array) -> float:
    """Volume of a voxel in mm³, by the determinant: the edges of a sheared voxel say less than that.

    The products are exact, so that the order in which a file stores its axes does not change the last digit.
    """
    (a, b, c), (d, e, f), (g, h, i) = ([Fraction(float(value)) for value in row[:3]] for row in affine[:3])
    return abs(float(a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)))


def is_sheared(affine: Array) -> bool:
    """Whether voxels are no boxes: their axes are not at right angles."""
    directions = affine[:3, :3] / voxel_sizes(affine)
    return bool(np.abs(directions.T @ directions - np.eye(3)).max() > SHEARED)


def places(voxels: Array, affine: Array) -> Array:
    """Places (N, 3) of voxels (N, 3) in mm, as far apart as they are in the world."""
    if is_sheared(affine):
        return voxels @ affine[:3, :3].T
    return voxels * voxel_sizes(affine)  # a turn of the whole changes no distance, but the last digits


def to_canonical(volume: Array, affine: Array) -> tuple[Array, Array]:
    """A volume (X, Y, Z) with axes that run as closely to right, anterior and superior as they can, and its affine."""
    turn = orientations.io_orientation(affine)
    # Files have the first axis run fastest; slices and labels are quicker the other way round.
    turned = np.ascontiguousarray(orientations.apply_orientation(volume, turn))
    return turned, affine @ orientations.inv_ornt_aff(turn, volume.shape)


def lattice(shape: Sequence[int], most: int) -> Array:
    """Voxel coordinates ``(points, 3)`` spread evenly over a grid, corners included, at most so many along an axis."""
    axes = [np.linspace(0, size - 1, max(1, min(size, most))) for size in shape]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)


def same_grid(one: nib.Nifti1Image, other: nib.Nifti1Image) -> bool:
    """Whether two images have the same voxels in space and in order, by their headers, to a hundredth of a voxel."""
    if one.shape[:3] != other.shape[:3]:
        return False
    return bool(np.abs(offsets(one.shape[:3], one.affine, other.affine)).max() < ALIKE)


def align(
    volume: Array, image: nib.Nifti1Image, like: nib.Nifti1Image, name: str, other: str, advice: str
) -> np.ndarray:
    """A volume in the order of another's voxels: its axes are flipped and swapped, and nothing is interpolated.

    Headers that put the two less than a voxel apart, without a turn, mean the same voxels: they are taken by their
    order, with a `DataWarning` that names the offset.

    Args:
        volume: (X, Y, Z).
        image: what was read of it, for its header.
        like: what was read of the other.
        name: of the volume, for messages.
        other: of the other, for messages.
        advice: what to do with a volume that lies elsewhere.

    Raises:
        ValueError: its voxels are not those of the other; with what differs.
    """
    shape, wanted = volume.shape, like.shape[:3]
    turn, off = _find_turn(shape, image.affine, wanted, like.affine)
    if turn is None:
        raise ValueError(
            f"{name} ({sizes(shape)}) is on another grid than {other} ({sizes(wanted)}): "
            f"{'; '.join(_differences(shape, image, like))}; {advice}."
        )
    if off:
        affine = image.affine @ orientations.inv_ornt_aff(turn, shape)
        warnings.warn(
            f"{name} has the voxels of {other}, but by its header they lie {_farthest(wanted, affine, like.affine)} "
            "off: it is taken voxel by voxel.",
            DataWarning,
            stacklevel=1,
        )
    return np.ascontiguousarray(orientations.apply_orientation(volume, turn))


def has_voxels_of(image: nib.Nifti1Image, like: nib.Nifti1Image) -> bool:
    """Whether an image has the voxels of another, in whatever order it stores them, as `align` takes them."""
    return _find_turn(image.shape[:3], image.affine, like.shape[:3], like.affine)[0] is not None


def _find_turn(shape: Sequence[int], affine: Array, wanted: Sequence[int], like: Array) -> tuple[Array | None, bool]:
    """The orientation (3, 2), as nibabel has it, that turns a grid to another, and whether an offset is left.

    None where the voxels are others.
    """
    turn = _turn(affine, like)
    if turn is None or _turned_shape(shape, turn) != tuple(wanted):
        return None, False
    affine = affine @ orientations.inv_ornt_aff(turn, shape)
    off = np.abs(offsets(wanted, affine, like)).max()
    taken = off < ALIKE or (off < 1 - ALIKE and _angle(affine, like) <= TURNED)
    return (turn, bool(off >= ALIKE)) if taken else (None, False)


def _turned_shape(shape: Sequence[int], turn: Array) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in np.argsort(turn[:, 0]))


def _turn(affine: Array, like: Array) -> Array | None:
    """The orientation that turns a grid's axes to another's; None where none does."""
    steps = np.rint(np.linalg.solve(like, affine)[:3, :3])
    if not ((np.abs(steps).sum(0) == 1).all() and (np.abs(steps).sum(1) == 1).all()):
        return None
    return np.stack([np.abs(steps).argmax(0), steps.sum(0)], -1)


def offsets(shape: Sequence[int], affine: Array, like: Array) -> Array:
    """How many voxels (8, 3) of another grid the corners of one are away from the same voxels of the other."""
    corners = lattice(shape, 2)
    return apply_affine(np.linalg.solve(like, affine), corners) - corners


def _angle(affine: Array, like: Array) -> float:
    """The largest angle in radians between an axis of a grid and the same axis of another."""
    here, there = (grid[:3, :3] / voxel_sizes(grid) for grid in (affine, like))
    return float(2 * np.arcsin(np.clip(np.linalg.norm(here - there, axis=0) / 2, 0, 1)).max())


def _farthest(shape: Sequence[int], affine: Array, like: Array) -> str:
    """How far the corner is that lies farthest from the same voxel of another grid, in words."""
    off = offsets(shape, affine, like)
    return _way(off[np.abs(off).max(1).argmax()], like)


def _way(steps: Array, affine: Array) -> str:
    """A way (3,) in voxels, in words."""
    way = affine[:3, :3] @ steps
    return f"{np.linalg.norm(way):.3g} mm ({', '.join(f'{round(step, 2) + 0.0:g}' for step in steps)} voxels)"


def _differences(shape: Sequence[int], image: nib.Nifti1Image, like: nib.Nifti1Image) -> list[str]:
    """What tells a grid from another, a part of a sentence each."""
    wanted, affine = like.shape[:3], image.affine
    turn = orientations.ornt_transform(orientations.io_orientation(affine), orientations.io_orientation(like.affine))
    turned = _turned_shape(shape, turn)
    affine = affine @ orientations.inv_ornt_aff(turn, shape)
    found = []
    codes, wanted_codes = ("".join(map(str, nib.aff2axcodes(grid.affine))) for grid in (image, like))
    if codes != wanted_codes:
        found.append(f"its orientation is {codes}, not {wanted_codes}")
    if turned != wanted:
        found.append(f"it has {sizes(turned)} voxels, not {sizes(wanted)}")
    here, there = voxel_sizes(affine), voxel_sizes(like.affine)
    if np.abs(here / there - 1).max() > ALIKE / max(1, *(size - 1 for size in wanted)):
        ours, theirs = ("×".join(f"{float(f'{size:.6g}')}" for size in lengths) for lengths in (here, there))
        if ours != theirs:
            found.append(f"its voxels have {ours} mm by its affine, not {theirs}")
    if (angle := _angle(affine, like.affine)) > TURNED:
        found.append(f"its axes are turned by {np.degrees(angle):.1f}°")
    way = np.linalg.solve(like.affine[:3, :3], affine[:3, 3] - like.affine[:3, 3])
    if np.abs(way).max() >= ALIKE:
        found.append(f"its origin is {_way(way, like.affine)} off")
    if not any(int(image.header[code]) for code in ("sform_code", "qform_code")):
        found.append("its header has neither qform nor sform")
    found += _forms(shape, image, like)
    return found or ["its far corner lies a voxel off or more"]


def _forms(shape: Sequence[int], image: nib.Nifti1Image, like: nib.Nifti1Image) -> list[str]:
    """Where the qform of either header, which the sform overrides, puts the one on the other: that, in words."""

    def fits(affine: Array | None, other: Array | None) -> bool:
        if affine is None or other is None:
            return False
        turn, off = _find_turn(shape, affine, like.shape[:3], other)
        return turn is not None and not off

    ours, theirs = _unused_qform(image), _unused_qform(like)
    if fits(ours, like.affine):
        return ["its qform lies on that grid, its sform does not"]
    if fits(image.affine, theirs):
        return ["it lies on the grid of the other's qform, not on that of its sform"]
    if fits(ours, theirs):
        return ["the two agree by their qforms, not by their sforms"]
    return []


def _unused_qform(image: nib.Nifti1Image) -> Array | None:
    """The qform of a header whose sform is used; None where there is no other."""
    if not (int(image.header["sform_code"]) and int(image.header["qform_code"])):
        return None
    try:
        affine = image.header.get_qform()
    except nib.spatialimages.HeaderDataError:  # a qform that is none
        return None
    return affine if abs(np.linalg.det(affine[:3, :3])) > 0 else None
