"""The published equations, literally: the oracle that every other backend is measured against.

Zhang et al., "RSANet: Recurrent Slice-wise Attention Network for Multiple Sclerosis Lesion Segmentation",
MICCAI 2019. One step reads the volume as ``S`` slices along one spatial axis and computes

    Q_i = theta(X_i)    K_j = phi(X_j)    V_j = g(X_j)
    L_ij = scale * <Q_i, K_j>    A = softmax_j(L)    Y_i = sum_j A_ij V_j    out = x + beta * Y

where ``<., .>`` sums over channels and the positions within a slice. Every function here is plain differentiable
PyTorch for any dtype and device. Logits, softmax and maps are float32 for half-precision volumes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rsa_kernels import folding


def attention_map(query: Tensor, key: Tensor, axis: int, scale: float = 1.0) -> Tensor:
    """Softmax over slices of the inner products between the slices of two volumes.

    Args:
        query: ``(N, C, D, H, W)``.
        key: same shape.
        axis: spatial dim 2, 3 or 4.
        scale: factor on the logits.

    Returns:
        ``(N, S, S)``, float32 (float64 for float64 volumes); rows sum to one.
    """
    precise = folding.accumulation_dtype(query.dtype)
    rows = query.movedim(axis, 1).flatten(2).to(precise)
    columns = key.movedim(axis, 1).flatten(2).to(precise)
    return torch.softmax(scale * (rows @ columns.transpose(1, 2)), dim=-1)


def mix_slices(attention: Tensor, value: Tensor, axis: int) -> Tensor:
    """``Y_i = sum_j A_ij V_j`` for maps ``(N, S, S)`` and a volume ``(N, C, D, H, W)``."""
    slices = value.movedim(axis, 1)
    mixed = attention @ slices.flatten(2).to(attention.dtype)
    return mixed.to(value.dtype).reshape(slices.shape).movedim(1, axis)


def slice_attention(
    query: Tensor, key: Tensor, value: Tensor, axis: int, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The parameter-free core: returns the attended volume and its map."""
    attention = attention_map(query, key, axis, scale)
    return mix_slices(attention, value, axis), attention


def project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 1x1x1 convolution: ``(N, C, D, H, W)`` with weight ``(C, C)`` and bias ``(C,)``."""
    return torch.nn.functional.conv3d(
        x, weight.to(x.dtype)[:, :, None, None, None], bias.to(x.dtype)
    )


def recurrent_slice_attention(
    x: Tensor,
    theta_weight: Tensor,
    theta_bias: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    g_weight: Tensor,
    g_bias: Tensor,
    betas: Tensor,
    axes: Sequence[int] = (3, 4, 2),
    scale: float = 1.0,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The whole block: returns the output, one map per axis, and the input of every step after the first."""
    maps, inputs = [], []
    for step, axis in enumerate(axes):
        if step:
            inputs.append(x)
        attended, attention = slice_attention(
            project(x, theta_weight, theta_bias),
            project(x, phi_weight, phi_bias),
            project(x, g_weight, g_bias),
            axis,
            scale,
        )
        x = x + betas[step].to(x.dtype) * attended
        maps.append(attention)
    return x, maps, inputs
