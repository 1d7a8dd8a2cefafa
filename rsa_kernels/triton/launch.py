"""Compiled kernels, kept and launched with little of the host's time.

Triton's own launcher binds and hashes every argument of every call, about 14 microseconds. Here what a kernel is
compiled for is looked up by a tuple of a few values, and the compiled kernel is called directly, about 2. That is safe
because nothing else can matter: numbers are never specialised (see :func:`~rsa_kernels.triton.tiles.kernel`), and every
pointer is aligned to 16 bytes (:mod:`~rsa_kernels.triton.volumes` sees to it) or compiled for as unaligned.
"""

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
        self._compiled = self._run = self._handles = None

    def __call__(self, programs: int, stream: int, *arguments: Tensor | int) -> None:
        """Launches ``programs`` programs on a stream of the current device."""
        if self._run is None:
            if INTERPRETED:
                self._kernel[(programs,)](*arguments, *self._constants)
                return
            self._compiled = self._kernel.warmup(*arguments, *self._constants, grid=(programs,), **self._options)
            self._run = self._compiled.run  # loads the kernel on the current device
            self._handles = self._compiled.function, self._compiled.packed_metadata
        hook = triton.knobs.runtime.launch_enter_hook
        if getattr(hook, "calls", hook):  # a profiler wants to hear of it
            self._compiled[(programs, 1, 1)](*arguments, *self._constants, stream=stream)
            return
        self._run(programs, 1, 1, stream, *self._handles, None, None, None, *arguments, *self._constants)


_bound: dict[tuple[Any, ...], Bound] = {}


def bind(kernel: Any, key: tuple[Any, ...], warps: int, stages: int, *constants: Any) -> Bound:
    """The kernel with its constants in the order of its parameters.

    Args:
        kernel: a kernel of this package.
        key: the device's index, and what the dtypes of the kernel's pointers follow from.
        warps: per program.
        stages: of the software pipeline.
        constants: what it is compiled for.
    """
    entry = (id(kernel), key, warps, stages, constants)
    found = _bound.get(entry)
    if found is None:
        found = _bound[entry] = Bound(kernel, warps, stages, constants)
    return found


class OnDevice:
    """Makes a tensor's device current for a ``with`` block; enters with its index and its current stream."""

    def __init__(self, tensor: Tensor) -> None:
        self._index = tensor.device.index if tensor.is_cuda else None
        self._guard = None

    def __enter__(self) -> tuple[int, int]:
        if self._index is None:
            return 0, 0
        if torch.cuda.current_device() != self._index:
            self._guard = torch.cuda.device(self._index)
            self._guard.__enter__()
        return self._index, torch._C._cuda_getCurrentRawStream(self._index)

    def __exit__(self, *exception: object) -> None:
        if self._guard is not None:
            self._guard.__exit__(*exception)
