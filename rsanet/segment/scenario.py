"""What a simulated cohort can be told. Imports at once, so that the command line knows the words and the defaults."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONTRASTS = ("FLAIR", "T1w", "T2w", "PDw")
KINDS = ("periventricular", "juxtacortical", "deep", "infratentorial")
# Median number of lesions, and the factor on their volumes. The loads that follow are in `Scenario`.
LOADS: Mapping[str, tuple[float, float]] = {
    "none": (0.0, 0.0),
    "light": (12.0, 0.6),
    "typical": (30.0, 1.0),
    "heavy": (60.0, 1.6),
}
PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}  # the axis (x, y, z) across the slices
SMALLEST_VOXEL, LARGEST_VOXEL = 0.5, 8.0  # mm
LARGEST_NOISE = 0.5
MOST_SESSIONS = 9
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Scenario:
    """Everything about the patients of a cohort but their seeds.

    Args:
        spacing: voxel size in mm along x, y, z, each from 0.5 to 8.
        slice_thickness: thickness of the slices in mm, in place of the voxel size across them; None leaves it.
        plane: ``axial``, ``coronal`` or ``sagittal`` slices.
        contrasts: which images each session has, of FLAIR, T1w, T2w and PDw.
        load: ``none``, ``light``, ``typical`` or ``heavy``; each has more and larger lesions than the one before. The
            first 40 patients of seed 0 at 1 mm have medians of 1.3 mL (light) and 4.6 mL (typical).
        kinds: where lesions arise, of periventricular, juxtacortical, deep and infratentorial. Those that are left
            keep their proportions.
        sessions: scans of each patient, up to 9. From one to the next, lesions appear, grow, shrink and vanish.
        noise: standard deviation of the noise in each channel, as a fraction of the brightest tissue, up to 0.5.
        bias: standard deviation of the log of the bias field at its knots.
        texture: relative standard deviation of the smooth texture of the tissue.
        count_spread: standard deviation, between patients, of the log number of lesions.
        volume_spread: standard deviation, between patients, of the log factor on all their lesion volumes.
        warp_mm: displacement (standard deviation) at the knots of the coarse and the fine control grid.
        enlargement_mm: range of the widening of the lateral ventricles.

    Raises:
        ValueError: a value is out of its range, or a name is unknown.
    """

    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    slice_thickness: float | None = None
    plane: str = "axial"
    contrasts: tuple[str, ...] = ("FLAIR", "T1w", "T2w")
    load: str = "typical"
    kinds: tuple[str, ...] = KINDS
    sessions: int = 1
    noise: float = 0.025
    bias: float = 0.10
    texture: float = 0.03
    count_spread: float = 0.5
    volume_spread: float = 0.35
    warp_mm: tuple[float, float] = (2.2, 1.3)
    enlargement_mm: tuple[float, float] = (0.0, 2.5)

    def __post_init__(self) -> None:
        """Refuses what cannot be simulated, and puts names into the order of their tables."""
        sizes = f"from {SMALLEST_VOXEL} to {LARGEST_VOXEL:g}"
        if len(self.spacing) != 3 or not all(SMALLEST_VOXEL <= size <= LARGEST_VOXEL for size in self.spacing):
            raise ValueError(f"--spacing is {_listed(self.spacing)}: give voxel sizes in mm, each {sizes}.")
        if self.slice_thickness is not None and not SMALLEST_VOXEL <= self.slice_thickness <= LARGEST_VOXEL:
            raise ValueError(f"--slice-thickness is {self.slice_thickness}: give a thickness in mm, {sizes}.")
        if self.plane not in PLANES:
            raise ValueError(f"--plane is {self.plane!r}: give axial, coronal or sagittal.")
        if self.slice_thickness is None and self.plane != "axial":
            raise ValueError(f"--plane is {self.plane}, but the slices have no thickness: give --slice-thickness, too.")
        if self.load not in LOADS:
            raise ValueError(f"--load is {self.load!r}: give one of {', '.join(LOADS)}.")
        if not 1 <= self.sessions <= MOST_SESSIONS:
            raise ValueError(f"--sessions is {self.sessions}: ask for 1 to {MOST_SESSIONS} scans of each patient.")
        if not 0 <= self.noise <= LARGEST_NOISE:
            raise ValueError(
                f"--noise is {self.noise}: give a fraction of the brightest tissue, from 0 to {LARGEST_NOISE}."
            )
        for name in ("bias", "texture", "count_spread", "volume_spread"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number of 0 or more.")
        object.__setattr__(self, "contrasts", _chosen("--contrasts", self.contrasts, CONTRASTS))
        object.__setattr__(self, "kinds", _chosen("--kinds", self.kinds, KINDS))

    @property
    def voxel_size(self) -> tuple[float, float, float]:
        """Voxel size in mm along x, y, z, with the slices as thick as they are."""
        size = list(self.spacing)
        if self.slice_thickness is not None:
            size[PLANES[self.plane]] = self.slice_thickness
        return (size[0], size[1], size[2])


def _chosen(option: str, names: Sequence[str], table: Sequence[str]) -> tuple[str, ...]:
    """The names in the table's order, or an error about the first that the table lacks."""
    if isinstance(names, str):
        names = (names,)
    if unknown := [name for name in names if name not in table]:
        raise ValueError(f"{option} has {unknown[0]!r}: give some of {', '.join(table)}.")
    if not names:
        raise ValueError(f"{option} is empty: give some of {', '.join(table)}.")
    return tuple(name for name in table if name in names)


def check_shares(shares: Sequence[float]) -> None:
    """Refuses shares of a split that are not three, negative, without training, or do not add up to 1."""
    if len(shares) != len(PARTS) or not all(share >= 0 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(
            f"--split is {_listed(shares)}: give the shares of train, validation and test, which add up to 1."
        )
    if shares[0] == 0:
        raise ValueError(f"--split is {_listed(shares)}: give the first part, train, a share above 0.")


def _listed(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)
