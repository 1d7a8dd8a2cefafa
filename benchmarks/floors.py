"""The least that a pass has to compute and to move, and so the least time that the hardware allows."""

import math
from collections.abc import Sequence
from typing import NamedTuple

# Volumes that a step has to read or write: x for the map, x and out for the mix; backward x and the gradient for the
# map, both and the gradient of x for the mix.
VOLUMES = {"forward": 3, "backward": 5}
# What the steps of a mode consist of.
PASSES = {"forward": ("forward",), "no_grad": ("forward",), "backward": ("backward",), "full": ("forward", "backward")}


class Ceilings(NamedTuple):
    """What the hardware does at its best, measured."""

    copy_gb_per_s: float
    matrix_gflop_per_s: float


class Floor(NamedTuple):
    """Of all steps of a block together."""

    gflop: float
    gbyte: float
    ms: float


def step_flops(shape: Sequence[int], axis: int, direction: str) -> int:
    """Operations of the folded algebra in one step; a multiply-add is two.

    Forward two projections and two products over slices. Backward there are two ways, and the cheaper one counts: six
    products with the weights and four over slices, or five and five.
    """
    channels, slices = shape[1], shape[axis]
    each = {
        "forward": 2 * channels + 2 * slices,
        "backward": min(6 * channels + 4 * slices, 5 * channels + 5 * slices),
    }
    return 2 * math.prod(shape) * each[direction]


def step_bytes(shape: Sequence[int], itemsize: int, direction: str) -> int:
    """Bytes that one step has to move: every input read once in each of its two passes, every output written once."""
    return VOLUMES[direction] * math.prod(shape) * itemsize


def floor(shape: Sequence[int], axes: Sequence[int], itemsize: int, mode: str, ceilings: Ceilings) -> Floor:
    """The sum over steps and directions of the time for bytes or for operations, whichever is longer.

    Args:
        shape: ``(N, C, D, H, W)``.
        axes: spatial dims of the steps.
        itemsize: bytes of an element.
        mode: forward, backward, full or no_grad.
        ceilings: of the hardware, for the dtype.
    """
    gflop = gbyte = ms = 0.0
    for axis in axes:
        for direction in PASSES[mode]:
            work, traffic = step_flops(shape, axis, direction) / 1e9, step_bytes(shape, itemsize, direction) / 1e9
            gflop, gbyte = gflop + work, gbyte + traffic
            ms += 1e3 * max(work / ceilings.matrix_gflop_per_s, traffic / ceilings.copy_gb_per_s)
    return Floor(gflop, gbyte, ms)
