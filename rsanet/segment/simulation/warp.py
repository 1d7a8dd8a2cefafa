"""How a patient's head differs from the template: a smooth asymmetric warp with wider ventricles."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional as F

from rsanet.segment.scenario import Scenario
from rsanet.segment.simulation.anatomy import Anatomy
from rsanet.segment.simulation.grid import CENTRE, FIELD_OF_VIEW, Grid

Array = np.ndarray


def sample(maps: torch.Tensor, origin: Array, step: float, points: torch.Tensor) -> torch.Tensor:
    """Trilinear values of maps (K, X, Y, Z) at world points (..., 3): (K, ...)."""
    size = torch.tensor(maps.shape[1:], dtype=torch.float32)
    index = (points - torch.as_tensor(origin, dtype=torch.float32)) / step
    grid = (2 * index / (size - 1) - 1).flip(-1).reshape(1, -1, 1, 1, 3)
    values = F.grid_sample(maps[None], grid, mode="bilinear", padding_mode="border", align_corners=True)
    return values.reshape(maps.shape[0], *points.shape[:-1])


def random_field(rngs: Sequence[np.random.Generator], knots_mm: float) -> tuple[torch.Tensor, Array, float]:
    """Standard normal values at knots that cover the field of view: (maps, origin, step) for :func:`sample`.

    Each generator draws a map. Widely spaced knots are joined by cubic splines first, so that the field is smooth,
    not merely continuous.
    """
    knots = np.ceil(FIELD_OF_VIEW / knots_mm).astype(int) + 3
    origin = CENTRE - (knots - 1) * knots_mm / 2
    values = np.stack([rng.standard_normal(tuple(knots), dtype=np.float32) for rng in rngs])
    finer = 4
    if knots_mm < 10:
        return torch.from_numpy(values), origin, knots_mm
    values = np.stack([ndimage.zoom(value, ((knots - 1) * finer + 1) / knots, order=3) for value in values])
    return torch.from_numpy(values), origin, knots_mm / finer


@dataclass(frozen=True)
class Warp:
    """From the patient's world to the template's: an affine map, then a smooth displacement.

    Attributes:
        matrix: (3, 3) about the centre of the field of view.
        displacement: (3, X, Y, Z) mm on a grid over the field of view.
        origin: world mm of that grid's first voxel.
        step: its voxel size in mm.
    """

    matrix: torch.Tensor
    displacement: torch.Tensor
    origin: Array
    step: float

    def __call__(self, points: torch.Tensor) -> torch.Tensor:
        """Template points of the patient's points (..., 3)."""
        centre = torch.as_tensor(CENTRE, dtype=torch.float32)
        linear = (points - centre) @ self.matrix.T + centre
        return linear + sample(self.displacement, self.origin, self.step, linear).movedim(0, -1)

    def inverse(self, points: torch.Tensor) -> torch.Tensor:
        """The patient's points of template points, by fixed-point iteration: the displacement contracts."""
        guess = points
        for _ in range(20):
            guess = guess + (points - self(guess))
        return guess


def draw_warp(rng: np.random.Generator, anatomy: Anatomy, scenario: Scenario) -> Warp:
    """Draw the shape of a head."""
    angles = rng.normal(0, np.deg2rad(2), 3)
    scales = rng.uniform(0.97, 1.06, 3)  # patient to template: above 1 is a smaller head
    matrix = _rotation(angles) @ np.diag(scales)
    coarse_mm, fine_mm = scenario.warp_mm
    step = 4.0
    grid = Grid.over_field_of_view((step, step, step), margin=3)
    points = grid.points()
    displacement = coarse_mm * sample(*random_field([rng] * 3, 40.0), points)
    displacement = displacement + fine_mm * sample(*random_field([rng] * 3, 16.0), points)
    # Sampling closer to the ventricle than one stands widens it; the effect fades into the tissue.
    distance = sample(anatomy.maps[5:6], anatomy.origin, 1.0, points)[0].numpy()
    smooth = ndimage.gaussian_filter(distance, 0.75)
    slope = np.stack(np.gradient(smooth, step))
    pull = rng.uniform(*scenario.enlargement_mm) * np.exp(-np.clip(smooth, 0, None) / 8)
    displacement = displacement - torch.from_numpy((pull * slope).astype(np.float32))
    return Warp(torch.tensor(matrix, dtype=torch.float32), displacement, grid.origin, step)


def _rotation(angles: Array) -> Array:
    """Rotation about x, then y, then z, by angles in radians."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x
