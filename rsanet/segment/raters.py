"""Lesion masks that are more than one file of zeros and ones: those of several raters, and one with several labels."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from rsanet.segment.geometry import align
from rsanet.segment.volumes import MaskSource, read_labels, read_mask

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
        first, *others = self.masks.values()
        lesion, grid = read_mask(first)
        votes = lesion.astype(np.int16)
        for mask in others:
            votes += self._on_first(*read_mask(mask), mask, grid)
        least = {"union": 1, "majority": len(self.masks) // 2 + 1, "intersection": len(self.masks)}[self.rule]
        return votes >= least, grid

    def ignored(self) -> np.ndarray | None:
        """Voxels that any rater leaves out."""
        parts = [(mask, part) for mask in self.masks.values() if (part := ignored_voxels(mask)) is not None]
        if not parts:
            return None
        grid = read_mask(next(iter(self.masks.values())))[1]
        return np.logical_or.reduce([self._on_first(part, read_mask(mask)[1], mask, grid) for mask, part in parts])

    def _on_first(
        self, voxels: np.ndarray, image: nib.Nifti1Image, mask: Path | MaskSource, grid: nib.Nifti1Image
    ) -> np.ndarray:
        """What a rater says, in the order of the first rater's voxels."""
        first = next(iter(self.masks.values()))
        advice = "resample the one to the other, or give one of them as --raters"
        return align(voxels, image, grid, str(mask), str(first), advice)


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
        voxels, image = read_labels(self.path)
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
