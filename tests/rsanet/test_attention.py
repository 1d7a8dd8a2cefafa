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
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from rsa_kernels.api import AXIS_NAMES
from rsanet import NonLocalBlock, RSABlock, SABlock, insert_rsa
from rsanet.insertion import WithRSA


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


# --- what users do to the projections ---


class Adapted(nn.Module):
    """A low-rank adapter around a convolution, as adapter libraries put it there."""

    def __init__(self, conv, dropout=0.0):
        super().__init__()
        self.base_layer = conv.requires_grad_(False)
        self.down = nn.Conv3d(conv.in_channels, 2, 1, bias=False).to(conv.weight.dtype)
        self.up = nn.Conv3d(2, conv.out_channels, 1, bias=False).to(conv.weight.dtype)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(self.dropout(x)))


def published(block, x):
    """The published equations with projections that are called."""
    axes = block.axes if isinstance(block, RSABlock) else [block.axis]
    for beta, axis in zip(block.betas if isinstance(block, RSABlock) else [block.beta], axes, strict=True):
        dim = AXIS_NAMES[axis]
        query, key, value = (conv(x).movedim(dim, 1) for conv in (block.theta_conv, block.phi_conv, block.g_conv))
        attention = torch.softmax(block.scale * query.flatten(2) @ key.flatten(2).transpose(1, 2), -1)
        x = x + beta * (attention @ value.flatten(2)).view(value.shape).movedim(1, dim)
    return x


def every_weight(block):
    return [(getattr(block, name), "weight") for name in ("theta_conv", "phi_conv", "g_conv")]


CHANGES = {
    "nothing": lambda block: None,
    "spectral norm": lambda block: spectral_norm(block.g_conv),
    "weight norm": lambda block: weight_norm(block.theta_conv),
    "pruning": lambda block: prune.l1_unstructured(block.g_conv, "weight", 0.5),
    "pruned bias": lambda block: prune.random_unstructured(block.g_conv, "bias", 0.5),
    "pruning all": lambda block: prune.global_unstructured(every_weight(block), prune.L1Unstructured, amount=0.5),
    "parametrization": lambda block: parametrizations.spectral_norm(block.theta_conv),
    "both": lambda block: prune.l1_unstructured(parametrizations.weight_norm(block.g_conv, "bias"), "weight", 0.5),
    "adapter": lambda block: setattr(block, "g_conv", Adapted(block.g_conv)),
    "adapters": lambda block: [setattr(block, n, Adapted(getattr(block, n))) for n in ("theta_conv", "phi_conv")],
    "no bias": lambda block: setattr(block, "theta_conv", nn.Conv3d(4, 4, 1, bias=False).double()),
    "larger kernel": lambda block: setattr(block, "g_conv", nn.Conv3d(4, 4, 3, padding=1).double()),
    "groups": lambda block: setattr(block, "g_conv", nn.Conv3d(4, 4, 1, groups=2).double()),
    "removed": lambda block: setattr(block, "theta_conv", nn.Identity()),
    "forward": lambda block: setattr(block.g_conv, "forward", lambda x: 2 * nn.Conv3d.forward(block.g_conv, x)),
    "hook": lambda block: block.g_conv.register_forward_hook(lambda conv, args, out: out.relu()),
    "pre-hook": lambda block: block.g_conv.register_forward_pre_hook(lambda conv, args: (args[0].relu(),)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize("make", [lambda: RSABlock(4), lambda: SABlock(4, "coronal", scale=0.5)], ids=["rsa", "sa"])
@pytest.mark.parametrize("change", CHANGES)
def test_whatever_is_done_to_a_projection_counts(change, make, volume):
    block = open_betas(seeded(make).double())
    plain = block(volume.double()).detach()
    CHANGES[change](block)
    x = volume.double().requires_grad_()
    block.eval()  # where power iterations rest
    torch.testing.assert_close(block(x), published(block, x))
    assert torch.allclose(block(x), plain) == (change in ("nothing", "weight norm"))  # a norm alone changes no value
    block.train()
    parameters = [parameter for parameter in block.parameters() if parameter.requires_grad]
    for _ in range(2):  # nothing is kept from one step to the next
        block.zero_grad()
        block(x).square().sum().backward()
        assert all(parameter.grad is not None for parameter in parameters)
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(0.01 * torch.randn_like(parameter))
    block.eval()
    torch.testing.assert_close(block(x), published(block, x))
    expected = torch.autograd.grad(published(block, x).square().sum(), parameters, allow_unused=True)
    for gradient, wanted in zip(torch.autograd.grad(block(x).square().sum(), parameters), expected, strict=True):
        torch.testing.assert_close(gradient, wanted, atol=1e-9, rtol=1e-7)


def test_a_pruned_checkpoint_is_seen_and_a_norm_is_one(volume):
    block, other = (open_betas(make().double()) for make in (lambda: RSABlock(4), lambda: RSABlock(4)))
    for one in (block, other):
        prune.l1_unstructured(one.g_conv, "weight", 0.5)
        one(volume.double())
    other.load_state_dict(block.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(other(volume.double()), block(volume.double()))
        assert torch.equal(copy.deepcopy(other)(volume.double()), block(volume.double()))
    prune.remove(other.g_conv, "weight")
    torch.testing.assert_close(other(volume.double()), block(volume.double()))

    block = open_betas(RSABlock(4))
    spectral_norm(block.g_conv, n_power_iterations=20)
    block(volume).sum().backward()
    assert block.g_conv.weight_orig.grad.any()
    torch.testing.assert_close(torch.linalg.matrix_norm(block.g_conv.weight.detach().flatten(1), 2), torch.tensor(1.0))


def test_a_pruned_beta_is_seen(volume):
    block = open_betas(RSABlock(4))
    prune.identity(block.betas, "0")
    before = block(volume)
    for _ in range(2):
        block(volume).sum().backward()
    assert block.betas.get_parameter("0_orig").grad != 0
    open_betas(block, 0.2)
    assert not torch.equal(block(volume), before)
    open_betas(block, 0.0)
    assert torch.equal(block(volume), volume)


def test_hooks_of_projections_fire_once_a_step(volume):
    block, seen = open_betas(RSABlock(4)), []
    block.g_conv.register_forward_pre_hook(lambda conv, args: seen.append("before"))
    block.g_conv.register_forward_hook(lambda conv, args, out: seen.append("after"))
    block.g_conv.register_full_backward_hook(lambda conv, grad_in, grad_out: seen.append("back"))
    block(volume.requires_grad_()).sum().backward()
    assert seen == ["before", "after"] * 3 + ["back"] * 3


def test_called_projections_give_the_maps_the_dtypes_and_the_graphs_of_read_ones(volume):
    block = open_betas(RSABlock(4, axes=("sagittal", "axial")))
    called = copy.deepcopy(block)
    called.g_conv.register_forward_pre_hook(lambda conv, args: None)
    for one, other in zip(called.attention_maps(volume), block.attention_maps(volume), strict=True):
        torch.testing.assert_close(one, other)
        assert not one.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert called(volume).dtype == block(volume).dtype == torch.bfloat16
    half = volume.bfloat16()  # weights of float32
    torch.testing.assert_close(called(half), block(half), rtol=0.05, atol=0.05)
    pruned = copy.deepcopy(block)
    prune.identity(pruned.g_conv, "weight")
    torch._dynamo.reset()
    for one in (called, pruned):
        torch.testing.assert_close(torch.compile(one, fullgraph=True, backend="aot_eager")(volume), block(volume))
        torch.testing.assert_close(torch.export.export(one, (volume,)).module()(volume), block(volume))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("replacement", "words"),
    [
        (nn.Conv3d(4, 2, 1), r"theta_conv is a Conv3d and makes \(2, 2, 5, 3, 6\) of a volume \(2, 4, 5, 3, 6\)"),
        (nn.Conv3d(4, 4, 3), "theta_conv is a Conv3d and makes .* put a 1x1x1 convolution there"),
        (nn.Conv3d(4, 4, 1, stride=2), "needs the same shape"),
        (nn.Flatten(), r"theta_conv is a Flatten and makes \(2, 360\)"),
        (None, "theta_conv is a NoneType, but must be a module"),
    ],
)
def test_a_projection_that_cannot_serve_is_refused(replacement, words, volume):
    block = RSABlock(4)
    block.theta_conv = replacement
    with pytest.raises((TypeError, ValueError), match=words):
        block(volume)


# --- the start ---


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("first", ["block", "parts"])
@pytest.mark.parametrize(
    "make", [lambda: RSABlock(4), lambda: SABlock(4, 2), lambda: NonLocalBlock(4)], ids=["rsa", "sa", "non-local"]
)
def test_initialization_from_the_meta_device_ends_as_the_identity(make, first, backwards, volume):
    with torch.device("meta"):
        block = make()
    repr(block)
    block = block.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in block.parameters():  # what memory held
            parameter.fill_(7.0)
    modules = list(block.modules())[:: -1 if backwards else 1]
    for module in modules:
        owns = any(True for _ in module.parameters(recurse=False))
        assert hasattr(module, "reset_parameters") or not owns
        if hasattr(module, "reset_parameters") and (first == "block" or owns):
            module.reset_parameters()
    assert torch.equal(block(volume), volume)
    assert not any((parameter == 7).any() for parameter in block.parameters())
    assert block.theta_conv.weight.unique().numel() == block.theta_conv.weight.numel()


def test_a_seed_gives_the_parameters_that_it_gave():
    torch.manual_seed(5)
    block = NonLocalBlock(4)
    after = torch.rand(3)
    torch.manual_seed(5)
    convs = [nn.Conv3d(4, 2, 1), nn.Conv3d(4, 2, 1), nn.Conv3d(4, 2, 1), nn.Conv3d(2, 4, 1)]
    assert torch.equal(block.g_conv.weight, convs[2].weight)
    assert torch.equal(torch.rand(3), after)


def test_the_repr_shows_betas_or_where_they_are():
    block = RSABlock(4)
    with torch.no_grad():
        block.betas[1].fill_(0.7)
    assert "betas=(0.0, 0.7, 0.0)" in repr(block)
    assert "betas=(0.0, 0.7002, 0.0)" in repr(block.half())
    assert "betas=on meta" in repr(block.to("meta"))
    assert "beta=0.0" in repr(SABlock(4, 2))
    assert "beta=on meta" in repr(SABlock(4, 2).to("meta"))
    with torch._subclasses.FakeTensorMode():
        assert "betas=" in repr(RSABlock(4))


@pytest.mark.parametrize("make", [lambda: RSABlock(4), lambda: SABlock(4, 2), lambda: NonLocalBlock(4)])
def test_a_batch_of_none_passes(make):
    block, x = open_betas(make()), torch.zeros(0, 4, 3, 4, 5, requires_grad=True)
    out = block(x)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert all(not parameter.grad.any() for parameter in block.parameters())
