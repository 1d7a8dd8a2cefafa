"""The voxels of a patient's images, the slices of which may be thicker than what they average."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

Array = np.ndarray

FIELD_OF_VIEW = np.array([176.0, 208.0, 176.0])  # mm; holds the largest warped brain with a margin
CENTRE = np.array([0.0, -17.0, 5.0])  # world mm; the middle of the template's brain
FINEST_PART = 1.0  # mm; the template has no more detail


@dataclass(frozen=True)
class Grid:
    """Voxel centres, on axes that point right, anterior, superior.

    Attributes:
        shape: (3,) number of voxels.
        origin: (3,) world mm of voxel (0, 0, 0).
        step: (3,) voxel size in mm.
    """

    shape: Array
    origin: Array
    step: Array

    @classmethod
    def over_field_of_view(cls, spacing: Sequence[float], margin: int = 0) -> "Grid":
        """The smallest grid over the field of view, and so many voxels more along each axis."""
        step = np.asarray(spacing, dtype=float)
        shape = np.ceil(FIELD_OF_VIEW / step - 1e-6).astype(int) + margin
        return cls(shape, CENTRE - (shape - 1) * step / 2, step)

    @property
    def affine(self) -> Array:
        """(4, 4) voxel to world mm."""
        affine = np.diag([*self.step, 1.0])
        affine[:3, 3] = self.origin
        return affine

    def parts(self) -> Array:
        """(3,) into how many parts to cut a voxel along each axis, so that they are about as wide as it is thin."""
        return np.maximum(np.round(self.step / max(self.step.min(), FINEST_PART)), 1).astype(int)

    def cut(self, parts: Array) -> "Grid":
        """The grid of the parts of the voxels."""
        step = self.step / parts
        return Grid(self.shape * parts, self.origin - (parts - 1) * step / 2, step)

    def points(self) -> torch.Tensor:
        """World points (X, Y, Z, 3) in mm."""
        lines = [
            torch.from_numpy((o + s * np.arange(n)).astype(np.float32))
            for n, o, s in zip(self.shape, self.origin, self.step, strict=True)
        ]
        return torch.stack(torch.meshgrid(*lines, indexing="ij"), dim=-1)


def average(volume: Array, parts: Array) -> Array:
    """The mean over the parts of each voxel: partial volumes."""
    if (parts == 1).all():
        return volume
    (x, y, z), (a, b, c) = volume.shape, parts
    return volume.reshape(x // a, a, y // b, b, z // c, c).mean((1, 3, 5), dtype=np.float32)


def repeat(volume: Array, parts: Array) -> Array:
    """The value of each voxel in all its parts."""
    for axis, count in enumerate(parts):
        volume = volume.repeat(count, axis) if count > 1 else volume
    return volume
