"""The ``triton`` backend: the kernels in the order that a block needs them.

A step forward is three launches in the narrow regime (map, softmax, mix), four in the wide one (one product for query
and value, contraction, softmax, mix), three for few slices (the softmax goes into the mix). Nothing here waits for the
device. See :mod:`rsa_kernels.ops` for the contract that all backends keep.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rsa_kernels.folding import Gradients, Projections, accumulation_dtype, fold, fold_backward
from rsa_kernels.triton import maps, narrow, tuning, wide
from rsa_kernels.triton.launch import INTERPRETED, bind, on_device
from rsa_kernels.triton.tuning import Tiling
from rsa_kernels.triton.volumes import ALIGNMENT, Geometry, empty_packed, geometry, pack, unpack

# A program that walks chunks should have some, or its share of a partial map costs more than it saves.
CHUNKS_PER_PROGRAM = 2
# Elements that a program on a map's rows looks at together.
ROW_ELEMENTS = 4096
# Half precision ends at 65504, and the folded query, a product with two weights, can be larger than either alone: it is
# rounded as many times smaller, and the logits, which are float32, are as many times larger again.
HALF_SHRINK = 2.0**-8
# Side of the tiles that the weights are folded in.
FOLD_TILE = 16


class NarrowWeights(NamedTuple):
    """Block-diagonal weights of ``K`` columns; see :func:`rsa_kernels.triton.narrow.fold_kernel`."""

    m: Tensor
    w: Tensor
    u: Tensor
    b: Tensor


def _rows_of(volume: Tensor) -> Tensor:
    """A packed volume as ``(voxels, C)``."""
    return volume.permute(0, 2, 3, 4, 1).reshape(-1, volume.shape[1])


def _flat(volume: Tensor) -> Tensor:
    return volume.permute(0, 2, 3, 4, 1).reshape(-1)


def _unflat(flat: Tensor, shape: torch.Size) -> Tensor:
    batch, channels, depth, height, width = shape
    return flat.view(batch, depth, height, width, channels).permute(0, 4, 1, 2, 3)


class Machine:
    """Launches the kernels for volumes of one shape and dtype on the current stream of their device.

    Args:
        like: a volume ``(N, C, D, H, W)``.
        device: index of its device.
        stream: the stream.
    """

    def __init__(self, like: Tensor, device: int, stream: int) -> None:
        self.shape = tuple(like.shape)
        self.batch, self.channels = self.shape[:2]
        self.dtype = like.dtype
        self.precise = accumulation_dtype(like.dtype)
        self.like = like
        self.device = device
        self.stream = stream
        self.arch = tuning.architecture(device)
        self.kind = tuning.kind(like.dtype)
        self.precision = "tf32" if self.kind == "tf32" else "ieee"
        self.shrink = HALF_SHRINK if like.dtype == torch.float16 else 1.0

    def tiling(self, kernel: str, geometry: Geometry) -> Tiling | None:
        """The launch table's entry for a kernel."""
        return tuning.tiling(kernel, self.arch, self.kind, geometry.slices, self.channels)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Room on the device."""
        return self.like.new_empty(shape, dtype=dtype or self.precise)

    def parts(self, chunks: int, blocks: int, tiling: Tiling) -> int:
        """How many programs of a sample share ``chunks``, where ``blocks`` do so for each sample."""
        wanted = tuning.processors(self.device) * tiling.programs // (self.batch * blocks)
        return max(1, min(wanted, chunks // CHUNKS_PER_PROGRAM))

    def launch(
        self, kernel: Any, programs: int, tiling: tuple[int, int], arguments: Sequence[Any], *constants: Any
    ) -> None:
        """Launches a kernel with ``(warps, stages)``; pointers come first, then numbers, then constants."""
        dtypes = tuple(argument.dtype for argument in arguments if isinstance(argument, Tensor))
        bind(kernel, self.device, dtypes, *tiling, *constants)(programs, self.stream, *arguments)

    def launch_rows(self, kernel: Any, arguments: Sequence[Any], padded: int, *constants: Any) -> None:
        """Launches a kernel on the rows of maps, a program for each: they are few, and so are kept busy together."""
        rows = min(padded, 64) if INTERPRETED else 1
        self.launch(kernel, self.batch * padded // rows, (4, 1), arguments, padded, rows, *constants)

    # Maps ----------------------------------------------------------------------------------------------------------

    def softmax(self, partial: Tensor, slices: int) -> tuple[Tensor, Tensor]:
        """The map ``(N, S, S)`` from partial logits, and its padded copy in the volumes' dtype."""
        parts, padded = partial.shape[1:3]
        attention = self.empty(self.batch, slices, slices)
        rounded = self.empty(self.batch, padded, padded, dtype=self.dtype)
        self.launch_rows(
            maps.softmax_kernel, (partial, attention, rounded, slices, parts), padded, parts_at_once(padded)
        )
        return attention, rounded

    def round(self, attention: Tensor, *tilings: Tiling) -> Tensor:
        """The padded copy of a map in the volumes' dtype, for kernels with these tilings."""
        slices = attention.shape[1]
        padded = tuning.padded(slices, *tilings)
        rounded = self.empty(self.batch, padded, padded, dtype=self.dtype)
        self.launch_rows(maps.round_kernel, (attention, rounded, slices), padded)
        return rounded

    def softmax_backward(self, partial: Tensor, attention: Tensor, beta: Tensor | None) -> tuple[Tensor, Tensor]:
        """The padded gradient of the logits, and ``rowsum(A * D)`` ``(N, SP)``."""
        parts, padded = partial.shape[1:3]
        grad_logits = self.empty(self.batch, padded, padded, dtype=self.dtype)
        row_dots = self.empty(self.batch, padded)
        scale = row_dots if beta is None else beta
        self.launch_rows(
            maps.softmax_backward_kernel,
            (partial, attention, scale, grad_logits, row_dots, attention.shape[1], parts),
            padded,
            parts_at_once(padded),
            beta is not None,
        )
        return grad_logits, row_dots

    # Narrow --------------------------------------------------------------------------------------------------------

    def fold(self, weights: Projections, columns: int) -> NarrowWeights:
        """Block-diagonal weights."""
        m = self.empty(3, columns, columns, dtype=self.dtype)
        u = self.empty(2, columns)
        theta_weight, theta_bias, phi_weight, _, g_weight, g_bias = weights
        tile = columns if INTERPRETED else FOLD_TILE
        self.launch(
            narrow.fold_kernel,
            (columns // tile) ** 2,
            (4, 1),
            (theta_weight, theta_bias, phi_weight, g_weight, g_bias, m, m[2], u, u[1]),
            self.channels,
            columns // self.channels,
            columns,
            tile,
        )
        return NarrowWeights(m[:2], m[2], u[0], u[1])

    def narrow_cut(self, geometry: Geometry, tiling: Tiling, padded: int) -> tuple[int, int, int, int]:
        """Positions in a tile, chunks, parts, programs."""
        places = tiling.columns // self.channels
        chunks = geometry.outer * -(-geometry.inner // places)
        blocks = padded // tiling.rows
        parts = self.parts(chunks, blocks, tiling)
        return places, chunks, parts, parts * blocks * self.batch

    def narrow_map(self, x: Tensor, weights: NarrowWeights, geometry: Geometry, tiling: Tiling, padded: int) -> Tensor:
        """Partial logits, padded to so many slices."""
        places, chunks, parts, programs = self.narrow_cut(geometry, tiling, padded)
        partial = self.empty(self.batch, parts, padded, padded)
        self.launch(
            narrow.map_kernel,
            programs,
            (tiling.warps, tiling.stages),
            (x, weights.m, weights.u, partial, geometry.slices, geometry.inner, chunks, parts, *geometry.strides),
            *(self.channels, places, tiling.columns, padded, tiling.rows, geometry.flat),
            *(tiling.split, self.shrink, self.precision),
        )
        return partial

    def narrow_mix(
        self,
        x: Tensor,
        rounded: Tensor,
        weights: NarrowWeights,
        beta: Tensor,
        out: Tensor,
        geometry: Geometry,
        tiling: Tiling,
    ) -> None:
        """``out = x + beta (Wv A x + bv)``."""
        padded = rounded.shape[1]
        places, chunks, parts, programs = self.narrow_cut(geometry, tiling, padded)
        self.launch(
            narrow.mix_kernel,
            programs,
            (tiling.warps, tiling.stages),
            (
                *(x, rounded, weights.w, weights.b, beta, out),
                *(geometry.slices, geometry.inner, chunks, parts, *geometry.strides),
            ),
            *(self.channels, places, tiling.columns, padded, tiling.rows, geometry.flat, self.precision),
        )

    def unfold(
        self,
        matrices: Tensor,
        vectors: Tensor,
        beta: Tensor,
        total: Tensor,
        total_vector: Tensor,
        matrix: bool,
        scaled: bool,
    ) -> None:
        """Adds partial gradients of block-diagonal weights to those of the folded ones."""
        parts, columns = vectors.shape
        width = tuning.bucket(self.channels)
        rows = width if INTERPRETED else 1
        self.launch(
            narrow.unfold_kernel,
            -(-self.channels // rows) if matrix else 1,
            (4, 1),
            (matrices, vectors, beta, total, total_vector, parts),
            *(self.channels, columns // self.channels, columns, width, rows, parts_at_once(width), matrix, scaled),
        )

    # Wide ----------------------------------------------------------------------------------------------------------

    def wide_cut(self, geometry: Geometry, tiling: Tiling) -> tuple[int, int, int]:
        """Channels and positions in a tile, chunks."""
        channels = min(self.channels, tiling.columns)
        places = tiling.columns // channels
        chunks = geometry.outer * -(-geometry.inner // places) * -(-self.channels // channels)
        return channels, places, chunks

    def contract(self, left: Tensor, right: Tensor, geometry: Geometry, shrink: float = 1.0) -> Tensor:
        """Partial maps ``<left_i, right_j> / shrink`` of packed volumes, or of rows ``(V, C)`` of a wider matrix."""
        tiling = self.tiling("contract", geometry)
        padded = tuning.bucket(geometry.slices)
        channels, places, chunks = self.wide_cut(geometry, tiling)
        blocks = (-(-geometry.slices // tiling.rows)) ** 2
        parts = self.parts(chunks, blocks, tiling)
        partial = self.empty(self.batch, parts, padded, padded)
        self.launch(
            wide.contract_kernel,
            blocks * parts * self.batch,
            (tiling.warps, tiling.stages),
            (left, right, partial, geometry.slices, geometry.inner, chunks, parts, *geometry.strides),
            *(self.channels, channels, places, tiling.columns, padded, tiling.rows, tiling.rows),
            *(_row(left), _row(right), shrink, self.precision),
        )
        return partial

    def mix(
        self,
        matrix: Tensor,
        volume: Tensor,
        out: Tensor,
        geometry: Geometry,
        transposed: bool = False,
        base: tuple[Tensor, Tensor] | None = None,
        rank_one: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """``out = A volume``; with ``base = (x, beta)`` ``x + beta A volume``; with ``rank_one`` their product more."""
        tiling = self.tiling("mix_slices", geometry)
        padded = matrix.shape[1]
        channels, places, chunks = self.wide_cut(geometry, tiling)
        rest, beta = base or (volume, matrix)
        row_scale, vector = rank_one or (matrix, matrix)
        blocks = -(-geometry.slices // tiling.rows)
        self.launch(
            wide.mix_kernel,
            blocks * chunks * self.batch,
            (tiling.warps, tiling.stages),
            (
                *(volume, matrix, rest, beta, row_scale, vector, out),
                *(geometry.slices, geometry.inner, chunks, *geometry.strides),
            ),
            *(self.channels, channels, places, tiling.columns, padded, tiling.rows, tiling.rows),
            *(transposed, base is not None, rank_one is not None, _row(volume), _row(out), self.precision),
        )

    def softmax_mix(
        self,
        partial: Tensor,
        value: Tensor,
        base: Tensor,
        beta: Tensor,
        out: Tensor,
        geometry: Geometry,
        tiling: Tiling,
    ) -> Tensor:
        """Softmax and ``out = base + beta A value`` in one launch; returns the map."""
        parts, padded = partial.shape[1:3]
        channels, places, chunks = self.wide_cut(geometry, tiling)
        programs = self.parts(chunks, 1, tiling)
        attention = self.empty(self.batch, geometry.slices, geometry.slices)
        self.launch(
            wide.softmax_mix_kernel,
            programs * self.batch,
            (tiling.warps, tiling.stages),
            (
                *(partial, attention, value, base, beta, out),
                *(geometry.slices, geometry.inner, chunks, parts, programs, *geometry.strides),
            ),
            *(self.channels, channels, places, tiling.columns, padded, parts_at_once(padded**2)),
            *(_row(value), self.precision),
        )
        return attention


def parts_at_once(elements: int) -> int:
    """How many parts of so many elements a program sums at a time."""
    return max(1, min(64, ROW_ELEMENTS // elements))


def _row(volume: Tensor) -> int:
    """Elements from a voxel to the next in memory."""
    return volume.stride(0) if volume.dim() == 2 else volume.shape[1]


class Weights:
    """The weights of a block as the steps need them, each form made at its first use.

    Args:
        machine: launches the kernels.
        weights: the published ones.
        betas: one per step.
        scale: factor on the logits.
    """

    def __init__(self, machine: Machine, weights: Projections, betas: Tensor, scale: float) -> None:
        if scale != 1:
            weights = weights._replace(
                theta_weight=weights.theta_weight.to(machine.precise) * scale,
                theta_bias=weights.theta_bias.to(machine.precise) * scale,
            )
        self.published = Projections(*(weight.contiguous() for weight in weights))
        self.betas = betas.contiguous()
        self._machine = machine
        self._narrow: dict[int, NarrowWeights] = {}
        self._wide: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def beta(self, step: int) -> Tensor:
        """The scale of a step: ``(1,)``."""
        return self.betas[step : step + 1]

    def narrow(self, columns: int) -> NarrowWeights:
        """Block-diagonal, for tiles of so many columns."""
        if columns not in self._narrow:
            self._narrow[columns] = self._machine.fold(self.published, columns)
        return self._narrow[columns]

    def wide(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``M``, ``u``, ``Wv`` and ``bv`` in the dtype of the volumes."""
        if self._wide is None:
            precise = (weight.to(self._machine.precise) for weight in self.published)
            theta_weight, theta_bias, phi_weight, _, g_weight, g_bias = precise
            folded = (*fold(theta_weight, theta_bias, phi_weight, 1.0), g_weight, g_bias)
            self._wide = tuple(weight.to(self._machine.dtype) for weight in folded)
        return self._wide

    def project(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Query, ``shrink`` times smaller, and value of voxels ``(V, C)``.

        They come of one product where both then start aligned: the voxels are read once.
        """
        m, u, g_weight, g_bias = self.wide()
        channels, shrink = rows.shape[1], self._machine.shrink
        if shrink != 1 or channels * rows.element_size() % ALIGNMENT:
            query = torch.addmm(u, rows, m, alpha=shrink, beta=shrink)
            return query, torch.addmm(g_bias, rows, g_weight.T)
        both = torch.addmm(torch.cat((u, g_bias)), rows, torch.cat((m, g_weight.T), 1))
        return both[:, :channels], both[:, channels:]


def _forward_step(
    machine: Machine, weights: Weights, step: int, x: Tensor, axis: int, target: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One step; returns its output, in ``target`` where that can be, and its map. ``target`` may be ``x``."""
    shape = geometry(machine.shape, axis)
    beta = weights.beta(step)
    map_tiling, mix_tiling = (machine.tiling(kernel, shape) for kernel in ("map", "mix"))
    if map_tiling and mix_tiling:
        padded = tuning.padded(shape.slices, map_tiling, mix_tiling)
        partial = machine.narrow_map(x, weights.narrow(map_tiling.columns), shape, map_tiling, padded)
        attention, rounded = machine.softmax(partial, shape.slices)
        if target is None or (target is x and mix_tiling.rows < rounded.shape[1]):
            target = empty_packed(machine.shape, x)
        machine.narrow_mix(x, rounded, weights.narrow(mix_tiling.columns), beta, target, shape, mix_tiling)
        return target, attention
    if target is None:
        target = empty_packed(machine.shape, x)
    query, value = weights.project(_rows_of(x))
    partial = machine.contract(query, x, shape, machine.shrink)
    tiling = machine.tiling("softmax_mix", shape)
    if tiling:
        return target, machine.softmax_mix(partial, value, x, beta, target, shape, tiling)
    attention, rounded = machine.softmax(partial, shape.slices)
    machine.mix(rounded, value, target, shape, base=(x, beta))
    return target, attention


def recurrent_slice_attention(
    x: Tensor, weights: Projections, betas: Tensor, axes: Sequence[int], scale: float, keep_inputs: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The whole block; see :mod:`rsa_kernels.ops` for the contract that all backends keep."""
    with on_device(x) as (device, stream):
        machine = Machine(x, device, stream)
        prepared = Weights(machine, weights, betas, scale)
        volume = pack(x, device, stream)
        maps, inputs = [], []
        for step, axis in enumerate(axes):
            # Without a backward to come, one buffer serves every step; the caller's volume stays as it is.
            own = step > 0 or volume.data_ptr() != x.data_ptr()
            target = volume if own and not keep_inputs else None
            if keep_inputs and step:
                inputs.append(_flat(volume))
            volume, attention = _forward_step(machine, prepared, step, volume, axis, target)
            maps.append(attention)
        return unpack(volume, x, device, stream), maps, inputs


class Totals(NamedTuple):
    """The gradients of the folded weights, summed over steps, and what betas' gradients are made of."""

    m: Tensor
    u: Tensor
    g_weight: Tensor
    grad_sums: list[Tensor]
    """Per step, the sum of the upstream gradient over voxels: ``(C,)``."""
    row_dots: list[Tensor]
    """Per step, ``rowsum(A * D)``: ``(N, SP)``."""

    @classmethod
    def zeros(cls, machine: Machine) -> "Totals":
        """Sums to add to."""
        channels = machine.channels
        zeros = machine.empty(2 * channels + 1, channels).zero_()
        return cls(zeros[:channels], zeros[-1], zeros[channels : 2 * channels], [], [])


def _backward_step(
    machine: Machine,
    weights: Weights,
    totals: Totals,
    step: int,
    grad: Tensor,
    x: Tensor,
    attention: Tensor,
    axis: int,
    grad_x: Tensor | None,
    need_folded: bool,
    need_value: bool,
) -> None:
    """Backward of one step; adds to ``totals`` and fills ``grad_x``, which may be ``grad`` itself."""
    shape = geometry(machine.shape, axis)
    tilings = [machine.tiling(kernel, shape) for kernel in ("map_backward", "mix_backward")]
    needs = (need_folded, need_value)
    if all(tilings):
        _narrow_backward(machine, weights, totals, step, grad, x, attention, shape, tilings, grad_x, *needs)
    else:
        _wide_backward(machine, weights, totals, step, grad, x, attention, shape, grad_x, *needs)


def _narrow_backward(
    machine: Machine,
    weights: Weights,
    totals: Totals,
    step: int,
    grad: Tensor,
    x: Tensor,
    attention: Tensor,
    shape: Geometry,
    tilings: Sequence[Tiling],
    grad_x: Tensor | None,
    need_folded: bool,
    need_value: bool,
) -> None:
    beta = weights.beta(step)
    first, second = tilings
    rounded = machine.round(attention, first, second)
    padded = rounded.shape[1]

    def arguments(tiling: Tiling) -> tuple[int, int, Tensor, Tensor, tuple[int, ...], tuple[Any, ...]]:
        places, chunks, parts, programs = machine.narrow_cut(shape, tiling, padded)
        matrices = machine.empty(machine.batch * parts, tiling.columns, tiling.columns)
        vectors = machine.empty(machine.batch * parts, tiling.columns)
        numbers = (shape.slices, shape.inner, chunks, parts, *shape.strides)
        constants = (machine.channels, places, tiling.columns, padded, shape.flat)
        return programs, parts, matrices, vectors, numbers, constants

    programs, parts, matrices, vectors, numbers, constants = arguments(first)
    partial = machine.empty(machine.batch, parts, padded, padded)
    machine.launch(
        narrow.map_backward_kernel,
        programs,
        (first.warps, first.stages),
        (x, grad, rounded, weights.narrow(first.columns).w, partial, matrices, vectors, *numbers),
        *(*constants, need_value, machine.precision),
    )
    grad_sum = machine.empty(machine.channels).zero_()
    machine.unfold(matrices, vectors, beta, totals.g_weight, grad_sum, need_value, True)
    totals.grad_sums.append(grad_sum)
    grad_logits, row_dots = machine.softmax_backward(partial, attention, beta)
    totals.row_dots.append(row_dots)
    if grad_x is None and not need_folded:
        return

    programs, parts, matrices, vectors, numbers, constants = arguments(second)
    folded = weights.narrow(second.columns)
    machine.launch(
        narrow.mix_backward_kernel,
        programs,
        (second.warps, second.stages),
        (
            *(x, grad, rounded, grad_logits, folded.m, folded.w, folded.u, beta),
            *(x if grad_x is None else grad_x, matrices, vectors, *numbers),
        ),
        *(*constants, grad_x is not None, need_folded, machine.precision),
    )
    if need_folded:
        machine.unfold(matrices, vectors, beta, totals.m, totals.u, True, False)


def _wide_backward(
    machine: Machine,
    weights: Weights,
    totals: Totals,
    step: int,
    grad: Tensor,
    x: Tensor,
    attention: Tensor,
    shape: Geometry,
    grad_x: Tensor | None,
    need_folded: bool,
    need_value: bool,
) -> None:
    beta = weights.beta(step)
    m, u, g_weight, _ = weights.wide()
    rows, grad_rows = _rows_of(x), _rows_of(grad)
    projected = grad_rows @ g_weight
    partial = machine.contract(projected, x, shape)
    grad_logits, row_dots = machine.softmax_backward(partial, attention, beta)
    totals.row_dots.append(row_dots)
    totals.grad_sums.append(grad_rows.sum(0, dtype=machine.precise))
    rounded = machine.round(attention)
    moved = machine.empty(len(rows), machine.channels, dtype=machine.dtype)
    if need_value:
        machine.mix(rounded, grad, moved, shape, transposed=True)
        totals.g_weight.addcmul_(_correlate(moved, rows), beta.to(machine.precise))
    # dX = G + beta A^T R + (dL^T X) M + (dL X) M^T + c u, c the columns' sums of dL. From here on G may be gone.
    if grad_x is not None:
        rank_one = (grad_logits.sum(1, dtype=machine.precise), u)
        machine.mix(rounded, projected, grad_x, shape, transposed=True, base=(grad, beta), rank_one=rank_one)
        machine.mix(grad_logits, x, moved, shape, transposed=True)
        _rows_of(grad_x).addmm_(moved, m)
    machine.mix(grad_logits, x, moved, shape)
    if grad_x is not None:
        _rows_of(grad_x).addmm_(moved, m.T)
    if need_folded:
        totals.m.add_(_correlate(rows, moved))
        totals.u.add_(moved.sum(0, dtype=machine.precise))


def _correlate(rows: Tensor, columns: Tensor) -> Tensor:
    """``rows^T columns`` with sums and result in the accumulation dtype."""
    if rows.dtype in (torch.float32, torch.float64):
        return rows.T @ columns
    if rows.is_cuda:
        return torch.mm(rows.T, columns, out_dtype=torch.float32)
    return rows.float().T @ columns.float()


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
    with on_device(x) as (device, stream):
        machine = Machine(x, device, stream)
        prepared = Weights(machine, weights, betas, scale)
        inputs = [x, *(_unflat(flat, x.shape) for flat in inputs)]
        inputs = [pack(volume, device, stream) for volume in inputs]
        for step in range(len(inputs) - 1, len(axes) - 1):
            inputs.append(_remix(machine, prepared, step, inputs[-1], maps[step], axes[step]))

        need_folded = bool(needs.theta_weight or needs.theta_bias or needs.phi_weight)
        totals = Totals.zeros(machine)
        upstream = pack(grad, device, stream)
        grad_x = None
        for step in reversed(range(len(axes))):
            # Every step but the last reads and writes the one buffer of ours: the caller's gradient stays as it is.
            if grad_x is None and (step > 0 or needs.x):
                own = upstream.data_ptr() != grad.data_ptr()
                grad_x = upstream if own else empty_packed(machine.shape, x)
            target = grad_x if step > 0 or needs.x else None
            _backward_step(
                machine,
                prepared,
                totals,
                step,
                upstream,
                inputs.pop(),
                maps[step],
                axes[step],
                target,
                need_folded,
                bool(needs.g_weight),
            )
            upstream = grad_x
        return _collect(machine, prepared, totals, weights, scale, needs, need_folded)._replace(
            x=unpack(grad_x, x, device, stream) if needs.x else None
        )


def _remix(machine: Machine, weights: Weights, step: int, x: Tensor, attention: Tensor, axis: int) -> Tensor:
    """What a step puts out, from its kept map."""
    shape = geometry(machine.shape, axis)
    out = empty_packed(machine.shape, x)
    tilings = [machine.tiling(kernel, shape) for kernel in ("map", "mix")]
    rounded = machine.round(attention, *(tilings if all(tilings) else ()))
    if all(tilings):
        folded = weights.narrow(tilings[1].columns)
        machine.narrow_mix(x, rounded, folded, weights.beta(step), out, shape, tilings[1])
    else:
        _, _, g_weight, g_bias = weights.wide()
        value = torch.addmm(g_bias, _rows_of(x), g_weight.T)
        machine.mix(rounded, value, out, shape, base=(x, weights.beta(step)))
    return out


def _collect(
    machine: Machine,
    prepared: Weights,
    totals: Totals,
    weights: Projections,
    scale: float,
    needs: Gradients,
    need_folded: bool,
) -> Gradients:
    """The published weights' gradients from those of the folded ones."""
    precise = machine.precise
    result = dict.fromkeys(Gradients._fields)
    if need_folded:
        theta_weight, theta_bias, phi_weight, *_ = (weight.to(precise) for weight in weights)
        result["theta_weight"], result["theta_bias"], result["phi_weight"] = fold_backward(
            totals.m, totals.u, theta_weight, theta_bias, phi_weight, scale
        )
    result["phi_bias"] = torch.zeros_like(weights.phi_bias)
    result["g_weight"] = totals.g_weight
    if needs.g_bias or needs.betas:
        grad_sums = torch.stack(totals.grad_sums[::-1])
        dots = torch.stack([dots.sum() for dots in reversed(totals.row_dots)])
        result["g_bias"] = prepared.betas.to(precise) @ grad_sums
        result["betas"] = dots + grad_sums @ weights.g_bias.to(precise)
    return Gradients(**result)


def slice_attention(query: Tensor, key: Tensor, value: Tensor, axis: int, scale: float) -> tuple[Tensor, Tensor]:
    """The parameter-free core; see :mod:`rsa_kernels.ops` for the contract that all backends keep."""
    with on_device(query) as (device, stream):
        machine = Machine(query, device, stream)
        shape = geometry(machine.shape, axis)
        packed_query, packed_key, packed_value = (pack(volume, device, stream) for volume in (query, key, value))
        partial = machine.contract(packed_query, packed_key, shape)
        attention, rounded = machine.softmax(_scaled(partial, scale), shape.slices)
        out = empty_packed(machine.shape, value)
        machine.mix(rounded, packed_value, out, shape)
        return unpack(out, value, device, stream), attention


def _scaled(partial: Tensor, scale: float) -> Tensor:
    return partial if scale == 1 else partial.mul_(scale)


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
    with on_device(query) as (device, stream):
        machine = Machine(query, device, stream)
        shape = geometry(machine.shape, axis)
        upstream = pack(grad, device, stream)
        grads: list[Tensor | None] = [None, None, None]

        def mix(matrix: Tensor, volume: Tensor, like: Tensor, transposed: bool) -> Tensor:
            out = empty_packed(machine.shape, like)
            machine.mix(matrix, pack(volume, device, stream), out, shape, transposed)
            return unpack(out, like, device, stream)

        if needs[0] or needs[1]:
            partial = machine.contract(upstream, pack(value, device, stream), shape)
            grad_logits, _ = machine.softmax_backward(_scaled(partial, scale), attention, None)
            if needs[0]:
                grads[0] = mix(grad_logits, key, query, False)
            if needs[1]:
                grads[1] = mix(grad_logits, query, key, True)
        if needs[2]:
            grads[2] = mix(machine.round(attention), upstream, value, True)
        return grads
