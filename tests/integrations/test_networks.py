"""`insert_rsa` in the networks of other packages: each row of the table in docs/tutorials/plug-in.md."""

import copy
import importlib
import io
import re
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import nn

from rsanet import insert_rsa

PAGE = Path(__file__).parents[2] / "docs" / "tutorials" / "plug-in.md"
CELL = re.compile(r"`([\w.]+)`, (\d+) channels")


def rows():
    """The networks of the table: the call that makes one, and the path and channels of each place in it."""
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        places = [CELL.fullmatch(cell) for cell in cells[1:]]
        if line.startswith("| `") and places and all(places):
            call = cells[0].strip("`")
            name = call.split("(")[0].rpartition(".")[2]
            yield pytest.param(call, [(place[1], int(place[2])) for place in places], id=name)


NETWORKS = list(rows())


def made(call):
    """The network that a row of the table makes, with weights of its own each time."""
    module, _, name = call.split("(")[0].rpartition(".")
    package = module.partition(".")[0]
    pytest.importorskip(package, reason=f"{package} is not installed, and it has no network to plug into")
    network = getattr(importlib.import_module(module), name)
    return eval(call.replace(f"{module}.", "", 1), {"torch": torch, name: network})


def volume(call):
    """Large enough for normalization at the bottleneck: of the networks with six stages, too."""
    size = (64, 32, 32) if "PlainConvUNet" in call else (32, 32, 16)
    return torch.randn(1, 1, *size, generator=torch.Generator().manual_seed(1))


def plugged(call, places):
    model = made(call)
    for path, _ in places:
        assert insert_rsa(model, path) is model
    return model


def open_betas(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "betas" in name:
                parameter.fill_(0.5)
    return model


def test_the_table_names_the_networks_of_the_field():
    assert [row.id for row in NETWORKS] == ["UNet", "BasicUNet", "DynUNet", "SegResNet", "VNet", "PlainConvUNet"]


@pytest.mark.parametrize(("call", "places"), NETWORKS)
def test_a_plugged_network_starts_as_it_was_and_keeps_its_checkpoints(call, places):
    model = made(call).eval()
    published = copy.deepcopy(model.state_dict())
    x = volume(call)
    with torch.no_grad():
        before = model(x)
        for path, channels in places:
            insert_rsa(model, path)
            assert model.get_submodule(path).rsa_block.channels == channels
        assert torch.equal(model(x), before)
        opened = open_betas(model)(x)
        assert not torch.allclose(opened, before)

        state = model.state_dict()
        assert [key for key in state if ".rsa_block." not in key] == list(published)
        other = plugged(call, places).eval()
        report = other.load_state_dict(published, strict=False)
        assert not report.unexpected_keys
        assert set(report.missing_keys) == set(state) - set(published)
        assert torch.equal(other(x), before)

        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True), strict=True)
        assert torch.equal(other(x), opened)
        assert torch.equal(copy.deepcopy(model)(x), opened)


@pytest.mark.parametrize(("call", "places"), NETWORKS)
def test_a_plugged_network_trains(call, places):
    torch.manual_seed(0)
    model = plugged(call, places).train()
    blocks = [model.get_submodule(path).rsa_block for path, _ in places]
    assert all(block.training for block in blocks)
    x = volume(call)
    target = (x[:, 0] > 0).long()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    before = [parameter.detach().clone() for block in blocks for parameter in block.parameters()]
    losses = []
    for _ in range(3):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        assert all(beta.grad != 0 for block in blocks for beta in block.betas)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    names = [name for block in blocks for name, _ in block.named_parameters()]
    after = [parameter for block in blocks for parameter in block.parameters()]
    # The key's bias has no influence; weight decay alone moves it, if it is not zero.
    for name, one, two in zip(names, before, after, strict=True):
        assert name == "phi_conv.bias" or not torch.equal(one, two)
    model.eval()
    assert not any(block.training for block in blocks)


class Aliased(nn.Module):
    """Runs its stage through a name of its own, as MONAI's DynUNet does, or through a list that torch does not see."""

    def __init__(self, hidden=False):
        super().__init__()
        self.stage = nn.Conv3d(1, 4, 1)
        self.order = [self.stage] if hidden else nn.ModuleList([self.stage, nn.Conv3d(4, 4, 1)])

    def forward(self, x):
        for stage in islice(self.order, 2):
            x = stage(x)
        return x


@pytest.mark.parametrize("path", ["stage", "order.0"])
def test_a_submodule_has_its_block_everywhere_that_the_network_registers_it(path):
    model = insert_rsa(Aliased(), path)
    assert model.stage is model.order[0]
    x = torch.randn(1, 1, 3, 4, 5)
    before = model(x)
    assert not torch.allclose(open_betas(model)(x), before)
    assert {"stage.rsa_block.betas.0", "order.0.rsa_block.betas.0"} < set(model.state_dict())
    other = insert_rsa(Aliased(), "stage")
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(x), model(x))


def test_blocks_go_into_a_submodule_that_has_one_in_any_order():
    x = torch.randn(1, 1, 3, 4, 5)
    outer, inner = Aliased(), Aliased()
    for model, paths in ((outer, ("order", "order.1")), (inner, ("order.1", "order"))):
        model.order = nn.Sequential(*model.order)
        for path in paths:
            insert_rsa(model, path)
    assert list(outer.state_dict()) == list(inner.state_dict())
    inner.load_state_dict(open_betas(outer).state_dict(), strict=True)
    assert torch.equal(inner.order(x), outer.order(x))
    with pytest.raises(ValueError, match=r"there is no submodule 'order\.2': order has 0, 1"):
        insert_rsa(outer, "order.2")


def test_a_submodule_that_runs_from_a_plain_list_has_its_block_there_too():
    model, x = insert_rsa(Aliased(hidden=True), "stage"), torch.randn(1, 1, 3, 4, 5)
    with pytest.raises(IndexError):
        model.order[1]
    before = model(x)
    assert not torch.allclose(open_betas(model)(x), before)


class Merge(nn.Conv3d):
    def forward(self, x, skip, *, gain=1):
        return super().forward(x) + gain * skip


def test_a_submodule_may_take_several_arguments():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.merge = Merge(2, 2, 1)

        def forward(self, x):
            return self.merge(x, x, gain=2)

    model, x = Network(), torch.randn(1, 2, 3, 4, 5)
    before = model(x)
    assert torch.equal(insert_rsa(model, "merge")(x), before)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_torchscript_is_refused_with_advice_and_traced_without_gradients():
    model = open_betas(insert_rsa(nn.Sequential(nn.Conv3d(1, 4, 1)), "0"))
    with pytest.raises(RuntimeError, match=r"TorchScript cannot compile RSABlock.*use torch\.export"):
        torch.jit.script(model)
    x = torch.randn(1, 1, 3, 4, 5)
    with torch.no_grad():
        traced = torch.jit.trace(model, x)
        larger = torch.randn(2, 1, 5, 4, 3)
        assert torch.equal(traced(larger), model(larger))


SMALL = {
    "SegResNet": "monai.networks.nets.SegResNet(3, init_filters=8, in_channels=1, out_channels=2)",
    "SegResNetDS": "monai.networks.nets.SegResNetDS(3, init_filters=8, in_channels=1, out_channels=2)",
    "AttentionUnet": "monai.networks.nets.AttentionUnet(3, 1, 2, (16, 32, 64), (2, 2))",
    "BasicUNet": "monai.networks.nets.BasicUNet(2, 1, 2, features=(8, 8, 8, 8, 8, 8))",
    "DynUNet": "monai.networks.nets.DynUNet(3, 1, 2, [3] * 3, [1, 2, 2], [2] * 2)",
    "SwinTransformer": "monai.networks.nets.swin_unetr.SwinTransformer("
    "1, 12, (7, 7, 7), (2, 2, 2), (1, 1, 1, 1), (1, 1, 1, 1))",
    "DenseNet": "monai.networks.nets.DenseNet(3, 1, 2, init_features=8, growth_rate=4, block_config=(2, 2))",
    "DenseBlock": "monai.networks.blocks.denseblock.DenseBlock([torch.nn.Conv3d(1, 4, 1)])",
    "PlainConvUNet": "dynamic_network_architectures.architectures.unet.PlainConvUNet(1, 3, (8, 12, 16), "
    "torch.nn.Conv3d, 3, [1, 2, 2], 2, 2, 2, conv_bias=True, norm_op=torch.nn.InstanceNorm3d, "
    "nonlin=torch.nn.LeakyReLU)",
}


@pytest.mark.parametrize(
    ("name", "path", "error", "words"),
    [
        ("SegResNet", "down_layers", ValueError, "a ModuleList, which is never called"),
        ("SegResNet", "up_layers", ValueError, "a ModuleList, which is never called"),
        ("DynUNet", "downsamples", ValueError, "a ModuleList, which is never called"),
        ("SegResNetDS", "encoder", TypeError, "SegResEncoder returns a list"),
        ("SwinTransformer", None, TypeError, "SwinTransformer returns a list"),
        ("DenseBlock", None, ValueError, "goes through its children"),
        ("AttentionUnet", "model.1", ValueError, "do not tell how many channels come out: pass channels= or example="),
        ("BasicUNet", "down_4", ValueError, "layers for 2-D images"),
        ("PlainConvUNet", "encoder.stages", ValueError, "never calls submodule 'encoder.stages'"),
    ],
)
def test_places_where_a_block_would_not_run_are_refused(name, path, error, words):
    model = made(SMALL[name])
    model, path = (model, path) if path else (nn.Sequential(model), "0")
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(error, match=words):
        insert_rsa(model, path)
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("name", "path", "channels"),
    [("AttentionUnet", "model.1", 16), ("DenseNet", "features.denseblock1", 16), ("SegResNetDS", "encoder", None)],
)
def test_an_example_tells_the_channels_of_any_place(name, path, channels):
    model, x = made(SMALL[name]), torch.randn(2, 1, 32, 32, 32)
    if channels is None:
        with pytest.raises(TypeError, match="returns a list"):
            insert_rsa(model, path, example=x)
        return
    insert_rsa(model, path, example=x)
    assert model.get_submodule(path).rsa_block.channels == channels
    with torch.no_grad():
        before = model.eval()(x)
        assert not torch.allclose(open_betas(model)(x), before)
