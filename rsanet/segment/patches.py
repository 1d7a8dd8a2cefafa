"""Patches to train on: their size, and which one each step sees."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from monai.transforms import Compose
from torch.utils.data import Dataset

LARGEST_PATCH = {"cuda": 128**3, "cpu": 64**3}  # voxels; larger ones cost more time than they gain
BYTES = 100  # that a step takes per voxel and channel of full resolution; measured: 80 in float32, 57 in bfloat16


def choose_patch(
    shapes: Sequence[Sequence[int]], channels: Sequence[int], memory: float, samples: int, device: str
) -> tuple[int, int, int]:
    """The largest patch that the volumes fill and the memory holds.

    Args:
        shapes: voxels of the prepared volumes along z, y and x.
        channels: widths of the network's levels, the finest first.
        memory: bytes that a step may take.
        samples: patches that a device computes at once.
        device: ``cuda`` or ``cpu``.

    Returns:
        Multiples of the network's stride along z, y and x, in the proportions of the median volume; where it is not
        thinner, twice the stride at least, as memory allows: attention over a single slice is none.
    """
    stride = 2 ** (len(channels) - 1)
    wide = sum(width / 8**level for level, width in enumerate(channels))
    most = min(LARGEST_PATCH[device], memory / (samples * wide * BYTES))
    median = np.median(np.asarray(shapes), axis=0)
    strides = np.ceil(median / stride).astype(int)
    while np.prod(strides * stride) > most and strides.max() > 1:
        # The axis whose patch covers the most of the volume gives way.
        least = 2 if strides.max() > 2 else 1
        covered = np.where(strides > least, strides * stride / median, 0)
        strides[covered.argmax()] -= 1
    return tuple((strides * stride).tolist())


class Patches(Dataset):
    """The patches of a training run in order, each a function of the seed and of its place alone.

    So a run that is taken up again, has workers, or is shared by several processes sees the same patches.

    Args:
        volumes: prepared cases.
        transform: cuts a random patch.
        seed: of the run.
        batch: patches per step of all processes together.
        steps: the steps to deal patches for, counted from 0.
        rank: number of this process.
        world: number of processes, which share each batch.
    """

    def __init__(
        self,
        volumes: Sequence[dict[str, Any]],
        transform: Compose,
        seed: int,
        batch: int,
        steps: range,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.volumes = volumes
        self.transform = transform
        self.seed = seed
        self.batch = batch
        self.steps = steps
        self.rank = rank
        self.share = batch // world

    def __len__(self) -> int:
        return len(self.steps) * self.share

    def __getitem__(self, index: int) -> dict[str, Any]:
        step, place = divmod(index, self.share)
        number = self.steps[step] * self.batch + self.rank * self.share + place
        # Every case is seen once before any is seen again.
        turn, place = divmod(number, len(self.volumes))
        case = np.random.default_rng((self.seed, turn)).permutation(len(self.volumes))[place]
        self.transform.set_random_state(seed_of(self.seed, number))
        return self.transform(self.volumes[int(case)])[0]


def seed_of(*numbers: int) -> int:
    """A seed of 32 bits from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
