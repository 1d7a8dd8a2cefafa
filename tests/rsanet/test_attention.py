"""The attention blocks, and plugging them into other networks."""

import copy
import io
import json
import pickle

import numpy as np
import pytest
import torch
from support import GOLDEN, golden_parameter, golden_tensor
from torch import nn

from rsa_kernels.api import AXIS_NAMES
from rsanet import NonLocalBlock, RSABlock, SABlock, insert_rsa
from rsanet.attention import WithRSA


def open_betas(module, value=0.7):
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "beta" in name:
                parameter.fill_(value)
    return module


def seeded(make):
    torch.manual_seed(0)
    return make()


@pytest.fixture
def volume():
    return torch.randn(2, 4, 5, 3, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("stem", "shape"), [("small", (2, 8, 5, 6, 7)), ("odd", (1, 12, 9, 3, 11))])
def test_rsa_block_reproduces_the_published_outputs_and_gradients(stem, shape):
    golden = np.load(GOLDEN / f"rsa_block_{stem}.npz")
    block = RSABlock(shape[1]).double()
    block.load_state_dict({key: golden_parameter(key, p.shape) for key, p in block.state_dict().items()}, strict=True)
    x = golden_tensor(f"rsa_{stem}.x", shape).requires_grad_()
    y = block(x)
    y.backward(golden_tensor(f"rsa_{stem}.gy", shape))
    torch.testing.assert_close(y, torch.from_numpy(golden["y"]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x.grad, torch.from_numpy(golden["grad.x"]), rtol=1e-8, atol=1e-8)
    for name, parameter in block.named_parameters():
        expected = torch.from_numpy(np.asarray(golden[f"grad.{name}"]))
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-8, atol=1e-8)


def test_rsa_block_has_the_published_state_dict():
    shapes = json.loads((GOLDEN / "rsanet_state_dict.json").read_text())
    published = {k.removeprefix("rsa_block."): v for k, v in shapes.items() if k.startswith("rsa_block.")}
    ours = {key: list(tensor.shape) for key, tensor in RSABlock(512).state_dict().items()}
    assert ours == published


@pytest.mark.parametrize(
    "make",
    [
        lambda: RSABlock(4),
        lambda: RSABlock(4, ("axial",)),
        lambda: SABlock(4, "sagittal"),
        lambda: NonLocalBlock(4),
        lambda: NonLocalBlock(1),
    ],
)
def test_blocks_start_as_the_identity_and_learn(make, volume):
    block = seeded(make)
    volume = volume[:, : block.channels]
    assert torch.equal(block(volume), volume)
    block(volume).square().sum().backward()
    gates = [p for name, p in block.named_parameters() if "beta" in name or "out_conv" in name]
    assert gates
    assert all(gate.grad.abs().sum() > 0 for gate in gates)


def test_rsa_block_is_slice_attention_axis_by_axis_with_shared_projections(volume):
    axes = ("axial", "sagittal", "coronal")
    block = open_betas(seeded(lambda: RSABlock(4, axes)))
    expected = volume
    for axis in axes:
        step = open_betas(SABlock(4, axis))
        step.load_state_dict({k: v for k, v in block.state_dict().items() if "conv" in k}, strict=False)
        expected = step(expected)
    torch.testing.assert_close(block(volume), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", AXIS_NAMES)
def test_axis_names_mean_their_dims(name, volume):
    dim = AXIS_NAMES[name]
    results = [open_betas(seeded(lambda axis=axis: SABlock(4, axis)))(volume) for axis in (name, dim, dim - 5)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    size = volume.shape[dim]
    assert seeded(lambda: SABlock(4, name)).attention_map(volume).shape == (2, size, size)


def test_attention_maps_are_the_softmax_of_slice_products(volume):
    block = open_betas(seeded(lambda: RSABlock(4, scale=0.5)))
    maps = block.attention_maps(volume)
    assert [tuple(m.shape) for m in maps] == [(2, 3, 3), (2, 6, 6), (2, 5, 5)]
    query, key = block.theta_conv(volume), block.phi_conv(volume)
    expected = torch.softmax(0.5 * torch.einsum("ncdhw,ncdkw->nhk", query, key), dim=-1)
    torch.testing.assert_close(maps[0], expected, rtol=1e-4, atol=1e-5)
    for attention in maps:
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:2]))


def test_recompute_changes_nothing_but_memory(volume):
    gradients = []
    for recompute in (False, True):
        block = open_betas(seeded(lambda r=recompute: RSABlock(4, recompute=r)))
        x = volume.clone().requires_grad_()
        block(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-5)


def test_blocks_keep_channels_last(volume):
    x = volume.to(memory_format=torch.channels_last_3d)
    for block in (open_betas(RSABlock(4)), open_betas(SABlock(4, 2))):
        y = block(x)
        assert y.is_contiguous(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(y, block(volume), rtol=1e-5, atol=1e-5)


def test_non_local_block_is_the_embedded_gaussian(volume):
    block = seeded(lambda: NonLocalBlock(4, inner_channels=3, scale=0.7))
    nn.init.normal_(block.out_conv.weight)
    nn.init.normal_(block.out_conv.bias)
    theta, phi, g = (conv(volume).flatten(2) for conv in (block.theta_conv, block.phi_conv, block.g_conv))
    attention = torch.softmax(0.7 * torch.einsum("nci,ncj->nij", theta, phi), dim=-1)
    attended = torch.einsum("nij,ncj->nci", attention, g).reshape(2, 3, 5, 3, 6)
    torch.testing.assert_close(block(volume), volume + block.out_conv(attended), rtol=1e-4, atol=1e-5)
    assert NonLocalBlock(8).theta_conv.out_channels == 4


@pytest.mark.parametrize("make", [lambda: RSABlock(4), lambda: SABlock(4, "axial"), lambda: NonLocalBlock(4)])
def test_blocks_compile_to_one_graph_and_export(make, volume):
    block = open_betas(seeded(make))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x, y = (volume.clone().requires_grad_() for _ in range(2))
    compiled(x).square().sum().backward()
    block(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5)
    exported = torch.export.export(block, (volume,))
    torch.testing.assert_close(exported.module()(volume), block(volume), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: RSABlock(4), lambda: SABlock(4, "axial"), lambda: NonLocalBlock(4)])
def test_blocks_run_under_autocast(make, volume):
    block = open_betas(seeded(make))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(volume)
    torch.testing.assert_close(y.float(), block(volume), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: RSABlock(0), ValueError, "channels is 0.*at least 1"),
        (lambda: RSABlock(4.0), TypeError, "channels is 4.0.*int"),
        (lambda: RSABlock(True), TypeError, "channels is True"),
        (lambda: RSABlock(4, "axial"), TypeError, "axes is a sequence of axes, not 'axial'"),
        (lambda: RSABlock(4, ()), ValueError, "axes is empty"),
        (lambda: RSABlock(4, ("axial", 1)), ValueError, "axis is 1, but must be"),
        (lambda: RSABlock(4, ("frontal",)), ValueError, "axis is 'frontal'.*coronal"),
        (lambda: RSABlock(4, (2.0,)), ValueError, "axis is 2.0, but must be"),
        (lambda: RSABlock(4, scale=float("nan")), ValueError, "scale is nan.*finite"),
        (lambda: RSABlock(4, scale="1"), TypeError, "scale is '1'.*number"),
        (lambda: NonLocalBlock(4, inner_channels=-1), ValueError, "inner_channels is -1"),
        (lambda: RSABlock(4)(torch.zeros(1, 8, 2, 2, 2)), ValueError, "4 channels and got 8.*channels=8"),
        (
            lambda: SABlock(4, 2)(torch.zeros(4, 2, 2, 2)),
            ValueError,
            r"\(N, C, D, H, W\), got shape \(4, 2, 2, 2\)",
        ),
        (lambda: NonLocalBlock(4)([torch.zeros(1)]), TypeError, "one tensor.*got list"),
    ],
)
def test_block_errors_say_what_is_wrong(make, error, words):
    with pytest.raises(error, match=words):
        make()


class Tiny(nn.Module):
    """A plain network with a nested submodule and a module list."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv3d(1, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU())
        self.stages = nn.ModuleList([nn.Conv3d(6, 8, 3, padding=1), nn.Conv3d(8, 8, 1)])
        self.act = nn.ReLU()
        self.head = nn.Conv3d(8, 2, 1)

    def forward(self, x):
        x = self.encoder(x)
        for stage in self.stages:
            x = self.act(stage(x))
        return self.head(x)


def basic_unet():
    nets = pytest.importorskip("monai.networks.nets")
    return nets.BasicUNet(spatial_dims=3, in_channels=1, out_channels=2, features=(8, 8, 8, 8, 8, 8))


def monai_unet():
    nets = pytest.importorskip("monai.networks.nets")
    return nets.UNet(3, 1, 2, channels=(8, 16, 24), strides=(2, 2), num_res_units=1)


PLUGS = [
    (Tiny, "encoder", 6),
    (Tiny, "stages.0", 8),
    (basic_unet, "down_4", 8),
    (basic_unet, "upcat_2.convs", 8),
    (monai_unet, "model.1.submodule.1.submodule", 24),
]


@pytest.mark.parametrize(("make", "path", "channels"), PLUGS)
def test_insert_rsa_leaves_outputs_unchanged_until_the_betas_move(make, path, channels):
    model = seeded(make).eval()
    x = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        before = model(x)
        assert insert_rsa(model, path) is model
        assert model.get_submodule(path).rsa_block.channels == channels
        assert torch.equal(model(x), before)
        open_betas(model)
        assert not torch.allclose(model(x), before)


@pytest.mark.parametrize(("make", "path", "channels"), PLUGS)
def test_insert_rsa_keeps_the_state_dict_keys(make, path, channels):
    model = seeded(make)
    pretrained = copy.deepcopy(model.state_dict())
    insert_rsa(model, path)
    state = model.state_dict()
    assert [key for key in state if "rsa_block" not in key] == list(pretrained)
    assert all(key.startswith(f"{path}.rsa_block.") for key in set(state) - set(pretrained))

    other = insert_rsa(make(), path)
    report = other.load_state_dict(pretrained, strict=False)
    assert not report.unexpected_keys
    assert set(report.missing_keys) == set(state) - set(pretrained)
    for key, tensor in pretrained.items():
        assert torch.equal(other.state_dict()[key], tensor)
    other.load_state_dict(open_betas(model).state_dict(), strict=True)
    x = torch.randn(1, 1, 32, 32, 32)
    assert torch.equal(other.eval()(x), model.eval()(x))


def test_inserted_blocks_survive_copy_pickle_compile_and_export():
    model = open_betas(insert_rsa(insert_rsa(seeded(Tiny).eval(), "stages.0"), "encoder"))
    x = torch.randn(1, 1, 4, 5, 6)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh = insert_rsa(insert_rsa(Tiny().eval(), "stages.0"), "encoder")
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh(x), expected)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)


def test_insert_rsa_follows_device_dtype_and_mode():
    model = insert_rsa(Tiny().to(torch.bfloat16).eval(), "stages.1", axes=("axial", 4), scale=0.5, recompute=True)
    wrapped = model.get_submodule("stages.1")
    assert isinstance(wrapped, WithRSA)
    assert not wrapped.training
    assert all(p.dtype == torch.bfloat16 for p in wrapped.parameters())
    assert wrapped.rsa_block.axes == ("axial", "sagittal")
    assert wrapped.rsa_block.scale == 0.5
    assert wrapped.rsa_block.recompute
    on_meta = insert_rsa(Tiny().to("meta"), "head")
    assert on_meta.head.rsa_block.g_conv.weight.is_meta


def test_attributes_of_the_wrapped_module_stay_reachable():
    model = insert_rsa(Tiny(), "encoder")
    assert model.encoder[0].out_channels == 6
    model = insert_rsa(model, "stages.0")
    assert model.stages[0].kernel_size == (3, 3, 3)
    with pytest.raises(AttributeError, match="no_such_thing"):
        model.encoder.no_such_thing  # noqa: B018
    with pytest.raises(AttributeError):
        WithRSA.__new__(WithRSA).anything  # noqa: B018


def test_inserted_parameters_train():
    model = insert_rsa(seeded(Tiny), "stages.0")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(1, 1, 4, 5, 6)).square().mean().backward()
    optimizer.step()
    assert all(beta.item() != 0 for beta in model.get_submodule("stages.0").rsa_block.betas)


class Outputs(nn.Module):
    def forward(self, x):
        return [x, x]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: insert_rsa(Tiny(), "encoder.9"),
            ValueError,
            "no submodule 'encoder.9': encoder has 0, 1, 2",
        ),
        (lambda: insert_rsa(Tiny(), "decoder"), ValueError, "the model has encoder, stages, act, head"),
        (lambda: insert_rsa(Tiny(), ""), ValueError, "no submodule ''"),
        (lambda: insert_rsa(Tiny(), 3), TypeError, "path must be a string, not int"),
        (lambda: insert_rsa("net", "encoder"), TypeError, "torch.nn.Module, not str"),
        (lambda: insert_rsa(Tiny(), "act"), ValueError, "'act' do not tell.*pass channels="),
        (lambda: insert_rsa(insert_rsa(Tiny(), "head"), "head"), ValueError, "already has an RSA block"),
        (
            lambda: insert_rsa(Tiny(), "head", channels=3)(torch.zeros(1, 1, 2, 2, 2)),
            ValueError,
            "3 channels and got 2",
        ),
        (
            lambda: insert_rsa(nn.Sequential(Outputs()), "0", channels=1)(torch.zeros(1, 1, 2, 2, 2)),
            TypeError,
            "Outputs returns a list.*one volume.*insert it at a submodule of this one",
        ),
    ],
)
def test_insert_rsa_errors_say_what_is_wrong(call, error, words):
    with pytest.raises(error, match=words):
        call()
