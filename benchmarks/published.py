"""The block as a user would write it in eager PyTorch from the paper: what every other provider is held against."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv3d


def published(
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
) -> Tensor:
    """Three convolutions, three rearranged copies and two products a step, all in the precision of ``x``.

    Args:
        x: ``(N, C, D, H, W)``.
        theta_weight: ``(C, C)``, like the other weights.
        theta_bias: ``(C,)``, like the other biases.
        phi_weight: of the keys.
        phi_bias: of the keys.
        g_weight: of the values.
        g_bias: of the values.
        betas: ``(len(axes),)``.
        axes: spatial dims, one per step.
        scale: factor on the logits.

    Returns:
        The shape of ``x``.
    """
    projections = [(theta_weight, theta_bias), (phi_weight, phi_bias), (g_weight, g_bias)]
    for beta, axis in zip(betas.unbind(), axes, strict=True):
        volumes = [conv3d(x, weight[:, :, None, None, None], bias) for weight, bias in projections]
        query, key, value = (volume.transpose(1, axis).contiguous() for volume in volumes)
        attention = torch.softmax(scale * torch.bmm(query.flatten(2), key.flatten(2).transpose(1, 2)), -1)
        attended = torch.bmm(attention, value.flatten(2)).view(value.shape).transpose(1, axis)
        x = x + beta * attended
    return x
