"""The ``cpp`` backend: the block in one call of the C++ extension, on the CPU. See ``csrc/cpu`` for what it does.

The bits of its results depend neither on the run nor on the number of threads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rsa_kernels import native
from rsa_kernels.folding import Gradients, Projections, accumulation_dtype

# From how many channels on a volume more pays, and below how many bytes.
ROOM_CHANNELS, ROOM_BYTES = 32, 32 << 20

_kernels = torch.ops.rsa_kernels_cpp


def _precise(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor as the extension reads it."""
    return tensor.to(dtype).contiguous()


def _weights(weights: Projections, betas: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """All that has an influence on the output."""
    theta_weight, theta_bias, phi_weight, _, g_weight, g_bias = weights
    return [_precise(tensor, dtype) for tensor in (theta_weight, theta_bias, phi_weight, g_weight, g_bias, betas)]


def _room(x: Tensor) -> Tensor:
    """Room for a volume with its channels as neighbours, which is quick to read and to write along every axis."""
    batch, channels, *sizes = x.shape
    return x.new_empty((batch, *sizes, channels))


def _deserves_room(x: Tensor, result: Tensor, axes: Sequence[int]) -> bool:
    """Whether what passes from step to step gets room, where it is not kept and could be in the result's.

    It takes up to a sixth off the time where channels are far apart in the result. One axis alone and few channels gain
    nothing, and allocations of 32 MiB and more come fresh from the system, page by page.
    """
    far_apart = result.stride(1) != 1
    return far_apart and len(axes) > 1 and x.shape[1] >= ROOM_CHANNELS and x.nbytes < ROOM_BYTES


def _empty_map(x: Tensor, axis: int) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[axis], x.shape[axis]), dtype=accumulation_dtype(x.dtype))


def instruction_set(name: str = "") -> str:
    """The instruction set in use: ``amx``, ``avx512_bf16``, ``avx512``, ``avx2`` or ``plain``.

    The fastest one that the processor has is in use from the start; on Intel's that is never ``avx512_bf16``.

    Args:
        name: the one to use from now on in the whole process; by default nothing changes.

    Raises:
        RuntimeError: if this processor does not have it, or the extension cannot be used.
    """
    if reason := native.missing("cpp"):
        raise RuntimeError(f"the instruction set of backend 'cpp' was asked for, but it {reason}")
    return _kernels.use_instruction_set(name)


def recurrent_slice_attention(
    x: Tensor, weights: Projections, betas: Tensor, axes: Sequence[int], scale: float, keep_inputs: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The whole block; see :mod:`rsa_kernels.ops` for the contract that all backends keep."""
    out = torch.empty_like(x)
    maps = [_empty_map(x, axis) for axis in axes]
    if keep_inputs:
        inputs = [_room(x) for _ in axes[1:]]
    else:
        inputs = [_room(x)] * len(axes[1:]) if _deserves_room(x, out, axes) else []
    _kernels.block(x, _weights(weights, betas, accumulation_dtype(x.dtype)), axes, scale, out, maps, inputs)
    return out, maps, inputs if keep_inputs else []


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
    """Gradients of the whole block; see :mod:`rsa_kernels.ops` for the contract that all backends keep."""
    precise = _weights(weights, betas, accumulation_dtype(x.dtype))
    inputs, maps = ([tensor.contiguous() for tensor in tensors] for tensors in (inputs, maps))
    missing = [_room(x) for _ in range(len(axes) - 1 - len(inputs))]
    grad_x = torch.empty_like(x)
    work = [_room(x)] if _deserves_room(x, grad_x, axes) else []
    need_folded = bool(needs.theta_weight or needs.theta_bias or needs.phi_weight)
    grads = [torch.empty_like(tensor) for tensor in precise]
    _kernels.block_backward(
        *(grad, x, inputs + missing, len(inputs), maps, precise, axes, scale, work, grad_x),
        *(bool(needs.x), need_folded, bool(needs.g_weight), grads),
    )
    theta_weight, theta_bias, phi_weight, g_weight, g_bias, grad_betas = grads
    return Gradients(
        grad_x, theta_weight, theta_bias, phi_weight, torch.zeros_like(weights.phi_bias), g_weight, g_bias, grad_betas
    )


def _contract(left: Tensor, right: Tensor, axis: int) -> Tensor:
    """``<left_i, right_j>`` for the slices of two volumes: ``(N, S, S)``."""
    logits = _empty_map(left, axis)
    _kernels.contract(left, right, axis, logits)
    return logits


def _mix(matrix: Tensor, volume: Tensor, axis: int, like: Tensor, transposed: bool = False) -> Tensor:
    """``sum_j matrix_ij volume_j`` for every sample, in the memory format of ``like``."""
    out = torch.empty_like(like)
    _kernels.mix(volume, matrix.contiguous(), transposed, axis, out)
    return out


def slice_attention(query: Tensor, key: Tensor, value: Tensor, axis: int, scale: float) -> tuple[Tensor, Tensor]:
    """The parameter-free core; see :mod:`rsa_kernels.ops` for the contract that all backends keep."""
    attention = torch.softmax(_contract(query, key, axis).mul_(scale), -1)
    return _mix(attention, value, axis, like=value), attention


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
    """Gradients of query, key and value, where needed."""
    grads: list[Tensor | None] = [None, None, None]
    if needs[0] or needs[1]:
        weighted = attention * _contract(grad, value, axis)
        grad_logits = (weighted - attention * weighted.sum(-1, keepdim=True)).mul_(scale)
        if needs[0]:
            grads[0] = _mix(grad_logits, key, axis, like=query)
        if needs[1]:
            grads[1] = _mix(grad_logits, query, axis, like=key, transposed=True)
    if needs[2]:
        grads[2] = _mix(attention, grad, axis, like=value, transposed=True)
    return grads
