"""A simulated patient in memory: the images and masks of every session."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from rsanet.segment.scenario import Scenario
from rsanet.segment.simulation.anatomy import Anatomy, load_anatomy
from rsanet.segment.simulation.grid import Grid
from rsanet.segment.simulation.lesions import draw_lesions, follow_lesions
from rsanet.segment.simulation.painting import paint_lesions
from rsanet.segment.simulation.scan import make_head, scan
from rsanet.segment.simulation.streams import stream
from rsanet.segment.simulation.truth import compare_sessions, describe_lesions
from rsanet.segment.simulation.warp import draw_warp

Array = np.ndarray


@dataclass(frozen=True)
class Session:
    """One scan of a patient.

    Attributes:
        images: contrast to (X, Y, Z) int16, background 0.
        mask: (X, Y, Z) uint8, 1 in lesions.
        lesions: each 26-connected component of the mask: id, kind, voxels, volume_mm3, centre_mm. After the first
            session also fate, before and volume_before_mm3: see `rsanet.segment.simulation.truth.compare_sessions`.
        vanished: the lesions of the session before of which nothing is left; empty in the first session.
        new_mask: (X, Y, Z) uint8, 1 in the lesions that were not there before; None in the first session.
    """

    images: dict[str, Array]
    mask: Array
    lesions: list[dict[str, Any]]
    vanished: list[dict[str, Any]]
    new_mask: Array | None


@dataclass(frozen=True)
class Patient:
    """A simulated patient.

    Attributes:
        sessions: one or more, all on one grid.
        affine: (4, 4) voxel to world mm, axes right, anterior, superior.
        seed: the patient's seed.
        scenario: what else the patient was made from.
    """

    sessions: list[Session]
    affine: Array
    seed: int
    scenario: Scenario


def simulate_patient(seed: int, scenario: Scenario | None = None, anatomy: Anatomy | None = None) -> Patient:
    """Simulate one patient.

    Shape, lesions, appearance and noise each draw from a random stream of their own: a setting of one leaves the
    others as they are. The first session is the same however many follow.

    Args:
        seed: the patient's seed, 0 or more.
        scenario: everything else; the defaults if None.
        anatomy: the template; loaded if None.

    Returns:
        The patient. The same seed, scenario and versions of the libraries give the same bits.

    Raises:
        ValueError: the seed is negative.
        RuntimeError: nilearn is not installed.
    """
    check_seed(seed)
    scenario = scenario or Scenario()
    anatomy = anatomy or load_anatomy()
    grid = Grid.over_field_of_view(scenario.voxel_size)
    warp = draw_warp(stream(seed, "shape"), anatomy, scenario)
    head = make_head(seed, anatomy, warp, grid, scenario.contrasts)
    lesions = draw_lesions(seed, anatomy, warp, scenario)
    sessions: list[Session] = []
    for number in range(1, scenario.sessions + 1):
        if number > 1:
            lesions = follow_lesions(lesions, number, seed, anatomy, warp, scenario)
        painting = paint_lesions(lesions, head.white, grid)
        kinds = np.array([scenario.kinds.index(lesion.kind) for lesion in lesions] or [0])
        found = describe_lesions(painting.mask, grid.affine, kinds[painting.mask_owner], scenario.kinds)
        vanished: list[dict[str, Any]] = []
        new_mask = None
        if sessions:
            before = sessions[-1]
            found, vanished, new_mask = compare_sessions(painting.mask, found, before.mask, before.lesions)
        images = scan(seed, number, head, lesions, painting, scenario)
        sessions.append(Session(images, painting.mask, found, vanished, new_mask))
    return Patient(sessions, grid.affine, seed, scenario)


def check_seed(seed: int) -> None:
    """Refuses a negative seed."""
    if seed < 0:
        raise ValueError(f"--seed is {seed}: give a whole number of 0 or more.")
