"""Group norm, and a ReLU after it, of a channels-last volume on a CPU: two passes of the C++ extension.

PyTorch's own is coarse there in float32, where volumes are large, and slow in its backward pass.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from rsa_kernels import native
from rsa_kernels.folding import accumulation_dtype

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN = (Tensor, torch.nn.Parameter)


def can_run(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether :func:`group_norm` takes these tensors; where it does not, PyTorch's own does.

    It does not where a compiler, a tracer, a transform of ``torch.func`` or a mode comes in between.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) not in _PLAIN or x.device.type != "cpu":
        return False
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return False
    if x.dim() != 5 or x.dtype not in _DTYPES or x.numel() == 0 or (weight is None) != (bias is None):
        return False
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last_3d):
        return False
    weights = () if weight is None else (weight, bias)
    dtypes = (x.dtype, accumulation_dtype(x.dtype))
    if any(type(tensor) not in _PLAIN or tensor.dtype not in dtypes or not tensor.is_cpu for tensor in weights):
        return False
    return torch._C._len_torch_dispatch_stack() == 0 and native.missing("cpp") is None


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    relu: bool = False,
    inplace: bool = False,
) -> Tensor:
    """``torch.nn.functional.group_norm``, and the ReLU of it if asked for; where :func:`can_run` says so.

    Moments and sums are as exact as float64's, whatever the dtype. The bits of the result depend neither on the run nor
    on the number of threads.

    Args:
        x: ``(N, C, D, H, W)`` in channels_last_3d, of any floating dtype.
        num_groups: number of groups of channels; divides ``C``.
        weight: ``(C,)`` or None, in the dtype of ``x`` or in float32.
        bias: ``(C,)``, where there is a weight.
        eps: added to the variance.
        relu: whether negative values become zero.
        inplace: whether the result may take the place of ``x``; it does where no gradient is recorded.

    Returns:
        The shape, dtype and memory format of ``x``.
    """
    x, weight, bias = (None if tensor is None else tensor.resolve_neg() for tensor in (x, weight, bias))
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (x, weight, bias)):
        return _GroupNorm.apply(x, weight, bias, num_groups, eps, relu)
    return _forward(x, _weights(x, weight, bias), num_groups, eps, relu, x if inplace else torch.empty_like(x))[0]


def _weights(x: Tensor, *weights: Tensor | None) -> list[Tensor]:
    """As the extension reads them."""
    dtype = accumulation_dtype(x.dtype)
    return [tensor.detach().to(dtype).contiguous() for tensor in weights if tensor is not None]


def _forward(
    x: Tensor, weights: list[Tensor], groups: int, eps: float, relu: bool, out: Tensor
) -> tuple[Tensor, Tensor]:
    moments = x.new_empty((2, x.shape[0], groups), dtype=torch.float64)
    torch.ops.rsa_kernels_cpp.group_norm(x, weights, groups, eps, relu, out, moments)
    return out, moments


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, relu: bool
    ) -> Tensor:
        out, moments = _forward(x, _weights(x, weight, bias), groups, eps, relu, torch.empty_like(x))
        ctx.save_for_backward(x, weight, bias, moments)
        ctx.arguments = (groups, eps, relu)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, moments = ctx.saved_tensors
        groups, eps, relu = ctx.arguments
        # Hooks on saved tensors promise values, not strides.
        x = x.resolve_neg().contiguous(memory_format=torch.channels_last_3d)
        moments = moments.contiguous()
        if torch.is_grad_enabled():  # it is to be differentiated again
            # In PyTorch's operations, whose moments are exact in contiguous memory alone.
            out = F.group_norm(x.contiguous(), groups, weight, bias, eps)
            out, tensors = (F.relu(out) if relu else out), (x, weight, bias)
            wanted = [tensor for tensor, need in zip(tensors, ctx.needs_input_grad, strict=False) if need]
            found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
            return *(next(found) if need else None for need in ctx.needs_input_grad[:3]), None, None, None
        grad = grad.resolve_neg().contiguous(memory_format=torch.channels_last_3d)
        weights = _weights(x, weight, bias)
        grads = [torch.empty_like(tensor) for tensor in weights]
        grad_x = torch.empty_like(x)
        torch.ops.rsa_kernels_cpp.group_norm_backward(grad, x, moments, weights, groups, relu, grad_x, grads)
        if weight is None:
            return grad_x, None, None, None, None, None
        return grad_x, grads[0].to(weight.dtype), grads[1].to(bias.dtype), None, None, None
