"""Volumes as the kernels want them: dense, channels last, aligned; and how a step along an axis reads one.

A channels_last_3d volume is read and written in place. A contiguous one is transposed once before the block and once
after, by a kernel that reads and writes whole runs; anything else (a slice of channels, say) is copied by torch.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from rsa_kernels.triton.launch import bind
from rsa_kernels.triton.tiles import kernel

ALIGNMENT = 16


class Geometry(NamedTuple):
    """How a step reads a volume, as the kernels take it; see :mod:`rsa_kernels.triton.tiles`."""

    slices: int
    outer: int
    """Positions within a slice: ``outer`` rows of ``inner``."""
    inner: int
    strides: tuple[int, int, int, int]
    """In voxels: sample, slice, row, position."""
    flat: bool
    """Whether neighbouring positions are neighbours in memory."""


@lru_cache(maxsize=1024)
def geometry(shape: tuple[int, ...], axis: int) -> Geometry:
    """The geometry of a step along ``axis`` of ``(N, C, D, H, W)``."""
    _, _, depth, height, width = shape
    sample = depth * height * width
    if axis == 2:
        return Geometry(depth, 1, height * width, (sample, height * width, 0, 1), True)
    if axis == 3:
        return Geometry(height, depth, width, (sample, width, height * width, 1), True)
    return Geometry(width, 1, depth * height, (sample, 1, 0, width), width == 1)


def is_packed(volume: Tensor) -> bool:
    """Whether a volume is dense in channels-last order and aligned."""
    expected = 1
    for dim in (1, 4, 3, 2, 0):
        size = volume.shape[dim]
        if size != 1 and volume.stride(dim) != expected:
            return False
        expected *= size
    return volume.data_ptr() % ALIGNMENT == 0


def empty_packed(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Room for a dense channels-last volume ``(N, C, D, H, W)``."""
    batch, channels, depth, height, width = shape
    return like.new_empty((batch, depth, height, width, channels)).permute(0, 4, 1, 2, 3)


@kernel()
def transpose_kernel(
    source,
    target,
    rows: tl.int64,
    columns: tl.int64,
    row_blocks: tl.int32,
    column_blocks: tl.int32,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """``target[n, c, r] = source[n, r, c]``: one read, one write, in runs on both sides."""
    pid = tl.program_id(0)
    row = (pid % row_blocks).to(tl.int64) * BR + tl.arange(0, BR)
    column = (pid // row_blocks % column_blocks).to(tl.int64) * BC + tl.arange(0, BC)
    first = (pid // row_blocks // column_blocks).to(tl.int64) * rows * columns
    tile = tl.load(
        source + first + row[:, None] * columns + column[None, :],
        mask=(row[:, None] < rows) & (column[None, :] < columns),
        other=0.0,
    )
    tl.store(
        target + first + column[:, None] * rows + row[None, :],
        tl.trans(tile),
        mask=(column[:, None] < columns) & (row[None, :] < rows),
    )


def _transpose(source: Tensor, target: Tensor, batch: int, rows: int, columns: int, device: int, stream: int) -> None:
    block = 64 if source.element_size() <= 4 else 32
    row_blocks, column_blocks = -(-rows // block), -(-columns // block)
    launch = bind(transpose_kernel, (device, source.dtype), 4, 1, block, block)
    launch(row_blocks * column_blocks * batch, stream, source, target, rows, columns, row_blocks, column_blocks)


def pack(volume: Tensor, device: int, stream: int) -> Tensor:
    """The volume itself if it is packed, else a packed copy."""
    if is_packed(volume):
        return volume
    packed = empty_packed(volume.shape, volume)
    batch, channels, *sizes = volume.shape
    if volume.is_contiguous() and volume.data_ptr() % ALIGNMENT == 0:
        _transpose(volume, packed, batch, channels, sizes[0] * sizes[1] * sizes[2], device, stream)
    else:
        packed.copy_(volume)
    return packed


def unpack(packed: Tensor, like: Tensor, device: int, stream: int) -> Tensor:
    """A packed volume with the strides of ``torch.empty_like(like)``; itself, if it has them."""
    if packed.stride() == like.stride():
        return packed
    wanted = torch.empty_like(like, device="meta")
    if is_packed(wanted):  # the same places, whatever is said of dims of size 1
        return packed.as_strided(wanted.shape, wanted.stride())
    result = torch.empty_like(like)
    batch, channels, *sizes = result.shape
    if result.is_contiguous():
        _transpose(packed, result, batch, sizes[0] * sizes[1] * sizes[2], channels, device, stream)
        return result
    return result.copy_(packed)
