"""The folded algebra in plain PyTorch: the ``torch`` backend, for any device.

Two projections instead of three, and no permuted copy of a volume. Both passes of a step (the map, then the mix)
walk the volume in tiles: all ``S`` slices, a block of the ``P`` positions within a slice, all ``C`` channels. A tile
is packed into a buffer that stays in cache, in the order that the volume's own strides suggest, so packing moves whole
runs and every product is a plain matrix product. Half-precision volumes are widened tile by tile: sums, logits,
softmax and maps are float32 throughout.

Traffic per step, in multiples of ``C*V``: forward 3 (read for the map, read and write for the mix), backward 5 (read
``x`` and the gradient twice, write once), plus 2 where the projected gradient is kept between the passes.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from rsa_kernels.folding import Gradients, Projections, accumulation_dtype, fold, fold_backward

# A tile's bytes. On a CPU the tiles in use should stay in cache and still feed every thread products of a good size:
# this much for each thread, and never less than for two. On a GPU few and large launches matter more.
CPU_TILE_BYTES = 1 << 20
GPU_TILE_BYTES = 1 << 27


class ChannelsLast:
    """Tiles ``(S, p, C)``, for volumes whose channels are neighbours in memory."""

    @staticmethod
    def order(slices: int, outer: int, inner: int) -> tuple[int, ...]:
        """Dims of ``(C, D, H, W)`` in the order of a tile."""
        return (slices, outer, inner, 0)

    @staticmethod
    def project(weight: Tensor, tile: Tensor, out: Tensor, add: bool = False) -> None:
        """``out = weight @ voxel`` for every voxel; with ``add`` on top of what ``out`` holds."""
        channels = tile.shape[2]
        torch.addmm(
            out.view(-1, channels),
            tile.view(-1, channels),
            weight.T,
            beta=int(add),
            out=out.view(-1, channels),
        )

    @staticmethod
    def mix(matrix: Tensor, tile: Tensor, out: Tensor, add: bool = False) -> None:
        """``out_i = sum_j matrix_ij tile_j`` over slices; with ``add`` on top of what ``out`` holds."""
        slices = tile.shape[0]
        torch.addmm(out.view(slices, -1), matrix, tile.view(slices, -1), beta=int(add), out=out.view(slices, -1))

    @staticmethod
    def contract(rows: Tensor, columns: Tensor) -> Tensor:
        """Inner products between the slices of two tiles: ``(S, S)``."""
        return rows.flatten(1) @ columns.flatten(1).T

    @staticmethod
    def correlate(rows: Tensor, columns: Tensor, total: Tensor) -> None:
        """Adds the products between the channels of two tiles, summed over voxels, to ``total`` ``(C, C)``."""
        total.addmm_(rows.flatten(0, 1).T, columns.flatten(0, 1))

    @staticmethod
    def sum_voxels(tile: Tensor) -> Tensor:
        """Sum over slices and positions: ``(C,)``."""
        return tile.sum((0, 1))

    @staticmethod
    def broadcast(values: Tensor) -> Tensor:
        """Channel values ``(C,)``, or slice by channel ``(S, C)``, in a tile's four-dimensional view."""
        return values if values.dim() == 1 else values[:, None, None, :]


class ChannelsFirst:
    """What the two channels-first layouts share: a voxel's channels lie far apart."""

    @staticmethod
    def project(weight: Tensor, tile: Tensor, out: Tensor, add: bool = False) -> None:
        """As :meth:`ChannelsLast.project`."""
        channels = tile.shape[0]
        torch.addmm(out.view(channels, -1), weight, tile.view(channels, -1), beta=int(add), out=out.view(channels, -1))

    @staticmethod
    def correlate(rows: Tensor, columns: Tensor, total: Tensor) -> None:
        """As :meth:`ChannelsLast.correlate`."""
        total.addmm_(rows.flatten(1), columns.flatten(1).T)

    @staticmethod
    def sum_voxels(tile: Tensor) -> Tensor:
        """As :meth:`ChannelsLast.sum_voxels`."""
        return tile.sum((1, 2))


class SlicesOutside(ChannelsFirst):
    """Tiles ``(C, S, p)``, for contiguous volumes sliced along any axis but the last."""

    @staticmethod
    def order(slices: int, outer: int, inner: int) -> tuple[int, ...]:
        """As :meth:`ChannelsLast.order`."""
        return (0, slices, outer, inner)

    @staticmethod
    def mix(matrix: Tensor, tile: Tensor, out: Tensor, add: bool = False) -> None:
        """As :meth:`ChannelsLast.mix`."""
        torch.baddbmm(out, matrix.expand(tile.shape[0], -1, -1), tile, beta=int(add), out=out)

    @staticmethod
    def contract(rows: Tensor, columns: Tensor) -> Tensor:
        """As :meth:`ChannelsLast.contract`."""
        return torch.bmm(rows, columns.transpose(1, 2)).sum(0)

    @staticmethod
    def broadcast(values: Tensor) -> Tensor:
        """As :meth:`ChannelsLast.broadcast`."""
        return values[:, None, None, None] if values.dim() == 1 else values.T[:, :, None, None]


class SlicesInside(ChannelsFirst):
    """Tiles ``(C, p, S)``, for contiguous volumes sliced along the last axis."""

    @staticmethod
    def order(slices: int, outer: int, inner: int) -> tuple[int, ...]:
        """As :meth:`ChannelsLast.order`."""
        return (0, outer, inner, slices)

    @staticmethod
    def mix(matrix: Tensor, tile: Tensor, out: Tensor, add: bool = False) -> None:
        """As :meth:`ChannelsLast.mix`."""
        slices = tile.shape[2]
        torch.addmm(out.view(-1, slices), tile.view(-1, slices), matrix.T, beta=int(add), out=out.view(-1, slices))

    @staticmethod
    def contract(rows: Tensor, columns: Tensor) -> Tensor:
        """As :meth:`ChannelsLast.contract`."""
        return rows.flatten(0, 1).T @ columns.flatten(0, 1)

    @staticmethod
    def broadcast(values: Tensor) -> Tensor:
        """As :meth:`ChannelsLast.broadcast`."""
        return values[:, None, None, None] if values.dim() == 1 else values.T[:, None, None, :]


class Walk:
    """The tiles of volumes shaped like ``x``, for a step along one axis.

    Args:
        x: ``(N, C, D, H, W)``, any strides; they choose the layout.
        axis: the spatial dim that is sliced.
        buffers: how many tiles the caller works on at a time.
    """

    def __init__(self, x: Tensor, axis: int, buffers: int) -> None:
        strides = x.stride()
        outer, inner = (dim for dim in (2, 3, 4) if dim != axis)
        if strides[outer] < strides[inner]:
            outer, inner = inner, outer
        if strides[1] == 1 and x.shape[1] > 1:
            self.layout = ChannelsLast
        elif strides[axis] < strides[inner]:
            self.layout = SlicesInside
        else:
            self.layout = SlicesOutside
        self._order = self.layout.order(axis - 1, outer - 1, inner - 1)
        self._outer = self._order.index(outer - 1)

        channels, slices = x.shape[1], x.shape[axis]
        dtype = accumulation_dtype(x.dtype)
        on_cpu = x.device.type == "cpu"
        limit = CPU_TILE_BYTES * max(2, torch.get_num_threads()) if on_cpu else GPU_TILE_BYTES
        positions = max(1, limit // (channels * slices * dtype.itemsize))
        columns = _cut(x.shape[inner], positions)
        rows = _cut(x.shape[outer], max(1, positions // x.shape[inner]))
        self._blocks = [(row, column) for row in rows for column in columns]
        largest = max(row.stop - row.start for row in rows) * max(column.stop - column.start for column in columns)
        self.scratch = x.new_empty((buffers, channels * slices * largest), dtype=dtype)

    def tiles(self, volumes: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """The tiles of one sample's volumes ``(C, D, H, W)``, as four-dimensional views in tile order."""
        arranged = [volume.permute(self._order) for volume in volumes]
        for row, column in self._blocks:
            if self._outer == 1:
                yield [volume[:, row, column] for volume in arranged]
            else:
                yield [volume[:, :, row, column] for volume in arranged]

    def buffers(self, view: Tensor) -> list[Tensor]:
        """The scratch tiles, in three dimensions, for the size of one tile's view."""
        shape = list(view.shape)
        shape[self._outer : self._outer + 2] = [shape[self._outer] * shape[self._outer + 1]]
        return list(self.scratch[:, : view.numel()].view(-1, *shape).unbind())


def _cut(length: int, limit: int) -> list[slice]:
    """Cuts ``length`` into equal parts of at most ``limit``."""
    parts = -(-length // limit)
    edges = [length * part // parts for part in range(parts + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


def _pack(view: Tensor, tile: Tensor) -> None:
    tile.view(view.shape).copy_(view)


def _unpack(tile: Tensor, view: Tensor, values: Tensor | None = None) -> None:
    """Writes a tile back to its place, with values added to every voxel on the way."""
    tile = tile.view(view.shape)
    if values is None:
        view.copy_(tile)
    elif view.dtype == tile.dtype:
        torch.add(tile, values, out=view)
    else:
        view.copy_(tile.add_(values))


class Folded(NamedTuple):
    """What a step needs of the weights, in the accumulation dtype: made once per block."""

    m: Tensor
    u: Tensor
    g_weight: Tensor
    g_bias: Tensor

    @classmethod
    def of(cls, weights: Projections, scale: float, dtype: torch.dtype) -> "Folded":
        """Folds the published weights."""
        theta_weight, theta_bias, phi_weight, _, g_weight, g_bias = (weight.to(dtype) for weight in weights)
        return cls(*fold(theta_weight, theta_bias, phi_weight, scale), g_weight, g_bias)


def _attention_map(x: Tensor, axis: int, folded: Folded) -> Tensor:
    """``softmax(<M^T X_i + u, X_j>)``: one read of ``x``."""
    walk = Walk(x, axis, buffers=2)
    layout = walk.layout
    logits = folded.m.new_zeros((x.shape[0], x.shape[axis], x.shape[axis]))
    to_query = folded.m.T
    for sample in range(x.shape[0]):
        for (view,) in walk.tiles([x[sample]]):
            tile, query = walk.buffers(view)
            _pack(view, tile)
            layout.project(to_query, tile, query)
            query.view(view.shape).add_(layout.broadcast(folded.u))
            logits[sample] += layout.contract(query, tile)
    return torch.softmax(logits, -1)


def _mix(x: Tensor, attention: Tensor, axis: int, beta: Tensor, folded: Folded, out: Tensor) -> None:
    """``out = x + beta * (Wv A x + bv)``: one read, one write; ``out`` may be ``x`` itself."""
    walk = Walk(x, axis, buffers=2)
    layout = walk.layout
    weight = beta * folded.g_weight
    bias = layout.broadcast(beta * folded.g_bias)
    for sample in range(x.shape[0]):
        for view, target in walk.tiles([x[sample], out[sample]]):
            tile, mixed = walk.buffers(view)
            _pack(view, tile)
            layout.mix(attention[sample], tile, mixed)
            layout.project(weight, mixed, tile, add=True)
            _unpack(tile, target, bias)


def recurrent_slice_attention(
    x: Tensor, weights: Projections, betas: Tensor, axes: Sequence[int], scale: float, keep_inputs: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The whole block; see :mod:`rsa_kernels.ops` for the contract that all backends keep."""
    folded = Folded.of(weights, scale, accumulation_dtype(x.dtype))
    betas = betas.to(folded.m.dtype)
    out, maps, inputs = x, [], []
    for step, axis in enumerate(axes):
        attention = _attention_map(out, axis, folded)
        # Without a backward to come, one buffer serves every step.
        target = torch.empty_like(x) if keep_inputs or step == 0 else out
        _mix(out, attention, axis, betas[step], folded, target)
        maps.append(attention)
        if keep_inputs and step:
            inputs.append(out)
        out = target
    return out, maps, inputs


def _softmax_backward(attention: Tensor, grad: Tensor) -> Tensor:
    weighted = attention * grad
    return weighted - attention * weighted.sum(-1, keepdim=True)


class StepGradients(NamedTuple):
    """Sums over the steps of a block."""

    m: Tensor
    u: Tensor
    g_weight: Tensor
    g_bias: Tensor


def _step_backward(
    grad: Tensor,
    x: Tensor,
    attention: Tensor,
    axis: int,
    beta: Tensor,
    folded: Folded,
    totals: StepGradients,
    grad_x: Tensor | None,
    need_folded: bool,
    need_value: bool,
) -> Tensor:
    """Backward of one step: adds to ``totals``, fills ``grad_x`` (which may be ``grad`` itself), returns d beta.

    With ``R = Wv^T G`` and ``D_ij = <R_i, X_j>`` from the first pass, and ``dL`` from them, the second pass makes

        narrow  dX = G + beta Wv^T (A^T G) + M (dL X) + M^T (dL^T X) + u c      4 mixes, 6 products of C x C
        wide    dX = G + A^T (beta R)      + M (dL X) + dL^T (M^T X + u)        5 mixes, 5 products, keeps R

    """
    channels, slices = x.shape[1], x.shape[axis]
    wide = channels > 2 * slices
    walk = Walk(x, axis, buffers=3)
    layout = walk.layout
    to_value, from_value = folded.g_weight, folded.g_weight.T
    kept = torch.empty_like(x, dtype=beta.dtype) if wide and grad_x is not None else None
    scaled_attention = beta * attention
    grad_sum = torch.zeros_like(folded.u)
    contracted = torch.zeros_like(attention)
    value_weight = torch.zeros_like(to_value)
    for sample in range(x.shape[0]):
        volumes = [x[sample], grad[sample]] + ([kept[sample]] if kept is not None else [])
        for view, grad_view, *kept_view in walk.tiles(volumes):
            tile, grad_tile, work = walk.buffers(view)
            _pack(view, tile)
            _pack(grad_view, grad_tile)
            grad_sum += layout.sum_voxels(grad_tile)
            if wide and need_value:
                layout.mix(attention[sample], tile, work)
                layout.correlate(grad_tile, work, value_weight)
            layout.project(from_value, grad_tile, work)
            contracted[sample] += layout.contract(work, tile)
            if kept_view:
                _unpack(work, kept_view[0])

    grad_beta = (attention * contracted).sum() + folded.g_bias @ grad_sum
    totals.g_bias.add_(beta * grad_sum)
    if grad_x is None and not need_folded and (wide or not need_value):
        totals.g_weight.add_(beta * value_weight)
        return grad_beta

    grad_logits = _softmax_backward(attention, beta * contracted)
    columns = grad_logits.sum(1)
    for sample in range(x.shape[0]):
        volumes = [x[sample], grad[sample]]
        volumes += [grad_x[sample]] if grad_x is not None else []
        volumes += [kept[sample]] if kept is not None else []
        dl, dl_t = grad_logits[sample], grad_logits[sample].T
        for view, grad_view, *others in walk.tiles(volumes):
            tile, total, work = walk.buffers(view)
            _pack(view, tile)
            _pack(grad_view, total)
            if not wide:
                layout.mix(attention[sample].T, total, work)
                if need_value:
                    layout.correlate(work, tile, value_weight)
                if grad_x is not None:
                    layout.project(beta * from_value, work, total, add=True)
            layout.mix(dl, tile, work)
            if need_folded:
                layout.correlate(tile, work, totals.m)
                totals.u.add_(layout.sum_voxels(work))
            if grad_x is None:
                continue
            layout.project(folded.m, work, total, add=True)
            if wide:
                _pack(others[1], work)
                layout.mix(scaled_attention[sample].T, work, total, add=True)
                layout.project(folded.m.T, tile, work)
                layout.mix(dl_t, work, total, add=True)
            else:
                layout.mix(dl_t, tile, work)
                layout.project(folded.m.T, work, total, add=True)
            _unpack(total, others[0], layout.broadcast(torch.outer(columns[sample], folded.u)))
    totals.g_weight.add_(beta * value_weight)
    return grad_beta


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
    dtype = accumulation_dtype(x.dtype)
    folded = Folded.of(weights, scale, dtype)
    precise_betas = betas.to(dtype)
    inputs = [x, *inputs]
    for step in range(len(inputs) - 1, len(axes) - 1):
        restored = torch.empty_like(x)
        _mix(inputs[-1], maps[step], axes[step], precise_betas[step], folded, restored)
        inputs.append(restored)

    need_folded = needs.theta_weight or needs.theta_bias or needs.phi_weight
    totals = StepGradients(*(torch.zeros_like(part) for part in folded))
    grad_betas = torch.zeros_like(precise_betas)
    grad_x = None
    for step in reversed(range(len(axes))):
        # Every step but the last reads and writes the one buffer of ours: the caller's gradient stays as it is.
        if grad_x is None and (step > 0 or needs.x):
            grad_x = torch.empty_like(x)
        grad_betas[step] = _step_backward(
            grad,
            inputs[step],
            maps[step],
            axes[step],
            precise_betas[step],
            folded,
            totals,
            grad_x if step > 0 or needs.x else None,
            need_folded,
            bool(needs.g_weight),
        )
        inputs.pop()
        grad = grad_x

    result = dict.fromkeys(Gradients._fields)
    if need_folded:
        theta_weight, theta_bias, phi_weight, *_ = (weight.to(dtype) for weight in weights)
        result["theta_weight"], result["theta_bias"], result["phi_weight"] = fold_backward(
            totals.m, totals.u, theta_weight, theta_bias, phi_weight, scale
        )
    result["phi_bias"] = torch.zeros_like(weights.phi_bias)
    result.update(x=grad_x, g_weight=totals.g_weight, g_bias=totals.g_bias, betas=grad_betas)
    return Gradients(**result)


def _contract(rows: Tensor, columns: Tensor, axis: int) -> Tensor:
    """``<rows_i, columns_j>`` for the slices of two volumes: ``(N, S, S)``."""
    walk = Walk(rows, axis, buffers=2)
    result = walk.scratch.new_zeros((rows.shape[0], rows.shape[axis], rows.shape[axis]))
    for sample in range(rows.shape[0]):
        for views in walk.tiles([rows[sample], columns[sample]]):
            tiles = walk.buffers(views[0])
            for view, tile in zip(views, tiles, strict=True):
                _pack(view, tile)
            result[sample] += walk.layout.contract(*tiles)
    return result


def _mix_slices(matrix: Tensor, volume: Tensor, axis: int, like: Tensor) -> Tensor:
    """``sum_j matrix_ij volume_j`` for every sample, in the memory format of ``like``."""
    out = torch.empty_like(like)
    walk = Walk(volume, axis, buffers=2)
    for sample in range(volume.shape[0]):
        for view, target in walk.tiles([volume[sample], out[sample]]):
            tile, mixed = walk.buffers(view)
            _pack(view, tile)
            walk.layout.mix(matrix[sample], tile, mixed)
            _unpack(mixed, target)
    return out


def slice_attention(query: Tensor, key: Tensor, value: Tensor, axis: int, scale: float) -> tuple[Tensor, Tensor]:
    """The parameter-free core; see :mod:`rsa_kernels.ops` for the contract that all backends keep."""
    attention = torch.softmax(scale * _contract(query, key, axis), -1)
    return _mix_slices(attention, value, axis, like=value), attention


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
        grad_logits = scale * _softmax_backward(attention, _contract(grad, value, axis))
        if needs[0]:
            grads[0] = _mix_slices(grad_logits, key, axis, like=query)
        if needs[1]:
            grads[1] = _mix_slices(grad_logits.transpose(1, 2), query, axis, like=key)
    if needs[2]:
        grads[2] = _mix_slices(attention.transpose(1, 2), grad, axis, like=value)
    return grads
