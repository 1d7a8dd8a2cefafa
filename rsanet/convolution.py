"""Convolutions that cost a sample as much, and keep its memory format, whether it comes alone or with others.

PyTorch leaves float32 convolutions of one small volume on a CPU to a kernel of its own. That takes up to five times as
long as oneDNN, and returns contiguous memory: a network in channels_last_3d is rearranged around it. Here oneDNN
computes them, as it does for several volumes.

At the bottom of a network the weights are larger than the volume, and what oneDNN does to each weight before and after
takes longer than the convolution. There it is a product of matrices, which reads the weight as it lies.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

_PLAIN = (Tensor, nn.Parameter)
_ONES, _ZEROS = (1, 1, 1), (0, 0, 0)

# With fewer channels oneDNN is slow in the one backward pass that PyTorch lets it have for a lone volume.
FEWEST_CHANNELS = 16

# Up to so many voxels of the result for each of its channels the product is faster than oneDNN, in training above all.
MOST_VOXELS = 0.5


class Conv3d(nn.Conv3d):
    """``torch.nn.Conv3d``, computed by :func:`conv3d`."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            return super()._conv_forward(input, weight, bias)
        return conv3d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = _ONES,
    padding: Sequence[int] = _ZEROS,
    dilation: Sequence[int] = _ONES,
    groups: int = 1,
) -> Tensor:
    """``torch.nn.functional.conv3d``, by oneDNN where PyTorch leaves it out, and as a product where that is faster."""
    plain = _is_plain(x, weight, bias)
    if plain and groups == 1 and max(dilation) == 1 and _is_small(x, weight, bias, stride, padding):
        return _as_product(x, weight, bias, stride, padding)
    if not plain or not _leaves_onednn_out(x, weight, bias, stride, padding, dilation, groups):
        return F.conv3d(x, weight, bias=bias, stride=stride, padding=padding, dilation=dilation, groups=groups)
    if len(x) == 1 and x.shape[1] < FEWEST_CHANNELS and max(weight.shape[2:]) > 1 and max(dilation) == 1:
        return _in_halves(x, weight, bias, stride, padding, groups)
    return _OneDnn.apply(x, weight, bias, list(stride), list(padding), list(dilation), groups)


def is_traced() -> bool:
    """Whether a graph is made, in which sizes would be conditions."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _is_plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether these are float32 volumes of a CPU, and nothing comes in between that would have to see a convolution."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if is_traced() or any(type(tensor) not in _PLAIN or tensor.dtype != torch.float32 for tensor in tensors):
        return False
    if x.dim() != 5 or x.device.type != "cpu":
        return False
    if torch.is_autocast_enabled("cpu") or not (
        torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()
    ):
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    return forward_ad._current_level < 0


def _leaves_onednn_out(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> bool:
    """Whether PyTorch takes its own kernel."""
    stride, padding, dilation, groups = options
    chosen = torch._C._select_conv_backend(x, weight, bias, stride, padding, dilation, False, _ZEROS, groups)
    return chosen == torch._C._ConvBackend.Slow3d


def _is_small(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether the result has few voxels beside its channels, and the weight lies as the product reads it."""
    if weight.dim() != 5 or x.shape[1] != weight.shape[1] or max(weight.shape[2:]) == 1:
        return False
    # What does not fit is left to PyTorch, which says so.
    if not (bias is None or bias.shape == weight.shape[:1]) or min(stride) < 1 or min(padding) < 0:
        return False
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, strict=True)
    result = [(length + 2 * edge - size) // step + 1 for length, size, step, edge in sizes]
    few = min(result) > 0 and 0 < len(x) * math.prod(result) <= MOST_VOXELS * len(weight)
    # Who lets matrix products be coarse, for a GPU mostly, did not ask for coarse convolutions.
    exact = torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")
    return few and exact and weight.is_contiguous(memory_format=torch.channels_last_3d)


def _as_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """The convolution as the product of a matrix, a row for what each voxel of the result sees, and the weight."""
    x = F.pad(x, [edge for length in reversed(padding) for edge in (length, length)]).permute(0, 2, 3, 4, 1)
    seen = torch.arange(x.shape[:4].numel(), device=x.device).view(x.shape[:4])
    for dim, (size, step) in enumerate(zip(weight.shape[2:], stride, strict=True), start=1):
        seen = seen.unfold(dim, size, step)
    # An embedding gathers the voxels; backward it adds whole voxels, which `unfold` does number by number.
    rows = F.embedding(seen, x.flatten(0, 3)).flatten(4)
    out = F.linear(rows.flatten(0, 3), weight.permute(0, 2, 3, 4, 1).flatten(1), bias)
    return _no_view(out.unflatten(0, rows.shape[:4]).permute(0, 4, 1, 2, 3))


def _no_view(out: Tensor) -> Tensor:
    """A result that may be changed in place, as that of any convolution may, where gradients are recorded later."""
    return out if torch.is_grad_enabled() else out.data  # `detach` makes one more view


def _in_halves(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], groups: int
) -> Tensor:
    """The convolution of a lone volume as that of its upper and its lower half, which are two volumes."""
    size, step, before = weight.shape[2], stride[0], padding[0]
    slices = (x.shape[2] + 2 * before - size) // step + 1
    half = -(-slices // 2)
    needed = (half - 1) * step + size
    x = F.pad(x, (0, 0, 0, 0, before, half * step + needed - before - x.shape[2]))
    halves = torch.cat([x[:, :, :needed], x[:, :, half * step :]])
    out = F.conv3d(halves, weight, bias, stride, (0, *padding[1:]), 1, groups)
    memory_format = torch.contiguous_format if out.is_contiguous() else torch.channels_last_3d
    return _no_view(out.transpose(0, 1).flatten(1, 2)[None, :, :slices].contiguous(memory_format=memory_format))


class _OneDnn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = options
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        stride, padding, dilation, groups = options
        return torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, dilation, groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.options
        # oneDNN is taken for a tensor of its own, whatever its size; but that can be differentiated once alone.
        volume = x if torch.is_grad_enabled() else x.detach().to_mkldnn()
        needs = list(ctx.needs_input_grad[:3])
        options = (stride, padding, dilation, False, [0, 0, 0], groups, needs)
        grads = torch.ops.aten.convolution_backward(grad, volume, weight, ctx.bias_sizes, *options)
        return *grads, None, None, None, None
