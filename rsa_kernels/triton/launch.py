"""Compiled kernels, kept and launched with little of the host's time.

Triton's own launcher binds and hashes every argument of every call, about 14 microseconds. Here what a kernel is
compiled for is looked up by a tuple of a few values, and the compiled kernel is called directly, about 2. That is safe
because nothing else can matter: numbers are never specialised (see :func:`~rsa_kernels.triton.tiles.kernel`), and every
pointer is aligned to 16 bytes (:mod:`~rsa_kernels.triton.volumes` sees to it).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)


class Bound:
    """A kernel with its constants, for pointers of certain dtypes on one device; compiled at its first call."""

    def __init__(self, kernel: Any, warps: int, stages: int, constants: tuple[Any, ...]) -> None:
        self._kernel = kernel
        self._options = {"num_warps": warps, "num_stages": stages}
        self._constants = constants
        self._compiled = None

    def __call__(self, programs: int, stream: int, *arguments: Tensor | int) -> None:
        """Launches ``programs`` programs on a stream of the current device."""
        if self._compiled is None:
            if INTERPRETED:
                self._kernel[(programs,)](*arguments, *self._constants)
                return
            self._compiled = self._kernel.warmup(*arguments, *self._constants, grid=(programs,), **self._options)
        self._compiled[(programs, 1, 1)](*arguments, *self._constants, stream=stream)


@cache
def bind(kernel: Any, device: int, dtypes: tuple[torch.dtype, ...], warps: int, stages: int, *constants: Any) -> Bound:
    """The kernel for a device, the dtypes of its pointers, and its constants in the order of its parameters."""
    return Bound(kernel, warps, stages, constants)


@contextmanager
def on_device(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Makes a tensor's device current; yields its index and its current stream."""
    if not tensor.is_cuda:
        yield 0, 0
        return
    index = tensor.device.index
    with torch.cuda.device(index):
        yield index, torch._C._cuda_getCurrentRawStream(index)
