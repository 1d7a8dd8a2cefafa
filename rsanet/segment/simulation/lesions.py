"""Lesions as they are drawn: where multiple sclerosis puts them, in millimetres, and what becomes of them.

They are drawn in the template's space, whatever the voxels, so that the same seed is the same patient on every grid.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from rsanet.segment.scenario import LOADS, Scenario
from rsanet.segment.simulation.anatomy import Anatomy
from rsanet.segment.simulation.contrasts import SIGNALS
from rsanet.segment.simulation.streams import stream
from rsanet.segment.simulation.warp import Warp

Array = np.ndarray

FEWEST, MOST = 4, 150  # lesions of a patient, unless the load is "none"
SMALLEST_MM3, LARGEST_MM3 = 5.0, 6000.0
CLEARANCE_MM = 3.0  # between the lesion that appears and those that are there
TRIES = 30  # to find a place for it

# From one session to the next.
GROWING, SHRINKING, VANISHING = 0.12, 0.12, 0.05  # shares of the lesions
GROWTH, SHRINKAGE = (1.4, 2.5), (0.35, 0.7)  # ranges of the factor on the volume
APPEARING = 0.1  # mean number of new lesions, as a fraction of the load's median number


@dataclass(frozen=True)
class LesionKind:
    """One place where lesions arise, and their sizes and shapes there.

    Attributes:
        share: fraction of the lesions.
        median_mm3: median of the log-normal volume.
        spread: standard deviation of the log volume.
        elongation: range of the semi-axis along the gradient of the distance, over the mean of the other two.
            Above 1 the lesion points away from the surface (Dawson's fingers), below 1 it lies along it.
        offset: how far, in semi-axes, the centre lies from the drawn voxel along that gradient.
    """

    share: float
    median_mm3: float
    spread: float
    elongation: tuple[float, float]
    offset: float = 0.0


LESION_KINDS = {
    "periventricular": LesionKind(0.45, 130.0, 0.8, (1.5, 2.8), offset=0.7),
    "juxtacortical": LesionKind(0.2, 70.0, 0.7, (0.5, 0.9)),
    "deep": LesionKind(0.25, 70.0, 0.7, (0.8, 1.5)),
    "infratentorial": LesionKind(0.1, 60.0, 0.7, (0.8, 1.5)),
}


@dataclass(frozen=True)
class Lesion:
    """One drawn ellipsoid, in the patient's world millimetres.

    Attributes:
        kind: where it arose.
        centre: (3,) mm.
        axes: (3, 3), the rows orthonormal.
        semi_axes: (3,) mm along them.
        edge_mm: width of its soft edge.
        outline: (5, 5, 5) random knots of its irregular outline.
        signal: per contrast, as a fraction of the brightest tissue.
    """

    kind: str
    centre: Array
    axes: Array
    semi_axes: Array
    edge_mm: float
    outline: Array
    signal: dict[str, float]


def draw_lesions(seed: int, anatomy: Anatomy, warp: Warp, scenario: Scenario) -> list[Lesion]:
    """Draw the lesions of a patient's first session. A heavier load has those of a lighter one, larger, and more."""
    count, factor = _load(seed, scenario)
    return [_draw_lesion(stream(seed, "lesion", number), anatomy, warp, scenario, factor) for number in range(count)]


def _load(seed: int, scenario: Scenario) -> tuple[int, float]:
    """The number of a patient's lesions, and the factor on their volumes."""
    median, factor = LOADS[scenario.load]
    if not median:
        return 0, 0.0
    more, larger = stream(seed, "load").normal(size=2)
    count = round(median * np.exp(scenario.count_spread * more))
    return int(np.clip(count, FEWEST, MOST)), factor * float(np.exp(scenario.volume_spread * larger))


def follow_lesions(
    before: list[Lesion], session: int, seed: int, anatomy: Anatomy, warp: Warp, scenario: Scenario
) -> list[Lesion]:
    """The lesions of a session from those of the one before: some grow, shrink or vanish, and others appear.

    A lesion appears clear of all others, so that it is one of its own in the mask, too.
    """
    lesions = []
    for number, lesion in enumerate(before):
        rng = stream(seed, "fate", session, number)
        chance = rng.random()
        if chance < VANISHING:
            continue
        factor = 1.0
        if chance < VANISHING + SHRINKING:
            factor = rng.uniform(*SHRINKAGE)
        elif chance < VANISHING + SHRINKING + GROWING:
            factor = rng.uniform(*GROWTH)
        lesions.append(replace(lesion, semi_axes=lesion.semi_axes * np.cbrt(factor)) if factor != 1 else lesion)
    median, _ = LOADS[scenario.load]
    _, factor = _load(seed, scenario)
    for number in range(stream(seed, "appearing", session).poisson(APPEARING * median)):
        for attempt in range(TRIES):
            rng = stream(seed, "appearing", session, number, attempt)
            lesion = _draw_lesion(rng, anatomy, warp, scenario, factor, age=0.3)
            if all(_gap(lesion, other) > CLEARANCE_MM for other in (*before, *lesions)):
                lesions.append(lesion)
                break
    return lesions


def _gap(one: Lesion, other: Lesion) -> float:
    """Least distance in mm between the spheres around two lesions and their irregular outlines."""
    reach = 1.2 * (one.semi_axes.max() + other.semi_axes.max())
    return float(np.linalg.norm(one.centre - other.centre)) - reach


def _draw_lesion(
    rng: np.random.Generator, anatomy: Anatomy, warp: Warp, scenario: Scenario, factor: float, age: float = 1.0
) -> Lesion:
    """Draw place, size, shape and signal in template space, and carry them into the patient's.

    Args:
        rng: of this lesion alone.
        anatomy: the template.
        warp: the patient's.
        scenario: which kinds there are.
        factor: on the volume.
        age: from 0 to 1; a longer history destroys more tissue.
    """
    shares = np.array([LESION_KINDS[name].share for name in scenario.kinds])
    name = scenario.kinds[rng.choice(len(shares), p=shares / shares.sum())]
    kind = LESION_KINDS[name]
    volume = factor * kind.median_mm3 * np.exp(kind.spread * rng.normal())
    volume = float(np.clip(volume, SMALLEST_MM3, LARGEST_MM3))
    distance = anatomy.distance(name)
    index = np.unravel_index(rng.choice(anatomy.candidates[name]), distance.shape)
    along = _slope(distance, index)
    elongation = rng.uniform(*kind.elongation)
    flattening = rng.uniform(0.8, 1.25)
    across = (volume / (4 / 3 * np.pi * elongation)) ** (1 / 3)
    semi_axes = np.array([elongation * across, flattening * across, across / flattening])
    # Its near end on the surface it grows from: the ventricle's wall, or the cortex.
    centre = anatomy.origin + np.array(index) + kind.offset * rng.uniform(0.8, 1.2) * semi_axes[0] * along
    ends = warp.inverse(torch.tensor(np.stack([centre, centre + 2 * along]), dtype=torch.float32)).numpy()
    axes = _frame(ends[1] - ends[0], rng.normal(size=3))
    destruction = age * rng.beta(1.2, 3.0) * min(1.0, 0.5 + volume / 600)  # large lesions are the older ones
    outline = rng.standard_normal((5, 5, 5))
    edge_mm = rng.uniform(0.3, 0.9)
    # Every contrast is drawn, whichever are wanted: a choice of contrasts leaves the others' signals as they are.
    signal = {}
    for contrast, tissue in SIGNALS.items():
        mean = tissue.lesion + destruction * (tissue.hole - tissue.lesion)
        signal[contrast] = float(mean * np.exp(0.07 * rng.normal()))
    return Lesion(name, ends[0].astype(float), axes, semi_axes, edge_mm, outline, signal)


def _slope(distance: Array, index: tuple[np.intp, ...]) -> Array:
    """Unit gradient of a distance map at a voxel, over 2 voxels on each side to look past its roughness."""
    slope = np.empty(3)
    for axis in range(3):
        near, far = list(index), list(index)
        near[axis], far[axis] = index[axis] - 2, index[axis] + 2
        slope[axis] = float(distance[tuple(far)]) - float(distance[tuple(near)])
    return slope / max(float(np.linalg.norm(slope)), 1e-6)


def _frame(along: Array, other: Array) -> Array:
    """Orthonormal rows, the first along the given direction."""
    first = along / max(float(np.linalg.norm(along)), 1e-6)
    second = other - (other @ first) * first
    second = second / np.linalg.norm(second)
    return np.stack([first, second, np.cross(first, second)])
