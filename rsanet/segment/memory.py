"""What a network takes of the memory that is free, and what to say where that does not suffice."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from rsanet.network import RSANet
from rsanet.segment.environment import Precision

# Volumes of the finest level that live at once where the memory peaks, in the last stage of the decoder: where it
# convolves its two inputs apart, and where it joins them. Measured on a CPU in float32 and in bfloat16: 4.6 to 5.4 for
# windows of 48×48×48 and 64×64×64, 3.8 to 4.2 for 96×96×96, 3.5 for a whole brain; joined, in odd sizes, 6.7 to 7.5.
FINEST_VOLUMES, FINEST_VOLUMES_JOINED = 5, 8
SHARE = 0.8  # of the free memory that one pass may take


def forward_bytes(network: RSANet, window: Sequence[int], precision: Precision) -> int:
    """About how many bytes a forward pass of one window takes besides the weights."""
    width, size = network.config["channels"][0], 2 if precision.name == "bf16" else 4
    below = [-(-length // 2) for length in window]
    apart = network.up_concat1.can_split(next(network.parameters()).device, 1, below, window)
    return (FINEST_VOLUMES if apart else FINEST_VOLUMES_JOINED) * width * size * math.prod(window)


@contextmanager
def lack_told(what: str, advice: str) -> Iterator[None]:
    """Within it, a lack of memory on any device is a ValueError in one sentence.

    Args:
        what: what does not fit.
        advice: what to do about it.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # A processor's allocator has no error of its own.
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            raise ValueError(f"{what} does not fit into memory: {advice}.") from error
        raise
