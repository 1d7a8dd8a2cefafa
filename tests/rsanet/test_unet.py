"""The U-Net's convolutions that are computed otherwise than they are written: the same function, the same gradients."""

import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
from support import random_volume, relative_error, with_gradients
from torch import nn
from torch.nn import functional as F

from rsanet import RSANet, insert_rsa, unet
from rsanet.unet import MOST_NARROW, NEIGHBOURS, ConvPair, UpConcat, conv_of_upsampled, narrow_conv

# What the results may differ by from the published path in float64; in bf16, both round on their way.
LIMITS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
EVEN, ODD = (4, 6, 8), (3, 6, 8)


@pytest.fixture
def splits(monkeypatch):
    """The shapes of the volumes that were convolved without being upsampled, however small."""
    seen = []
    monkeypatch.setattr(unet, "FEWEST_VOXELS", 1)
    monkeypatch.setattr(
        unet, "conv_of_upsampled", lambda x, weight: seen.append(tuple(x.shape)) or conv_of_upsampled(x, weight)
    )
    return seen


def published(module):
    """A copy that computes what the modules say, one after the other: the hook, which does nothing, asks for it."""
    module = copy.deepcopy(module)
    for part in module.modules():
        if isinstance(part, nn.Conv3d):
            part.register_forward_hook(lambda module, inputs, output: None)
    return module


def results(module, inputs, seed=5):
    """The output, and the gradients of everything that has one."""
    inputs = [tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_() for tensor in inputs]
    torch.manual_seed(seed)
    out = module(*inputs)
    return [out, *torch.autograd.grad(out, [*inputs, *module.parameters()], random_volume(out.shape, 9).to(out))]


def agree(module, inputs, dtype):
    """Compares with the published path in float64; bfloat16 is autocast, and no worse than the published path in it."""
    truths = results(published(module).double(), [tensor.double() for tensor in inputs])
    mixed = dtype == torch.bfloat16
    parameters = torch.float32 if mixed else dtype
    module, inputs = module.to(parameters), [tensor.to(parameters) for tensor in inputs]
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        found, written = results(module, inputs), results(published(module), inputs)
    assert found[0].dtype == dtype
    for index, (result, other, truth) in enumerate(zip(found, written, truths, strict=True)):
        limit = LIMITS[dtype] + (1.5 * relative_error(other, truth) if mixed else 0.0)
        assert relative_error(result, truth) < limit, index


def level(size=EVEN, **choices):
    """One level of a decoder with its inputs."""
    torch.manual_seed(0)
    module = UpConcat(16, 8, **{"norm": ("group", {"num_groups": 4}), **choices})
    return module, [random_volume((2, 16, *(-(-s // 2) for s in size)), 3), random_volume((2, 8, *size), 4)]


# --- a convolution of an upsampled volume ---


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("size", [(2, 3, 4), (1, 2, 1), (5, 2, 3)])
def test_a_convolution_of_an_upsampled_volume_needs_no_upsampled_volume(size, dtype):
    tensors = [random_volume((2, 8, *size)).to(dtype), random_volume((16, 8, 3, 3, 3), 2).to(dtype)]
    upstream = random_volume((2, 16, *(2 * s for s in size)), 3).to(dtype)
    truths = with_gradients(
        lambda x, weight: F.conv3d(F.interpolate(x, scale_factor=2), weight, padding=1),
        [tensor.double() for tensor in tensors],
        upstream.double(),
    )
    for result, truth in zip(with_gradients(conv_of_upsampled, tensors, upstream), truths, strict=True):
        assert result.dtype == dtype
        assert relative_error(result, truth) < LIMITS[dtype]


def test_a_convolution_of_an_upsampled_volume_can_be_differentiated_twice():
    x, weight = (random_volume(shape).requires_grad_() for shape in ((1, 2, 2, 1, 3), (3, 2, 3, 3, 3)))
    assert torch.autograd.gradcheck(conv_of_upsampled, (x, weight))
    assert torch.autograd.gradgradcheck(conv_of_upsampled, (x, weight))


def test_weights_are_rounded_once(monkeypatch):
    """Sums of eight in bfloat16 would lose what the published path keeps."""
    kernels = []
    monkeypatch.setattr(F, "conv_transpose3d", lambda x, kernel, **options: kernels.append(kernel))
    x, weight = random_volume((1, 2, 1, 1, 1)).float(), random_volume((4, 2, 3, 3, 3)).float()
    conv_of_upsampled(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        conv_of_upsampled(x, weight)
    assert torch.equal(kernels[0], kernels[1]), "autocast rounds it for the convolution alone"
    conv_of_upsampled(x.bfloat16(), weight.bfloat16())
    conv_of_upsampled(x, weight.bfloat16().float())
    assert torch.equal(kernels[2], kernels[3].bfloat16())


# --- a level of the decoder ---


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d], ids=str)
@pytest.mark.parametrize("size", [EVEN, ODD], ids=["even", "odd"])
def test_a_level_is_its_published_self_with_all_gradients(size, memory_format, dtype, splits):
    module, inputs = level(size)
    module = module.to(memory_format=memory_format)
    agree(module, [tensor.contiguous(memory_format=memory_format) for tensor in inputs], dtype)
    assert splits == ([(2, 8, 2, 3, 4)] if size == EVEN else [])


@pytest.mark.parametrize("norm", ["batch", "instance", ("group", {"num_groups": 8})], ids=str)
@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_a_level_keeps_its_norm_and_its_dropout(mode, norm, splits):
    module, inputs = level(norm=norm, dropout=0.5)
    agree(module.train(mode), inputs, torch.float64)
    assert len(splits) == 1


@pytest.mark.parametrize(
    "choice",
    [{"block": "residual"}, {"block": "pre_activation"}, {"upsample": "trilinear"}, {"upsample": "transposed"}],
    ids=str,
)
def test_other_kinds_of_levels_are_computed_as_written(choice, splits):
    agree(*level(**choice), torch.float64)
    assert not splits


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("flat", [(2, 6, 8), (4, 2, 8), (4, 6, 2)], ids=str)
def test_volumes_two_voxels_high_are_computed_as_written(flat, dtype, splits):
    """There oneDNN's gradients in bfloat16 are wrong or out of their bounds."""
    agree(*level(flat), dtype)
    assert len(splits) == (2 not in flat[1:])


def test_small_volumes_are_computed_as_written(splits, monkeypatch):
    module, inputs = level()
    for fewest, expected in ((2 * 2 * 3 * 4 + 1, 0), (2 * 2 * 3 * 4, 1)):
        monkeypatch.setattr(unet, "FEWEST_VOXELS", fewest)
        agree(module, inputs, torch.float64)
        assert len(splits) == expected


@pytest.mark.parametrize("name", ["up", "up.up", "up.up.1", "conv", "conv.layer", "conv.layer.layer.0.conv"])
def test_hooks_on_a_level_see_what_they_ask_for(name, splits):
    module, inputs = level()
    module, seen = module.double(), []
    handle = module.get_submodule(name).register_forward_hook(lambda module, inputs, output: seen.append(output))
    out = module(*inputs)
    handle.remove()
    assert len(seen) == 1
    torch.testing.assert_close(out, module(*inputs))
    bypassed = name.startswith("up") or name.endswith("conv.layer.layer.0.conv")
    assert len(splits) == (1 if bypassed else 2)


def count_backward(module, calls):
    module.register_full_backward_hook(lambda *_: calls.append(1))


def count_gradients(module, calls):
    module.register_full_backward_pre_hook(lambda *_: calls.append(1))


def count_forward(module, calls):
    forward = module.forward
    module.forward = lambda x: calls.append(1) or forward(x)


WATCHES = pytest.mark.parametrize("watch", [count_backward, count_gradients, count_forward])


@WATCHES
@pytest.mark.parametrize("name", ["up", "up.up", "up.up.1", "conv.layer.layer.0.conv", "conv.layer.layer.0.norm"])
def test_whoever_watches_a_part_of_a_level_sees_it_run(name, watch, splits):
    (module, inputs), calls = level(), []
    expected = results(module.double(), inputs)
    watch(module.get_submodule(name), calls)
    found = results(module, inputs)
    assert len(calls) == 1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@WATCHES
@pytest.mark.parametrize("place", [0, 1])
def test_whoever_watches_a_part_of_the_head_sees_it_run(place, watch):
    head, calls = pair(), []
    watch(head[place], calls)
    head(random_volume((1, 8, 3, 4, 5)).float().requires_grad_()).sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("name", "apart"),
    [
        ("up", False),
        ("up.up", False),
        ("up.up.0", True),
        ("up.up.1", False),
        ("conv", True),
        ("conv.layer", True),
        ("conv.layer.layer.0", True),
        ("conv.layer.layer.0.conv", False),
    ],
)
def test_replaced_parts_of_a_level_do_their_part(name, apart, splits):
    """Each part is replaced by itself and an attention that is no identity."""
    module, inputs = level()
    insert_rsa(module, name, 8)
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if "betas" in key:
                parameter.fill_(0.3)
        module.double()
        out = module(*inputs)
        assert len(splits) == apart
        torch.testing.assert_close(out, published(module)(*inputs))


def test_parametrized_weights_are_computed_as_written(splits):
    module, inputs = level()
    nn.utils.parametrizations.spectral_norm(module.conv.layer.layer[0].conv)
    module.double().eval()(*inputs)
    assert not splits


# --- the last two convolutions ---


def pair():
    torch.manual_seed(0)
    return ConvPair(nn.Conv3d(8, 8, 3, padding=1, bias=False), nn.Conv3d(8, 3, 1, bias=False))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d], ids=str)
@pytest.mark.parametrize("width", [5, 8])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_the_last_two_convolutions_are_one(dtype, width, memory_format, monkeypatch):
    kernels, conv3d = [], F.conv3d
    agree(pair(), [random_volume((2, 8, 3, 4, width)).contiguous(memory_format=memory_format)], dtype)
    monkeypatch.setattr(
        F, "conv3d", lambda x, weight, **options: kernels.append(weight) or conv3d(x, weight, **options)
    )
    with torch.autocast("cpu", torch.bfloat16):
        pair()(torch.zeros(1, 8, 3, 4, 5))
    assert [kernel.shape for kernel in kernels] == [(3, 8, 3, 3, 3)]
    assert kernels[0].dtype == torch.float32, "the product is rounded by the convolution alone"


@pytest.mark.parametrize("out", range(1, MOST_NARROW + 1))
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d], ids=str)
@pytest.mark.parametrize("size", [(1, 1, NEIGHBOURS), (3, 5, 2 * NEIGHBOURS), (2, 1, 5 * NEIGHBOURS)], ids=str)
def test_neighbours_are_convolved_at_once(size, memory_format, out):
    tensors = [
        random_volume((2, 6, *size)).contiguous(memory_format=memory_format),
        random_volume((out, 6, 3, 3, 3), 2),
    ]
    upstream = random_volume((2, out, *size), 3)
    written = with_gradients(lambda x, weight: F.conv3d(x, weight, padding=1), tensors, upstream)
    for result, truth in zip(with_gradients(narrow_conv, tensors, upstream), written, strict=True):
        assert result.shape == truth.shape
        assert relative_error(result, truth) < 1e-13
    formats = [
        conv(*tensors).is_contiguous(memory_format=memory_format)
        for conv in (narrow_conv, partial(F.conv3d, padding=1))
    ]
    assert formats[0] == formats[1] or 1 in (out, *size)


@pytest.fixture
def neighbours(monkeypatch):
    """The volumes whose neighbouring voxels were convolved at once."""
    seen = []
    monkeypatch.setattr(unet, "narrow_conv", lambda x, weight: seen.append(x) or narrow_conv(x, weight))
    return seen


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(1, 9, 16), (3, 9, NEIGHBOURS)], ids=str)
def test_neighbours_are_convolved_one_by_one_where_onednn_is_wrong(size, dtype, neighbours):
    """In bfloat16 on processors with AMX."""
    agree(pair(), [random_volume((2, 8, *size))], dtype)
    assert not neighbours


@pytest.mark.parametrize(("out", "width", "narrow"), [(2, 8, True), (4, 8, True), (5, 8, False), (2, 6, False)])
def test_neighbours_are_convolved_at_once_where_that_pays(out, width, narrow, neighbours):
    head = ConvPair(nn.Conv3d(8, 8, 3, padding=1, bias=False), nn.Conv3d(8, out, 1, bias=False)).double()
    x = random_volume((1, 8, 3, 4, width))
    torch.testing.assert_close(head(x), nn.Sequential(*head)(x))
    assert len(neighbours) == narrow


@pytest.mark.parametrize(
    "change",
    [
        lambda convs: convs.__setitem__(1, nn.Conv3d(8, 4, 1)),
        lambda convs: convs.__setitem__(1, nn.Conv3d(8, 4, 3, padding=1, bias=False)),
        lambda convs: convs.__setitem__(1, nn.Identity()),
        lambda convs: convs.append(nn.Sigmoid()),
        lambda convs: convs[0].register_forward_hook(lambda module, inputs, output: 2 * output),
        lambda convs: nn.utils.parametrizations.spectral_norm(convs[0]),
    ],
    ids=["bias", "kernel", "identity", "appended", "hooked", "parametrized"],
)
def test_a_changed_head_is_computed_as_written(change):
    head = pair().eval()
    change(head)
    x = random_volume((1, 8, 3, 4, 5)).float()
    torch.testing.assert_close(head(x), nn.Sequential(*head)(x), rtol=0, atol=0)


# --- the network ---


def network(**choices):
    torch.manual_seed(0)
    return RSANet(2, 3, (8, 16, 32), **{"attention": None, "dropout": 0.0, **choices})


@pytest.mark.parametrize("choice", [{}, {"downsample": "max_pool"}, {"norm": "batch", "dropout": 0.4}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_network_is_its_published_self_with_all_gradients(dtype, choice, splits):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LIMITS, torch.float64, 1e-10)
        patch.setitem(LIMITS, torch.float32, 1e-3)  # a gradient is a small difference of large sums
        agree(network(**choice), [random_volume((2, 2, 12, 8, 16))], dtype)
    assert len(splits) == 2


def test_channels_last_stays_channels_last(splits):
    channels_last = torch.channels_last_3d
    model = network().to(memory_format=channels_last)
    x = random_volume((1, 2, 16, 24, 16)).float().contiguous(memory_format=channels_last)
    outputs = []
    for name in ("up_concat1", "up_concat2"):
        model.get_submodule(name).register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        outputs.append(model(x))
    assert len(splits) == 2
    assert len(outputs) == 3
    assert all(output.is_contiguous(memory_format=channels_last) for output in outputs)


def test_copies_and_pickles_compute_the_same(splits):
    model = network().double()
    x = random_volume((1, 2, 8, 8, 8))
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
    assert len(splits) == 6


def test_a_trace_of_even_sizes_serves_odd_ones(splits):
    model = network().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, random_volume((1, 2, 8, 8, 8)).float(), check_trace=False)
    assert not splits
    for size in ((8, 8, 8), (9, 13, 6)):
        x = random_volume((1, 2, *size)).float()
        torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)
