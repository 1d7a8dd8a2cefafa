"""What the backend would launch on an architecture: it runs on CPU tensors, and launches are noted, not made."""

from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from rsa_kernels.triton import block, launch, tuning

PROCESSORS = 132


class Launch(NamedTuple):
    """A kernel as it is compiled: everything that the compiled code depends on."""

    kernel: str
    pointers: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]
    warps: int
    stages: int

    @property
    def constant(self):
        return dict(self.constants)


TYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@contextmanager
def recording(arch):
    """Yields the list that launches are added to, as ``(Launch, kernel, programs, arguments)``."""
    made = []

    def note(self, programs, stream, *arguments):
        names = self._kernel.arg_names
        constants = tuple(zip(names[len(arguments) :], self._constants, strict=True))
        pointers = tuple(TYPES[argument.dtype] for argument in arguments if isinstance(argument, torch.Tensor))
        name = f"{self._kernel.fn.__module__.rsplit('.', 1)[1]}.{self._kernel.fn.__name__.removesuffix('_kernel')}"
        options = self._options
        made.append(
            (
                Launch(name, pointers, constants, options["num_warps"], options["num_stages"]),
                self._kernel,
                programs,
                arguments,
            )
        )

    with ExitStack() as stack:
        stack.enter_context(patch.object(launch.Bound, "__call__", note))
        stack.enter_context(patch.object(tuning, "architecture", lambda device: arch))
        stack.enter_context(patch.object(tuning, "processors", lambda device: PROCESSORS))
        yield made


def run_block(shape, axes, dtype, memory_format=torch.channels_last_3d):
    """Forward with and without a backward to come, backward with and without gradients of the weights."""
    channels = shape[1]
    x = torch.zeros(shape, dtype=dtype).contiguous(memory_format=memory_format)
    weights = [torch.zeros(size) for size in [(channels, channels), (channels,)] * 3]
    if dtype == torch.float64:
        weights = [weight.double() for weight in weights]
    weights = block.Projections(*weights)
    betas = torch.zeros(len(axes), dtype=weights.g_bias.dtype)
    block.recurrent_slice_attention(x, weights, betas, axes, 1.0, False)
    _, maps, inputs = block.recurrent_slice_attention(x, weights, betas, axes, 1.0, True)
    for weights_need in (True, False):
        needs = block.Gradients(True, *[weights_need] * 7)
        block.recurrent_slice_attention_backward(x, x, inputs, maps, weights, betas, axes, 1.0, needs)


def run_attention(shape, axis, dtype, memory_format=torch.channels_last_3d):
    """The parameter-free core, forward and backward."""
    x = torch.zeros(shape, dtype=dtype).contiguous(memory_format=memory_format)
    _, attention = block.slice_attention(x, x, x, axis, 1.0)
    block.slice_attention_backward(x, x, x, x, attention, axis, 1.0, (True, True, True))
