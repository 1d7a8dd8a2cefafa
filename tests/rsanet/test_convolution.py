"""Convolutions of one volume take oneDNN's path, tiny ones are products: same values, format and derivatives."""

import copy
import io

import pytest
import torch
from support import random_volume, relative_error
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from rsanet import RSANet
from rsanet.convolution import MOST_VOXELS, Conv3d, conv3d

CHANNELS_LAST = torch.channels_last_3d
FORMATS = [torch.contiguous_format, CHANNELS_LAST]
# Few channels and many, even and odd depths, one slice; kernel, stride, padding.
SHAPES = [(3, 6, 5, 4), (3, 5, 4, 3), (2, 1, 3, 4), (17, 4, 3, 5), (20, 1, 2, 2)]
OPTIONS = [(3, 1, 1), (3, 2, 1), (1, 1, 0), (1, 2, 0), (2, 2, 0)]

# Few voxels beside the channels of the result: volumes, channels, kernel, stride, padding.
TINY = [
    ((1, 6, 4, 3, 5), 120, (3, 3, 3), (1, 1, 1), (1, 1, 1)),
    ((2, 5, 3, 2, 5), 121, (3, 3, 3), (1, 1, 1), (1, 1, 1)),
    ((3, 4, 5, 4, 3), 80, (3, 3, 3), (2, 2, 2), (1, 1, 1)),
    ((1, 3, 4, 5, 7), 25, (2, 2, 2), (2, 2, 2), (0, 0, 0)),
    ((1, 5, 4, 5, 6), 49, (3, 3, 3), (1, 1, 1), (0, 0, 0)),
    ((2, 7, 3, 4, 5), 90, (1, 3, 5), (3, 1, 2), (0, 2, 1)),
    ((1, 32, 1, 1, 1), 2, (3, 3, 3), (1, 1, 1), (1, 1, 1)),
]


def case(shape, size, memory_format=CHANNELS_LAST, bias=True):
    torch.manual_seed(0)
    x = random_volume((1, *shape)).float().contiguous(memory_format=memory_format)
    weight = random_volume((4, shape[0], size, size, size), 2).float().contiguous(memory_format=memory_format)
    return [x, weight, random_volume((4,), 3).float() if bias else None]


def gradients(function, tensors):
    leaves = [None if t is None else t.detach().clone(memory_format=torch.preserve_format) for t in tensors]
    leaves = [leaf if leaf is None else leaf.requires_grad_() for leaf in leaves]
    out = function(*leaves)
    wanted = [leaf for leaf in leaves if leaf is not None]
    return [out, *torch.autograd.grad(out, wanted, random_volume(out.shape, 5).to(out))]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_a_lone_volume_is_convolved_with_all_gradients(memory_format, shape, options):
    size, stride, padding = options
    if min(shape[1:]) + 2 * padding < size:
        shape = (shape[0], *(max(length, size) for length in shape[1:]))
    for bias in (True, False):
        tensors = case(shape, size, memory_format, bias)
        rest = ((stride,) * 3, (padding,) * 3)
        found = gradients(lambda *t: conv3d(*t, *rest), tensors)  # noqa: B023
        with torch.no_grad():
            assert torch.equal(conv3d(*tensors, *rest), found[0])
        truths = gradients(lambda *t: F.conv3d(*t, *rest), [t if t is None else t.double() for t in tensors])  # noqa: B023
        assert found[0].is_contiguous(memory_format=memory_format)
        for one, truth in zip(found, truths, strict=True):
            assert one.shape == truth.shape
            assert relative_error(one, truth) < 2e-6 or truth.norm() == 0


@pytest.mark.parametrize("channels", [3, 17])
def test_no_convolution_of_a_lone_volume_is_left_to_the_plain_kernel(channels):
    """The profiler sees which kernels ran, forward and backward."""
    x, weight, _ = case((channels, 6, 5, 4), 3, bias=False)
    leaves = [x.requires_grad_(), weight.requires_grad_()]

    def ran(function):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            torch.autograd.grad(function(*leaves, None, (1, 1, 1), (1, 1, 1)).sum(), leaves)
        return {event.key for event in profile.key_averages()}

    assert any("slow_conv3d" in name for name in ran(F.conv3d))
    names = ran(conv3d)
    assert not any("slow_conv3d" in name for name in names)
    assert "aten::mkldnn_convolution" in names


def tiny(which, bias=True):
    shape, channels, size, stride, padding = which
    x = random_volume(shape).float().contiguous(memory_format=CHANNELS_LAST)
    weight = random_volume((channels, shape[1], *size), 2).float().contiguous(memory_format=CHANNELS_LAST)
    return [x, weight, random_volume((channels,), 3).float() if bias else None], (stride, padding)


def check_transforms(x, weight, bias, rest):
    """Asserts that second derivatives and `torch.func` see what they see of `F.conv3d`."""

    def twice(conv):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        first = torch.autograd.grad(conv(*leaves, *rest).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), leaves)

    for one, truth in zip(twice(conv3d), twice(F.conv3d), strict=True):
        assert relative_error(one, truth.double()) < 1e-4
    loss = lambda conv: lambda x: conv(x, weight, bias, *rest).square().sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(loss(conv3d))(x), torch.func.grad(loss(F.conv3d))(x))
    torch.testing.assert_close(torch.func.vmap(loss(conv3d))(x[None]), torch.func.vmap(loss(F.conv3d))(x[None]))
    torch.testing.assert_close(torch.func.jvp(loss(conv3d), (x,), (x,)), torch.func.jvp(loss(F.conv3d), (x,), (x,)))


@pytest.mark.parametrize("which", TINY, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_a_tiny_result_is_a_product_with_all_gradients(which, memory_format):
    for bias in (True, False):
        (x, *weights), rest = tiny(which, bias)
        tensors = [x.contiguous(memory_format=memory_format), *weights]
        found = gradients(lambda *t: conv3d(*t, *rest), tensors)  # noqa: B023
        again = gradients(lambda *t: conv3d(*t, *rest), tensors)  # noqa: B023
        truths = gradients(lambda *t: F.conv3d(*t, *rest), [t if t is None else t.double() for t in tensors])  # noqa: B023
        assert found[0].is_contiguous(memory_format=CHANNELS_LAST)
        for one, same, truth in zip(found, again, truths, strict=True):
            assert one.shape == truth.shape
            assert torch.equal(one, same)
            assert relative_error(one, truth) < 2e-6


@pytest.mark.parametrize("which", TINY, ids=str)
def test_no_weight_of_a_product_is_rearranged(which):
    """The gradient lies as the weight does, and neither it nor the weight is copied."""
    (x, weight, bias), rest = tiny(which)
    leaves = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        gradient = torch.autograd.grad(conv3d(*leaves, *rest).sum(), leaves)[1]
    assert gradient.stride() == weight.stride()
    names = {event.key for event in profile.key_averages()}
    assert names & {"aten::mm", "aten::addmm"}
    assert not any("conv" in name for name in names)
    numbers = [torch.Size(event.input_shapes[0]).numel() for event in profile.events() if event.key == "aten::copy_"]
    assert weight.numel() not in numbers


def test_a_product_ends_where_the_voxels_do_and_at_other_weights():
    """A voxel too many, a weight in another order, groups and a dilation are left to a convolution."""

    def ran(*arguments):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            conv3d(*arguments)
        return any("conv" in event.key for event in profile.key_averages())

    x = random_volume((2, 4, 3, 4, 5)).float().contiguous(memory_format=CHANNELS_LAST)
    channels = round(len(x) * 60 / MOST_VOXELS)
    weight = random_volume((channels, 4, 3, 3, 3), 2).float().contiguous(memory_format=CHANNELS_LAST)
    ones = (1, 1, 1)
    assert not ran(x, weight, None, ones, ones)
    assert ran(x, weight[:-1], None, ones, ones)
    assert ran(x, weight.contiguous(), None, ones, ones)
    assert ran(x, weight, None, ones, (2, 2, 2), (2, 2, 2))
    assert ran(x, weight[:, :2].contiguous(memory_format=CHANNELS_LAST), None, ones, ones, ones, 2)


def test_what_does_not_fit_is_told_as_torch_tells_it():
    (x, weight, bias), (stride, padding) = tiny(TINY[0])
    wrong = [
        (x[:, :3], weight, bias),
        (x[:, :, :1, :1, :1], weight, bias),
        (x, weight, bias[:5]),
        (x, weight, bias[:1]),
        (x, weight[0], bias),
        (x[0, 0], weight, bias),
        (x, weight.double(), bias),
        (x, weight[:, :0], bias),
        (x, weight, bias, (0, 1, 1), padding),
        (x, weight, bias, stride, (1, -1, 1)),
    ]
    for tensors in wrong:
        with pytest.raises(RuntimeError) as theirs:
            F.conv3d(*tensors)
        with pytest.raises(RuntimeError) as ours:
            conv3d(*tensors)
        assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("which", TINY[:4], ids=str)
def test_a_product_in_transforms_and_hooks(which):
    (x, weight, bias), rest = tiny(which)
    check_transforms(x, weight, bias, rest)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.mT.contiguous().mT)
    with hooks:
        hooked = conv3d(*leaves, *rest)
    plain = torch.autograd.grad(conv3d(*leaves, *rest).sum(), leaves)
    for one, same in zip(torch.autograd.grad(hooked.sum(), leaves), plain, strict=True):
        torch.testing.assert_close(one, same)
    with torch.inference_mode():
        torch.testing.assert_close(conv3d(x, weight, bias, *rest), F.conv3d(x, weight, bias, *rest))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv3d(x, weight, bias, *rest), F.conv3d(x, weight, bias, *rest))
    torch.testing.assert_close(conv3d(torch._neg_view(x), weight, bias, *rest), F.conv3d(-x, weight, bias, *rest))


@pytest.mark.parametrize("channels", [3, 17])
def test_second_derivatives_and_transforms(channels):
    check_transforms(*case((channels, 4, 3, 2), 3), ((1, 1, 1), (1, 1, 1)))


@pytest.mark.parametrize("channels", [3, 17])
def test_the_module_is_torchs_in_all_but_speed(channels):
    torch.manual_seed(0)
    ours = Conv3d(channels, 4, 3, padding=1)
    theirs = nn.Conv3d(channels, 4, 3, padding=1)
    theirs.load_state_dict(ours.state_dict())
    x = random_volume((1, channels, 4, 3, 2)).float()
    assert repr(ours) == repr(theirs)
    close = torch.testing.assert_close
    close(copy.deepcopy(ours)(x), theirs(x), rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x), theirs(x))
    with FlopCounterMode(display=False) as counter:
        ours(x)
    assert counter.get_total_flops() == 2 * 27 * channels * 4 * 24
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    close(compiled(x), theirs(x), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    traced = torch.jit.load(io.BytesIO(_saved(torch.jit.trace(ours, x))))
    close(traced(torch.cat([x, x])), theirs(torch.cat([x, x])), rtol=1e-4, atol=1e-5)
    again = checkpoint(ours, x.requires_grad_(), use_reentrant=False)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t,
        lambda t: t.clone().transpose(2, 4).contiguous().transpose(2, 4) if t.dim() == 5 and t.shape == x.shape else t,
    ):
        hooked = ours(x)
    for out in (again, hooked):
        close(torch.autograd.grad(out.sum(), x)[0], torch.autograd.grad(theirs(x).sum(), x)[0], rtol=1e-4, atol=1e-5)
    assert ours(x[:0]).shape == (0, 4, 4, 3, 2)
    close(ours(torch._neg_view(x)), theirs(-x), rtol=1e-4, atol=1e-5)
    for module in (ours, theirs):
        nn.utils.parametrizations.weight_norm(module)
        module.register_forward_hook(lambda module, inputs, out: 2 * out)
    close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


# A product, two halves, and oneDNN.
WAYS = {"product": ((1, 32, 2, 2, 2), 64), "halves": ((1, 4, 8, 8, 8), 8), "oneDNN": ((1, 32, 8, 8, 8), 32)}


@pytest.mark.parametrize(("shape", "channels"), WAYS.values(), ids=WAYS)
def test_new_tensors_of_another_device_by_default_change_nothing(shape, channels):
    x = random_volume(shape).float().requires_grad_()
    conv = Conv3d(shape[1], channels, 3, padding=1).to(memory_format=CHANNELS_LAST)
    wanted = nn.functional.conv3d(x, conv.weight, conv.bias, padding=1)
    with torch.device("meta"):
        found = conv(x)
        found.sum().backward()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, torch.autograd.grad(wanted.sum(), x)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("shape", "channels"), WAYS.values(), ids=WAYS)
def test_what_a_frozen_convolution_gave_may_be_changed_in_place(shape, channels):
    conv = Conv3d(shape[1], channels, 3, padding=1).to(memory_format=CHANNELS_LAST)
    with torch.no_grad():
        out = conv(random_volume(shape).float())
    was = out.clone()
    factor = torch.tensor(3.0, requires_grad=True)
    out.mul_(factor).sum().backward()
    torch.testing.assert_close(out, 3 * was)
    torch.testing.assert_close(factor.grad, was.sum(), rtol=1e-4, atol=1e-3)


def test_coarse_products_do_not_make_convolutions_coarse():
    x, conv = random_volume((2, 64, 2, 2, 2)).float(), Conv3d(64, 64, 3, padding=1).to(memory_format=CHANNELS_LAST)
    wanted = nn.functional.conv3d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    torch.set_float32_matmul_precision("medium")
    try:
        found = conv(x)
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    assert "Permute" in type(conv(x).grad_fn).__name__  # a product again


def _saved(traced):
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("choice", [{}, {"block": "residual", "downsample": "residual"}, {"block": "pre_activation"}])
def test_a_lone_volume_keeps_its_format_throughout_the_network(choice):
    torch.manual_seed(0)
    model = RSANet(2, 2, (8, 16, 32), **choice).to(memory_format=CHANNELS_LAST).eval()
    x = random_volume((2, 2, 12, 9, 11)).float().contiguous(memory_format=CHANNELS_LAST)
    seen = []
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            module.register_forward_hook(lambda module, inputs, out: seen.append(out))
    with torch.no_grad():
        alone = [model(x[:1]), model(x[1:])]
        assert all(out.is_contiguous(memory_format=CHANNELS_LAST) for out in seen)
        together = model(x)
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.cat(alone).argmax(1), together.argmax(1))


@pytest.mark.parametrize("attention", ["rsa", "non_local", None])
def test_an_empty_batch_passes_through_the_network(attention):
    model = RSANet(2, 2, (8, 16), attention=attention)
    for memory_format in FORMATS:
        x = torch.empty(0, 2, 6, 5, 4).contiguous(memory_format=memory_format).requires_grad_()
        out = model(x)
        out.sum().backward()
        assert out.shape == (0, 2, 6, 5, 4)
        assert x.grad.shape == x.shape
        assert not any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
