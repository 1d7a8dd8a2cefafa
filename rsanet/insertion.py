"""RSA blocks in networks that already exist: put in behind a submodule, and taken out again.

The block is a child of the submodule, its stage, and a forward hook of the stage calls it. The stage itself stays where
it is, so whatever is set or replaced on it takes effect, and all its names are as they were. Its class becomes a
subclass of the same name, for three reasons: containers would count and run the block as one of their layers;
``torch.compile`` would go on with code that it made without the block, as it does not look for new hooks; and what
fuses layers that follow each other, by their type, would move the block or drop it.
"""

import ast
import functools
import inspect
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from rsanet.attention import DEFAULT_AXES, RSABlock, SABlock

NAME = "rsa_block"  # of the block in its stage, and of the hook that calls it


# --- the stage ---


def _attend(stage: nn.Module, args: Any, output: Any) -> Any:
    """The forward hook of a stage: its output after attention."""
    block = stage._modules.get(NAME)
    if block is None:
        raise RuntimeError(f"the RSA block of this {type(stage).__name__} was deleted: use remove_rsa(model) instead")
    if not isinstance(output, Tensor | fx.Proxy):
        raise TypeError(_no_volume(type(stage).__name__, type(output).__name__))
    return block(output)


def _no_volume(stage: str, output: str) -> str:
    return (
        f"{stage} returns a {output}, but an RSA block goes behind a module that returns one volume (N, C, D, H, W): "
        "insert it at a submodule of this one, such as its last stage"
    )


class WithRSA(nn.Module):
    """What every module with an RSA block behind it is, beside an instance of the class that it had before."""

    def __init_subclass__(cls, **_: Any) -> None:
        # Past that of the class before, which may register its subclasses by name, or want arguments.
        pass

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class was made here and has no name to be imported by.
        if type(self) not in _CLASSES:
            return super().__reduce_ex__(protocol)
        return _unpickled, (_class_before(type(self)),), self.__getstate__()


def _unpickled(base: type[nn.Module]) -> nn.Module:
    kind = _class_with_block(base)
    return kind.__new__(kind)


_READ = ("__iter__", "__len__", "__getitem__", "__contains__")
_READ_BY_NAME = ("keys", "values", "items")
_CHANGE = ("__setitem__", "__delitem__", "__iadd__", "__imul__", "append", "insert", "extend", "pop", "update", "clear")
_CLASSES: dict[type, type[nn.Module]] = {}  # those of stages, and what each was before


def _class_before(kind: type) -> type[nn.Module]:
    return _CLASSES[kind]


@functools.cache
def _class_with_block(base: type[nn.Module]) -> type[nn.Module]:
    """The class of a stage: its own, in which a container, the user's own too, has no block among its layers."""
    methods: dict[str, Any] = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    methods |= {name: _reading(base, name) for name in _READ if hasattr(base, name)}
    if issubclass(base, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        methods |= {name: _reading(base, name) for name in _READ_BY_NAME if hasattr(base, name)}
        methods |= {name: _changing(base, name) for name in _CHANGE if hasattr(base, name)}
    kind = type(base)(base.__name__, (WithRSA, base), methods)
    _CLASSES[kind] = base
    return kind


def _changed_class(stage: nn.Module, change: Callable[[type], type]) -> type[nn.Module]:
    """What the class of a stage becomes, whose own class is changed below the one that a parametrization made of it.

    PyTorch takes its own from the very class of a module, and gives it the first class below.
    """
    kind = type(stage)
    if not parametrize.is_parametrized(stage) or not vars(kind).keys() & stage.parametrizations.keys():
        return change(kind)
    # Copies of the stage share its class: it stays as it is.
    methods = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind)(kind.__name__, (change(kind.__bases__[0]),), methods)


def _reading(base: type[nn.Module], name: str) -> Callable:
    method = getattr(base, name)

    @functools.wraps(method)
    def read(self: nn.Module, *args: Any) -> Any:
        # Asked of a stage of the same layers without the block: nothing changes while another thread runs it.
        bare = object.__new__(base)
        bare.__dict__.update(self.__dict__)
        bare.__dict__["_modules"] = {key: module for key, module in self._modules.items() if key != NAME}
        return method(bare, *args)

    return read


def _changing(base: type[nn.Module], name: str) -> Callable:
    method = getattr(base, name)

    @functools.wraps(method)
    def change(self: nn.Module, *args: Any) -> Any:
        block = self._modules.pop(NAME, None)
        try:
            return method(self, *args)
        finally:
            if block is not None:
                self._modules[NAME] = block

    return change


# --- what cannot have a block behind it ---


def _methods(kind: type[nn.Module], name: str) -> Iterator[FunctionType]:
    """The functions behind a method of a class, as far as they are not PyTorch's: its own, and those it extends."""
    for owner in kind.__mro__:
        method = vars(owner).get(name)
        if owner.__module__.startswith("torch.") or not callable(method):
            continue
        function = inspect.unwrap(method)
        if isinstance(function, FunctionType):
            yield function
            if "super" in _names(function.__code__):
                continue
        return


def _names(code: CodeType) -> set[str]:
    """The names of attributes and globals that code uses."""
    return set(code.co_names).union(*(_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _functions(kind: type[nn.Module]) -> Iterator[FunctionType]:
    """``forward`` of a class, and the methods of its own that are called from there."""
    todo = seen = {"forward"}
    while todo:
        functions = [function for method in todo for function in _methods(kind, method)]
        yield from functions
        used = set().union(*(_names(function.__code__) for function in functions))
        todo, seen = used - seen, seen | used


def _uses(kind: type[nn.Module], names: Iterable[str]) -> bool:
    """Whether the forward pass of a class uses one of some names."""
    return any(not _names(function.__code__).isdisjoint(names) for function in _functions(kind))


def _source(function: FunctionType | None) -> ast.FunctionDef | None:
    """The source of a function, where there is one to read."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, SyntaxError, TypeError, ValueError, IndexError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


def _only_iterated(kind: type[nn.Module], name: str) -> bool:
    """Whether the forward pass of a class is written to take the layers out of a child, and never to call it."""
    found = []
    for tree in map(_source, _functions(kind)):
        if tree is None:
            return False
        for node in ast.walk(tree):
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.Attribute) and child.attr == name and _is_self(child.value, tree):
                    given = isinstance(node, ast.Call) and ast.unparse(node.func) in _ITERATE
                    iterated = isinstance(node, ast.For | ast.comprehension) and child is node.iter
                    found.append(given or iterated or isinstance(node, ast.Subscript))
    return bool(found) and all(found)


def _is_self(value: ast.expr, tree: ast.FunctionDef) -> bool:
    """Whether an expression is the first argument of a method, by whatever name."""
    arguments = [*tree.args.posonlyargs, *tree.args.args]
    return isinstance(value, ast.Name) and bool(arguments) and value.id == arguments[0].arg


_ITERATE = ("enumerate", "zip", "reversed", "len", "range", "list", "iter")


_COLLECTIONS = {
    **{ast.Tuple: "tuple", ast.List: "list", ast.ListComp: "list", ast.Dict: "dict", ast.DictComp: "dict"},
    **{"tuple": "tuple", "list": "list", "dict": "dict", "OrderedDict": "dict"},
}


def _collection(kind: type[nn.Module], method: str = "forward", depth: int = 3) -> str | None:
    """The collection that a class is written to return from ``forward``; None if it may return something else."""
    tree = _source(next(_methods(kind, method), None))
    if tree is None:
        return None
    nodes = [node for statement in tree.body for node in _inside(statement)]

    def read(value: ast.expr | None) -> str | None:
        if isinstance(value, ast.Name):
            stored = [node for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
            times = sum(node.id == value.id for node in stored)
            sources = [
                node.value
                for node in nodes
                if isinstance(node, ast.Assign | ast.AnnAssign)
                for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
                if isinstance(target, ast.Name) and target.id == value.id
            ]
            found = {None if isinstance(source, ast.Name) else read(source) for source in sources}
            return found.pop() if len(found) == 1 and len(sources) == times else None
        if isinstance(value, ast.Call):
            called = value.func
            if isinstance(called, ast.Name):
                return _COLLECTIONS.get(called.id)
            if isinstance(called, ast.Attribute) and _is_self(called.value, tree):
                return _collection(kind, called.attr, depth - 1) if depth else None
            return None
        if isinstance(value, ast.BinOp):
            return None if isinstance(value.left, ast.Name) else read(value.left)  # a name may be made of itself
        return _COLLECTIONS.get(type(value))

    found = {read(node.value) for node in nodes if isinstance(node, ast.Return)}
    if found and None not in found:
        return found.pop()
    said = ast.unparse(tree.returns).removeprefix("typing.").lower() if tree.returns else ""
    return said.partition("[")[0] if re.fullmatch(r"(list|tuple|dict)(\[[^|]*)?", said) else None


def _inside(node: ast.AST) -> Iterator[ast.AST]:
    """A statement and what is in it, but for functions of its own."""
    yield node
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
        for child in ast.iter_child_nodes(node):
            yield from _inside(child)


def _dims(module: nn.Module) -> set[int]:
    """For how many spatial dims the layers of a module are, of those that PyTorch has: 1, 2, 3."""
    kinds = {kind for layer in module.modules() for kind in type(layer).__mro__}
    names = [kind.__name__ for kind in kinds if kind.__module__.startswith("torch.nn")]
    return {int(name[-2]) for name in names if re.search(r"[123]d$", name)}


def _layers(module: nn.Module) -> list[nn.Module]:
    """The children of a module, without a block."""
    return [child for name, child in module._modules.items() if name != NAME and child is not None]


# Layers of PyTorch that keep the channels.
_KEEP = {f"torch.nn.modules.{name}" for name in ("activation", "dropout", "padding", "pooling", "upsampling")}
# What a forward pass can do to the channels that its convolutions put out.
_MIX = ("cat", "concat", "concatenate", "chunk", "glu", "pixel_shuffle", "rearrange")


def _keeps_channels(layer: nn.Module) -> bool:
    if type(layer).forward is nn.Sequential.forward:
        return all(_keeps_channels(part) for part in _layers(layer))
    if isinstance(layer, nn.GLU | nn.MultiheadAttention):
        return False
    return isinstance(layer, nn.Identity) or type(layer).__module__ in _KEEP


def _output_channels(module: nn.Module) -> int | None:
    """The channels that a module puts out, where its layers leave no doubt."""
    if isinstance(declared := getattr(module, "out_channels", None), int):
        return declared
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.num_features
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if type(module).forward is nn.Sequential.forward:
        last = next((layer for layer in reversed(_layers(module)) if not _keeps_channels(layer)), None)
        return None if last is None else _output_channels(last)
    # In which order the layers run is not known here: all that set the channels have to agree.
    parts, todo = [], [module]
    while todo:
        parts.append(todo.pop())
        todo += _layers(parts[-1])
    if any(_uses(type(part), _MIX) for part in parts):
        return None
    found = {getattr(part, name, None) for part in parts for name in ("out_channels", "out_features")} - {None}
    if not found:
        found = {_output_channels(part) for part in parts[1:] if not _layers(part)} - {None}
    return found.pop() if len(found) == 1 else None


def _find(model: nn.Module, path: str) -> nn.Module:
    """The submodule of a name, inside the wrappers of PyTorch that put names of their own around it."""
    module = model
    for depth, name in enumerate(path.split(".")):
        children = dict(module.named_children())
        if name not in children:
            where = ".".join(path.split(".")[:depth]) or "the model"
            raise ValueError(
                f"there is no submodule {path!r}: {where} has {', '.join(children) or 'no submodules'}; "
                "name one as in model.named_modules()"
            )
        if isinstance(module, RSABlock | SABlock):
            raise ValueError(
                f"submodule {path!r} is a part of an attention block, which takes its weights: name another"
            )
        module = children[name]
    for wrapped in ("_checkpoint_wrapped_module", "_orig_mod"):
        module = dict(module.named_children()).get(wrapped, module)
    return module


def _check_stage(model: nn.Module, path: str, stage: nn.Module) -> None:
    """Refuses what is known to have no place for a block, without a forward pass."""
    kind = type(stage)
    if isinstance(model, torch.jit.ScriptModule) or isinstance(stage, torch.jit.ScriptModule):
        raise ValueError(
            f"submodule {path!r} is TorchScript, which runs past blocks that are put in later: "
            "insert the block before the network is scripted or traced"
        )
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "the network is in a DistributedDataParallel, which would not share the gradients of the block: "
            "insert the block before the network is wrapped"
        )
    if isinstance(stage, WithRSA) or hasattr(stage, NAME):
        raise ValueError(f"submodule {path!r} already has an RSA block: insert each one once")
    if "forward" in vars(stage):
        return
    if kind.forward is nn.Module.forward:
        raise ValueError(
            f"submodule {path!r} is a {kind.__name__}, which is never called and only holds others: "
            f"insert the block at one of them{_such_as(path, stage)}"
        )
    if _uses(kind, ("children", "named_children", "modules", "named_modules", "_modules")):
        raise ValueError(
            f"submodule {path!r} is a {kind.__name__}, which goes through its children and would run the block as one "
            f"of them: insert it at another submodule, or put this one into an nn.Sequential of its own"
        )


def _check_unseen(model: nn.Module, path: str, stage: nn.Module) -> None:
    """Refuses what looks as if it would fail in a forward pass."""
    places = [
        (type(owner), name) for owner in model.modules() for name in owner._modules if owner._modules[name] is stage
    ]
    if all(_only_iterated(*place) for place in places):
        raise ValueError(_never_called(path))
    last = stage
    while type(last).forward is nn.Sequential.forward and _layers(last):
        last = _layers(last)[-1]
    if "forward" not in vars(last) and (collection := _collection(type(last))):
        raise TypeError(_no_volume(f"submodule {path!r}: {type(last).__name__}", collection))
    if (dims := _dims(stage) or _dims(model)) and 3 not in dims:
        raise ValueError(
            f"submodule {path!r} has layers for {max(dims)}-D images, but an RSA block attends volumes "
            "(N, C, D, H, W): insert it into a 3-D network, or pass example= if volumes come out here"
        )


def _such_as(path: str, stage: nn.Module) -> str:
    names = [name for name, _ in stage.named_children()]
    return f", such as {path}.{names[-1]}" if names else ""


# --- the first pass ---


class _FirstPass:
    """Sees whether the first forward pass of a network runs a stage, or only what is in it, past the block."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.key = f"{NAME} at {path}"  # of its hooks
        self.running = self.called = self.inside = self.warned = False

    def watch(self, model: nn.Module, stage: nn.Module) -> None:
        """Puts hooks on the network, the stage, and its children that are nobody else's."""
        elsewhere, todo = set(), [model]
        while todo:
            module = todo.pop()
            if module is not stage and module not in elsewhere:
                elsewhere.add(module)
                todo += _layers(module)
        model._forward_pre_hooks[self.key] = self.begin
        model._forward_hooks[self.key] = self.end
        stage._forward_pre_hooks[self.key] = self.call
        # This package's own modules compute layers together that nobody watches: they are left to the warning.
        for child in [] if type(stage).__module__.startswith("rsanet.") else _layers(stage):
            if child not in elsewhere:
                child._forward_pre_hooks[self.key] = self.enter

    def begin(self, *_: Any) -> None:
        """The network starts."""
        self.running = True

    def call(self, *_: Any) -> None:
        """The stage is called: all is well."""
        if self.running:
            self.called = True

    def enter(self, *_: Any) -> None:
        """A part of the stage is called."""
        if self.running:
            self.inside = True

    def end(self, model: nn.Module, *_: Any) -> None:
        """The network is done."""
        self.running = False
        if self.inside and not self.called:
            raise RuntimeError(_never_called(self.path) + ", or take the block out with remove_rsa(model)")
        if torch.compiler.is_dynamo_compiling():
            return
        if self.called:
            _forget(model, self.key)
        elif not self.warned:
            self.warned = True
            warnings.warn(
                f"this forward pass did not call submodule {self.path!r}, so the RSA block behind it did not run: "
                "if none should, take it out with remove_rsa(model)",
                stacklevel=1,
            )


def _forget(model: nn.Module, key: str) -> None:
    """Takes the hooks of a first pass away."""
    for module in model.modules():
        module._forward_pre_hooks.pop(key, None)
        module._forward_hooks.pop(key, None)


def _never_called(path: str) -> str:
    return (
        f"the network never calls submodule {path!r}, but runs what is in it on its own, past an RSA block: "
        "insert it at the last layer in there that runs"
    )


def _run_example(model: nn.Module, path: str, stage: nn.Module, example: Any) -> int:
    """The channels of the volumes that a stage returns in one forward pass, which leaves the network as it was."""
    tensors = [*model.parameters(), *model.buffers()]
    if any(isinstance(tensor, nn.parameter.UninitializedTensorMixin) for tensor in tensors):
        raise ValueError("the network has lazy layers, which example= would initialize: run one forward pass first")
    args, kwargs = example if isinstance(example, tuple | list) else (), example if isinstance(example, dict) else {}
    if not args and not kwargs:
        args = (example,)
    outputs: list[Any] = []
    entered: list[bool] = []
    before = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    values = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    handles = [stage.register_forward_hook(lambda _module, _args, output: outputs.append(output))]
    handles += [layer.register_forward_pre_hook(lambda *_: entered.append(True)) for layer in _layers(stage)]
    devices = {tensor.device.index or 0 for tensor in tensors if tensor.is_cuda}
    try:
        for module in model.modules():
            module.training = False
        # Code that was compiled before does not know the hooks above.
        eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
        with eager, torch.random.fork_rng(sorted(devices)), torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:
        raise ValueError(
            f"example= does not run through the network ({type(error).__name__}: {str(error).partition(chr(10))[0]}): "
            "give the arguments of one forward pass, on the network's device"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        for module, attributes, buffers in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)
    if not outputs:
        if entered:
            raise ValueError(_never_called(path))
        raise ValueError(
            f"the network does not call submodule {path!r} with this example: insert the block at one it calls"
        )
    for output in outputs:
        if not isinstance(output, Tensor):
            raise TypeError(_no_volume(f"submodule {path!r}: {type(stage).__name__}", type(output).__name__))
        if output.dim() != 5 or not output.is_floating_point() or output.shape[1] != outputs[0].shape[1]:
            raise ValueError(
                f"submodule {path!r} returns {output.dtype} of shape {tuple(output.shape)} for this example, but an "
                "RSA block attends floating-point volumes (N, C, D, H, W) of one width: insert it elsewhere"
            )
    return outputs[0].shape[1]


# --- in and out ---


def _floating_tensors(*modules: nn.Module) -> Iterator[Tensor]:
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                yield tensor


def insert_rsa(
    model: nn.Module,
    path: str,
    channels: int | None = None,
    *,
    example: Any = None,
    axes: Sequence[int | str] = DEFAULT_AXES,
    scale: float = 1.0,
    recompute: bool = False,
    backend: str | None = None,
) -> nn.Module:
    """Puts an RSA block behind a submodule of any 3-D network.

    The submodule's output goes through an ``RSABlock`` on its device and in its dtype. The block starts as
    the identity, so the network's outputs are unchanged until the betas move. The submodule stays what it is, with
    the block as its child ``rsa_block``: names of parameters and keys of the state_dict are kept, and those of the
    block are added, ``<path>.rsa_block.*``, under each path where the network registers the submodule under several.
    The new parameters have to reach the optimizer: insert first, then make the optimizer. ``docs/tutorials/plug-in.md``
    says which submodules to take in well-known networks.

    A place where the block would not run, or could not, is refused, and the network is left as it was. Not all can be
    known without a forward pass: ``example`` makes one. Without it, the network's first pass sees whether the submodule
    is called: it raises a ``RuntimeError`` where only what is in it runs, and warns where nothing of it does.

    Args:
        model: the network; changed in place.
        path: the submodule's name as in ``model.named_modules()``, for example ``"encoder.3"``.
        channels: channels of the submodule's output; inferred from its layers where they leave no doubt.
        example: what ``model`` is called with, a tensor or a tuple or dict of arguments, for one forward pass that sees
            what comes out of the submodule. It runs in evaluation mode without gradients, and leaves buffers, random
            numbers and modes as they were.
        axes: see ``RSABlock``.
        scale: see ``RSABlock``.
        recompute: see ``RSABlock``.
        backend: see ``RSABlock``.

    Returns:
        ``model``.

    Raises:
        TypeError: If ``model`` is no module, ``path`` no string, or the submodule returns no tensor.
        ValueError: If there is no such submodule, if it has an RSA block already, if a block would not run there, if
            its output is no volume, or if the channels are unknown or others.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}: pass the network itself")
    if not isinstance(path, str):
        raise TypeError(f"path must be a string, not {type(path).__name__}: name a submodule as in named_modules()")
    stage = _find(model, path)
    _check_stage(model, path, stage)
    if example is None:
        _check_unseen(model, path, stage)
        # A convolution of PyTorch is sure of its channels; what else declares some may be wrong.
        found = stage.out_channels if isinstance(stage, nn.modules.conv._ConvNd) else None
    else:
        found = _run_example(model, path, stage, example)
    if found is not None and channels not in (None, found):
        raise ValueError(
            f"the block at {path!r} would be made for {channels} channels and got {found}: leave channels= out"
        )
    channels = found or channels or _output_channels(stage)
    if channels is None:
        raise ValueError(
            f"the layers of submodule {path!r} do not tell how many channels come out: pass channels= or example="
        )
    block = RSABlock(channels, axes, scale=scale, recompute=recompute, backend=backend)
    like = next(_floating_tensors(stage, model), None)
    if like is not None:
        block.to(like.device, like.dtype)
    block.train(stage.training)

    kind = _changed_class(stage, _class_with_block)
    stage.add_module(NAME, block)
    stage._forward_hooks[NAME] = _attend
    stage.__class__ = kind
    if example is None:
        _FirstPass(path).watch(model, stage)
    return model


def remove_rsa(model: nn.Module, path: str | None = None) -> nn.Module:
    """Takes RSA blocks out that ``insert_rsa`` put in: the network is what it was.

    Args:
        model: the network; changed in place.
        path: the submodule that the block stands behind, as for ``insert_rsa``; None takes all blocks out.

    Returns:
        ``model``.

    Raises:
        TypeError: If ``model`` is no module or ``path`` no string.
        ValueError: If there is no such submodule, it has no such block, or its class was changed since.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}: pass the network itself")
    if not isinstance(path, str | None):
        raise TypeError(f"path must be a string, not {type(path).__name__}: name a submodule as in named_modules()")
    places = {name: module for name, module in model.named_modules() if isinstance(module, WithRSA)}
    if path is not None:
        stage = _find(model, path)
        if not isinstance(stage, WithRSA):
            held = ", ".join(places) or "no submodule"
            raise ValueError(f"submodule {path!r} has no RSA block that insert_rsa put in: {held} has one")
        places = {path: stage}
    before = {}
    for name, stage in places.items():
        try:
            before[stage] = _changed_class(stage, _class_before)
        except KeyError:
            raise ValueError(
                f"submodule {name!r} became a {type(stage).__name__} after the RSA block was put in: undo that first"
            ) from None
    for stage, kind in before.items():
        stage._modules.pop(NAME, None)
        stage._forward_hooks.pop(NAME, None)
        stage.__class__ = kind
        for hook in list(stage._forward_pre_hooks.values()):
            if isinstance(first := getattr(hook, "__self__", None), _FirstPass):
                first.called = True  # for the hooks of a network that this model is a part of
                _forget(model, first.key)
    return model
