"""Memory on a GPU: what a block allocates, and volumes beyond 2**31 elements."""

import math

import pytest
import torch
from gpu.device import CHANNELS_LAST, DEVICE, KERNELS, asks_cuda, block_inputs, on_device
from support import random_block, relative_error

from benchmarks.inputs import grade
from rsa_kernels import recurrent_slice_attention
from rsa_kernels.folding import fold

pytestmark = [asks_cuda, pytest.mark.xdist_group("large"), pytest.mark.parametrize("backend", KERNELS)]

MIB = 2**20
# Maps, partial maps, weights, and the workspaces of cuBLAS; volumes are 256 MiB.
SLACK = 64 * MIB
NARROW, WIDE = (2, 32, 128, 128, 128), (2, 256, 64, 64, 64)


def allocated(call):
    """The result of a call; bytes that it leaves allocated and that it allocates at most, above those before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    return result, torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before


def forward_of(tensors, backend, **options):
    def call():
        return recurrent_slice_attention(*tensors, backend=backend, **options)

    call()  # kernels and workspaces, once
    return call


def fuses(shape, backend):
    """Whether a backend projects inside its kernels, and so needs no room for query, value and their like."""
    return shape == NARROW and backend == "triton"


@pytest.mark.parametrize("shape", [NARROW, WIDE], ids=["narrow", "wide"])
def test_inference_allocates_at_most(shape, backend):
    tensors = block_inputs(shape, torch.bfloat16)
    with torch.no_grad():
        _, _, peak = allocated(forward_of(tensors, backend))
    # The output; where kernels do not project, query and value, too.
    volumes = 1 if fuses(shape, backend) else 3
    assert peak <= volumes * tensors[0].nbytes + SLACK


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("shape", [NARROW, WIDE], ids=["narrow", "wide"])
def test_training_keeps_and_allocates_at_most(shape, recompute, backend):
    tensors = [tensor.requires_grad_() for tensor in block_inputs(shape, torch.bfloat16)]
    volume = tensors[0].nbytes
    upstream = torch.ones_like(tensors[0])
    out, kept, _ = allocated(forward_of(tensors, backend, recompute=recompute))
    # The volume itself is the caller's; the output and what steps two and three read are kept.
    assert kept <= (1 if recompute else 3) * volume + SLACK
    _, _, peak = allocated(lambda: torch.autograd.grad(out, tensors, upstream))
    # The gradient; where kernels do not project, its projection, a product with a map, query and its like, too.
    extra = 1 if fuses(shape, backend) else 5
    assert peak <= (extra + (2 if recompute else 0)) * volume + SLACK


# Beyond 2**31 elements: fused kernels and products of the library. The last position lies where 32 bits do not reach.
HUGE = [
    pytest.param((1, 32, 128, 128, 4112), 2, id="narrow axis 2"),
    pytest.param((1, 32, 4112, 128, 128), 3, id="narrow axis 3"),
    pytest.param((1, 32, 4112, 128, 128), 4, id="narrow axis 4"),
    pytest.param((1, 32, 512, 512, 260), 4, id="wide axis 4"),
    pytest.param((2, 32, 512, 260, 260), 2, id="wide axis 2, two samples"),
]
HUGE_VOLUMES = 10


class Oracle:
    """One step by direct formulas in float32: contractions in chunks, the rest at a few positions.

    Args:
        tensors: a volume, six weights, the beta.
        axis: of the step.
    """

    def __init__(self, tensors, axis):
        self.x, *weights = tensors
        self.axis = axis
        theta, theta_bias, phi, _, self.g, self.g_bias, beta = (tensor.float() for tensor in weights)
        self.m, self.u = fold(theta, theta_bias, phi, 1.0)
        self.beta = beta[0]
        sizes = [size for dim, size in enumerate(self.x.shape) if dim > 1 and dim != axis]
        generator = torch.Generator().manual_seed(0)
        self.positions = [(0, 0), tuple(size - 1 for size in sizes)]
        self.positions += [tuple(int(torch.randint(n, (), generator=generator)) for n in sizes) for _ in range(14)]

    def lines(self, volume):
        """All slices of the last sample at the positions: ``(C, S, positions)``."""
        slices = volume.movedim(self.axis, 2)[-1]
        return torch.stack([slices[:, :, row, place] for row, place in self.positions], -1).float()

    def contract(self, left, right, matrix, bias):
        """``<matrix left_i + bias, right_j>`` for the last sample: ``(S, S)``."""
        left, right = (volume.movedim(self.axis, 2)[-1] for volume in (left, right))
        total = torch.zeros(left.shape[1], left.shape[1], device=DEVICE)
        rows = max(1, 2**26 // left[:, :, 0].numel())
        for first in range(0, left.shape[2], rows):
            chunk, other = (volume[:, :, first : first + rows].float().flatten(2) for volume in (left, right))
            projected = torch.einsum("oc,csp->osp", matrix, chunk) + bias[:, None, None]
            total += torch.einsum("csp,ctp->st", projected, other)
        return total

    def attention(self):
        return torch.softmax(self.contract(self.x, self.x, self.m.T, self.u), -1)

    def out(self, attention):
        lines = self.lines(self.x)
        value = torch.einsum("ij,cjp,oc->oip", attention, lines, self.g) + self.g_bias[:, None, None]
        return lines + self.beta * value

    def grad(self, attention, upstream):
        """The gradient of the volume at the positions."""
        contracted = self.contract(upstream, self.x, self.g.T, torch.zeros_like(self.u))
        weighted = attention * contracted
        grad_logits = self.beta * (weighted - attention * weighted.sum(-1, keepdim=True))
        lines, grads = self.lines(self.x), self.lines(upstream)
        return (
            grads
            + self.beta * torch.einsum("ij,oip,oc->cjp", attention, grads, self.g)
            + torch.einsum("ij,djp,cd->cip", grad_logits, lines, self.m)
            + torch.einsum("ij,cip,cd->djp", grad_logits, lines, self.m)
            + self.u[:, None, None] * grad_logits.sum(0)[:, None]
        )


@pytest.mark.parametrize(("shape", "axis"), HUGE)
def test_beyond_32_bits_of_elements(shape, axis, backend):
    needed = HUGE_VOLUMES * 2 * math.prod(shape)
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory, has {free >> 30}")
    batch, channels, *sizes = shape
    assert math.prod(shape) > 2**31
    generator = torch.Generator(DEVICE).manual_seed(0)
    x, upstream = (
        torch.randn(batch, *sizes, channels, dtype=torch.bfloat16, device=DEVICE, generator=generator).movedim(-1, 1)
        for _ in range(2)
    )
    weights = on_device(grade([x, *random_block(channels, 1, gain=1.0)])[1:], torch.bfloat16)
    oracle = Oracle([x, *weights], axis)
    leaf = x.detach().requires_grad_()
    out, (attention,) = recurrent_slice_attention(leaf, *weights, (axis,), return_maps=True, backend=backend)
    (grad,) = torch.autograd.grad(out, leaf, upstream)
    assert out.is_contiguous(memory_format=CHANNELS_LAST)
    torch.testing.assert_close(attention[-1], oracle.attention(), rtol=0, atol=2e-2)
    assert relative_error(oracle.lines(out.detach()), oracle.out(attention[-1])) <= 1e-2
    assert relative_error(oracle.lines(grad), oracle.grad(attention[-1], upstream)) <= 1e-2
