"""RSANet: the published function, every choice it offers, and the files its weights live in."""

import copy
import json
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from support import GOLDEN, golden_parameter, golden_tensor, random_volume, relative_error
from torch import nn

import rsanet.checkpoints
from rsanet import NonLocalBlock, RSABlock, RSANet, insert_rsa, load_model, load_reference_checkpoint, save_model
from rsanet.configuration import PAPER_CONFIGURATIONS
from rsanet.unet import group_norm_channels_last, pad_or_crop

PUBLISHED_SHAPES = json.loads((GOLDEN / "rsanet_state_dict.json").read_text())
NARROW = {"in_channels": 1, "out_channels": 3, "channels": (8, 16, 24), "dropout": 0.0}
ODD = (1, 1, 9, 13, 6)


@pytest.fixture(scope="module")
def published_state_dict():
    return OrderedDict((key, golden_parameter(key, shape).float()) for key, shape in PUBLISHED_SHAPES.items())


def narrow(**choices):
    """A narrow network with attention that is no longer the identity."""
    torch.manual_seed(0)
    model = RSANet(**{**NARROW, **choices})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "betas" in name:
                parameter.fill_(0.3)
            if "out_conv" in name:
                parameter.normal_(std=0.1)
    return model


def narrow_reference(prefix="", **choices):
    """A state_dict as the published code would save it, of a narrow network."""
    return {prefix + key: tensor for key, tensor in narrow(**choices).state_dict().items()}


def volume(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


# --- the published network ---


def test_default_network_has_the_published_parameters():
    with torch.device("meta"):
        model = RSANet()
    assert {key: list(t.shape) for key, t in model.state_dict().items()} == PUBLISHED_SHAPES
    assert list(model.state_dict()) == list(PUBLISHED_SHAPES)
    assert len(list(model.parameters())) == 74


@pytest.mark.parametrize(("case", "size"), [("32", (32, 32, 32)), ("odd", (27, 34, 21))])
def test_published_checkpoint_from_a_file_reproduces_the_published_output(case, size, published_state_dict, tmp_path):
    path = tmp_path / "published.pth"
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": t for k, t in published_state_dict.items()}}, path)
    model = load_reference_checkpoint(path).double()
    assert not model.training
    x = golden_tensor(f"net_{case}.x", (1, 3, *size)).float().double()
    with torch.no_grad():
        y = model(x)
    golden = torch.from_numpy(np.load(GOLDEN / f"rsanet_{case}.npz")["y"]).double()
    assert (y - golden).abs().max() < 1e-6


# --- every choice ---

CHOICES = [
    {"block": "residual"},
    {"block": "pre_activation"},
    {"downsample": "residual"},
    {"downsample": "max_pool"},
    {"upsample": "trilinear"},
    {"upsample": "transposed"},
    {"norm": "batch"},
    {"norm": "Instance"},
    {"norm": ("instance", {"affine": True})},
    {"norm": ("group", {"num_groups": 4, "eps": 1e-3})},
    {"attention": None},
    {"attention": "non_local"},
    {"attention_levels": (0, 1, 2)},
    {"attention_levels": (-2,), "decoder_attention_levels": (0, -2)},
    {"attention": "non_local", "attention_levels": (1,), "decoder_attention_levels": (1,)},
    {"axes": ("axial", 3), "scale": 0.1, "recompute": True},
    {"dropout": 0.3},
    {"channels": (8, 24), "block": "residual", "upsample": "transposed"},
    {"channels": (8, 8, 16, 16), "in_channels": 1, "downsample": "residual", "block": "pre_activation"},
    {"block": "residual", "downsample": "max_pool", "upsample": "trilinear", "norm": "batch"},
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("shape", [ODD, (2, 1, 8, 8, 16)], ids=["odd", "even"])
def test_every_choice_trains_on_any_size(choice, shape):
    model = narrow(**choice)
    y = model(volume(*shape))
    assert y.shape == (shape[0], 3, *shape[2:])
    y.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        # A bias of the keys has no influence by the algebra of softmax.
        assert "phi_conv.bias" in name or parameter.grad.abs().sum() > 0, name
    twin = RSANet(**json.loads(json.dumps(model.config)))
    twin.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(twin.eval()(volume(*shape)), model.eval()(volume(*shape)))


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 1, 3), (1, 7, 1), (3, 3, 3), (5, 4, 17)])
def test_strided_network_takes_tiny_volumes(size):
    model = narrow(channels=(16, 16, 32, 32, 64))
    assert model(volume(1, 1, *size)).shape == (1, 3, *size)


def test_blocks_are_what_their_names_say():
    x = volume(1, 8, 4, 4, 4)
    residual = rsanet.unet.ConvBlock(8, 8, "instance", "residual").layer
    last = residual.layer[1].norm
    pre = rsanet.unet.ConvBlock(8, 8, "instance", "pre_activation").layer
    with torch.no_grad():
        residual.layer[1].conv.weight.zero_()
        pre.layer[1].conv.weight.zero_()
    assert isinstance(last, nn.InstanceNorm3d)
    assert torch.equal(residual(x), torch.relu(x)), "the sum is activated"
    assert torch.equal(pre(x), x), "the shortcut is a clean identity"
    plain = rsanet.unet.ConvBlock(8, 8, "instance", "plain").layer
    assert (plain(x) >= 0).all()


def test_pad_or_crop_drops_the_first_slice_and_pads_the_end():
    x = torch.arange(1.0, 9).reshape(1, 1, 2, 2, 2)
    assert torch.equal(pad_or_crop(x, (1, 2, 1), pad=False), x[:, :, 1:, :, 1:])
    padded = pad_or_crop(x, (2, 3, 2), pad=True)
    assert torch.equal(padded[:, :, :, :2], x)
    assert (padded[:, :, :, 2] == 0).all()
    assert torch.equal(pad_or_crop(x, (2, 2, 2), pad=False), x)


def test_dropout_drops_whole_feature_maps_in_training_only():
    model = narrow(dropout=0.5, attention=None)
    seen = []
    for module in model.modules():
        if isinstance(module, nn.Dropout3d):
            module.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    x = volume(*ODD)
    torch.manual_seed(0)
    model(x)
    assert len(seen) == 5
    for before, after in seen:
        dropped = (after == 0).flatten(2).all(2)
        kept = after[~dropped]
        torch.testing.assert_close(kept, 2 * before[~dropped])
    assert any((after == 0).flatten(2).all(2).any() for _, after in seen)
    model.eval()
    assert torch.equal(model(x), model(x))


def test_attention_stands_at_the_levels_named():
    model = narrow(attention_levels=(0, -1), decoder_attention_levels=(0, -2))
    blocks = {name: module.channels for name, module in model.named_modules() if isinstance(module, RSABlock)}
    assert blocks == {"rsa_block": 24, "rsa_block1": 8, "rsa_block_up2": 16, "rsa_block_up1": 8}
    maps = model.eval().attention_maps(volume(1, 1, 8, 12, 16))
    sizes = {name: [m.shape[-1] for m in found] for name, found in maps.items()}
    assert sizes["rsa_block1"] == [12, 16, 8]
    assert sizes["rsa_block"] == [3, 4, 2]
    assert sizes["rsa_block_up2"] == [6, 8, 4]


def test_attention_of_an_encoder_level_reaches_its_skip_connection():
    model = narrow(attention_levels=(0,)).eval()
    x = volume(*ODD)
    attended = []
    model.rsa_block1.register_forward_hook(lambda module, inputs, output: attended.append(output))
    skips = []
    model.up_concat1.register_forward_pre_hook(lambda module, inputs: skips.append(inputs[1]))
    model(x)
    assert torch.equal(attended[0], skips[0])


@pytest.mark.parametrize("name", PAPER_CONFIGURATIONS)
def test_networks_of_the_paper_have_names(name):
    family, digits = name.split("-")
    model = RSANet.from_name(name, **NARROW)
    kind = RSABlock if family == "RSA" else NonLocalBlock
    found = [module for module in model.modules() if isinstance(module, RSABlock | NonLocalBlock)]
    assert len(found) == digits.count("1")
    assert all(type(module) is kind for module in found)
    prefix = "rsa_block" if family == "RSA" else "non_local_block"
    present = [hasattr(model, prefix + suffix) for suffix in ("2", "", "_up2")]
    assert present == [digit == "1" for digit in digits]
    assert model(volume(*ODD)).shape == (1, 3, *ODD[2:])


def test_the_default_is_rsa_010_and_000_is_the_plain_unet():
    assert RSANet.from_name("RSA-010", **NARROW).config == RSANet(**NARROW).config
    assert RSANet.from_name("NCL-000", **NARROW).config["attention"] is None


def test_attention_changes_nothing_at_the_start():
    torch.manual_seed(0)
    plain = RSANet(**NARROW, attention=None).eval()
    for name in ("RSA-111", "NCL-111"):
        attended = RSANet.from_name(name, **NARROW).eval()
        attended.load_state_dict(plain.state_dict(), strict=False)
        assert torch.equal(attended(volume(*ODD)), plain(volume(*ODD)))


# --- deep supervision ---


def test_deep_supervision_returns_a_list_in_training_and_a_tensor_in_evaluation():
    model = narrow(channels=(8, 8, 16, 16), deep_supervision=True)
    x = volume(1, 1, 16, 13, 9)
    outputs = model(x)
    assert [tuple(y.shape[2:]) for y in outputs] == [(16, 13, 9), (8, 7, 5), (4, 4, 3)]
    assert all(y.shape[1] == 3 for y in outputs)
    sum(y.square().mean() for y in outputs).backward()
    assert all(head.weight.grad.abs().sum() > 0 for head in model.deep_heads)
    model.eval()
    y = model(x)
    assert isinstance(y, torch.Tensor)
    deep = model.forward_deep(x)
    assert torch.equal(deep[0], y)
    assert len(deep) == 3
    with pytest.raises(ValueError, match="deep_supervision=True"):
        narrow().forward_deep(x)


# --- graphs, precision, memory format ---


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"deep_supervision": True, "decoder_attention_levels": (0,)},
        {"attention": "non_local", "downsample": "max_pool", "upsample": "trilinear"},
    ],
    ids=str,
)
def test_network_compiles_to_one_graph(choice):
    model = narrow(**choice)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = volume(*ODD)
    for mode in (True, False):
        model.train(mode)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


def test_one_compiled_graph_serves_odd_and_even_sizes():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    model = narrow().eval()
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    for size in [(9, 13, 6), (8, 8, 8), (12, 7, 16)]:
        torch.testing.assert_close(compiled(volume(1, 1, *size)), model(volume(1, 1, *size)))
    assert counter.frame_count == 1


@pytest.mark.parametrize("choice", [{}, {"downsample": "max_pool"}], ids=str)
def test_one_exported_graph_serves_odd_and_even_sizes(choice):
    model = narrow(**choice).eval()
    dims = {dim: torch.export.Dim(f"s{dim}", min=8, max=64) for dim in (2, 3, 4)}
    exported = torch.export.export(model, (volume(1, 1, 9, 12, 15),), dynamic_shapes={"x": dims}).module()
    for size in [(9, 12, 15), (8, 16, 24), (11, 8, 10)]:
        x = volume(1, 1, *size)
        torch.testing.assert_close(exported(x), model(x), rtol=1e-5, atol=1e-5)


def test_channels_last_in_gives_channels_last_out():
    channels_last = torch.channels_last_3d
    model = narrow(in_channels=2).eval()
    x = volume(2, 2, *ODD[2:])
    expected = model(x)
    model = model.to(memory_format=channels_last)
    threads = torch.get_num_threads()
    # With one thread, torch computes small convolutions on the CPU by a path that has no channels-last output.
    torch.set_num_threads(2)
    try:
        bottleneck = []
        model.rsa_block.register_forward_hook(lambda module, inputs, output: bottleneck.append((*inputs, output)))
        y = model(x.to(memory_format=channels_last))
    finally:
        torch.set_num_threads(threads)
    assert all(tensor.is_contiguous(memory_format=channels_last) for tensor in (*bottleneck[0], y))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_autocast_stays_close_and_trains():
    model = narrow()
    x = volume(*ODD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    y.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    relative = (y.float() - model(x)).norm() / model(x).norm()
    assert relative < 0.1


def test_forward_and_backward_repeat_bitwise():
    gradients = []
    for _ in range(2):
        model = narrow(dropout=0.2)
        torch.manual_seed(3)
        model(volume(*ODD)).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_network_copies_and_pickles():
    model = narrow(decoder_attention_levels=(0,)).eval()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(volume(*ODD)), model(volume(*ODD)))


# --- errors ---


@pytest.mark.parametrize(
    ("choice", "error", "words"),
    [
        ({"in_channels": 0}, ValueError, "in_channels is 0"),
        ({"out_channels": "2"}, TypeError, "out_channels is '2'.*int"),
        ({"channels": 32}, TypeError, "channels is 32.*sequence"),
        ({"channels": (32,)}, ValueError, "channels has 1 widths.*2 to 16 levels"),
        ({"channels": (8, 20)}, ValueError, "20 channels cannot be split into 8 groups"),
        ({"channels": (8, -8)}, ValueError, "every width in channels is -8"),
        ({"norm": "layer"}, ValueError, "norm 'layer' is unknown.*group"),
        ({"norm": 8}, TypeError, "norm is 8.*num_groups"),
        ({"norm": "group"}, ValueError, "num_groups"),
        ({"norm": ("group", {"num_groups": 0})}, ValueError, "positive num_groups"),
        ({"norm": ("batch", {"num_groups": 8})}, ValueError, "no option 'num_groups'"),
        ({"norm": ("batch", {"eps": "small"})}, TypeError, "'eps' of norm 'batch' is 'small': give float"),
        ({"dropout": 1.0}, ValueError, "dropout is 1.0.*below 1"),
        ({"dropout": None}, TypeError, "dropout is None"),
        ({"attention": "RSA"}, ValueError, "attention is 'RSA'.*'rsa', 'non_local'"),
        ({"attention_levels": (3,)}, ValueError, "attention_levels has 3.*3 levels: use -3 to 2"),
        ({"attention_levels": (-1, 2)}, ValueError, "names level 2 twice"),
        ({"attention_levels": (0.0,)}, TypeError, "levels are ints"),
        ({"attention_levels": -1}, TypeError, "attention_levels is -1.*sequence"),
        ({"decoder_attention_levels": (-1,)}, ValueError, "the bottleneck, which is no decoder level"),
        ({"axes": ()}, ValueError, "axes is empty"),
        ({"axes": ("z",)}, ValueError, "axis is 'z'"),
        ({"scale": float("inf")}, ValueError, "scale is inf"),
        ({"block": "vgg"}, ValueError, "block is 'vgg'.*plain"),
        ({"downsample": "avg"}, ValueError, "downsample is 'avg'.*max_pool"),
        ({"upsample": "linear"}, ValueError, "upsample is 'linear'.*trilinear"),
        ({"deep_supervision": 1}, TypeError, "deep_supervision is 1.*True or False"),
    ],
)
def test_constructor_errors_say_what_is_wrong(choice, error, words):
    with pytest.raises(error, match=words):
        RSANet(**{**NARROW, **choice})


def test_unknown_names_of_the_paper_are_refused():
    with pytest.raises(ValueError, match="'RSA-222' is unknown: use one of RSA-000"):
        RSANet.from_name("RSA-222")


@pytest.mark.parametrize(
    ("choice", "x", "error", "words"),
    [
        ({}, torch.zeros(1, 2, 8, 8, 8), ValueError, r"\(N, 1, D, H, W\), got shape \(1, 2, 8, 8, 8\)"),
        ({}, torch.zeros(1, 8, 8, 8), ValueError, "add the batch dim"),
        ({}, torch.zeros(1, 1, 8, 0, 8), ValueError, r"got shape \(1, 1, 8, 0, 8\)"),
        ({}, torch.zeros(1, 1, 8, 8, 8, dtype=torch.int16), TypeError, "floating-point tensor, got torch.int16"),
        ({}, np.zeros((1, 1, 8, 8, 8)), TypeError, "floating-point tensor, got ndarray"),
        ({"downsample": "max_pool"}, torch.zeros(1, 1, 3, 8, 8), ValueError, "too small to max-pool 2 times.*least 4"),
        ({"norm": "instance"}, torch.zeros(1, 1, 4, 4, 4), ValueError, "single value per instance norm"),
        ({"norm": "batch"}, torch.zeros(1, 1, 3, 4, 4), ValueError, "single value per batch norm"),
        ({}, torch.zeros(1, 1, 1, 1, 1), ValueError, "single value per group norm"),
    ],
)
def test_impossible_inputs_are_refused(choice, x, error, words):
    with pytest.raises(error, match=words):
        narrow(**choice)(x)


def test_single_voxels_are_refused_only_where_the_norm_cannot_take_them():
    for choice, shape in [({"norm": "batch"}, (2, 1, 4, 4, 4)), ({}, (1, 1, 4, 4, 4))]:
        assert narrow(**choice)(volume(*shape)).shape == (shape[0], 3, 4, 4, 4)
    assert narrow(norm="batch").eval()(volume(1, 1, 4, 4, 4)).shape == (1, 3, 4, 4, 4)


# --- checkpoints of the published code ---


@pytest.mark.parametrize(
    "wrap",
    [
        lambda sd: sd,
        lambda sd: {"model_state_dict": sd, "optimizer": {"lr": 0.1}},
        lambda sd: {"model": {"state_dict": sd}},
        lambda sd: {f"module.{k}": v for k, v in sd.items()},
        lambda sd: {"state_dict": {f"network.module.{k}": v for k, v in sd.items()}},
    ],
)
def test_reference_checkpoints_are_found_in_their_wrappings(wrap, tmp_path):
    state = narrow_reference(in_channels=2, channels=(8, 16, 24, 32))
    torch.save(wrap(state), tmp_path / "checkpoint.pth")
    model = load_reference_checkpoint(tmp_path / "checkpoint.pth", backend="reference", dropout=0.0)
    assert model.config["in_channels"] == 2
    assert model.config["out_channels"] == 3
    assert model.config["channels"] == [8, 16, 24, 32]
    assert model.rsa_block.backend == "reference"
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_reference_checkpoint_without_attention_is_a_plain_unet():
    model = load_reference_checkpoint(narrow_reference(attention=None))
    assert model.config["attention"] is None
    assert model(volume(*ODD)).shape == (1, 3, *ODD[2:])


def test_reference_checkpoint_keeps_dtype_and_does_not_alias():
    state = {key: tensor.double() for key, tensor in narrow_reference().items()}
    model = load_reference_checkpoint(state)
    assert model.final[1].weight.dtype == torch.float64
    model.final[1].weight.data.zero_()
    assert state["final.1.weight"].abs().sum() > 0
    assert all(parameter.requires_grad for parameter in model.parameters())


class NotATensor:
    pass


@pytest.mark.parametrize("content", [b"", b"junk", b"\x80\x02}", b"\x80\x02X\x01\x00\x00\x00\xff."])
def test_other_bytes_are_no_checkpoint(tmp_path, content):
    (tmp_path / "other.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.pth (cannot be read|holds more than tensors)"):
        load_reference_checkpoint(tmp_path / "other.pth")


def test_checkpoints_are_never_unpickled(tmp_path):
    torch.save({"state_dict": narrow_reference(), "args": NotATensor()}, tmp_path / "strange.pth")
    with pytest.raises(ValueError, match="not unpickled because that could run code"):
        load_reference_checkpoint(tmp_path / "strange.pth")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda sd: {}, ValueError, "a mapping with nothing"),
        (lambda sd: {"epoch": 3, "weights": 4}, ValueError, "a mapping with 'epoch', 'weights'.*save model.state_dict"),
        (lambda sd: {"fc.weight": torch.zeros(2, 2)}, ValueError, "no layers init_conv.*first key is 'fc.weight'"),
        (lambda sd: {**sd, "head.weight": torch.zeros(1)}, ValueError, r"1 unknown \(first head.weight\)"),
        (
            lambda sd: {k: v for k, v in sd.items() if "phi" not in k},
            ValueError,
            r"2 missing \(first rsa_block.phi_conv.weight\)",
        ),
        (lambda sd: {k: v for k, v in sd.items() if "conv2" not in k}, ValueError, "does not fit this network"),
        (lambda sd: {k: v for k, v in sd.items() if "center" not in k}, ValueError, "no layers init_conv"),
        (lambda sd: {**sd, "init_conv.weight": torch.zeros(8)}, ValueError, "no layers init_conv"),
        (lambda sd: {**sd, "down1.down.weight": torch.zeros(8, 8, 1, 1, 1)}, ValueError, "down1.down.weight of shape"),
        (lambda sd: 3, TypeError, "int is no checkpoint"),
    ],
)
def test_reference_checkpoint_errors_say_what_is_wrong(change, error, words):
    with pytest.raises(error, match=words):
        load_reference_checkpoint(change(narrow_reference()))


def test_unreadable_checkpoints_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*nothing\.pth"):
        load_reference_checkpoint(tmp_path / "nothing.pth")
    torch.save(narrow_reference(), tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    for name, content in [("cut.pth", whole[: len(whole) // 2]), ("text.pth", b"hello"), ("empty.pth", b"")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            load_reference_checkpoint(tmp_path / name)


# --- model files ---

safetensors = pytest.importorskip("safetensors.torch")


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"norm": "batch", "block": "residual", "attention": "non_local", "decoder_attention_levels": (0,)},
        {"norm": ("instance", {"affine": True}), "deep_supervision": True, "axes": (2, "coronal"), "scale": 0.5},
    ],
    ids=str,
)
def test_a_model_file_alone_rebuilds_its_network(choice, tmp_path):
    model = narrow(**choice)
    model(volume(2, *ODD[1:]))  # moves the statistics of batch norm
    model.eval()
    extra = {"contrasts": ["FLAIR", "T1"], "spacing": [1.0, 1.0, 3.0], "note": "läsion"}
    save_model(model, tmp_path / "model.safetensors", extra)
    twin = load_model(tmp_path / "model.safetensors")
    assert twin.config == model.config
    assert twin.extra == extra
    assert not twin.training
    assert torch.equal(twin(volume(*ODD)), model(volume(*ODD)))
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    tuned = load_model(tmp_path / "model.safetensors", backend="reference", recompute=True)
    blocks = [block for block in tuned.modules() if isinstance(block, RSABlock)]
    assert all(block.recompute and block.backend == "reference" for block in blocks)
    save_model(twin, tmp_path / "again.safetensors")
    assert load_model(tmp_path / "again.safetensors").extra == extra


def test_model_files_take_half_precision_channels_last_and_compiled_networks(tmp_path):
    model = narrow().to(torch.bfloat16).to(memory_format=torch.channels_last_3d)
    save_model(torch.compile(model), tmp_path / "model.safetensors")
    twin = load_model(tmp_path / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert twin.final[0].weight.dtype == torch.bfloat16


def test_files_of_equal_models_are_equal_to_the_byte(tmp_path):
    network = RSANet(1, 2, (8, 16))
    files = [tmp_path / f"{number}.safetensors" for number in range(6)]
    for path in files:
        save_model(network, path, {"contrasts": ["FLAIR"], "name": "für"})
    assert len({path.read_bytes() for path in files}) == 1
    assert load_model(files[0]).extra == {"contrasts": ["FLAIR"], "name": "für"}
    with safe_open(files[0], "pt") as file:  # what the library reads, padding and all
        assert file.metadata()["format"] == "pt"


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_model(narrow(), path)
    before = path.read_bytes()

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(rsanet.checkpoints.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(narrow(out_channels=2), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_what_cannot_be_saved_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(TypeError, match="saves an RSANet, not Linear"):
        save_model(nn.Linear(2, 2), path)
    with pytest.raises(TypeError, match="extra cannot be JSON"):
        save_model(narrow(), path, {"model": object()})
    with pytest.raises(ValueError, match=r"no longer is what its configuration says.*conv1\.rsa_block"):
        save_model(insert_rsa(narrow(), "conv1"), path)
    assert not path.exists()


def rewrite(path, change):
    """Rewrites the metadata of a model file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = change(file.metadata())
    safetensors.save_file(safetensors.load_file(path), path, metadata)


def configured(**changes):
    def change(metadata):
        return {**metadata, "rsanet_config": json.dumps({**json.loads(metadata["rsanet_config"]), **changes})}

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: None, "no RSANet configuration inside"),
        (lambda m: {**m, "rsanet_format": "9"}, "format '9', and this version reads '1'"),
        (lambda m: {**m, "rsanet_config": "{"}, "unusable configuration"),
        (lambda m: {**m, "rsanet_config": "[]"}, "unusable configuration.*not JSON objects"),
        (lambda m: {**m, "rsanet_extra": "3"}, "unusable configuration.*not JSON objects"),
        (configured(device="cuda"), "unexpected keyword argument 'device'"),
        (configured(backend="triton"), "multiple values for keyword argument 'backend'"),
        (configured(block="__import__('os')"), "block is .*unknown"),
        (configured(channels=[8, 16, 2**62]), "unusable configuration|does not fit"),
        (configured(channels=[60000, 60000, 60000]), "does not fit this network.*of shape"),
        (configured(channels=[8, 16, 16]), "does not fit this network"),
    ],
)
def test_strange_model_files_are_refused(change, words, tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(narrow(), path)
    rewrite(path, change)
    with pytest.raises(ValueError, match=words):
        load_model(path)


def test_broken_model_files_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_model(path)
    save_model(narrow(), path)
    whole = path.read_bytes()
    for content in (whole[:-100], whole[:20], b"", b"not a model file at all"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="no safetensors file, or a truncated one"):
            load_model(path)


# --- imports ---

BARE = """
import sys
BLOCKED = {"triton", "monai", "safetensors", "lightning", "nibabel", "scipy", "matplotlib", "typer", "nilearn"}

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Block())
import torch
from rsanet import RSANet, insert_rsa, save_model
model = RSANet(1, 2, (8, 16))
model(torch.randn(1, 1, 6, 5, 7)).sum().backward()
insert_rsa(torch.nn.Sequential(torch.nn.Conv3d(1, 2, 1)), "0")(torch.zeros(1, 1, 2, 2, 2))
try:
    save_model(model, "unused.safetensors")
except ImportError as error:
    assert "pip install" in str(error), error
else:
    raise AssertionError("safetensors was not blocked")
assert not BLOCKED & {name.partition(".")[0] for name in sys.modules}
print("fine")
"""


def test_package_needs_torch_alone(tmp_path):
    root = Path(rsanet.__file__).parents[1]
    script = f"import sys; sys.path.insert(0, {str(root)!r})\n{BARE}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "fine", done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keep", [0, 10, 200, 0.5, 0.99])
def test_a_checkpoint_cut_anywhere_is_refused(keep, tmp_path):
    path = tmp_path / "cut.pth"
    torch.save(narrow_reference(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    with pytest.raises(ValueError, match=r"cut\.pth"):
        load_reference_checkpoint(path)


def test_a_checkpoint_that_the_system_cannot_read_is_refused(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(22, "Invalid argument")

    (tmp_path / "cut.pth").write_bytes(b"PK")
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(ValueError, match=r"cut\.pth cannot be read"):
        load_reference_checkpoint(tmp_path / "cut.pth")


def test_a_full_disk_is_told_with_the_model_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        save_model(narrow(), tmp_path / "m.safetensors")
    assert caught.value.filename == str(tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_for_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        save_model(narrow(), tmp_path / "nowhere" / "m.safetensors")


def test_a_network_too_wide_for_any_memory_is_refused():
    with pytest.raises(ValueError, match="65536 is the most"):
        RSANet(1, 2, (8, 2**17))


def test_a_broken_configuration_is_told_in_one_line(tmp_path, monkeypatch):
    save_model(narrow(), tmp_path / "m.safetensors")

    def fail(*args, **kwargs):
        raise RuntimeError("no memory\nat line 1\nat line 2")

    monkeypatch.setattr(rsanet.checkpoints, "RSANet", fail)
    with pytest.raises(ValueError, match=r"\(no memory\): save the model again$"):
        load_model(tmp_path / "m.safetensors")


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_group_norm_of_channels_last_volumes_is_group_norm(dtype, affine):
    """The path that a GPU takes: the same function, the format kept."""
    x = random_volume((2, 12, 3, 5, 4)).add(0.7).to(dtype).contiguous(memory_format=torch.channels_last_3d)
    weight, bias = (random_volume((12,), seed).to(dtype) for seed in (2, 3)) if affine else (None, None)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias) if tensor is not None]
    upstream = random_volume(x.shape, 4).to(dtype)
    out = group_norm_channels_last(x, 4, weight, bias, 1e-5)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last_3d)
    exact = [None if tensor is None else tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    truth = torch.nn.functional.group_norm(exact[0], 4, exact[1], exact[2], 1e-5)
    truths = [truth, *torch.autograd.grad(truth, [part for part in exact if part is not None], upstream.double())]
    for result, expected in zip([out, *torch.autograd.grad(out, inputs, upstream)], truths, strict=True):
        limit = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 8e-3}[dtype]
        assert relative_error(result, expected) < limit


@pytest.mark.parametrize("attention", ["rsa", None])
def test_channels_last_is_kept_from_end_to_end_under_mixed_precision(attention):
    model = RSANet(channels=(8, 16, 32), attention=attention).to(memory_format=torch.channels_last_3d)
    arranged = []

    def note(module, inputs, output):
        arranged.append(output.is_contiguous(memory_format=torch.channels_last_3d))

    for module in model.modules():
        if not list(module.children()) or isinstance(module, RSABlock):
            module.register_forward_hook(note)
    x = random_volume((1, 3, 16, 24, 16)).float().contiguous(memory_format=torch.channels_last_3d)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert len(arranged) > 20
    assert all(arranged)


# --- meta device, batches of none, symbolic tracing ---


@pytest.mark.parametrize("attention", ["rsa", "non_local"])
@pytest.mark.parametrize("once", [False, True])
def test_a_network_from_the_meta_device_starts_as_the_identity(attention, once):
    with torch.device("meta"):
        model = narrow(attention=attention)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    for module in [model] if once else model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert not any((parameter == 7).any() for parameter in model.parameters())
    plain = narrow(attention=None)
    plain.load_state_dict(model.state_dict(), strict=False)
    x = torch.randn(1, model.config["in_channels"], 9, 8, 7)
    assert torch.equal(model.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("attention", ["rsa", "non_local", None])
def test_a_batch_of_none_passes(attention):
    model = narrow(attention=attention)
    x = torch.zeros(0, model.config["in_channels"], 8, 9, 7, requires_grad=True)
    out = model(x)
    assert out.shape == (0, model.config["out_channels"], 8, 9, 7)
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert model.eval()(x).shape == out.shape
    with pytest.raises(ValueError, match="needs a volume"):
        model(torch.zeros(1, model.config["in_channels"], 0, 9, 7))


def test_symbolic_tracing_is_refused_with_the_way():
    with pytest.raises(TypeError, match=r"torch\.fx\.symbolic_trace does not know: use torch\.export"):
        torch.fx.symbolic_trace(narrow())
