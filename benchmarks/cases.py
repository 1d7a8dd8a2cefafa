"""What is measured: volumes, axes, dtypes, memory formats."""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch

BLOCK_AXES = (3, 4, 2)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last_3d": torch.channels_last_3d}
# Name to the dtype of volumes and weights, and whether TensorFloat-32 is allowed.
DTYPES = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
    "tf32": (torch.float32, True),
    "float64": (torch.float64, False),
}

# A call on this one costs what a call costs before there is work.
CALL = "call"
SHAPES = {
    CALL: (1, 8, 2, 2, 2),
    "tiny 512": (1, 512, 10, 14, 10),
    "tiny 512 x2": (2, 512, 10, 14, 10),
    "wide 256": (1, 256, 20, 28, 20),
    "middle 128": (1, 128, 32, 32, 32),
    "middle 64": (1, 64, 48, 56, 48),
    "narrow 32": (1, 32, 64, 64, 64),
    # Just below 32 MiB in float32: larger allocations come fresh from the system, page by page, at every operation.
    "narrow 32, 31.5 MiB": (1, 32, 63, 64, 64),
    "narrow 32, 96": (1, 32, 96, 112, 96),
    "narrow 32, 128": (1, 32, 128, 128, 128),
    "narrow 32, 160": (1, 32, 160, 192, 160),
    "brain 16": (1, 16, 182, 218, 182),
    "odd 30": (1, 30, 29, 31, 37),
    "odd 65": (3, 65, 17, 19, 23),
    "odd 1": (1, 1, 61, 67, 71),
}
LARGE = ("narrow 32, 96", "narrow 32, 128", "narrow 32, 160", "brain 16")

# How cost grows with slices, channels, voxels and batch; the others stay.
SWEEPS = {
    "S": [(1, 64, slices, 48, 48) for slices in (1, 4, 16, 48, 96, 192)],
    "C": [(1, channels, 24, 24, 24) for channels in (8, 16, 32, 64, 128, 256, 512)],
    "V": [(1, 32, side, side, side) for side in (16, 32, 48, 64, 80, 96, 128, 160, 192, 224, 256)],
    "N": [(batch, 128, 16, 16, 16) for batch in (1, 2, 4, 8)],
}


class Case(NamedTuple):
    """A volume and what is done with it."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    memory_format: str = "contiguous"
    axes: tuple[int, ...] = BLOCK_AXES

    def __str__(self) -> str:
        axes = "" if self.axes == BLOCK_AXES else f" along {', '.join(map(str, self.axes))}"
        return f"{self.name}{axes} {self.dtype} {self.memory_format}"


def named(names: Sequence[str], dtypes: Sequence[str], formats: Sequence[str]) -> Iterator[Case]:
    """The cases of these names in these dtypes and memory formats."""
    for name, dtype, memory_format in product(names, dtypes, formats):
        yield Case(name, SHAPES[name], dtype, memory_format)


def single_axes(names: Sequence[str], dtype: str = "float32") -> Iterator[Case]:
    """Each axis alone."""
    for name, axis in product(names, BLOCK_AXES):
        yield Case(name, SHAPES[name], dtype, axes=(axis,))


def sweep(kind: str, dtype: str = "float32") -> Iterator[Case]:
    """The volumes of a sweep."""
    for shape in SWEEPS[kind]:
        yield Case(f"sweep {kind}", shape, dtype)


def everything() -> list[Case]:
    """All that ``make bench`` measures on a CPU, the most important first."""
    formats, usual = list(FORMATS), [name for name in SHAPES if name not in LARGE]
    return [
        *named(usual, ["float32"], formats),
        *named(usual, ["bfloat16"], formats),
        *named(LARGE, ["float32"], formats[:1]),
        *sweep("V"),
        *single_axes(["tiny 512", "middle 128", "narrow 32"]),
        *(case for kind in ("S", "C", "N") for case in sweep(kind)),
        *named(LARGE[:2], ["bfloat16"], formats[:1]),
        *named(["odd 30", "odd 65"], ["float16"], formats[:1]),
    ]


def quick() -> list[Case]:
    """What ``make bench-quick`` measures: enough for the pictures."""
    return [
        *named([CALL, "tiny 512", "narrow 32"], ["float32"], ["contiguous"]),
        *(case for case in sweep("V") if case.shape[2] <= 48),
    ]


def on_gpu() -> list[Case]:
    """What is measured on a GPU, which is lent for minutes: the most important first."""
    half, single, formats = ["bfloat16"], ["float32"], list(FORMATS)
    main = ["narrow 32, 128", "tiny 512", "wide 256", "middle 128"]
    wanted = [
        *named(main, half, formats[1:]),
        *named(main, half, formats[:1]),
        *named(main[:3], single, formats[1:]),
        *named(["middle 64", "narrow 32", "brain 16", "tiny 512 x2", "odd 65"], half, formats[1:]),
        *sweep("V", "bfloat16"),
        *named(main[:2], ["tf32", "float16"], formats[1:]),
        *single_axes(["narrow 32, 128"], "bfloat16"),
        *named([name for name in SHAPES if name != CALL], half, formats),
    ]
    return list(dict.fromkeys(wanted))
