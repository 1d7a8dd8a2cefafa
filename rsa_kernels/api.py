"""Public functions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rsa_kernels import reference


def slice_attention(query, key, value, axis, *, scale=1.0, backend=None) -> Tensor:
    return reference.slice_attention(query, key, value, axis, scale)[0]


def recurrent_slice_attention(
    x, theta_weight, theta_bias, phi_weight, phi_bias, g_weight, g_bias, betas,
    axes=(3, 4, 2), *, scale=1.0, recompute=False, return_maps=False, backend=None,
):
    c = x.shape[1]
    b = torch.stack(list(betas)) if isinstance(betas, Sequence) or not isinstance(betas, Tensor) else betas
    out, maps, _ = reference.recurrent_slice_attention(
        x, theta_weight.reshape(c, c), theta_bias, phi_weight.reshape(c, c), phi_bias,
        g_weight.reshape(c, c), g_bias, b, axes, scale)
    return (out, maps) if return_maps else out
