"""Attention blocks for 3-D networks. `rsanet.insertion` plugs one into a network that already exists.

``SABlock`` and ``RSABlock`` are the slice-wise attention of RSANet (Zhang et al., MICCAI 2019): they hold the
parameters, `rsa_kernels` computes. ``NonLocalBlock`` is the baseline of that paper. All three are residual
and start as the identity, so adding one changes nothing until it is trained.

Volumes are ``(N, C, D, H, W)``. The axis names follow the published code: axial is D, coronal is H,
sagittal is W. They are anatomically true only for volumes stored as (z, y, x).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from rsa_kernels import reference
from rsa_kernels.api import AXIS_NAMES, normalize_axis, recurrent_slice_attention, slice_attention
from rsa_kernels.backends import known
from rsanet.convolution import Conv3d

# torch.fx.symbolic_trace keeps each as one call in its graph: the checks inside look at sizes, which it does not know.
fx.wrap("recurrent_slice_attention")
fx.wrap("slice_attention")

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
    if isinstance(x, fx.Proxy):  # stands for a tensor that the traced graph will get
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} needs one tensor (N, C, D, H, W), got {type(x).__name__}: pass a single feature map")
    if x.dim() != 5:
        raise ValueError(f"{name} needs a volume (N, C, D, H, W), got shape {tuple(x.shape)}: add the missing dims")
    if x.shape[1] != channels:
        raise ValueError(f"{name} was made for {channels} channels and got {x.shape[1]}: use channels={x.shape[1]}")


def _is_plain(conv: nn.Module, channels: int) -> bool:
    """Whether a projection is the 1x1x1 convolution it was made as, with nothing on it but parametrizations.

    Only then its weight and bias say all that it does.
    """
    return (
        parametrize.type_before_parametrizations(conv) in (Conv3d, nn.Conv3d)
        and conv.in_channels == conv.out_channels == channels
        and conv.kernel_size == conv.stride == (1, 1, 1)
        and conv.padding == (0, 0, 0)
        and conv.groups == 1
        and conv.bias is not None
        and not (conv._forward_pre_hooks or conv._forward_hooks or conv._backward_pre_hooks or conv._backward_hooks)
        and "forward" not in conv.__dict__
    )


def _project(conv: nn.Module, name: str, x: Tensor) -> Tensor:
    """What a projection makes of a volume: the same shape and dtype, whatever the projection is."""
    if not isinstance(conv, nn.Module):
        raise TypeError(f"{name} is a {type(conv).__name__}, but must be a module: put a 1x1x1 convolution there")
    dtype = next((weight.dtype for weight in conv.parameters() if weight.is_floating_point()), x.dtype)
    out = conv(x.to(dtype))
    if isinstance(out, fx.Proxy):
        return out.to(x.dtype)
    if not isinstance(out, Tensor) or out.shape != x.shape:
        given = tuple(out.shape) if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise ValueError(
            f"{name} is a {type(conv).__name__} and makes {given} of a volume {tuple(x.shape)}, but attention needs "
            "the same shape: put a 1x1x1 convolution there that keeps the channels"
        )
    return out.to(x.dtype)


def _shown(betas: Sequence[Tensor]) -> str:
    """The betas' values for a repr, or where they are that cannot be read."""
    if any(beta.is_meta for beta in betas):
        return "on meta"
    if any(hasattr(beta, "device_mesh") for beta in betas):  # reading them would be a call that all processes make
        return "sharded"
    try:
        values = tuple(float(f"{beta.item():.4g}") for beta in betas)
    except (RuntimeError, TypeError, ValueError, AttributeError):  # of a fake or a transformed tensor
        return "without values"
    return repr(values)


class Betas(nn.ParameterList):
    """The betas of an RSA block: they start at zero, after ``to_empty`` as well."""

    def reset_parameters(self) -> None:
        """Sets them to zero."""
        for beta in self:
            nn.init.zeros_(beta)


class _SliceAttention(nn.Module):
    """The three projections that the slice-wise blocks share.

    They are ``Conv3d`` modules so that state_dict keys, shapes and initialisation are the published ones.
    The kernels take their weights. Where something else than a weight decides what a projection does (hooks, pruning,
    an adapter around it), all three are called instead, once a step, as the published code does.
    """

    def __init__(self, channels: int, scale: float, backend: str | None) -> None:
        super().__init__()
        self.channels = positive_int("channels", channels)
        self.scale = finite_number("scale", scale)
        self.backend = None if backend is None else known(backend)
        self.theta_conv = Conv3d(channels, channels, kernel_size=1)
        self.phi_conv = Conv3d(channels, channels, kernel_size=1)
        self.g_conv = Conv3d(channels, channels, kernel_size=1)

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError(
            f"TorchScript cannot compile {type(self).__name__}, whose checks are plain Python: use torch.export, or "
            "torch.jit.trace under torch.no_grad()"
        )

    def reset_parameters(self) -> None:
        """Draws the projections anew and sets the betas to zero: the block is the identity, as when it was made."""
        for conv in (self.theta_conv, self.phi_conv, self.g_conv):
            if hasattr(conv, "reset_parameters"):
                conv.reset_parameters()
        for name, parameter in self.named_parameters():
            if name.startswith("beta"):
                nn.init.zeros_(parameter)

    def _attend(
        self, x: Tensor, betas: Sequence[Tensor], axes: Sequence[str], recompute: bool, return_maps: bool
    ) -> Any:
        _check_volume(x, self.channels, self)
        convs = (self.theta_conv, self.phi_conv, self.g_conv)
        # ONNX has no operator for the kernels: it gets the published equations.
        to_onnx = (torch.compiler.is_exporting() or torch.jit.is_tracing()) and torch.onnx.is_in_onnx_export()
        if to_onnx or not all(_is_plain(conv, self.channels) for conv in convs):
            return self._attend_by_calls(x, betas, axes, return_maps, literally=return_maps or to_onnx)
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

    def _attend_by_calls(
        self, x: Tensor, betas: Sequence[Tensor], axes: Sequence[str], return_maps: bool, literally: bool
    ) -> Any:
        """The same with projections that are called."""
        device = x.device.type
        known = isinstance(x, Tensor) and torch.amp.is_autocast_available(device)
        if known and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))  # as the kernels do
        maps = []
        for beta, axis in zip(betas, axes, strict=True):
            volumes = [_project(getattr(self, name), name, x) for name in ("theta_conv", "phi_conv", "g_conv")]
            if literally:
                attended, attention = reference.slice_attention(*volumes, normalize_axis(axis), self.scale)
                maps.append(attention.detach())
            else:
                attended = slice_attention(*volumes, axis, scale=self.scale, backend=self.backend)
            x = (x + beta * attended).to(x.dtype)
        return (x, maps) if return_maps else x


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
        beta = _shown([self.beta]).strip("(,)")
        return f"channels={self.channels}, axis={self.axis!r}, scale={self.scale}, beta={beta}"


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
        recompute: keep only the input and the maps for backward, and recompute the steps between. Projections that
            are called, as hooks, pruning and adapters want it, keep all for backward.
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
        self.betas = Betas([nn.Parameter(torch.zeros(())) for _ in self.axes])

    def forward(self, x: Tensor) -> Tensor:
        """Attends ``(N, C, D, H, W)``; same shape and memory format."""
        return self._attend(x, self._betas(), self.axes, self.recompute, return_maps=False)

    def attention_maps(self, x: Tensor) -> list[Tensor]:
        """One ``(N, S, S)`` map per axis, in order: row ``i`` says how slice ``i`` weighs every slice."""
        return list(self._attend(x, self._betas(), self.axes, recompute=False, return_maps=True)[1])

    def _betas(self) -> list[Tensor]:
        # Pruning makes a beta anew in a hook of what holds it, which nobody calls.
        for hook in self.betas._forward_pre_hooks.values():
            hook(self.betas, ())
        return list(self.betas)

    def extra_repr(self) -> str:
        """Shows the choices that the submodules do not."""
        betas = _shown(self.betas)
        return (
            f"channels={self.channels}, axes={self.axes}, scale={self.scale}, recompute={self.recompute}, betas={betas}"
        )


class _ZeroConv(Conv3d):
    """A convolution that starts at zero, after ``to_empty`` as well."""

    def reset_parameters(self) -> None:
        """Sets weight and bias to zero, and draws as many random numbers as any convolution does."""
        super().reset_parameters()
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


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
        self.theta_conv = Conv3d(channels, inner, kernel_size=1)
        self.phi_conv = Conv3d(channels, inner, kernel_size=1)
        self.g_conv = Conv3d(channels, inner, kernel_size=1)
        self.out_conv = _ZeroConv(inner, channels, kernel_size=1)

    def reset_parameters(self) -> None:
        """Draws the projections anew and sets the last one to zero: the block is the identity, as when it was made."""
        for conv in (self.theta_conv, self.phi_conv, self.g_conv, self.out_conv):
            if hasattr(conv, "reset_parameters"):
                conv.reset_parameters()

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


def __getattr__(name: str) -> Any:
    if name not in ("WithRSA", "insert_rsa", "remove_rsa"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rsanet import insertion  # which imports this module

    return getattr(insertion, name)
