"""What a training run can be told. Imports at once, so that the command line knows the defaults."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

PRECISIONS = ("auto", "fp32", "bf16")
ATTENTIONS = ("rsa", "non_local", "none")
LARGEST_VOXEL = 20  # mm; no lesion survives more


@dataclass(frozen=True)
class Recipe:
    """Settings of a training run. The widths are those of the published network.

    Args:
        steps: optimizer steps.
        patch: voxels of a training patch along z, y and x, and of the window at prediction.
        batch: patches per step.
        lr: peak learning rate, reached after the warm-up.
        channels: widths of the network's levels, the finest first.
        attention: ``rsa``, ``non_local`` or ``none``, at the coarsest level.
        attention_scale: factor on the logits of the attention. 1 is as published; the logits sum over a whole slice,
            so the softmax then picks single slices. About 1 / (channels × voxels of a slice) keeps it graded.
        dropout: dropout probability of the network.
        spacing: voxel size in mm along z, y and x to resample to, or None for the images' own.
        val_fraction: share of the cases held out for validation; with 0 the last weights are kept.
        validate_every: steps between two validations, or None for five validations in all.
        seed: fixes the split, the initial weights, the patches and the augmentation.
        precision: ``auto``, ``fp32`` or ``bf16``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        workers: processes that prepare patches; 0 prepares them in the training process.
    """

    steps: int = 2000
    patch: tuple[int, int, int] = (64, 64, 64)
    batch: int = 2
    lr: float = 1e-3
    channels: tuple[int, ...] = (32, 64, 128, 256, 512)
    attention: str = "rsa"
    attention_scale: float = 1.0
    dropout: float = 0.2
    spacing: tuple[float, float, float] | None = None
    val_fraction: float = 0.2
    validate_every: int | None = None
    seed: int = 0
    precision: str = "auto"
    device: str = "auto"
    workers: int = 0

    def __post_init__(self) -> None:
        """Refuses what cannot train, before any file is read."""
        for name, smallest in (("steps", 1), ("batch", 1), ("workers", 0)):
            if getattr(self, name) < smallest:
                raise ValueError(f"--{name} is {getattr(self, name)}: give {smallest} or more.")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"--lr is {self.lr}: give a positive learning rate, for example 1e-3.")
        if not 0 < self.attention_scale < math.inf:
            raise ValueError(f"--attention-scale is {self.attention_scale}: give a positive factor, for example 1")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"--val-fraction is {self.val_fraction}: give a share from 0 up to, not including, 1.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout is {self.dropout}: give a probability from 0 up to, not including, 1.")
        if self.validate_every is not None and self.validate_every < 1:
            raise ValueError(f"--validate-every is {self.validate_every}: give 1 step or more.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed is {self.seed}: give a whole number from 0 to {2**32 - 1}.")
        if len(self.channels) < 2 or min(self.channels) < 1:
            raise ValueError(f"--channels are {self.channels}: give one positive width per level, two or more.")
        if self.spacing is not None and not all(0 < size <= LARGEST_VOXEL for size in self.spacing):
            raise ValueError(f"--spacing is {self.spacing}: give voxel sizes in mm, above 0 and up to {LARGEST_VOXEL}.")
        if self.attention not in ATTENTIONS:
            raise ValueError(f"--attention is {self.attention!r}: give one of {', '.join(ATTENTIONS)}.")
        if min(self.patch) < 1:
            raise ValueError(f"--patch is {self.patch}: give positive sizes in voxels")

    @property
    def steps_between_validations(self) -> int:
        """The chosen interval, or a fifth of the run."""
        return min(self.validate_every or -(-self.steps // 5), self.steps)


def triple(values: Sequence[float], name: str) -> tuple:
    """Three values from one (repeated) or three."""
    if len(values) not in (1, 3):
        raise ValueError(f"{name} has {len(values)} values: give one for all the axes, or three.")
    return tuple(values) * (3 // len(values))
