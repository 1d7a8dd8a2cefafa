"""Lesion masks that are more than one file of zeros and ones: those of several raters, and one with several labels."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from rsanet.segment.volumes import MaskSource, read_mask, read_volume, same_grid
from rsanet.segment.words import sizes

# How the masks of several raters make one: the least share of them that has to call a voxel lesion.
RULES = ("majority", "union", "intersection")


@dataclass(frozen=True)
class RatersMask(MaskSource):
    """The mask that a rule makes of those of several raters.

    Attributes:
        rule: ``majority``, more than half of the raters, so that a tie is no lesion; ``union``, any; or
            ``intersection``, all.
        masks: the raters' masks by name.
    """

    rule: str
    masks: Mapping[str, Path | MaskSource]

    def __str__(self) -> str:
        return f"the {self.rule} of {' and '.join(map(str, self.masks.values()))}"

    @property
    def files(self) -> tuple[Path, ...]:
        """The raters' files."""
        return tuple(file for mask in self.masks.values() for file in files_of(mask))

    def read(self) -> tuple[np.ndarray, nib.Nifti1Image]:
        """The mask and the grid of the first rater's.

        Raises:
            ValueError: the masks are on different grids.
        """
        votes: np.ndarray | None = None
        for mask in self.masks.values():
            lesion, image = read_mask(mask)
            if votes is None:
                votes, first, grid = lesion.astype(np.int16), mask, image
            elif not same_grid(grid, image):
                raise ValueError(
                    f"{mask} ({sizes(image.shape[:3])}) is on another grid than {first} ({sizes(grid.shape[:3])}): "
                    "resample the one to the other, or give one of them as --raters."
                )
            else:
                votes += lesion
        least = {"union": 1, "majority": len(self.masks) // 2 + 1, "intersection": len(self.masks)}[self.rule]
        return votes >= least, grid

    def ignored(self) -> np.ndarray | None:
        """Voxels that any rater leaves out."""
        parts = [part for mask in self.masks.values() if (part := ignored_voxels(mask)) is not None]
        return np.logical_or.reduce(parts) if parts else None


@dataclass(frozen=True)
class LabelledMask(MaskSource):
    """A mask file with 1 for lesion and 2 for what is no lesion of this kind, and counts neither for nor against.

    Attributes:
        path: the file.
        other: what the label 2 means, in words.
    """

    path: Path
    other: str

    def __str__(self) -> str:
        return str(self.path)

    @property
    def files(self) -> tuple[Path, ...]:
        """The file."""
        return (self.path,)

    def read(self) -> tuple[np.ndarray, nib.Nifti1Image]:
        """Where the label is 1.

        Raises:
            ValueError: there are other labels than 0, 1 and 2.
        """
        voxels, image = self._labels()
        return voxels == 1, image

    def ignored(self) -> np.ndarray | None:
        """Where the label is 2; None where that is nowhere."""
        other = self._labels()[0] == 2
        return other if other.any() else None

    def _labels(self) -> tuple[np.ndarray, nib.Nifti1Image]:
        voxels, image = read_volume(self.path)
        if foreign := [f"{label:g}" for label in np.unique(voxels) if label not in (0, 1, 2)]:
            raise ValueError(
                f"{self.path} has the label {foreign[0]}: give a mask of 0, 1 for lesion and 2 for {self.other}."
            )
        return voxels, image


def files_of(mask: object) -> tuple[Path, ...]:
    """The files behind a mask; none of one that is in memory."""
    if isinstance(mask, MaskSource):
        return mask.files
    return (mask,) if isinstance(mask, Path) else ()


def ignored_voxels(mask: object) -> np.ndarray | None:
    """Where a reference mask counts neither for nor against a prediction, ``(X, Y, Z)``; None where it is complete."""
    return mask.ignored() if isinstance(mask, MaskSource) else None


def find_rater(wanted: str, names: Sequence[str]) -> str | None:
    """The rater that is meant, by the whole name or by a word that no other has; None where that is nobody.

    So ``3`` is ``ManualSegmentation_3``.
    """
    wanted = wanted.lower()
    whole = [name for name in names if name.lower() == wanted]
    split = [name for name in names if wanted in re.split(r"[_\-./]", name.lower())]
    found = whole or split
    return found[0] if len(found) == 1 else None
