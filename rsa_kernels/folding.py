"""Two projections instead of three: the folded weights, and the way back to the published ones.

The softmax runs over the key index ``j``, so terms of the logits that do not depend on ``j`` drop out:
``L_ij = <M^T X_i + u, X_j>`` with ``M = theta^T phi`` and ``u = phi^T theta_bias``. Keys need no projection,
``phi_bias`` has no influence at all, and its gradient is exactly zero.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Projections(NamedTuple):
    """The published weights of a block, matrices ``(C, C)`` and biases ``(C,)``, in the order of the operators."""

    theta_weight: Tensor
    theta_bias: Tensor
    phi_weight: Tensor
    phi_bias: Tensor
    g_weight: Tensor
    g_bias: Tensor


class Gradients(NamedTuple):
    """One entry for each differentiable input of a block: whether its gradient is needed, or the gradient."""

    x: Tensor | bool | None
    theta_weight: Tensor | bool | None
    theta_bias: Tensor | bool | None
    phi_weight: Tensor | bool | None
    phi_bias: Tensor | bool | None
    g_weight: Tensor | bool | None
    g_bias: Tensor | bool | None
    betas: Tensor | bool | None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, softmax, maps and sums for volumes of ``dtype``: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fold(theta_weight: Tensor, theta_bias: Tensor, phi_weight: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Folds the query and key projections into one.

    Args:
        theta_weight: ``(C, C)`` query projection.
        theta_bias: ``(C,)`` query bias.
        phi_weight: ``(C, C)`` key projection.
        scale: factor on the logits.

    Returns:
        ``M`` ``(C, C)`` and ``u`` ``(C,)``, with the scale inside: ``Q' = M^T X + u``.
    """
    m, u = theta_weight.T @ phi_weight, phi_weight.T @ theta_bias
    return (m, u) if scale == 1 else (scale * m, scale * u)


def fold_backward(
    grad_m: Tensor, grad_u: Tensor, theta_weight: Tensor, theta_bias: Tensor, phi_weight: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``theta_weight``, ``theta_bias`` and ``phi_weight`` from those of ``M`` and ``u``."""
    if scale != 1:
        grad_m, grad_u = scale * grad_m, scale * grad_u
    grad_theta_weight = phi_weight @ grad_m.T
    grad_phi_weight = torch.addr(theta_weight @ grad_m, theta_bias, grad_u)
    return grad_theta_weight, phi_weight @ grad_u, grad_phi_weight
