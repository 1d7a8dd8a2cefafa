"""The ``cuda`` backend: the kernels of ``csrc/cuda`` in the order that a block needs them.

For GPUs where Triton cannot run. A step forward is a product of the library's for query and value (two where they would
not be aligned), then three launches: contraction, softmax, mix. Traffic in multiples of ``C*V``: 1 to read the volume
and 2 to write query and value, 2 for the contraction, 3 for the mix. A backward step is one product, one contraction
and up to four mixes, with the products that bring their sums back through the weights.

Kernels read and write dense channels-last volumes. A channels_last_3d volume is used in place; a contiguous one is
transposed once before the block and once after, by a kernel; anything else is copied by torch. Nothing here waits for
the device. See :mod:`rsa_kernels.ops` for the contract that all backends keep; the operators exist once
:mod:`rsa_kernels.native` has loaded the extension.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from rsa_kernels.backends import allows_tf32
from rsa_kernels.folding import Gradients, Projections, accumulation_dtype, fold, fold_backward

operators = torch.ops.rsa_kernels_cuda

ALIGNMENT = 16
# Sides of the maps that products read are rounded up to a multiple; padded_slices in csrc/cuda/index.cuh says the same.
MAP_PADDING = 16
# Half precision ends at 65504, and the folded query, a product with two weights, can be larger than either alone: it is
# rounded as many times smaller, and the logits, which are float32, are as many times larger again.
HALF_SHRINK = 2.0**-8


def _padded(slices: int) -> int:
    return -(-slices // MAP_PADDING) * MAP_PADDING


def _on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes a tensor's device current, for the library's products and for room."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


# Volumes (N, D, H, W, C), "packed": dense and aligned ----------------------------------------------------------------


def _is_packed(volume: Tensor) -> bool:
    """Whether a volume ``(N, D, H, W, C)`` is dense and aligned."""
    return volume.is_contiguous() and volume.data_ptr() % ALIGNMENT == 0


def _pack(volume: Tensor) -> Tensor:
    """A volume ``(N, C, D, H, W)`` as ``(N, D, H, W, C)``: a view if that is packed, else a packed copy."""
    last = volume.permute(0, 2, 3, 4, 1)
    if _is_packed(last):
        return last
    packed = last.new_empty(last.shape)
    if volume.is_contiguous():
        operators.transpose(volume.flatten(2), packed.flatten(1, 3))
    else:
        packed.copy_(last)
    return packed


def _unpack(packed: Tensor, like: Tensor) -> Tensor:
    """A packed volume ``(N, D, H, W, C)`` as ``(N, C, D, H, W)`` with the strides of ``torch.empty_like(like)``."""
    volume = packed.permute(0, 4, 1, 2, 3)
    if volume.stride() == like.stride():
        return volume
    wanted = torch.empty_like(like, device="meta")
    if wanted.permute(0, 2, 3, 4, 1).is_contiguous():  # the same places, whatever is said of dims of size 1
        return volume.as_strided(wanted.shape, wanted.stride())
    result = torch.empty_like(like)
    if result.is_contiguous():
        operators.transpose(packed.flatten(1, 3), result.flatten(2))
        return result
    return result.copy_(volume)


def _rows(packed: Tensor) -> Tensor:
    """A packed volume as ``(voxels, C)``."""
    return packed.view(-1, packed.shape[4])


# Kernels -------------------------------------------------------------------------------------------------------------


class Machine:
    """Calls the kernels for volumes of one dtype, with the settings that torch has now.

    Args:
        dtype: of the volumes.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.precise = accumulation_dtype(dtype)
        self.tf32 = dtype == torch.float32 and allows_tf32()
        self.shrink = HALF_SHRINK if dtype == torch.float16 else 1.0

    def _map(self, like: Tensor) -> Tensor:
        """Room for a padded map of as many samples and slices as a map has."""
        side = _padded(like.shape[-1])
        return like.new_empty((like.shape[0], side, side), dtype=self.dtype)

    def contract(self, left: Tensor, right: Tensor, axis: int) -> Tensor:
        """Partial maps ``<left_i, right_j>``, ``(N, parts, S, S)``, which sum to the map."""
        return operators.contract(left, right, axis, self.tf32)

    def softmax(self, partial: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        """The map ``(N, S, S)`` from partial logits, to be multiplied by ``factor``, and its padded copy."""
        attention = partial.new_empty((partial.shape[0], *partial.shape[2:]))
        padded = self._map(attention)
        operators.softmax(partial, factor, attention, padded)
        return attention, padded

    def pad(self, attention: Tensor, transposed: bool = False) -> Tensor:
        """The padded copy of a map in the volumes' dtype, or of its transpose."""
        padded = self._map(attention)
        operators.pad(attention.contiguous(), transposed, padded)
        return padded

    def softmax_backward(
        self, partial: Tensor, attention: Tensor, beta: Tensor | None, factor: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The logits' gradient, padded, its transpose, and ``rowsum(A * D)`` ``(N, SP)``; no beta counts as one."""
        plain, transposed = self._map(attention), self._map(attention)
        row_dots = partial.new_empty((partial.shape[0], plain.shape[1]))
        operators.softmax_backward(partial, attention.contiguous(), beta, factor, plain, transposed, row_dots)
        return plain, transposed, row_dots

    def mix(
        self,
        matrix: Tensor,
        volume: Tensor,
        axis: int,
        out: Tensor,
        base: tuple[Tensor, Tensor] | None = None,
        rank_one: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """``out_i = sum_j matrix_ij volume_j``; ``matrix`` is padded.

        With ``base = (x, beta)`` it is ``x + beta * (...)``; with ``rank_one = (a, b)``, ``(N, SP)`` over slices and
        ``(C,)``, their product is added.
        """
        operators.mix(matrix, volume, axis, self.tf32, *(base or (None, None)), *(rank_one or (None, None)), out)


class Weights:
    """The weights of a block as the steps need them.

    Args:
        machine: calls the kernels.
        weights: the published ones.
        betas: one per step.
        scale: factor on the logits. It stays out of the weights, which half precision could not hold that small.
    """

    def __init__(self, machine: Machine, weights: Projections, betas: Tensor, scale: float) -> None:
        theta_weight, theta_bias, phi_weight, _, g_weight, g_bias = (weight.to(machine.precise) for weight in weights)
        m, self.precise_u = fold(theta_weight, theta_bias, phi_weight, 1.0)
        rounded = (tensor.to(machine.dtype) for tensor in (m, self.precise_u, g_weight, g_bias))
        self.m, self.u, self.g_weight, self.g_bias = rounded
        self.betas = betas.to(machine.precise).contiguous()
        self.scale = scale
        self._machine = machine
        self._both: tuple[Tensor, Tensor] | None = None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Query, ``shrink`` times smaller, and value of a packed volume.

        They come of one product where both then start aligned: the voxels are read once.
        """
        rows, channels, shrink = _rows(x), x.shape[4], self._machine.shrink
        if shrink != 1 or channels * x.element_size() % ALIGNMENT:
            query = torch.addmm(self.u, rows, self.m, alpha=shrink, beta=shrink)
            return query.view(x.shape), self.value(x)
        if self._both is None:
            self._both = torch.cat((self.u, self.g_bias)), torch.cat((self.m, self.g_weight.T), 1)
        both = torch.addmm(self._both[0], rows, self._both[1]).view(*x.shape[:4], 2 * channels)
        return both[..., :channels], both[..., channels:]

    def value(self, x: Tensor) -> Tensor:
        """Value of a packed volume."""
        return torch.addmm(self.g_bias, _rows(x), self.g_weight.T).view(x.shape)


def _correlate(rows: Tensor, columns: Tensor) -> Tensor:
    """``rows^T columns`` with sums and result in the accumulation dtype."""
    if rows.dtype in (torch.float32, torch.float64):
        return rows.T @ columns
    if rows.is_cuda:
        return torch.mm(rows.T, columns, out_dtype=torch.float32)
    return rows.float().T @ columns.float()


# The block -----------------------------------------------------------------------------------------------------------


def _forward_step(machine: Machine, weights: Weights, beta: Tensor, x: Tensor, axis: int, out: Tensor) -> Tensor:
    """One step on packed volumes; fills ``out``, which may be ``x``, and returns the map."""
    query, value = weights.project(x)
    partial = machine.contract(query, x, axis)
    attention, padded = machine.softmax(partial, weights.scale / machine.shrink)
    machine.mix(padded, value, axis, out, base=(x, beta))
    return attention


def recurrent_slice_attention(
    x: Tensor, weights: Projections, betas: Tensor, axes: Sequence[int], scale: float, keep_inputs: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The whole block; see :mod:`rsa_kernels.ops` for the contract that all backends keep."""
    with _on_device(x):
        machine = Machine(x.dtype)
        prepared = Weights(machine, weights, betas, scale)
        volume = _pack(x)
        maps, inputs = [], []
        for step, (axis, beta) in enumerate(zip(axes, prepared.betas.unbind(), strict=True)):
            # Without a backward to come, one buffer serves every step; the caller's volume stays as it is.
            own = step > 0 or volume.data_ptr() != x.data_ptr()
            out = volume if own and not keep_inputs else volume.new_empty(volume.shape)
            if keep_inputs and step:
                inputs.append(volume)
            maps.append(_forward_step(machine, prepared, beta, volume, axis, out))
            volume = out
        return _unpack(volume, x), maps, inputs


class Totals(NamedTuple):
    """The gradients of the folded weights, summed over steps, and what betas' gradients are made of."""

    m: Tensor
    u: Tensor
    g_weight: Tensor
    grad_sums: list[Tensor]
    """For each step, last first, the sum of the upstream gradient over voxels: ``(C,)``."""
    row_dots: list[Tensor]
    """For each step, last first, the sum of ``A * D``."""

    @classmethod
    def zeros(cls, machine: Machine, like: Tensor) -> "Totals":
        """Sums to add to, for packed volumes like one."""
        channels = like.shape[4]
        sizes = (channels, channels), (channels,), (channels, channels)
        return cls(*(like.new_zeros(size, dtype=machine.precise) for size in sizes), [], [])


class Wanted(NamedTuple):
    """What the backward pass of a step is to make."""

    x: bool
    folded: bool
    """The gradients of M and u."""
    value: bool
    """That of the value projection."""


def _backward_step(
    machine: Machine,
    weights: Weights,
    totals: Totals,
    beta: Tensor,
    grad: Tensor,
    x: Tensor,
    attention: Tensor,
    axis: int,
    wanted: Wanted,
    grad_x: Tensor | None,
) -> None:
    """One step on packed volumes; fills ``grad_x``, which may be ``grad``, if it is wanted."""
    rows, grad_rows = _rows(x), _rows(grad)
    projected = (grad_rows @ weights.g_weight).view(x.shape)
    partial = machine.contract(projected, x, axis)
    grad_logits, transposed, row_dots = machine.softmax_backward(partial, attention, beta, weights.scale)
    totals.row_dots.append(row_dots.sum())
    totals.grad_sums.append(grad_rows.sum(0, dtype=machine.precise))
    if not any(wanted):
        return
    attention_transposed = machine.pad(attention, transposed=True) if wanted.x or wanted.value else None
    moved = torch.empty_like(x)
    if wanted.value:
        machine.mix(attention_transposed, grad, axis, moved)
        totals.g_weight.addcmul_(_correlate(_rows(moved), rows), beta)
    # dX = G + beta A^T R + (dL^T X) M + (dL X) M^T + c u, c the columns' sums of dL. From here on G may be gone.
    if wanted.x:
        rank_one = transposed.sum(2, dtype=machine.precise), weights.precise_u
        machine.mix(attention_transposed, projected, axis, grad_x, base=(grad, beta), rank_one=rank_one)
        machine.mix(transposed, x, axis, moved)
        _rows(grad_x).addmm_(_rows(moved), weights.m)
    if wanted.x or wanted.folded:
        machine.mix(grad_logits, x, axis, moved)
    if wanted.x:
        _rows(grad_x).addmm_(_rows(moved), weights.m.T)
    if wanted.folded:
        totals.m.add_(_correlate(rows, _rows(moved)))
        totals.u.add_(_rows(moved).sum(0, dtype=machine.precise))


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
    with _on_device(x):
        machine = Machine(x.dtype)
        prepared = Weights(machine, weights, betas, scale)
        scalars = prepared.betas.unbind()
        volumes = [_pack(volume) for volume in (x, *(kept.permute(0, 4, 1, 2, 3) for kept in inputs))]
        for step in range(len(volumes) - 1, len(axes) - 1):
            volume = volumes[-1]
            volumes.append(torch.empty_like(volume))
            mixed = machine.pad(maps[step]), prepared.value(volume), axes[step], volumes[-1]
            machine.mix(*mixed, base=(volume, scalars[step]))

        folded = bool(needs.theta_weight or needs.theta_bias or needs.phi_weight)
        totals = Totals.zeros(machine, volumes[0])
        upstream = _pack(grad)
        # Every step but the last reads and writes the one buffer of ours: the caller's gradient stays as it is.
        grad_x = upstream if upstream.data_ptr() != grad.data_ptr() else None
        for step in reversed(range(len(axes))):
            wanted = Wanted(bool(step > 0 or needs.x), folded, bool(needs.g_weight))
            if grad_x is None and wanted.x:
                grad_x = torch.empty_like(upstream)
            _backward_step(
                *(machine, prepared, totals, scalars[step], upstream, volumes.pop(), maps[step], axes[step]),
                *(wanted, grad_x),
            )
            upstream = grad_x
        gradients = _collect(machine, prepared, totals, weights, needs)
        return gradients._replace(x=_unpack(grad_x, x) if needs.x else None)


def _collect(machine: Machine, prepared: Weights, totals: Totals, weights: Projections, needs: Gradients) -> Gradients:
    """The published weights' gradients from those of the folded ones."""
    precise = machine.precise
    result = dict.fromkeys(Gradients._fields)
    if needs.theta_weight or needs.theta_bias or needs.phi_weight:
        theta_weight, theta_bias, phi_weight, *_ = (weight.to(precise) for weight in weights)
        result["theta_weight"], result["theta_bias"], result["phi_weight"] = fold_backward(
            totals.m, totals.u, theta_weight, theta_bias, phi_weight, 1.0
        )
    result["phi_bias"] = torch.zeros_like(weights.phi_bias)
    result["g_weight"] = totals.g_weight
    if needs.g_bias or needs.betas:
        grad_sums = torch.stack(totals.grad_sums[::-1])
        result["g_bias"] = prepared.betas @ grad_sums
        result["betas"] = torch.stack(totals.row_dots[::-1]) + grad_sums @ weights.g_bias.to(precise)
    return Gradients(**result)


# Attention alone -----------------------------------------------------------------------------------------------------


def slice_attention(query: Tensor, key: Tensor, value: Tensor, axis: int, scale: float) -> tuple[Tensor, Tensor]:
    """The parameter-free core; see :mod:`rsa_kernels.ops` for the contract that all backends keep."""
    with _on_device(query):
        machine = Machine(query.dtype)
        attention, padded = machine.softmax(machine.contract(_pack(query), _pack(key), axis), scale)
        packed_value = _pack(value)
        out = torch.empty_like(packed_value)
        machine.mix(padded, packed_value, axis, out)
        return _unpack(out, value), attention


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
    with _on_device(query):
        machine = Machine(query.dtype)
        upstream = _pack(grad)
        grads: list[Tensor | None] = [None, None, None]

        def mix(matrix: Tensor, packed: Tensor, like: Tensor) -> Tensor:
            out = torch.empty_like(packed)
            machine.mix(matrix, packed, axis, out)
            return _unpack(out, like)

        if needs[0] or needs[1]:
            partial = machine.contract(upstream, _pack(value), axis)
            grad_logits, transposed, _ = machine.softmax_backward(partial, attention, None, scale)
            if needs[0]:
                grads[0] = mix(grad_logits, _pack(key), query)
            if needs[1]:
                grads[1] = mix(transposed, _pack(query), key)
        if needs[2]:
            grads[2] = mix(machine.pad(attention, transposed=True), upstream, value)
        return grads
