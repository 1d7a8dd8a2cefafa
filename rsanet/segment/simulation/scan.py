"""Images of a head: tissue and lesions under a bias field and Rician noise, averaged over the voxels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import special

from rsanet.segment.scenario import Scenario
from rsanet.segment.simulation.anatomy import Anatomy, averaged_maps
from rsanet.segment.simulation.contrasts import SIGNALS, Contrast
from rsanet.segment.simulation.grid import Grid, average
from rsanet.segment.simulation.lesions import Lesion
from rsanet.segment.simulation.painting import Painting
from rsanet.segment.simulation.streams import stream
from rsanet.segment.simulation.warp import Warp, random_field, sample

Array = np.ndarray


@dataclass(frozen=True)
class Head:
    """A patient's head without lesions, on the parts of the voxels, of which N are brain.

    Attributes:
        inside: (X·a, Y·b, Z·c) bool: which parts are brain.
        white: the same shape: fraction of white matter, 0 outside the brain.
        share: (X, Y, Z) float32: how much of each voxel is brain.
        parts: (3,) how many parts a voxel has along each axis.
        points: (N, 3) world mm.
        tissue: names to (N,) values: ``t1`` of the template, fractions ``csf``, ``grey`` and ``white``, and ``rim``,
            the bright rim of the ventricles.
        texture: contrasts to (N,) standard normal values.
        means: the template's mean T1 of CSF, grey and white matter.
    """

    inside: Array
    white: Array
    share: Array
    parts: Array
    points: torch.Tensor
    tissue: dict[str, Array]
    texture: dict[str, Array]
    means: tuple[float, float, float]

    @property
    def brain(self) -> Array:
        """(X, Y, Z) bool: the voxels that the images show."""
        return self.share > 0.5

    def averaged(self, signal: Array) -> Array:
        """The mean of (N,) values over the brain in each voxel of the brain."""
        if (self.parts == 1).all():
            return signal
        volume = np.zeros(self.inside.shape, np.float32)
        volume[self.inside] = signal
        return average(volume, self.parts)[self.brain] / self.share[self.brain]


def make_head(seed: int, anatomy: Anatomy, warp: Warp, grid: Grid, contrasts: Sequence[str]) -> Head:
    """Warp the template into a patient's head, with the texture that stays from scan to scan."""
    parts = grid.parts()
    fine = grid.cut(parts)
    points = fine.points()
    maps = sample(averaged_maps(anatomy, tuple(fine.step.tolist())), anatomy.origin, 1.0, warp(points))
    t1, grey, white, csf, brain, to_ventricles = maps.numpy()
    inside = brain > 0.5
    points = points[torch.from_numpy(inside)]
    tissue = {"t1": t1[inside], "grey": grey[inside], "white": white[inside], "csf": csf[inside]}
    # The normal bright rim of the ventricles, patchy and of varying width: bright on FLAIR, and not a lesion.
    patchy = sample(*random_field([stream(seed, "rim")] * 2, 14.0), points).numpy()
    width = 0.8 + 1.0 * special.expit(1.5 * patchy[0])
    strength = special.expit(2.0 * patchy[1])
    depth = (to_ventricles[inside] - 1.2) / width  # CSF still fills part of the voxels of the wall itself
    tissue["rim"] = strength * np.exp(-(depth**2)) * (1 - tissue["csf"])
    texture = sample(*random_field([stream(seed, "texture", name) for name in contrasts], 2.5), points).numpy()
    return Head(
        inside,
        np.where(inside, white, 0),
        average(inside.astype(np.float32), parts),
        parts,
        points,
        tissue,
        dict(zip(contrasts, texture, strict=True)),
        anatomy.detail_means,
    )


def scan(
    seed: int, session: int, head: Head, lesions: Sequence[Lesion], painting: Painting, scenario: Scenario
) -> dict[str, Array]:
    """The images of one session, with a bias field and noise of its own: contrast to (X, Y, Z) int16."""
    names = scenario.contrasts
    bias = sample(*random_field([stream(seed, "bias", session, name) for name in names], 60.0), head.points).numpy()
    soft, owner = painting.soft[head.inside], painting.owner[head.inside]
    images = {}
    for name, log_bias in zip(names, bias, strict=True):
        contrast, texture = SIGNALS[name], scenario.texture * head.texture[name]
        levels = np.array([lesion.signal[name] for lesion in lesions] or [0], np.float32)
        signal = _healthy(contrast, head) * (1 + texture)
        signal = (1 - soft) * signal + soft * levels[owner] * (1 + 2 * texture)
        signal = head.averaged(signal * np.exp(scenario.bias * log_bias))
        noise = stream(seed, "noise", session, name).standard_normal((2, signal.size), dtype=np.float32)
        real, imaginary = scenario.noise * noise
        magnitude = np.sqrt((signal + real) ** 2 + imaginary**2)
        image = np.zeros(head.share.shape, np.int16)
        # Zero is kept for the background, so that `image > 0` is the brain.
        image[head.brain] = np.clip(np.round(contrast.gain * magnitude), 1, 32767)
        images[name] = image
    return images


def _healthy(contrast: Contrast, head: Head) -> Array:
    """(N,) signal of the tissue without lesions, texture and noise."""
    csf, grey, white = (head.tissue[name] for name in ("csf", "grey", "white"))
    signal = contrast.csf * csf + contrast.grey * grey + contrast.white * white
    detail = head.tissue["t1"] - (head.means[0] * csf + head.means[1] * grey + head.means[2] * white)
    signal = signal + contrast.detail * np.clip(detail, -0.25, 0.25) + contrast.rim * head.tissue["rim"]
    return np.clip(signal, 0.02, None)
