"""Attention blocks for 3-D networks, and the way to plug one into a network that already exists.

``SABlock`` and ``RSABlock`` are the slice-wise attention of RSANet (Zhang et al., MICCAI 2019): they hold the
parameters, `rsa_kernels` computes. ``NonLocalBlock`` is the baseline of that paper. All three are residual
and start as the identity, so adding one changes nothing until it is trained.

Volumes are ``(N, C, D, H, W)``. The axis names follow the published code: axial is D, coronal is H,
sagittal is W. They are anatomically true only for volumes stored as (z, y, x).
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rsa_kernels.api import AXIS_NAMES, normalize_axis, recurrent_slice_attention
from rsa_kernels.backends import known

DEFAULT_AXES = ("coronal", "sagittal", "axial")


def axis_name(axis: int | str) -> str:
    """The name of an axis given as a name or as a dim of ``(N, C, D, H, W)``, negative dims included."""
    dim = normalize_axis(axis)
    return next(name for name, named in AXIS_NAMES.items() if named == dim)


def positive_int(name: str, value: Any) -> int:
    """``value``, if it is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}, but must be an int: give a number of at least 1")
    if value < 1:
        raise ValueError(f"{name} is {value}, but must be at least 1: give a larger number")
    return value


def finite_number(name: str, value: Any) -> float:
    """``value`` as a float, if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r}, but must be a number: give a finite one")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}, but must be finite: give another number")
    return float(value)


def _check_volume(x: Tensor, channels: int, block: nn.Module) -> None:
    name = type(block).__name__
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} needs one tensor (N, C, D, H, W), got {type(x).__name__}: pass a single feature map")
    if x.dim() != 5:
        raise ValueError(f"{name} needs a volume (N, C, D, H, W), got shape {tuple(x.shape)}: add the missing dims")
    if x.shape[1] != channels:
        raise ValueError(f"{name} was made for {channels} channels and got {x.shape[1]}: use channels={x.shape[1]}")


class _SliceAttention(nn.Module):
    """The three projections that the slice-wise blocks share.

    They are ``Conv3d`` modules so that state_dict keys, shapes and initialisation are the published ones.
    They are never called: the kernels take their weights.
    """

    def __init__(self, channels: int, scale: float, backend: str | None) -> None:
        super().__init__()
        self.channels = positive_int("channels", channels)
        self.scale = finite_number("scale", scale)
        self.backend = None if backend is None else known(backend)
        self.theta_conv = nn.Conv3d(channels, channels, kernel_size=1)
        self.phi_conv = nn.Conv3d(channels, channels, kernel_size=1)
        self.g_conv = nn.Conv3d(channels, channels, kernel_size=1)

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError(
            f"TorchScript cannot compile {type(self).__name__}, whose checks are plain Python: use torch.export, or "
            "torch.jit.trace under torch.no_grad()"
        )

    def _attend(
        self, x: Tensor, betas: Sequence[Tensor], axes: Sequence[str], recompute: bool, return_maps: bool
    ) -> Any:
        _check_volume(x, self.channels, self)
        return recurrent_slice_attention(
            x,
            self.theta_conv.weight,
            self.theta_conv.bias,
            self.phi_conv.weight,
            self.phi_conv.bias,
            self.g_conv.weight,
            self.g_conv.bias,
            betas,
            axes,
            scale=self.scale,
            recompute=recompute,
            return_maps=return_maps,
            backend=self.backend,
        )


class SABlock(_SliceAttention):
    """Slice-wise attention along one axis, from "RSANet" (Zhang et al., MICCAI 2019).

    ``out = x + beta * softmax_j(<theta(X_i), phi(X_j)>) g(X_j)``, where ``X_i`` is a slice. ``beta`` starts
    at zero.

    Args:
        channels: channels of the volume.
        axis: ``"axial"`` (D), ``"coronal"`` (H) or ``"sagittal"`` (W), or the dim 2, 3, 4.
        scale: factor on the logits; the published block uses 1.
        backend: a backend of `rsa_kernels`; ``None`` leaves the choice to it.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If its value is impossible, or the volume of a call has another number of channels or dims.
    """

    def __init__(self, channels: int, axis: int | str, *, scale: float = 1.0, backend: str | None = None) -> None:
        super().__init__(channels, scale, backend)
        self.axis = axis_name(axis)
        self.beta = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Attends ``(N, C, D, H, W)``; same shape and memory format."""
        return self._attend(x, [self.beta], [self.axis], recompute=False, return_maps=False)

    def attention_map(self, x: Tensor) -> Tensor:
        """The ``(N, S, S)`` map: row ``i`` says how slice ``i`` weighs every slice."""
        return self._attend(x, [self.beta], [self.axis], recompute=False, return_maps=True)[1][0]

    def extra_repr(self) -> str:
        """Shows the choices that the submodules do not."""
        return f"channels={self.channels}, axis={self.axis!r}, scale={self.scale}"


class RSABlock(_SliceAttention):
    """Recurrent slice-wise attention, from "RSANet" (Zhang et al., MICCAI 2019).

    Applies slice-wise attention along each axis in turn with the same three projections and one scalar
    ``beta`` per axis. The betas start at zero: the block starts as the identity. The state_dict equals the
    published block's.

    The paper's figure draws sagittal, coronal, axial; the published code runs coronal, sagittal, axial, and
    that is the default here, so that its checkpoints reproduce.

    Args:
        channels: channels of the volume.
        axes: the axes in order, as names or dims; see the module's note on names.
        scale: factor on the logits; the published block uses 1.
        recompute: keep only the input and the maps for backward, and recompute the steps between.
        backend: a backend of `rsa_kernels`; ``None`` leaves the choice to it.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If its value is impossible, or the volume of a call has another number of channels or dims.
    """

    def __init__(
        self,
        channels: int,
        axes: Sequence[int | str] = DEFAULT_AXES,
        *,
        scale: float = 1.0,
        recompute: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(channels, scale, backend)
        if isinstance(axes, str) or not isinstance(axes, Sequence):
            raise TypeError(f"axes is a sequence of axes, not {axes!r}: write for example {DEFAULT_AXES}")
        if not axes:
            raise ValueError(f"axes is empty, but at least one axis is needed: write for example {DEFAULT_AXES}")
        self.axes = tuple(axis_name(axis) for axis in axes)
        self.recompute = bool(recompute)
        self.betas = nn.ParameterList([nn.Parameter(torch.zeros(())) for _ in self.axes])

    def forward(self, x: Tensor) -> Tensor:
        """Attends ``(N, C, D, H, W)``; same shape and memory format."""
        return self._attend(x, list(self.betas), self.axes, self.recompute, return_maps=False)

    def attention_maps(self, x: Tensor) -> list[Tensor]:
        """One ``(N, S, S)`` map per axis, in order: row ``i`` says how slice ``i`` weighs every slice."""
        return list(self._attend(x, list(self.betas), self.axes, recompute=False, return_maps=True)[1])

    def extra_repr(self) -> str:
        """Shows the choices that the submodules do not."""
        return f"channels={self.channels}, axes={self.axes}, scale={self.scale}, recompute={self.recompute}"


class NonLocalBlock(nn.Module):
    """Embedded-Gaussian non-local block, from "Non-local Neural Networks" (Wang et al., CVPR 2018).

    Every voxel attends to every voxel, so the cost grows with the square of the volume. The output
    projection starts at zero: the block starts as the identity.

    Args:
        channels: channels of the volume.
        inner_channels: channels of query, key and value; half of ``channels`` by default.
        scale: factor on the logits; the published block uses 1.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If its value is impossible, or the volume of a call has another number of channels or dims.
    """

    def __init__(self, channels: int, inner_channels: int | None = None, *, scale: float = 1.0) -> None:
        super().__init__()
        self.channels = positive_int("channels", channels)
        inner = max(1, channels // 2) if inner_channels is None else positive_int("inner_channels", inner_channels)
        self.scale = finite_number("scale", scale)
        self.theta_conv = nn.Conv3d(channels, inner, kernel_size=1)
        self.phi_conv = nn.Conv3d(channels, inner, kernel_size=1)
        self.g_conv = nn.Conv3d(channels, inner, kernel_size=1)
        self.out_conv = nn.Conv3d(inner, channels, kernel_size=1)
        nn.init.zeros_(self.out_conv.weight)
        nn.init.zeros_(self.out_conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Attends ``(N, C, D, H, W)``; same shape."""
        _check_volume(x, self.channels, self)
        query, key, value = (
            conv(x).flatten(2).transpose(1, 2).unsqueeze(1)  # (N, one head, voxels, inner)
            for conv in (self.theta_conv, self.phi_conv, self.g_conv)
        )
        attended = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        attended = attended.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.out_conv(attended)

    def extra_repr(self) -> str:
        """Shows the choices that the submodules do not."""
        return f"channels={self.channels}, scale={self.scale}"


# torch takes this name, which its own wrappers use, out of the names of parameters: torch.distributed.checkpoint then
# knows the module's parameters, and what the optimizer keeps of them, by the names that they had alone.
_WRAPPED = "_checkpoint_wrapped_module"


class WithRSA(nn.Module):
    """A module followed by an RSA block, with the state_dict keys that the module had alone.

    The block's keys are ``rsa_block.*`` beside the module's own, so a checkpoint of the network without
    attention still fits (``strict=False``: only the block's keys are missing). Attributes not found here
    are the module's. Whatever arguments the module takes, it has to return one volume.
    """

    def __init__(self, module: nn.Module, rsa_block: RSABlock) -> None:
        super().__init__()
        self._modules[_WRAPPED] = module
        self.rsa_block = rsa_block
        self.train(module.training)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The module's output after attention."""
        out = self.module(*args, **kwargs)
        if not isinstance(out, Tensor):
            raise TypeError(
                f"{type(self.module).__name__} returns a {type(out).__name__}, but an RSA block goes behind a module "
                "that returns one volume (N, C, D, H, W): insert it at a submodule of this one, such as its last stage"
            )
        return self.rsa_block(out)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("module", _WRAPPED):  # not there yet while unpickling
                raise
            return getattr(self.module, name)

    @property
    def module(self) -> nn.Module:
        """The module that the block stands behind."""
        return super().__getattr__(_WRAPPED)

    def __getitem__(self, index: Any) -> Any:
        return self.module[index]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As ``nn.Module.state_dict``, with the module's own keys."""
        destination = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        inner = f"{prefix}{_WRAPPED}."
        for key in [key for key in destination if key.startswith(prefix)]:
            # Every key is put back, the unchanged ones too, so that the order stays that of the modules.
            value = destination.pop(key)
            destination[prefix + key[len(inner) :] if key.startswith(inner) else key] = value
        return destination

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = prefix + "rsa_block."
        for key in [key for key in state_dict if key.startswith(prefix) and not key.startswith(own)]:
            state_dict[f"{prefix}{_WRAPPED}." + key[len(prefix) :]] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _output_channels(module: nn.Module) -> int | None:
    """The channels that a module puts out, by its own word or that of its last layer."""
    declared = getattr(module, "out_channels", None)
    if isinstance(declared, int):
        return declared
    for layer in reversed(list(module.modules())):
        for attribute in ("out_channels", "num_features", "num_channels"):
            channels = getattr(layer, attribute, None)
            if isinstance(layer, nn.Module) and isinstance(channels, int):
                return channels
    return None


def _registrations(model: nn.Module, module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Every place where a network registers a module: its owner and its name there."""
    for owner in model.modules():
        for name, child in owner._modules.items():
            if child is module:
                yield owner, name


def _check_not_held_elsewhere(model: nn.Module, path: str, module: nn.Module) -> None:
    """Refuses a module that the network also keeps in a plain list, tuple or dict, to run it without a block."""
    for name, owner in model.named_modules():
        for attribute, value in vars(owner).items():
            held = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
            if attribute != "_modules" and any(entry is module for entry in held):
                where = f"{name}.{attribute}" if name else attribute
                raise ValueError(
                    f"submodule {path!r} is also held by {where}, a plain {type(value).__name__}, and a call through "
                    "that would pass by the RSA block: insert it at a submodule of this one, such as its last layer"
                )


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
    axes: Sequence[int | str] = DEFAULT_AXES,
    scale: float = 1.0,
    recompute: bool = False,
    backend: str | None = None,
) -> nn.Module:
    """Puts an RSA block behind a submodule of any 3-D network.

    The submodule's output goes through an ``RSABlock`` on its device and in its dtype. The block starts as
    the identity, so the network's outputs are unchanged until the betas move. The state_dict keeps its keys
    and gains ``<path>.rsa_block.*``, under each path where the network registers the submodule under several.
    The new parameters have to reach the optimizer: insert first, then make the optimizer. ``docs/tutorials/plug-in.md``
    says which submodules to take in well-known networks.

    Args:
        model: the network; changed in place.
        path: the submodule's name as in ``model.named_modules()``, for example ``"encoder.3"``.
        channels: channels of the submodule's output; inferred from its layers where they tell.
        axes: see ``RSABlock``.
        scale: see ``RSABlock``.
        recompute: see ``RSABlock``.
        backend: see ``RSABlock``.

    Returns:
        ``model``.

    Raises:
        TypeError: If ``model`` is no module or ``path`` no string.
        ValueError: If there is no such submodule, if it has an RSA block already, if the network also keeps it
            where it cannot be replaced, or if the channels are unknown.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}: pass the network itself")
    if not isinstance(path, str):
        raise TypeError(f"path must be a string, not {type(path).__name__}: name a submodule as in named_modules()")
    module = model
    for depth, name in enumerate(path.split(".")):
        if isinstance(module, WithRSA) and name != "rsa_block":  # whose children go by the names that they had alone
            module = module.module
        children = dict(module.named_children())
        if name not in children:
            where = ".".join(path.split(".")[:depth]) or "the model"
            raise ValueError(
                f"there is no submodule {path!r}: {where} has {', '.join(children) or 'no submodules'}; "
                "name one as in model.named_modules()"
            )
        module = children[name]
    if isinstance(module, WithRSA) or "rsa_block" in dict(module.named_children()):
        raise ValueError(f"submodule {path!r} already has an RSA block: insert each one once")
    if channels is None and (channels := _output_channels(module)) is None:
        raise ValueError(f"the layers of submodule {path!r} do not tell how many channels come out: pass channels=")

    _check_not_held_elsewhere(model, path, module)
    block = RSABlock(channels, axes, scale=scale, recompute=recompute, backend=backend)
    like = next(_floating_tensors(module, model), None)
    if like is not None:
        block.to(like.device, like.dtype)
    wrapped = WithRSA(module, block)
    # MONAI's DynUNet, for one, runs its blocks under other names than those that they are known by.
    for owner, name in list(_registrations(model, module)):
        owner._modules[name] = wrapped
    return model
