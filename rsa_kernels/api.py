"""The public functions: what is checked before any backend sees it, the backend's name, the call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rsa_kernels import ops, transforms
from rsa_kernels.backends import Explanation, choose, requested

AXIS_NAMES = {"axial": 2, "coronal": 3, "sagittal": 4}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def normalize_axis(axis: int | str) -> int:
    """The spatial dim of ``(N, C, D, H, W)`` that an axis names.

    The names follow the published code; they are anatomically true for volumes stored as (z, y, x).

    Args:
        axis: ``"axial"`` (D), ``"coronal"`` (H), ``"sagittal"`` (W), or the dim: 2, 3, 4, -3, -2, -1.

    Returns:
        2, 3 or 4.

    Raises:
        ValueError: for anything else.
    """
    dim = None
    if isinstance(axis, str):
        dim = AXIS_NAMES.get(axis)
    elif hasattr(axis, "__index__") and not isinstance(axis, bool):
        dim = axis.__index__()
        dim += 5 if dim < 0 else 0
    if dim not in (2, 3, 4):
        raise ValueError(
            f"axis is {axis!r}, but must be 2 or 'axial', 3 or 'coronal', 4 or 'sagittal' (negative dims count)"
        )
    return dim


def slice_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axis: int | str,
    *,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Attention between the slices of a volume along one axis: the parameter-free core of slice-wise attention.

    ``softmax_j(scale * <query_i, key_j>)`` weighs the slices of ``value``; the inner product sums over channels and
    the positions within a slice (Zhang et al., "RSANet", MICCAI 2019, equations 1 and 2; no division by the square
    root of the length). Under autocast the volumes take the autocast dtype. First derivatives and ``torch.func.vmap``
    run the kernels of every backend; for forward mode and second derivatives see :mod:`rsa_kernels.transforms`.

    Args:
        query: ``(N, C, D, H, W)``, float64, float32, bfloat16 or float16, any strides.
        key: same shape, dtype and device.
        value: same shape, dtype and device.
        axis: the spatial axis that is sliced: 2 or ``"axial"``, 3 or ``"coronal"``, 4 or ``"sagittal"``.
        scale: factor on the logits.
        backend: a key of :func:`available_backends`, or ``"auto"``; by default the choice of :func:`use_backend`,
            else of the environment variable ``RSA_KERNELS_BACKEND``, else ``"auto"``.

    Returns:
        The attended volume, in the shape, dtype and memory format of ``value``.

    Raises:
        TypeError: if an argument is not a floating-point tensor, or the dtypes differ.
        ValueError: if a shape, device, axis or backend name does not fit.
        RuntimeError: if the backend that was asked for cannot run these volumes, or has no such derivative.
    """
    _check_volume("query", query)
    for name, volume in (("key", key), ("value", value)):
        _check_volume(name, volume)
        _check_same("shape", name, tuple(volume.shape), "query", tuple(query.shape))
        _check_same("device", name, volume.device, "query", query.device)
        if volume.dtype != query.dtype and not _autocast_agrees(volume, query):
            raise TypeError(f"{name} has dtype {volume.dtype}, but must have that of query, {query.dtype}")
    arguments = (query, key, value, normalize_axis(axis), _check_scale(scale), requested(backend))
    if _transformed():
        return transforms.attention(*arguments)[0]
    return ops.attention(*arguments)[0]


def recurrent_slice_attention(
    x: Tensor,
    theta_weight: Tensor,
    theta_bias: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    g_weight: Tensor,
    g_bias: Tensor,
    betas: Tensor | Sequence[Tensor],
    axes: Sequence[int | str] = (3, 4, 2),
    *,
    scale: float = 1.0,
    recompute: bool = False,
    return_maps: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, list[Tensor]]:
    """The recurrent slice-wise attention block: one residual attention step after another, with shared projections.

    Each step computes ``x + beta * attention(theta(x), phi(x), g(x))`` along its axis (Zhang et al., "RSANet",
    MICCAI 2019, section 2.2). The default order is the published code's: coronal, sagittal, axial. Under autocast
    ``x`` takes the autocast dtype and the weights keep theirs. Derivatives are those of :func:`slice_attention`.

    Args:
        x: ``(N, C, D, H, W)``, float64, float32, bfloat16 or float16, any strides.
        theta_weight: query projection, ``(C, C)`` or ``(C, C, 1, 1, 1)``, in ``x``'s dtype or float32.
        theta_bias: ``(C,)``.
        phi_weight: key projection, like ``theta_weight``.
        phi_bias: ``(C,)``; it cancels in the softmax: its gradient is exactly zero, and its values are not looked at.
        g_weight: value projection, like ``theta_weight``.
        g_bias: ``(C,)``.
        betas: one scale per axis: scalar tensors, or a tensor ``(len(axes),)``, in ``x``'s dtype or float32.
        axes: spatial axes in the order of the steps: dims or names, see :func:`slice_attention`.
        scale: factor on the logits.
        recompute: keep only ``x`` and the maps for backward, and make the inner steps' inputs again there, as is always
            done under a transform of ``torch.func``.
        return_maps: also return the attention maps, for looking at: no gradient flows through them.
        backend: see :func:`slice_attention`.

    Returns:
        The output, in the shape, dtype and memory format of ``x``; with ``return_maps`` also one map ``(N, S, S)``
        per axis, float32 (float64 for float64), whose rows sum to one.

    Raises:
        TypeError: if an argument is not a floating-point tensor, or the dtypes do not fit.
        ValueError: if a shape, device, axis or backend name does not fit.
        RuntimeError: if the backend that was asked for cannot run ``x``, or has no such derivative.
    """
    _check_volume("x", x)
    channels = x.shape[1]
    weights = {"theta": (theta_weight, theta_bias), "phi": (phi_weight, phi_bias), "g": (g_weight, g_bias)}
    tensors = []
    for name, (weight, bias) in weights.items():
        tensors.append(_check_matrix(f"{name}_weight", weight, channels, x))
        _check_parameter(f"{name}_bias", bias, x)
        if bias.shape != (channels,):
            raise ValueError(
                f"{name}_bias has shape {tuple(bias.shape)}, but must have ({channels},), one per channel of x"
            )
        tensors.append(bias)
    dims = _check_axes(axes)
    tensors = [x, *tensors, _check_betas(betas, len(dims), x)]
    to_differentiate = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    operator = transforms.block if _transformed() else ops.block
    out, maps, _ = operator(*tensors, dims, _check_scale(scale), to_differentiate and not recompute, requested(backend))
    return (out, maps) if return_maps else out


def explain(x: Tensor, axes: Sequence[int | str] = (3, 4, 2)) -> Explanation:
    """Says which backend would run a volume, and why each other one would not.

    Args:
        x: the volume ``(N, C, D, H, W)``; only its shape, dtype, strides and device matter.
        axes: the axes of the block, in order.

    Returns:
        The chosen backend and the reasons, readable with ``print``.

    Raises:
        TypeError: if ``x`` is not a floating-point tensor.
        ValueError: if a shape or an axis does not fit.
    """
    _check_volume("x", x)
    return choose(x, _check_axes(axes))


def _transformed() -> bool:
    """Whether ``torch.func`` or forward mode is at work; the compiler puts the operators themselves into its graph."""
    return not torch.compiler.is_compiling() and transforms.active()


def _check_volume(name: str, volume: object) -> None:
    if not isinstance(volume, Tensor):
        raise TypeError(f"{name} is a {type(volume).__name__}, but must be a tensor (N, C, D, H, W)")
    if volume.dim() != 5:
        raise ValueError(f"{name} has shape {tuple(volume.shape)}, but must have five dims (N, C, D, H, W)")
    if volume.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {volume.dtype}, but must be float64, float32, bfloat16 or float16")
    if volume.layout != torch.strided:
        raise TypeError(f"{name} has layout {volume.layout}, but must be a dense tensor")
    if 0 in volume.shape[1:]:
        raise ValueError(f"{name} has shape {tuple(volume.shape)}, but no dim may be empty, except the batch")


def _check_parameter(name: str, parameter: object, x: Tensor) -> None:
    if not isinstance(parameter, Tensor):
        raise TypeError(f"{name} is a {type(parameter).__name__}, but must be a tensor")
    if parameter.dtype not in (x.dtype, torch.float32) and not _autocast_agrees(parameter, x):
        raise TypeError(f"{name} has dtype {parameter.dtype}, but must have that of x, {x.dtype}, or float32")
    if parameter.device != x.device:
        _check_same("device", name, parameter.device, "x", x.device)


def _check_matrix(name: str, weight: object, channels: int, x: Tensor) -> Tensor:
    _check_parameter(name, weight, x)
    if weight.shape == (channels, channels):
        return weight
    if weight.shape == (channels, channels, 1, 1, 1):
        return weight.view(channels, channels)
    raise ValueError(
        f"{name} has shape {tuple(weight.shape)}, but must have ({channels}, {channels}) or "
        f"({channels}, {channels}, 1, 1, 1) for x with {channels} channels"
    )


def _check_betas(betas: object, steps: int, x: Tensor) -> Tensor:
    if not isinstance(betas, Tensor):
        betas = _listed("betas", betas)
        for index, beta in enumerate(betas):
            _check_parameter(f"betas[{index}]", beta, x)
            if beta.numel() != 1:
                raise ValueError(f"betas[{index}] has shape {tuple(beta.shape)}, but must be a scalar tensor")
        if len(betas) != steps:
            raise ValueError(f"betas has {len(betas)} entries, but axes has {steps}: give one beta per axis")
        return torch.stack([beta.reshape(()) for beta in betas])
    _check_parameter("betas", betas, x)
    if betas.shape != (steps,):
        raise ValueError(
            f"betas has shape {tuple(betas.shape)}, but axes has {steps} entries: give one beta per axis, ({steps},)"
        )
    return betas


def _check_axes(axes: object) -> list[int]:
    dims = [normalize_axis(axis) for axis in _listed("axes", axes)]
    if not dims:
        raise ValueError("axes is empty, but must name at least one axis")
    return dims


def _check_scale(scale: object) -> float:
    if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"scale is {scale!r}, but must be a number")
    return float(scale)


def _autocast_agrees(tensor: Tensor, x: Tensor) -> bool:
    """Whether autocast is on and lets two floating-point tensors meet: it leaves float64 alone."""
    device = x.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return False
    return tensor.dtype in DTYPES and (tensor.dtype == torch.float64) == (x.dtype == torch.float64)


def _check_same(what: str, name: str, given: object, other: str, wanted: object) -> None:
    if given != wanted:
        raise ValueError(f"{name} has {what} {given}, but must have that of {other}, {wanted}")


def _listed(name: str, values: object) -> list:
    if isinstance(values, (str, set, frozenset, Tensor)) or not hasattr(values, "__iter__"):
        raise TypeError(f"{name} is {values!r}, but must be a sequence with one entry per step")
    return list(values)
