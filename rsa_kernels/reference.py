"""The published equations, literally: the oracle that every other backend is measured against.

Zhang et al., "RSANet: Recurrent Slice-wise Attention Network for Multiple Sclerosis Lesion Segmentation",
MICCAI 2019. One step reads the volume as ``S`` slices along one spatial axis and computes

    Q_i = theta(X_i)    K_j = phi(X_j)    V_j = g(X_j)
    L_ij = scale * <Q_i, K_j>    A = softmax_j(L)    Y_i = sum_j A_ij V_j    out = x + beta * Y

where ``<., .>`` sums over channels and the positions within a slice. Every function here is plain differentiable
PyTorch for any dtype and device. Logits, softmax and maps are float32 for half-precision volumes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import conv3d

from rsa_kernels.folding import Gradients, Projections, accumulation_dtype


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
    precise = accumulation_dtype(query.dtype)
    rows = query.movedim(axis, 1).flatten(2).to(precise)
    columns = key.movedim(axis, 1).flatten(2).to(precise)
    return torch.softmax(scale * (rows @ columns.transpose(1, 2)), dim=-1)


def mix_slices(attention: Tensor, value: Tensor, axis: int) -> Tensor:
    """``Y_i = sum_j A_ij V_j`` for maps ``(N, S, S)`` and a volume ``(N, C, D, H, W)``."""
    slices = value.movedim(axis, 1)
    mixed = attention @ slices.flatten(2).to(attention.dtype)
    return mixed.to(value.dtype).view(slices.shape).movedim(1, axis)


def slice_attention(query: Tensor, key: Tensor, value: Tensor, axis: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """The parameter-free core: returns the attended volume and its map."""
    attention = attention_map(query, key, axis, scale)
    return mix_slices(attention, value, axis), attention


def project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 1x1x1 convolution of ``(N, C, D, H, W)`` with weight ``(C, C)`` and bias ``(C,)``."""
    return conv3d(x, weight.to(x.dtype)[:, :, None, None, None], bias.to(x.dtype))


def recurrent_slice_attention(
    x: Tensor,
    weights: Projections,
    betas: Tensor,
    axes: Sequence[int] = (3, 4, 2),
    scale: float = 1.0,
    keep_inputs: bool = True,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The whole block: returns the output, one map per axis, and what the steps after the first read."""
    maps, inputs = [], []
    for step, axis in enumerate(axes):
        if keep_inputs and step:
            inputs.append(x.permute(0, 2, 3, 4, 1).contiguous())
        query = project(x, weights.theta_weight, weights.theta_bias)
        key = project(x, weights.phi_weight, weights.phi_bias)
        value = project(x, weights.g_weight, weights.g_bias)
        attended, attention = slice_attention(query, key, value, axis, scale)
        x = x + betas[step].to(x.dtype) * attended
        maps.append(attention)
    return x, maps, inputs


@contextmanager
def _recording() -> Iterator[None]:
    """Lets autograd record inside a kernel, which the dispatcher runs below autograd."""
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for name in ("ADInplaceOrView", "AutogradCPU", "AutogradCUDA", "AutogradXPU", "AutogradMPS"):
        excluded = excluded - torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def recurrent_slice_attention_backward(
    grad: Tensor,
    x: Tensor,
    inputs: Sequence[Tensor],
    maps: Sequence[Tensor],
    weights: Projections,
    betas: Tensor,
    axes: Sequence[int],
    scale: float,
    needs: Gradients,
) -> Gradients:
    """Differentiates the equations as they stand: the forward pass again, under autograd.

    ``phi_bias`` adds the same to all logits of a row, so its gradient is zero; autograd finds rounding noise there.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in (x, *weights, betas)]
    with _recording():
        out, _, _ = recurrent_slice_attention(leaves[0], Projections(*leaves[1:-1]), leaves[-1], axes, scale)
        grads = torch.autograd.grad(out, leaves, grad)
    return Gradients(*grads)._replace(phi_bias=torch.zeros_like(weights.phi_bias))


def slice_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention: Tensor,
    axis: int,
    scale: float,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Differentiates the equations as they stand, like :func:`recurrent_slice_attention_backward`."""
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    with _recording():
        return list(torch.autograd.grad(slice_attention(*leaves, axis, scale)[0], leaves, grad))
