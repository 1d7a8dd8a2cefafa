"""What the GPU tests share: the device, the backends that run on it, inputs, and the error budget.

``RSANET_GPU_TESTS_ON_CPU=1`` with ``TRITON_INTERPRET=1`` tries the tests themselves on CPU tensors, as far as they do
not ask CUDA anything; choose small ones with ``-k``.
"""

import os
from functools import partial

import pytest
import torch
from support import random_block, random_volume, relative_error, with_gradients

from benchmarks.devices import arithmetic
from benchmarks.inputs import grade, least_allowed
from benchmarks.published import published
from rsa_kernels import available_backends, recurrent_slice_attention
from rsa_kernels.backends import cannot_run
from rsa_kernels.folding import Gradients

DRY_RUN = os.environ.get("RSANET_GPU_TESTS_ON_CPU") == "1"
DEVICE = "cpu" if DRY_RUN else "cuda"
asks_cuda = pytest.mark.skipif(DRY_RUN, reason="a dry run on a CPU has no streams, graphs and memory statistics")

CHANNELS_LAST = torch.channels_last_3d
RESULTS = ("out", *Gradients._fields)


def _usable():
    if not (DRY_RUN or torch.cuda.is_available()):
        return []
    volume = torch.empty((1,) * 5, device=DEVICE)
    return [name for name in available_backends() if name != "reference" and cannot_run(name, volume) is None]


# All that run on the device, and those of them with kernels of their own: without a GPU, names for tests that skip.
ON_DEVICE = _usable() or ["torch", "triton"]
KERNELS = [name for name in ON_DEVICE if name != "torch"]


def floor(precision):
    """Of the errors in a precision, a name of ``DTYPES``, or in that of a dtype."""
    name = str(precision).removeprefix("torch.")
    # Where a GPU rounds to bfloat16, Triton's interpreter truncates.
    return least_allowed(name) * (4 if DRY_RUN and name == "bfloat16" else 1)


def on_device(tensors, dtype):
    return [tensor.to(DEVICE, dtype) for tensor in tensors]


def block_inputs(shape, dtype, memory_format=CHANNELS_LAST, steps=3, offset=0.0, logits=1.0):
    """A volume with the mean ``offset``, six weights, and the betas; with graded maps, but for the factor on logits."""
    tensors = grade([random_volume(shape) + offset, *random_block(shape[1], steps, gain=1.0)])
    tensors[1:3] = (logits * tensor for tensor in tensors[1:3])
    tensors = on_device(tensors, dtype)
    return [tensors[0].contiguous(memory_format=memory_format), *tensors[1:]]


def results_of(tensors, upstream, backend, **options):
    """The output and all gradients of a block."""
    return with_gradients(lambda *t: recurrent_slice_attention(*t, backend=backend, **options), tensors, upstream)


def assert_same_bits(results, others):
    for name, result, other in zip(RESULTS, results, others, strict=False):  # the output alone, without gradients
        assert torch.equal(result, other), name


def assert_same_but_for_rounding(results, others):
    for name, result, other in zip(RESULTS, results, others, strict=True):
        assert relative_error(result, other.double()) <= 10 * floor(result.dtype), name


def assert_within_budget(
    shape, axes, precision, memory_format, backend, exact=torch.float64, offset=0.0, logits=1.0, **options
):
    """Output and gradients err at most twice as much as eager PyTorch in the same precision, plus the dtype's floor.

    The gradient that arrives is the output, that of half its squared norm: the betas' gradients then are sums whose
    terms do not cancel.
    """
    with arithmetic(precision) as dtype:
        tensors = block_inputs(shape, dtype, memory_format, len(axes), offset, logits)
        literal = partial(published, axes=axes, scale=options.get("scale", 1.0))
        exact_tensors = [tensor.to(exact) for tensor in tensors]
        upstream = literal(*exact_tensors).to(dtype)
        truths = with_gradients(literal, exact_tensors, upstream.to(exact))
        del exact_tensors
        eager = [
            relative_error(result, truth)
            for result, truth in zip(with_gradients(literal, tensors, upstream), truths, strict=True)
        ]
        results = results_of(tensors, upstream, backend, axes=axes, **options)
    for volume in results[:2]:
        assert volume.dtype == dtype
        assert volume.is_contiguous(memory_format=memory_format)
    found = {}
    for name, result, truth, other in zip(RESULTS, results, truths, eager, strict=True):
        if name == "phi_bias":
            assert torch.equal(result, torch.zeros_like(result))
        else:
            found[name] = (relative_error(result, truth), 2 * other + floor(precision))
    over = {
        name: f"{error:.1e}, at most {budget:.1e}" for name, (error, budget) in found.items() if not error <= budget
    }
    assert not over, over
