"""A norm on channels-last memory never takes PyTorch's own, whatever keeps the C++ extension away."""

import pytest
import torch
from support import random_volume, relative_error
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from rsa_kernels import native
from rsanet.unet import GroupNorm

CHANNELS_LAST = torch.channels_last_3d


class Refuse(TorchDispatchMode):
    """Fails where PyTorch's own group norm is given memory that is not contiguous."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "native_group_norm" in str(function):
            assert all(arg.is_contiguous() for arg in args if isinstance(arg, torch.Tensor) and arg.dim() == 5)
        return function(*args, **(kwargs or {}))


def check(norm, x, run):
    x = x.requires_grad_()
    out = run(norm, x)
    with Refuse():
        grads = torch.autograd.grad(out.square().sum(), [x, *norm.parameters()])
    wide = [t.detach().double().contiguous().requires_grad_() for t in (x, *norm.parameters())]
    truth = F.group_norm(wide[0], norm.num_groups, *wide[1:], norm.eps).relu()
    truths = torch.autograd.grad(truth.square().sum(), wide)
    for one, exact in zip((out, *grads), (truth, *truths), strict=True):
        assert relative_error(one.detach(), exact.detach()) < 1e-5
    assert out.is_contiguous(memory_format=CHANNELS_LAST)


def under(mode):
    def run(norm, x):
        with mode():
            return norm(x, relu=True)

    return run


RUNS = {
    "plainly": lambda norm, x: norm(x, relu=True),
    "a mode": under(Refuse),
    "counting": under(lambda: FlopCounterMode(display=False)),
    "vjp": lambda norm, x: torch.func.vmap(lambda x: norm(x, relu=True))(x[None])[0],
    "compiled": lambda norm, x: torch.compile(norm, backend="aot_eager")(x, relu=True),
}


@pytest.mark.parametrize("way", RUNS)
@pytest.mark.parametrize("extension", [True, False])
def test_every_way_is_right_and_keeps_the_format(extension, way, monkeypatch):
    torch._dynamo.reset()
    if not extension:
        monkeypatch.setitem(native._reasons, "cpp", "is not there")
    norm = GroupNorm(2, 4)
    torch.nn.init.normal_(norm.weight)
    check(norm, random_volume((2, 4, 3, 4, 5)).float().contiguous(memory_format=CHANNELS_LAST), RUNS[way])
    torch._dynamo.reset()


def test_frozen_weights_and_a_second_derivative():
    norm = GroupNorm(2, 4).requires_grad_(False)
    x = random_volume((2, 4, 3, 4, 5)).float().contiguous(memory_format=CHANNELS_LAST).requires_grad_()
    with Refuse():
        (first,) = torch.autograd.grad(norm(x).pow(3).sum(), x, create_graph=True)
        first.square().sum().backward()
    assert x.grad.isfinite().all()


def test_what_was_saved_may_come_back_in_other_strides_or_with_the_negative_bit():
    norm = GroupNorm(2, 4)
    x = random_volume((2, 4, 3, 4, 5)).float().contiguous(memory_format=CHANNELS_LAST).requires_grad_()
    (expected,) = torch.autograd.grad(norm(x, relu=True).square().sum(), x)
    for pack, unpack in ((lambda t: t, lambda t: t.contiguous()), (torch.neg, torch._neg_view)):
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            out = norm(x, relu=True)
        torch.testing.assert_close(torch.autograd.grad(out.square().sum(), x)[0], expected)
    with torch.no_grad():
        torch.testing.assert_close(norm(torch._neg_view(x), relu=True, inplace=True), norm(-x, relu=True))
