"""`insert_rsa` and `remove_rsa`: where a block goes, what stays, and what is refused before anything changes."""

import copy
import io
import pickle
import warnings
from collections import OrderedDict

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.fx.experimental.optimization import fuse
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

from rsanet import RSABlock, SABlock, insert_rsa, remove_rsa


class Stage(nn.Module):
    """A stage with a switch and buffers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(1, 4, 1)
        self.norm = nn.BatchNorm3d(4)
        self.act = True

    def forward(self, x):
        y = self.norm(self.conv(x))
        return y.relu() if self.act else y


class Network(nn.Module):
    """Stages of several kinds: a module, a container, a single layer."""

    def __init__(self):
        super().__init__()
        self.stage = Stage()
        self.body = nn.Sequential(nn.Conv3d(4, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU())
        self.drop = nn.Dropout3d(0.5)
        self.head = nn.Conv3d(4, 2, 1)

    def forward(self, x):
        return self.head(self.drop(self.body(self.stage(x))))


PLACES = ["stage", "body", "body.0", "body.1", "head"]
X = torch.randn(2, 1, 4, 5, 6, generator=torch.Generator().manual_seed(1))


def network():
    torch.manual_seed(0)
    model = Network()
    for buffer in model.buffers():  # statistics that a norm does not start with
        buffer.fill_(0.2)
    return model.eval()


def opened(model, value=0.5):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "beta" in name:
                parameter.fill_(value)
    return model


def looks(model):
    """All that could show what was done to a network."""
    hooks = [
        (name, list(module._forward_hooks), list(module._forward_pre_hooks)) for name, module in model.named_modules()
    ]
    kinds = [(name, type(module), module.training) for name, module in model.named_modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    return hooks, kinds, repr(model), state, [sorted(vars(module)) for module in model.modules()]


def assert_same_looks(one, other):
    assert one[:3] == other[:3]
    torch.testing.assert_close(one[3], other[3], rtol=0, atol=0)
    assert list(one[3]) == list(other[3])
    assert one[4] == other[4]


# --- what a network is with a block, and after it ---


@pytest.mark.parametrize("path", PLACES)
def test_names_and_classes_speak_of_what_the_network_had(path):
    model = network()
    names, keys = [name for name, _ in model.named_parameters()], list(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    trained = {key: value.clone() for key, value in model.state_dict().items()}
    insert_rsa(model, path)
    assert [name for name, _ in model.named_parameters() if ".rsa_block." not in name] == names
    assert [key for key in model.state_dict() if ".rsa_block." not in key] == keys
    new = {name for name, _ in model.named_parameters()} - set(names)
    assert all(name.startswith(f"{path}.rsa_block.") for name in new)
    report = model.load_state_dict({**trained, f"{path}.other": torch.zeros(1)}, strict=False)
    assert report.unexpected_keys == [f"{path}.other"]
    assert set(report.missing_keys) == new
    kept_by_name = {name: parameter.detach() + 1 for name, parameter in model.named_parameters()}
    model.load_state_dict({**model.state_dict(), **kept_by_name}, strict=True)
    assert all(torch.equal(parameter, kept_by_name[name]) for name, parameter in model.named_parameters())
    model.load_state_dict({**model.state_dict(), **dict.fromkeys((n for n in new if "beta" in n), torch.zeros(()))})
    old = [module for name, module in model.named_modules() if ".rsa_block" not in name]
    assert all(isinstance(module, kind) for module, kind in zip(old, kinds, strict=True))
    assert [type(module).__name__ for module in old] == [kind.__name__ for kind in kinds]
    name = path.rpartition(".")[2]
    assert f"({name}): {type(model.get_submodule(path)).__name__}(" in repr(model)
    assert "betas=(0.0, 0.0, 0.0)" in repr(model)
    assert "betas=(0.5, 0.5, 0.5)" in repr(opened(model))


@pytest.mark.parametrize("passed", [False, True])
@pytest.mark.parametrize("path", PLACES)
def test_a_block_taken_out_leaves_the_network_as_it_was(path, passed):
    model = network()
    model.get_submodule(path).register_forward_hook(lambda *_: None)
    before, out = looks(model), model(X)
    assert insert_rsa(model, path) is model
    if passed:
        assert torch.equal(model(X), out)
    assert not torch.allclose(opened(model)(X), out)
    assert remove_rsa(model, path) is model
    assert torch.equal(model(X), out)
    assert_same_looks(looks(model), before)
    with pytest.raises(ValueError, match=f"'{path}' has no RSA block that insert_rsa put in: no submodule has one"):
        remove_rsa(model, path)


def test_all_blocks_come_out_at_once_and_only_those_that_were_put_in():
    model = nn.Sequential(Network(), RSABlock(2), SABlock(2, "axial")).eval()
    before, out = looks(model), model(X)
    for path in (*PLACES[:3], "1"):
        insert_rsa(model, path if path == "1" else f"0.{path}")
    with pytest.raises(ValueError, match=r"'0\.head' has no RSA block that insert_rsa put in: 0\.stage, 0\.body"):
        remove_rsa(model, "0.head")
    assert remove_rsa(model) is model
    assert remove_rsa(model) is model
    assert torch.equal(model(X), out)
    assert_same_looks(looks(model), before)
    with pytest.raises(TypeError, match="path must be a string, not int"):
        remove_rsa(model, 3)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, not str"):
        remove_rsa("model")


def test_taking_out_a_part_s_block_leaves_no_watch_in_the_whole():
    model = insert_rsa(network(), "body.0")
    remove_rsa(model.body)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(X)
    assert_same_looks(looks(model), looks(network()))


@pytest.mark.parametrize("path", PLACES)
def test_a_network_with_a_block_goes_wherever_a_network_goes(path):
    model = opened(insert_rsa(network(), path))
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]  # before the first pass
    expected = model(X)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies += [copy.deepcopy(model), torch.load(file, weights_only=False)]
    for other in copies:
        assert torch.equal(other(X), expected)
        other.get_submodule(path).register_forward_hook(lambda module, args, output: 2 * output)
        assert not torch.allclose(other(X), expected)
        opened(other, 0.25)
        remove_rsa(other)
        assert type(other.get_submodule(path)) is type(network().get_submodule(path))
    assert torch.equal(model(X), expected)  # and is its own
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert torch.equal(torch.func.functional_call(model, parameters, (X,)), expected)
    zero = {name: value * ("betas" not in name) for name, value in parameters.items()}
    assert torch.allclose(torch.func.functional_call(model, zero, (X,)), network()(X))
    assert torch.allclose(torch.export.export(model, (X,)).module()(X), expected)
    assert all(module.training for module in model.train().modules())
    assert all(parameter.dtype == torch.float64 for parameter in model.double().parameters())
    seen = []
    model.apply(seen.append)
    assert model.get_submodule(path).rsa_block in seen


def test_hooks_keep_their_places_after_a_copy_by_pickle():
    model = insert_rsa(network(), "stage")
    other = pickle.loads(pickle.dumps(model))
    torch.utils.hooks.RemovableHandle.next_id, before = 0, torch.utils.hooks.RemovableHandle.next_id
    try:  # as in another process
        handles = [other.stage.register_forward_hook(lambda *_: None) for _ in range(before + 1)]
        assert not torch.allclose(opened(other)(X), network()(X))
        assert len(handles) == before + 1
    finally:
        torch.utils.hooks.RemovableHandle.next_id = max(before, torch.utils.hooks.RemovableHandle.next_id)


@pytest.mark.parametrize("path", ["body", "head"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_compilers_and_tracers_see_the_block(path):
    model = network()
    plain = model(X)
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    torch.testing.assert_close(compiled(X), plain)
    opened(insert_rsa(model, path))  # behind the compiler's back
    expected = compiled(X)
    assert not torch.allclose(expected, plain)
    torch.testing.assert_close(compiled(X), expected)
    assert counter.frame_count == 2
    torch.testing.assert_close(model(X), expected)  # an uncompiled pass sees that the stage is called, once for all
    torch.testing.assert_close(compiled(X), expected)
    torch.testing.assert_close(compiled(X), expected)
    assert counter.frame_count == 3
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(model, X)(X), expected)
    remove_rsa(model)
    torch.testing.assert_close(compiled(X), plain)
    torch._dynamo.reset()


@pytest.mark.parametrize("path", PLACES)
def test_symbolic_tracing_keeps_the_block_and_layers_around_it_are_not_fused(path):
    torch.manual_seed(0)
    model = opened(insert_rsa(Network().train(), path))
    model(X)  # statistics of their own
    model.eval()
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(X), model(X))
    assert not torch.allclose(traced(X), opened(copy.deepcopy(model), 0.0)(X))
    torch.testing.assert_close(fuse(model)(X), model(X))
    with torch.no_grad():
        prune.l1_unstructured(model.get_submodule(path).rsa_block.g_conv, "weight", 0.5)
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(X), model(X))


def test_activation_checkpointing_takes_the_stage_with_its_block():
    model = opened(insert_rsa(network(), "stage"))
    model(X).sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    class Checkpointed(Network):
        def forward(self, x):
            return self.head(self.drop(self.body(checkpoint(self.stage, x, use_reentrant=False))))

    model.zero_grad()
    model.__class__ = Checkpointed
    model(X).sum().backward()
    assert all(torch.equal(parameter.grad, expected[name]) for name, parameter in model.named_parameters())


def test_a_block_comes_too_late_for_a_network_that_shares_its_gradients():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(network())
        before = looks(model)
        with pytest.raises(ValueError, match=r"DistributedDataParallel, .* insert the block before"):
            insert_rsa(model, "module.stage")
        assert_same_looks(looks(model), before)
    finally:
        torch.distributed.destroy_process_group()


def test_wrappers_of_pytorch_hold_the_block_inside():
    expected = opened(insert_rsa(network(), "body"))
    for wrap in (checkpoint_wrapper, lambda module: torch.compile(module, backend="eager")):
        before, after = opened(insert_rsa(network(), "body")), network()
        before.body, after.body = wrap(before.body), wrap(after.body)
        opened(insert_rsa(after, "body"))
        after.load_state_dict(before.state_dict(), strict=True)
        assert list(after.state_dict()) == list(before.state_dict())
        assert torch.equal(after(X), before(X))
        if wrap is checkpoint_wrapper:
            assert list(after.state_dict()) == list(expected.state_dict())
            expected.load_state_dict(after.state_dict(), strict=True)
        remove_rsa(after, "body")
        torch.testing.assert_close(after(X), network()(X))


# --- what is done to a stage afterwards ---


def test_what_is_set_replaced_or_deleted_on_a_stage_takes_effect():
    model, twin = insert_rsa(network(), "stage"), network()
    model(X)
    for change in (
        lambda stage: setattr(stage, "act", False),
        lambda stage: setattr(stage, "conv", nn.Conv3d(1, 4, 1, bias=False)),
        lambda stage: delattr(stage, "norm") or setattr(stage, "norm", nn.Identity()),
        lambda stage: setattr(stage, "forward", lambda x: stage.conv(x) + 1),
        lambda stage: delattr(stage, "forward"),
        lambda stage: stage.register_buffer("kept", torch.zeros(1)),
        lambda stage: nn.utils.parametrizations.weight_norm(stage.conv),
    ):
        for one in (model, twin):
            torch.manual_seed(3)
            change(one.stage)
        assert torch.equal(model(X), twin(X))
        assert [key for key in model.state_dict() if ".rsa_block." not in key] == list(twin.state_dict())
        assert [n for n, _ in model.named_parameters() if ".rsa_block." not in n] == [
            name for name, _ in twin.named_parameters()
        ]
    out = model(X)
    assert not torch.allclose(opened(model)(X), out)


def test_a_container_counts_and_changes_its_own_layers():
    model, twin = opened(insert_rsa(network(), "body")), network()
    model.body.rsa_block.register_forward_hook(lambda block, args, out: args[0])  # the identity, seen to be called
    for change in (
        lambda body: None,
        lambda body: body.append(nn.Conv3d(4, 4, 1).apply(lambda m: nn.init.constant_(m.weight, 0.5))),
        lambda body: body.insert(1, nn.Hardtanh()),
        lambda body: body.extend([nn.Tanh(), nn.Sigmoid()]),
        lambda body: body.__setitem__(0, nn.Identity()),
        lambda body: body.pop(-1),
        lambda body: body.__delitem__(slice(1, 2)),
        lambda body: body.__iadd__(nn.Sequential(nn.ReLU6())),
        lambda body: body.__imul__(2),
    ):
        for one in (model.body, twin.body):
            torch.manual_seed(2)
            change(one)
        torch.testing.assert_close(model(X), twin(X))
        body, other = model.body, twin.body
        assert len(body) == len(other)
        assert [repr(layer) for layer in body] == [repr(layer) for layer in other]
        assert [repr(body[place]) for place in range(-len(body), len(body))] == [
            repr(other[place]) for place in range(-len(other), len(other))
        ]
        assert repr(body[1:]) == repr(other[1:])
        assert type(body[1:]) is nn.Sequential
        assert body.rsa_block not in body
        assert repr(body + other) == repr(other + other)
        assert list(body._modules)[-1] == "rsa_block"
        assert {key for key in model.state_dict() if ".rsa_block." not in key} == set(twin.state_dict())
    with pytest.raises(IndexError):
        model.body[len(twin.body)]
    remove_rsa(model)
    assert repr(model) == repr(twin)


class Chain(nn.ModuleList):
    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x


class Named(nn.ModuleDict):
    def forward(self, x):
        for name, layer in self.items():
            assert name in self
            x = layer(x)
        assert len(list(self.keys())) == len(self) == len(list(self.values()))
        return x


class Own(nn.Sequential):
    def __init__(self, width, layers=2):
        super().__init__(OrderedDict((f"conv{i}", nn.Conv3d(1 if i == 0 else width, width, 1)) for i in range(layers)))

    def forward(self, x):
        for place in range(len(self)):
            x = self[place](x)
        return x


class Home(nn.Module):
    """A container that PyTorch knows nothing of."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv3d(1, 4, 1), nn.Conv3d(4, 4, 1)

    def __iter__(self):
        return iter(self._modules.values())

    def __len__(self):
        return sum(1 for _ in self.children())

    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x


@pytest.mark.parametrize(
    "make",
    [
        lambda: Chain([nn.Conv3d(1, 4, 1), nn.Conv3d(4, 4, 1)]),
        lambda: Named({"one": nn.Conv3d(1, 4, 1), "two": nn.Conv3d(4, 4, 1)}),
        lambda: Own(4),
        Home,
    ],
    ids=["list", "dict", "sequence", "own"],
)
def test_containers_that_run_their_layers_do_not_run_the_block_among_them(make):
    torch.manual_seed(0)
    model = nn.Sequential(make())
    inner = model[0]
    out, layers = model(X), len(inner)
    insert_rsa(model, "0")
    calls = []
    inner.rsa_block.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(model(X), out)
    assert (len(calls), len(inner)) == (1, layers)
    opened(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(remove_hooks(model)))):
        assert torch.equal(other(X), model(X))
        assert len(other[0]) == layers
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(X), model(X))
    torch._dynamo.reset()
    assert type(remove_rsa(model)[0]) is type(make())


def remove_hooks(model):
    """Without the hook of the test, which pickle does not take."""
    model[0].rsa_block._forward_hooks.clear()
    return model


class Registered(nn.Module):
    """A base that keeps its subclasses by name, and asks them for an argument."""

    kinds: dict = {}  # noqa: RUF012 shared on purpose

    def __init_subclass__(cls, *, kind):
        Registered.kinds[kind] = cls


class Block(Registered, kind="block"):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(1, 4, 1)

    def forward(self, x):
        return self.conv(x)


def test_a_class_that_registers_its_subclasses_keeps_its_register():
    model = nn.Sequential(Block())
    opened(insert_rsa(model, "0"))
    assert Registered.kinds == {"block": Block}
    assert not torch.equal(model(X), model[0].conv(X))
    assert type(remove_rsa(model)[0]) is Block


def test_hooks_that_come_later_see_the_attended_output():
    model, seen = network(), []
    model.stage.register_forward_hook(lambda stage, args, out: seen.append(out.clone()))
    insert_rsa(model, "stage")
    model.stage.register_forward_hook(lambda stage, args, out: seen.append(out.clone()))
    opened(model)(X)
    torch.testing.assert_close(seen[1], model.stage.rsa_block(seen[0]))
    assert not torch.allclose(*seen)


def test_a_stage_that_is_replaced_takes_its_block_along_and_a_deleted_block_is_told():
    model = insert_rsa(network(), "stage")
    del model.stage.rsa_block
    with pytest.raises(RuntimeError, match=r"the RSA block of this Stage was deleted: use remove_rsa"):
        model(X)
    remove_rsa(model)
    assert_same_looks(looks(model), looks(network()))
    insert_rsa(model, "stage")
    model.stage = Stage()
    assert not any("rsa_block" in key for key in model.state_dict())
    with pytest.warns(UserWarning, match="did not call submodule 'stage', so the RSA block behind it did not run"):
        model(X)


@pytest.mark.parametrize("block_first", [False, True], ids=["weight_norm_first", "block_first"])
@pytest.mark.parametrize("block_out_first", [False, True], ids=["weight_norm_out_first", "block_out_first"])
def test_parametrizations_and_blocks_go_in_and_out_in_any_order(block_first, block_out_first):
    model = network()
    out = model(X)
    into = [lambda: nn.utils.parametrizations.weight_norm(model.head), lambda: insert_rsa(model, "head")]
    for put in reversed(into) if block_first else into:
        put()
    torch.testing.assert_close(model(X), out)
    attended = opened(model)(X)
    assert torch.equal(copy.deepcopy(model)(X), attended)
    assert parametrize.type_before_parametrizations(model.head).__name__ == "Conv3d"
    away = [lambda: parametrize.remove_parametrizations(model.head, "weight"), lambda: remove_rsa(model)]
    for take in reversed(away) if block_out_first else away:
        take()
        torch.testing.assert_close(model(X), attended if take is away[0] and not block_out_first else out)
    assert type(model.head) is nn.Conv3d
    assert sorted(model.state_dict()) == sorted(network().state_dict())


def test_a_class_that_was_changed_since_is_told():
    model = insert_rsa(network(), "head")
    with_block = type(model.head)
    model.head.__class__ = type("Wrapped", (with_block,), {})
    with pytest.raises(ValueError, match=r"'head' became a Wrapped after.*undo that first"):
        remove_rsa(model)
    model.head.__class__ = with_block
    assert type(remove_rsa(model).head) is nn.Conv3d


# --- what is refused ---


class Outputs(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.conv = nn.Conv3d(1, 4, 1)
        self.kind = kind


class Lists(Outputs):
    def forward(self, x):
        outputs = []
        for _ in range(2):
            outputs.append(self.conv(x))
        return outputs


class Tuples(Outputs):
    def forward(self, x):
        y = self.conv(x)
        return y, [x]


class Dicts(Outputs):
    def forward(self, x):
        def nested():
            return x

        return {"out": self.conv(nested())}


class Said(Outputs):
    def forward(self, x) -> list[torch.Tensor]:
        return self.kind(self.conv(x))


class Called(Outputs):
    def forward(self, x):
        return self.pyramid(x)

    def pyramid(self, x):
        return [self.conv(x)] * 2


class Either(Outputs):
    def forward(self, x):
        y, z = self.conv(x), [self.conv(x)]
        return z if self.kind else y


class Sums(Outputs):
    def forward(self, x):
        x = x + self.conv(x)
        return x


def test_a_stage_whose_output_is_a_sum_with_itself_gets_a_block():
    model = nn.Sequential(Sums(0))
    assert insert_rsa(model, "0", 4)[0].rsa_block.channels == 4


class Takes(nn.Module):
    """Runs its stage in a way of its own."""

    def __init__(self, stage, run=None):
        super().__init__()
        self.stage = stage
        self.head = nn.Conv3d(4, 2, 1)
        self.run = run or (lambda stage, x: stage(x))

    def forward(self, x):
        x = self.run(self.stage, x)
        while not isinstance(x, torch.Tensor):
            x = next(iter(x.values() if isinstance(x, dict) else x))
        return self.head(x)


class Loops(Takes):
    def forward(self, x):
        for layer in self.stage:
            x = layer(x)
        return self.head(x)


class Counts(Takes):
    def forward(net, x):  # noqa: N805 a name of the author's own
        for place, layer in enumerate(net.stage):
            x = layer(x) if place < len(net.stage) else x
        return net.head(x)


class Indexes(Takes):
    def forward(self, x):
        return self.head(self.tail(self.stage[0](x)))

    def tail(self, x):
        return self.stage[1](x)


class Walks(nn.Sequential):
    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        return x


class WalksByName(nn.Sequential):
    def forward(self, x):
        for name, layer in self.named_modules():
            x = layer(x) if name else x
        return x


class WalksElsewhere(Walks):
    def forward(self, x):
        return super().forward(x)


def layers():
    return nn.Sequential(nn.Conv3d(1, 4, 1), nn.ReLU())


def flat():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4))


ITERATED = r"never calls submodule 'stage', but runs what is in it on its own"


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Takes(nn.ModuleList([layers()])), ValueError, "a ModuleList, which is never called.*such as stage.0"),
        (lambda: Takes(nn.ModuleDict({"a": layers()})), ValueError, "a ModuleDict, which is never.*such as stage.a"),
        (lambda: Takes(nn.ParameterList()), ValueError, "a ParameterList, which is never called"),
        (lambda: Takes(nn.Module()), ValueError, "a Module, which is never called"),
        (lambda: Loops(layers()), ValueError, ITERATED),
        (lambda: Counts(layers()), ValueError, ITERATED),
        (lambda: Indexes(layers()), ValueError, ITERATED),
        (lambda: Takes(Walks(nn.Conv3d(1, 4, 1))), ValueError, "goes through its children"),
        (lambda: Takes(WalksByName(nn.Conv3d(1, 4, 1))), ValueError, "goes through its children"),
        (lambda: Takes(WalksElsewhere(nn.Conv3d(1, 4, 1))), ValueError, "goes through its children"),
        (lambda: Takes(Lists(0)), TypeError, "'stage': Lists returns a list, but .* one volume"),
        (lambda: Takes(Tuples(0)), TypeError, "Tuples returns a tuple"),
        (lambda: Takes(Dicts(0)), TypeError, "Dicts returns a dict"),
        (lambda: Takes(Said(list)), TypeError, "Said returns a list"),
        (lambda: Takes(Called(0)), TypeError, "Called returns a list"),
        (lambda: Takes(nn.Sequential(nn.Identity(), Lists(0))), TypeError, "Lists returns a list"),
        (lambda: nn.ModuleDict({"stage": flat()}), ValueError, "layers for 2-D images.*3-D network"),
        (lambda: nn.ModuleDict({"stage": nn.Conv1d(1, 4, 1)}), ValueError, "layers for 1-D images"),
        (lambda: nn.ModuleDict({"stage": nn.ReLU(), "other": flat()}), ValueError, "layers for 2-D images"),
        (lambda: Takes(torch.jit.trace(layers(), X)), ValueError, "is TorchScript, which runs past blocks"),
    ],
)
@pytest.mark.parametrize("channels", [None, 4])
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_stage_that_has_no_place_for_a_block_is_refused_before_anything_changes(make, error, words, channels):
    model = make()
    before = looks(model)
    with pytest.raises(error, match=words):
        insert_rsa(model, "stage", channels)
    assert_same_looks(looks(model), before)


@pytest.mark.parametrize(
    ("make", "channels", "error", "words"),
    [
        (lambda: Takes(Either(1)), None, TypeError, "'stage': Either returns a list"),
        (lambda: Takes(layers(), lambda stage, x: stage[1](stage[0](x))), None, ValueError, ITERATED),
        (
            lambda: Takes(layers(), lambda stage, x: x.repeat(1, 4, 1, 1, 1)),
            None,
            ValueError,
            "does not call submodule",
        ),
        (lambda: Takes(nn.Conv3d(1, 4, 1)), 3, ValueError, "made for 3 channels and got 4: leave channels= out"),
        (lambda: Takes(nn.Conv3d(1, 3, 1)), None, ValueError, r"does not run through the network \(RuntimeError: "),
        (
            lambda: Takes(
                nn.Sequential(nn.Conv3d(1, 4, 1), nn.Flatten()), lambda stage, x: stage(x).view(2, 4, 4, 5, 6)
            ),
            None,
            ValueError,
            r"returns torch\.float32 of shape \(2, 480\) for this example",
        ),
    ],
)
def test_an_example_tells_what_comes_out(make, channels, error, words):
    model = make()
    before = looks(model)
    with pytest.raises(error, match=words):
        insert_rsa(model, "stage", channels, example=X)
    assert_same_looks(looks(model), before)


def test_an_example_does_not_initialize_lazy_layers():
    model = Takes(nn.LazyConv3d(4, 1))
    with pytest.raises(ValueError, match="lazy layers, which example= would initialize"):
        insert_rsa(model, "stage", example=X)
    insert_rsa(model, "stage")
    assert model(X).shape == (2, 2, 4, 5, 6)
    assert "stage.rsa_block.betas.0" in model.state_dict()
    assert type(remove_rsa(model).stage) is nn.Conv3d


@pytest.mark.parametrize("example", [X, (X,), [X], {"x": X}], ids=["tensor", "tuple", "list", "dict"])
def test_an_example_leaves_no_trace_and_no_watch(example):
    class Noisy(Network):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) + torch.rand(())

    torch.manual_seed(0)
    model = Noisy().train()
    model.head.eval()
    model(X).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    before = looks(model)
    insert_rsa(model, "body", example=example)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None if ".rsa_block." in name else torch.equal(parameter.grad, gradients[name])
    assert model.calls == 1
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.body.rsa_block.training
    remove_rsa(model)
    assert_same_looks(looks(model), before)
    torch.manual_seed(4)
    random = RSABlock(4).theta_conv.weight  # all that an insertion draws
    torch.manual_seed(4)
    assert torch.equal(insert_rsa(model, "stage", example=example).stage.rsa_block.theta_conv.weight, random)


def test_an_example_serves_what_cannot_be_guessed():
    class Doubles(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(1, 2, 1)

        def forward(self, x):
            y = self.conv(x)
            return torch.cat([y, -y], 1)

    class Folds(nn.Module):
        """A network of 2-D layers that takes volumes."""

        def __init__(self):
            super().__init__()
            self.stage = nn.Module()
            self.stage.layers = flat()
            self.stage.forward = self.slices

        def slices(self, x):
            n, _, d, *_ = x.shape
            return self.stage.layers(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (n, d)).transpose(1, 2)

        def forward(self, x):
            return self.stage(x)

    for make in (lambda: Takes(Doubles()), Folds):
        model = make()
        with pytest.raises(ValueError, match=r"pass channels= or example=|or pass example= if volumes"):
            insert_rsa(model, "stage")
        insert_rsa(model, "stage", example=X)
        assert model.stage.rsa_block.channels == 4
        out = model(X)
        assert not torch.allclose(opened(model)(X), out)


class Backwards(nn.Module):
    """Its last registered layer runs first."""

    def __init__(self):
        super().__init__()
        self.last = nn.Conv3d(8, 4, 1)
        self.first = nn.Conv3d(1, 8, 1)

    def forward(self, x):
        return self.last(self.first(x))


class Agrees(Backwards):
    """All of its convolutions put out as many channels, whatever the order."""

    def __init__(self):
        super().__init__()
        self.last, self.norm, self.first = nn.Conv3d(4, 4, 1), nn.GroupNorm(1, 1), nn.Conv3d(1, 4, 1)


@pytest.mark.parametrize(
    ("stage", "channels"),
    [
        (Backwards(), None),
        (nn.Sequential(Backwards()), None),
        (nn.Sequential(nn.Conv3d(1, 8, 1), nn.GLU(1)), None),
        (nn.Sequential(nn.Conv3d(1, 4, 1), nn.Sequential(nn.ReLU(), nn.Dropout3d()), nn.MaxPool3d(2)), 4),
        (nn.Sequential(nn.Conv3d(1, 8, 1), Agrees()), 4),
        (Agrees(), 4),
        (nn.InstanceNorm3d(5), 5),
        (nn.GroupNorm(1, 6), 6),
        (nn.ConvTranspose3d(1, 7, 2), 7),
    ],
)
def test_channels_are_guessed_where_the_layers_leave_no_doubt(stage, channels):
    model = nn.ModuleDict({"stage": stage, "other": nn.Conv3d(1, 1, 1)})
    if channels is None:
        with pytest.raises(ValueError, match="do not tell how many channels come out: pass channels= or example="):
            insert_rsa(model, "stage")
    else:
        insert_rsa(model, "stage")
        assert model.stage.rsa_block.channels == channels


def test_parts_of_an_attention_block_have_no_place_for_another():
    model = insert_rsa(network(), "stage")
    for path in ("stage.rsa_block.g_conv", "stage.rsa_block.betas"):
        with pytest.raises(ValueError, match="a part of an attention block"):
            insert_rsa(model, path)


# --- the first pass ---


def around(stage, x):
    return stage[1](stage[0](x))


@pytest.mark.parametrize("compiled", [False, True])
def test_the_first_pass_tells_that_a_stage_is_run_past_its_block(compiled):
    model = insert_rsa(Takes(layers(), around), "stage")
    torch._dynamo.reset()
    run = torch.compile(model, backend="eager") if compiled else model
    for _ in range(2):  # until something is done about it
        with pytest.raises(RuntimeError, match=ITERATED + r".*or take the block out with remove_rsa"):
            run(X)
    before = Takes(layers(), around)
    remove_rsa(model)
    model(X)
    assert [type(module) for module in model.modules()] == [type(module) for module in before.modules()]
    torch._dynamo.reset()


def test_a_whole_graph_of_a_stage_that_is_run_past_its_block_is_refused():
    torch._dynamo.reset()
    model = torch.compile(insert_rsa(Takes(layers(), around), "stage"), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        model(X)
    torch._dynamo.reset()


def test_a_stage_that_a_pass_skips_is_told_once_and_works_later():
    model = insert_rsa(Takes(layers(), lambda stage, x: x.expand(-1, 4, -1, -1, -1)), "stage")
    with pytest.warns(UserWarning, match="did not call submodule 'stage'"):
        model(X)
    model.run = lambda stage, x: stage(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.run, skipped = (lambda stage, x: x.expand(-1, 4, -1, -1, -1)), model.run
        model(X)
        model.run = skipped
        model(X)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_layers_that_run_elsewhere_too_and_calls_by_hand_are_no_fault():
    shared = layers()
    model = Takes(shared, lambda stage, x: stage[0](x))
    model.again = shared[0]
    insert_rsa(model, "stage")
    with pytest.warns(UserWarning, match="did not call"):
        model(X)
    model = insert_rsa(network(), "body")
    model.body[0](torch.zeros(1, 4, 2, 2, 2))
    model(X)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_pass_that_failed_says_nothing_of_the_next():
    model = insert_rsa(network(), "stage")
    with pytest.raises(RuntimeError, match="expected input"):
        model(torch.zeros(1, 2, 3, 4, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(X)
