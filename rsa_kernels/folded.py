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
from functools import lru_cache
from itertools import pairwise, product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from rsa_kernels.folding import Gradients, Projections, accumulation_dtype, fold, fold_backward

# A tile's bytes. On a CPU the tiles in use should stay in cache and still feed every thread products of a good size:
# this much for each thread, and never less than for two. On a GPU few and large launches matter more.
CPU_TILE_BYTES = 1 << 20
GPU_TILE_BYTES = 1 << 27


def _product(left: Tensor, right: Tensor, out: Tensor, add: bool) -> None:
    """``out = left @ right`` for a batch of matrices, on top of what ``out`` holds with ``add``."""
    if out.shape[0] == 1:
        torch.addmm(out[0], left[0], right[0], beta=int(add), out=out[0])
    else:
        torch.baddbmm(out, left, right, beta=int(add), out=out)


class ChannelsLast:
    """Tiles ``(n, S, p, C)``, for volumes whose channels are neighbours in memory."""

    @staticmethod
    def order(axis: int, outer: int, inner: int) -> tuple[int, ...]:
        """Dims of ``(N, C, D, H, W)`` in the order of a tile, ``p`` as two."""
        return (0, axis, outer, inner, 1)

    @staticmethod
    def project(weight: Tensor, tile: Tensor, out: Tensor, add: bool = False) -> None:
        """``out = weight @ voxel`` for every voxel; with ``add`` on top of what ``out`` holds."""
        out = out.view(-1, out.shape[3])
        torch.addmm(out, tile.view(out.shape), weight.T, beta=int(add), out=out)

    @staticmethod
    def mix(matrix: Tensor, tile: Tensor, out: Tensor, add: bool = False) -> None:
        """``out_i = sum_j matrix_ij tile_j`` over slices; with ``add`` on top of what ``out`` holds."""
        _product(matrix, tile.flatten(2), out.flatten(2), add)

    @staticmethod
    def contract(rows: Tensor, columns: Tensor) -> Tensor:
        """Inner products between the slices of two tiles: ``(n, S, S)``."""
        return rows.flatten(2) @ columns.flatten(2).mT

    @staticmethod
    def correlate(rows: Tensor, columns: Tensor, total: Tensor) -> None:
        """Adds the products between the channels of two tiles, summed over voxels, to ``total`` ``(C, C)``."""
        total.addmm_(rows.view(-1, rows.shape[3]).T, columns.view(-1, rows.shape[3]))

    @staticmethod
    def sum_voxels(tile: Tensor) -> Tensor:
        """Sum over samples, slices and positions: ``(C,)``."""
        return tile.sum((0, 1, 2))

    @staticmethod
    def broadcast(values: Tensor) -> Tensor:
        """Channel values ``(C,)``, or slice by channel ``(n, S, C)``, against a tile's view with ``p`` as two dims."""
        return values if values.dim() == 1 else values[:, :, None, None]


class ChannelsFirst:
    """What the two channels-first layouts share: a voxel's channels lie far apart."""

    @staticmethod
    def project(weight: Tensor, tile: Tensor, out: Tensor, add: bool = False) -> None:
        """As :meth:`ChannelsLast.project`."""
        _product(weight.expand(len(tile), -1, -1), tile.flatten(2), out.flatten(2), add)

    @staticmethod
    def correlate(rows: Tensor, columns: Tensor, total: Tensor) -> None:
        """As :meth:`ChannelsLast.correlate`."""
        if len(rows) == 1:
            total.addmm_(rows[0].flatten(1), columns[0].flatten(1).T)
        else:
            total += (rows.flatten(2) @ columns.flatten(2).mT).sum(0)

    @staticmethod
    def sum_voxels(tile: Tensor) -> Tensor:
        """As :meth:`ChannelsLast.sum_voxels`."""
        return tile.sum((0, 2, 3))


class SlicesOutside(ChannelsFirst):
    """Tiles ``(n, C, S, p)``, for contiguous volumes sliced along any axis but the last."""

    @staticmethod
    def order(axis: int, outer: int, inner: int) -> tuple[int, ...]:
        """As :meth:`ChannelsLast.order`."""
        return (0, 1, axis, outer, inner)

    @staticmethod
    def mix(matrix: Tensor, tile: Tensor, out: Tensor, add: bool = False) -> None:
        """As :meth:`ChannelsLast.mix`."""
        # One sample's matrix serves all channels by a stride of zero; those of several samples are repeated.
        matrices = matrix[:, None].expand(-1, tile.shape[1], -1, -1).flatten(0, 1)
        _product(matrices, tile.flatten(0, 1), out.flatten(0, 1), add)

    @staticmethod
    def contract(rows: Tensor, columns: Tensor) -> Tensor:
        """As :meth:`ChannelsLast.contract`."""
        return (rows @ columns.mT).sum(1)

    @staticmethod
    def broadcast(values: Tensor) -> Tensor:
        """As :meth:`ChannelsLast.broadcast`."""
        return values[:, None, None, None] if values.dim() == 1 else values.mT[..., None, None]


class SlicesInside(ChannelsFirst):
    """Tiles ``(n, C, p, S)``, for contiguous volumes sliced along the last axis."""

    @staticmethod
    def order(axis: int, outer: int, inner: int) -> tuple[int, ...]:
        """As :meth:`ChannelsLast.order`."""
        return (0, 1, outer, inner, axis)

    @staticmethod
    def mix(matrix: Tensor, tile: Tensor, out: Tensor, add: bool = False) -> None:
        """As :meth:`ChannelsLast.mix`."""
        _product(tile.flatten(1, 2), matrix.mT, out.flatten(1, 2), add)

    @staticmethod
    def contract(rows: Tensor, columns: Tensor) -> Tensor:
        """As :meth:`ChannelsLast.contract`."""
        if rows.shape[3] < 16:
            # So small a product is summed term after term by the library: shorter sums, of a channel each, round less.
            return (rows.mT @ columns).sum(1)
        return rows.flatten(1, 2).mT @ columns.flatten(1, 2)

    @staticmethod
    def broadcast(values: Tensor) -> Tensor:
        """As :meth:`ChannelsLast.broadcast`."""
        return values[:, None, None, None] if values.dim() == 1 else values.mT[:, :, None, None]


class Walk:
    """The tiles of volumes of one shape, for a step along one axis; made once for each kind of volume.

    Args:
        shape: ``(N, C, D, H, W)``.
        strides: of the volume that is read most; they choose the layout.
        axis: the spatial dim that is sliced.
        elements: how many a tile should hold at most; it holds at least one position of one sample.
    """

    def __init__(self, shape: torch.Size, strides: tuple[int, ...], axis: int, elements: int) -> None:
        outer, inner = (dim for dim in (2, 3, 4) if dim != axis)
        if strides[outer] < strides[inner]:
            outer, inner = inner, outer
        positions = max(1, elements // (shape[1] * shape[axis]))
        # SlicesOutside makes a map for each channel, which is small beside a tile unless slices are many and tiny.
        tiny_slices = shape[axis] > 2 * min(positions, shape[outer] * shape[inner])
        if strides[1] == 1 and shape[1] > 1:
            self.layout = ChannelsLast
        elif strides[axis] < strides[inner] or tiny_slices:
            self.layout = SlicesInside
        else:
            self.layout = SlicesOutside
        self._order = self.layout.order(axis, outer, inner)

        columns = _cut(shape[inner], positions)
        rows = _cut(shape[outer], max(1, positions // shape[inner]))
        samples = _cut(shape[0], max(1, positions // (shape[inner] * shape[outer])))
        place = self._order.index(outer)
        between = (slice(None),) * (place - 1)
        self._tiles = []
        for sample, row, column in product(samples, rows, columns):
            extents = [shape[dim] for dim in self._order]
            extents[0] = sample.stop - sample.start
            extents[place : place + 2] = [(row.stop - row.start) * (column.stop - column.start)]
            self._tiles.append((sample, (sample, *between, row, column), tuple(extents)))
        self._largest = max(prod(extents) for _, _, extents in self._tiles)

    @staticmethod
    def of(x: Tensor, axis: int) -> "Walk":
        """The tiles for volumes shaped like ``x``."""
        on_cpu = x.device.type == "cpu"
        limit = CPU_TILE_BYTES * max(2, torch.get_num_threads()) if on_cpu else GPU_TILE_BYTES
        return _walk(x.shape, x.stride(), axis, limit // accumulation_dtype(x.dtype).itemsize)

    def tiles(self, *volumes: Tensor, buffers: int) -> Iterator[tuple[slice, list[Tensor], list[Tensor]]]:
        """Goes through the tiles.

        Args:
            volumes: ``(N, C, D, H, W)`` each.
            buffers: how many scratch tiles the caller works on.

        Yields:
            The tile's samples; its view in each volume, in tile order with ``p`` as two dims; and the scratch tiles.
        """
        arranged = [volume.permute(self._order) for volume in volumes]
        first = volumes[0]
        scratch = first.new_empty((buffers, self._largest), dtype=accumulation_dtype(first.dtype))
        for samples, index, extents in self._tiles:
            tiles = scratch[:, : prod(extents)].view(buffers, *extents).unbind()
            yield samples, [volume[index] for volume in arranged], tiles


_walk = lru_cache(maxsize=256)(Walk)


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
    """What a step needs of the weights, or their gradients, in the accumulation dtype: made once per block."""

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
    walk = Walk.of(x, axis)
    layout = walk.layout
    logits = folded.m.new_zeros((x.shape[0], x.shape[axis], x.shape[axis]))
    to_query = folded.m.T
    for samples, (view,), (tile, query) in walk.tiles(x, buffers=2):
        _pack(view, tile)
        layout.project(to_query, tile, query)
        query.view(view.shape).add_(layout.broadcast(folded.u))
        logits[samples] += layout.contract(query, tile)
    return torch.softmax(logits, -1)


def _mix(x: Tensor, attention: Tensor, axis: int, beta: Tensor, folded: Folded, out: Tensor) -> None:
    """``out = x + beta * (Wv A x + bv)``: one read, one write; ``out`` may be ``x`` itself."""
    walk = Walk.of(x, axis)
    layout = walk.layout
    weight = beta * folded.g_weight
    bias = layout.broadcast(beta * folded.g_bias)
    for samples, (view, target), (tile, mixed) in walk.tiles(x, out, buffers=2):
        _pack(view, tile)
        layout.mix(attention[samples], tile, mixed)
        layout.project(weight, mixed, tile, add=True)
        _unpack(tile, target, bias)


def _target(volume: Tensor, step: int, kept: Sequence[Tensor], x: Tensor) -> Tensor:
    """Where a step writes to: one buffer serves every step, unless it is the caller's or is kept as it is."""
    taken = step == 0 or (kept and kept[-1].data_ptr() == volume.data_ptr())
    return torch.empty_like(x) if taken else volume


def recurrent_slice_attention(
    x: Tensor, weights: Projections, betas: Tensor, axes: Sequence[int], scale: float, keep_inputs: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The whole block; see :mod:`rsa_kernels.ops` for the contract that all backends keep."""
    folded = Folded.of(weights, scale, accumulation_dtype(x.dtype))
    betas = betas.to(folded.m.dtype)
    out, maps, inputs = x, [], []
    for step, axis in enumerate(axes):
        attention = _attention_map(out, axis, folded)
        if keep_inputs and step:
            inputs.append(out.permute(0, 2, 3, 4, 1).contiguous())
        target = _target(out, step, inputs, x)
        _mix(out, attention, axis, betas[step], folded, target)
        maps.append(attention)
        out = target
    return out, maps, inputs


def _softmax_backward(attention: Tensor, grad: Tensor) -> Tensor:
    weighted = attention * grad
    return weighted - attention * weighted.sum(-1, keepdim=True)


def _step_backward(
    grad: Tensor,
    x: Tensor,
    attention: Tensor,
    axis: int,
    beta: Tensor,
    folded: Folded,
    totals: Folded,
    grad_x: Tensor | None,
    need_folded: bool,
    need_value: bool,
) -> Tensor:
    """Backward of one step.

    Adds the weights' gradients to ``totals``, fills ``grad_x`` (which may be ``grad`` itself), returns beta's. With
    ``R = Wv^T G`` and ``D_ij = <R_i, X_j>`` from the first pass, and ``dL`` from them, the second pass makes

        narrow  dX = G + beta Wv^T (A^T G) + M (dL X) + M^T (dL^T X) + u c      4 mixes, 6 products of C x C
        wide    dX = G + A^T (beta R)      + M (dL X) + dL^T (M^T X) + u c      5 mixes, 5 products, keeps R
    """
    channels, slices = x.shape[1], x.shape[axis]
    wide = channels > 2 * slices and grad_x is not None
    walk = Walk.of(x, axis)
    layout = walk.layout
    from_value = folded.g_weight.T
    scaled_from_value = beta * from_value
    kept = [torch.empty_like(x, dtype=beta.dtype)] if wide else []
    grad_sum = torch.zeros_like(folded.u)
    contracted = torch.zeros_like(attention)
    value_weight = torch.zeros_like(from_value)
    for samples, (view, grad_view, *kept_view), (tile, grad_tile, work) in walk.tiles(x, grad, *kept, buffers=3):
        _pack(view, tile)
        _pack(grad_view, grad_tile)
        grad_sum += layout.sum_voxels(grad_tile)
        if wide and need_value:
            layout.mix(attention[samples], tile, work)
            layout.correlate(grad_tile, work, value_weight)
        layout.project(from_value, grad_tile, work)
        contracted[samples] += layout.contract(work, tile)
        if wide:
            _unpack(work, *kept_view)

    grad_beta = (attention * contracted).sum() + folded.g_bias @ grad_sum
    totals.g_bias.add_(beta * grad_sum)
    if grad_x is None and not need_folded and not need_value:
        return grad_beta

    grad_logits = _softmax_backward(attention, beta * contracted)
    spread = grad_logits.sum(1)[:, :, None] * folded.u
    targets = [] if grad_x is None else [grad_x]
    for samples, (view, grad_view, *others), (tile, total, work) in walk.tiles(x, grad, *kept, *targets, buffers=3):
        _pack(view, tile)
        _pack(grad_view, total)
        if not wide:
            layout.mix(attention[samples].mT, total, work)
            if need_value:
                layout.correlate(work, tile, value_weight)
            if grad_x is not None:
                layout.project(scaled_from_value, work, total, add=True)
        layout.mix(grad_logits[samples], tile, work)
        if need_folded:
            layout.correlate(tile, work, totals.m)
            totals.u.add_(layout.sum_voxels(work))
        if grad_x is None:
            continue
        layout.project(folded.m, work, total, add=True)
        if wide:
            _pack(others[0], work)
            layout.mix(beta * attention[samples].mT, work, total, add=True)
            layout.project(folded.m.T, tile, work)
            layout.mix(grad_logits[samples].mT, work, total, add=True)
        else:
            layout.mix(grad_logits[samples].mT, tile, work)
            layout.project(folded.m.T, work, total, add=True)
        _unpack(total, others[-1], layout.broadcast(spread[samples]))
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
    inputs = [x, *(volume.permute(0, 4, 1, 2, 3) for volume in inputs)]
    volume = inputs[-1]
    for step in range(len(inputs) - 1, len(axes) - 1):
        # In the strides of the forward pass, and then in those of kept inputs: the bits are the same.
        target = _target(volume, step, inputs, x)
        _mix(volume, maps[step], axes[step], precise_betas[step], folded, target)
        inputs.append(target.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3))
        volume = target

    need_folded = needs.theta_weight or needs.theta_bias or needs.phi_weight
    totals = Folded(*(torch.zeros_like(part) for part in folded))
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
    walk = Walk.of(rows, axis)
    size = (rows.shape[0], rows.shape[axis], rows.shape[axis])
    result = rows.new_zeros(size, dtype=accumulation_dtype(rows.dtype))
    for samples, views, tiles in walk.tiles(rows, columns, buffers=2):
        for view, tile in zip(views, tiles, strict=True):
            _pack(view, tile)
        result[samples] += walk.layout.contract(*tiles)
    return result


def _mix_slices(matrix: Tensor, volume: Tensor, axis: int, like: Tensor) -> Tensor:
    """``sum_j matrix_ij volume_j`` for every sample, in the memory format of ``like``."""
    out = torch.empty_like(like)
    walk = Walk.of(volume, axis)
    for samples, (view, target), (tile, mixed) in walk.tiles(volume, out, buffers=2):
        _pack(view, tile)
        walk.layout.mix(matrix[samples], tile, mixed)
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
