"""Activation checkpointing, torch's and the block's own, changes what is kept, and no bit of what is computed."""

import pytest
import torch
from support import BACKENDS, FORMATS
from torch import nn
from torch.utils.checkpoint import checkpoint

from rsanet import RSABlock

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def network(backend, recompute=False):
    """A block between convolutions, its betas open."""
    torch.manual_seed(0)
    block = RSABlock(8, backend=backend, recompute=recompute)
    with torch.no_grad():
        for beta in block.betas:
            beta.fill_(0.5)
    return nn.Sequential(nn.Conv3d(8, 8, 1), block, nn.GroupNorm(2, 8), nn.Conv3d(8, 8, 1))


def gradients(model, memory_format, autocast, call):
    """Of the input, then of the parameters."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 8, 4, 5, 6, generator=generator).contiguous(memory_format=memory_format).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = call(model, x)
    out.float().square().sum().backward()
    return [x.grad, *(parameter.grad for parameter in model.parameters())]


def assert_same_bits(results, expected):
    for one, other in zip(results, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recompute"])
def test_checkpoint_gives_the_same_bits(recompute, memory_format, autocast, backend):
    arguments = (memory_format, autocast)
    expected = gradients(network(backend, recompute), *arguments, lambda model, x: model(x))
    for use_reentrant in (False, True):

        def call(model, x, use_reentrant=use_reentrant):
            return checkpoint(model, x, use_reentrant=use_reentrant)

        assert_same_bits(gradients(network(backend, recompute), *arguments, call), expected)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
def test_recompute_gives_the_same_bits(memory_format, autocast, backend):
    kept, made_again = (
        gradients(network(backend, recompute), memory_format, autocast, lambda model, x: model(x))
        for recompute in (False, True)
    )
    assert_same_bits(made_again, kept)


def test_checkpoint_runs_forward_again_in_backward(backend):
    model, calls = network(backend), []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    out = checkpoint(model, torch.randn(1, 8, 3, 4, 5, requires_grad=True), use_reentrant=False)
    assert len(calls) == 1
    out.sum().backward()
    assert len(calls) == 2


def test_checkpoint_compiles_as_one_graph(backend):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda model, x: checkpoint(model, x, use_reentrant=False), fullgraph=True, backend="aot_eager"
    )
    expected = gradients(network(backend), torch.contiguous_format, False, lambda model, x: model(x))
    results = gradients(network(backend), torch.contiguous_format, False, compiled)
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one, other)
    torch._dynamo.reset()
