"""The ``triton`` backend: the kernels in the order that a block needs them.

A step forward is three launches in the narrow regime (map, softmax, mix), four in the wide one (a product for query and
value, two where they would not be aligned; contraction, softmax, mix). Nothing here waits for the device. See
:mod:`rsa_kernels.ops` for the contract that all backends keep.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rsa_kernels.folding import Gradients, Projections, accumulation_dtype, fold_backward
from rsa_kernels.triton import maps, narrow, tuning, wide
from rsa_kernels.triton.launch import INTERPRETED, OnDevice, bind
from rsa_kernels.triton.tuning import Tiling
from rsa_kernels.triton.volumes import ALIGNMENT, Geometry, empty_packed, geometry, pack, unpack

# A program that walks chunks should have some, or its share of a partial map costs more than it saves.
CHUNKS_PER_PROGRAM = 2
# Elements of partial results that a program loads together: they wait for memory at once, not one behind the other.
ROW_ELEMENTS = 8192
# Half precision ends at 65504, and the folded query, a product with two weights, can be larger than either alone: it is
# rounded as many times smaller, and the logits, which are float32, are as many times larger again.
HALF_SHRINK = 2.0**-8
# Side of the tiles that the weights are folded in, of few channels and of many.
FOLD_TILES = (16, 32)
FOLD_MANY = 128


class Cut(NamedTuple):
    """A volume cut into chunks, and the programs that walk them."""

    channels: int
    """In a tile; all of them in the narrow regime."""
    places: int
    """Positions in a tile."""
    chunks: int
    parts: int
    """Programs that share a sample's chunks."""


@lru_cache(maxsize=4096)
def cut(geometry: Geometry, tiling: Tiling, channels: int, batch: int, blocks: int, processors: int) -> Cut:
    """Cuts a volume for a kernel of which ``blocks`` programs work on the same chunk."""
    in_tile = min(channels, tiling.columns)
    places = tiling.columns // in_tile
    chunks = geometry.outer * -(-geometry.inner // places) * -(-channels // in_tile)
    wanted = processors * tiling.programs // (batch * blocks)
    return Cut(in_tile, places, chunks, max(1, min(wanted, chunks // CHUNKS_PER_PROGRAM)))


def parts_at_once(elements: int) -> int:
    """How many parts of so many elements a program sums at a time."""
    return max(1, min(128, ROW_ELEMENTS // elements))


def rows_of(volume: Tensor) -> Tensor:
    """A packed volume as ``(voxels, C)``."""
    return volume.permute(0, 2, 3, 4, 1).reshape(-1, volume.shape[1])


def _unflat(flat: Tensor, shape: torch.Size) -> Tensor:
    batch, channels, depth, height, width = shape
    return flat.view(batch, depth, height, width, channels).permute(0, 4, 1, 2, 3)


def _row(volume: Tensor) -> int:
    """Elements from a voxel to the next in memory."""
    return volume.stride(0) if volume.dim() == 2 else volume.shape[1]


class Folded(NamedTuple):
    """Weights as kernels or products read them; see :func:`rsa_kernels.triton.narrow.fold_kernel`."""

    matrices: Tensor
    vectors: Tensor


class Machine:
    """Launches the kernels for volumes of one shape and dtype on the current stream of their device.

    Args:
        like: a volume ``(N, C, D, H, W)``.
        device: index of its device.
        stream: the stream.
        parameters: the other tensors of the caller's that kernels read.
    """

    def __init__(self, like: Tensor, device: int, stream: int, parameters: Sequence[Tensor] = ()) -> None:
        self.shape = tuple(like.shape)
        self.batch, self.channels = self.shape[:2]
        self.dtype = like.dtype
        self.precise = accumulation_dtype(like.dtype)
        self.like = like
        self.device = device
        self.stream = stream
        self.arch = tuning.architecture(device)
        self.processors = tuning.processors(device)
        self.kind = tuning.kind(like.dtype)
        self.precision = "tf32" if self.kind == "tf32" else "ieee"
        self.shrink = HALF_SHRINK if like.dtype == torch.float16 else 1.0
        # The dtypes of all pointers follow from these. Triton compiles for AMD with regard to sizes past 2 GiB, too.
        large = torch.version.hip is not None and like.nbytes >= 2**31
        self._key = (device, like.dtype, large, *(parameter.dtype for parameter in parameters))
        self._scratch: dict[tuple[Any, ...], Tensor] = {}

    def tiling(self, kernel: str, geometry: Geometry) -> Tiling | None:
        """The launch table's entry for a kernel."""
        return tuning.tiling(kernel, self.arch, self.kind, geometry.slices, self.channels)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Room on the device."""
        return self.like.new_empty(shape, dtype=dtype or self.precise)

    def scratch(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Room under a name: later steps get the same, which they may, because kernels run one after the other."""
        room = self._scratch.get((name, dtype, shape))
        if room is None:
            room = self._scratch[name, dtype, shape] = self.empty(*shape, dtype=dtype)
        return room

    def launch(
        self, kernel: Any, programs: int, options: tuple[int, int], arguments: Sequence[Any], *constants: Any
    ) -> None:
        """Launches a kernel with ``(warps, stages)``; pointers come first, then numbers, then constants."""
        bind(kernel, self._key, *options, *constants)(programs, self.stream, *arguments)

    def launch_rows(self, kernel: Any, arguments: Sequence[Any], padded: int, *constants: Any) -> None:
        """Launches a kernel on the rows of maps, a program for each: they are few, and so are kept busy together."""
        rows = min(padded, 64) if INTERPRETED else 1
        self.launch(kernel, self.batch * padded // rows, (4, 1), arguments, padded, rows, *constants)

    # Maps ----------------------------------------------------------------------------------------------------------

    def softmax(self, partial: Tensor, slices: int) -> tuple[Tensor, Tensor]:
        """The map ``(N, S, S)`` from partial logits, and its padded copy in the volumes' dtype."""
        parts, padded = partial.shape[1:3]
        attention = self.empty(self.batch, slices, slices)
        rounded = self.scratch("rounded", self.batch, padded, padded, dtype=self.dtype)
        arguments = (partial, attention, rounded, slices, parts)
        self.launch_rows(maps.softmax_kernel, arguments, padded, parts_at_once(padded))
        return attention, rounded

    def round(self, attention: Tensor, *tilings: Tiling) -> Tensor:
        """The padded copy of a map in the volumes' dtype, for kernels with these tilings."""
        slices = attention.shape[1]
        padded = tuning.padded(slices, *tilings)
        rounded = self.scratch("rounded", self.batch, padded, padded, dtype=self.dtype)
        self.launch_rows(maps.round_kernel, (attention, rounded, slices), padded)
        return rounded

    def softmax_backward(
        self, partial: Tensor, attention: Tensor, betas: Tensor | None = None, step: int = 0
    ) -> tuple[Tensor, Tensor]:
        """The padded gradient of the logits, and ``rowsum(A * D)`` ``(N, SP)``; without betas they count as one."""
        parts, padded = partial.shape[1:3]
        grad_logits = self.scratch("grad_logits", self.batch, padded, padded, dtype=self.dtype)
        row_dots = self.empty(self.batch, padded)
        scales = row_dots if betas is None else betas
        arguments = (partial, attention, scales, grad_logits, row_dots, step, attention.shape[1], parts)
        # 0 without betas; else 1 or 2, for they may come in the caller's dtype or in ours.
        scaled = 0 if betas is None else 1 + (betas.dtype == self.precise)
        self.launch_rows(maps.softmax_backward_kernel, arguments, padded, parts_at_once(padded), scaled)
        return grad_logits, row_dots

    # Narrow --------------------------------------------------------------------------------------------------------

    def fold(self, weights: Projections, columns: int | None = None) -> Folded:
        """Block-diagonal weights of so many columns; without columns M and W side by side, ``(C, 2 C)``."""
        side_by_side = columns is None
        columns = columns or self.channels
        shape = (columns, 2 * columns) if side_by_side else (3, columns, columns)
        folded = Folded(self.empty(*shape, dtype=self.dtype), self.empty(2, columns))
        theta_weight, theta_bias, phi_weight, _, g_weight, g_bias = weights
        tile = max(16, tuning.bucket(columns)) if INTERPRETED else FOLD_TILES[columns > FOLD_MANY]
        self.launch(
            narrow.fold_kernel,
            (-(-columns // tile)) ** 2,
            (4, 1),
            (theta_weight, theta_bias, phi_weight, g_weight, g_bias, *folded),
            *(self.channels, columns // self.channels, columns, tile, side_by_side),
        )
        return folded

    def _narrow_cut(self, geometry: Geometry, tiling: Tiling, blocks: int) -> tuple[Cut, tuple[int, ...]]:
        """The cut, and the numbers that every kernel of the narrow regime takes."""
        made = cut(geometry, tiling, self.channels, self.batch, blocks, self.processors)
        return made, (geometry.slices, geometry.inner, made.chunks, made.parts, *geometry.strides)

    def narrow_map(self, x: Tensor, folded: Folded, geometry: Geometry, tiling: Tiling, padded: int) -> Tensor:
        """Partial logits, padded to so many slices."""
        blocks = padded // tiling.rows
        made, numbers = self._narrow_cut(geometry, tiling, blocks)
        partial = self.scratch("partial", self.batch, made.parts, padded, padded)
        self.launch(
            narrow.map_kernel,
            made.parts * blocks * self.batch,
            (tiling.warps, tiling.stages),
            (x, *folded, partial, *numbers),
            *(self.channels, made.places, tiling.columns, padded, tiling.rows, geometry.flat),
            *(tiling.split, self.shrink, self.precision),
        )
        return partial

    def narrow_mix(
        self,
        x: Tensor,
        rounded: Tensor,
        folded: Folded,
        betas: Tensor,
        step: int,
        out: Tensor,
        geometry: Geometry,
        tiling: Tiling,
    ) -> None:
        """``out = x + beta (Wv A x + bv)``."""
        padded = rounded.shape[1]
        blocks = padded // tiling.rows
        made, numbers = self._narrow_cut(geometry, tiling, blocks)
        self.launch(
            narrow.mix_kernel,
            made.parts * blocks * self.batch,
            (tiling.warps, tiling.stages),
            (x, rounded, *folded, betas, out, step, *numbers),
            *(self.channels, made.places, tiling.columns, padded, tiling.rows, geometry.flat, self.precision),
        )

    def narrow_map_backward(
        self, x: Tensor, grad: Tensor, rounded: Tensor, folded: Folded, geometry: Geometry, tiling: Tiling, need: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Partial ``D``; with ``need`` partial gradients of the value projection; partial sums of the gradient."""
        padded = rounded.shape[1]
        made, numbers = self._narrow_cut(geometry, tiling, 1)
        partial = self.scratch("partial", self.batch, made.parts, padded, padded)
        sums = self._narrow_sums(made, tiling)
        self.launch(
            narrow.map_backward_kernel,
            made.parts * self.batch,
            (tiling.warps, tiling.stages),
            (x, grad, rounded, folded.matrices, partial, *sums, *numbers),
            *(self.channels, made.places, tiling.columns, padded, geometry.flat, need, self.precision),
        )
        return partial, *sums

    def narrow_mix_backward(
        self,
        x: Tensor,
        grad: Tensor,
        rounded: Tensor,
        grad_logits: Tensor,
        folded: Folded,
        betas: Tensor,
        step: int,
        grad_x: Tensor | None,
        geometry: Geometry,
        tiling: Tiling,
        need: bool,
    ) -> tuple[Tensor, Tensor]:
        """Fills ``grad_x``; with ``need`` returns partial gradients of M and u."""
        made, numbers = self._narrow_cut(geometry, tiling, 1)
        sums = self._narrow_sums(made, tiling)
        target = x if grad_x is None else grad_x
        self.launch(
            narrow.mix_backward_kernel,
            made.parts * self.batch,
            (tiling.warps, tiling.stages),
            (x, grad, rounded, grad_logits, *folded, betas, target, *sums, step, *numbers),
            *(self.channels, made.places, tiling.columns, rounded.shape[1], geometry.flat),
            *(grad_x is not None, need, self.precision),
        )
        return sums

    def _narrow_sums(self, made: Cut, tiling: Tiling) -> tuple[Tensor, Tensor]:
        """Room for a matrix and a vector of each program's."""
        programs, columns = self.batch * made.parts, tiling.columns
        return self.scratch("matrices", programs, columns, columns), self.scratch("vectors", programs, columns)

    def unfold(
        self,
        sums: tuple[Tensor, Tensor],
        betas: Tensor,
        step: int,
        total: Tensor,
        total_vector: Tensor,
        matrix: bool,
        scaled: bool,
    ) -> None:
        """Adds partial gradients of block-diagonal weights to those of the folded ones."""
        parts, columns = sums[1].shape
        width = tuning.bucket(self.channels)
        rows = width if INTERPRETED else 1
        self.launch(
            narrow.unfold_kernel,
            -(-self.channels // rows) if matrix else 1,
            (8, 1),
            (*sums, betas, total, total_vector, step, parts),
            *(self.channels, columns // self.channels, columns, width, rows, parts_at_once(width), matrix, scaled),
        )

    # Wide ----------------------------------------------------------------------------------------------------------

    def contract(self, left: Tensor, right: Tensor, geometry: Geometry, shrink: float = 1.0) -> Tensor:
        """Partial maps ``<left_i, right_j> / shrink`` of packed volumes, or of rows ``(V, C)`` of a wider matrix."""
        tiling = self.tiling("contract", geometry)
        padded = tuning.bucket(geometry.slices)
        blocks = (-(-geometry.slices // tiling.rows)) ** 2
        made = cut(geometry, tiling, self.channels, self.batch, blocks, self.processors)
        partial = self.scratch("partial", self.batch, made.parts, padded, padded)
        self.launch(
            wide.contract_kernel,
            blocks * made.parts * self.batch,
            (tiling.warps, tiling.stages),
            (left, right, partial, geometry.slices, geometry.inner, made.chunks, made.parts, *geometry.strides),
            *(self.channels, made.channels, made.places, tiling.columns, padded, tiling.rows, tiling.rows),
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
        base: tuple[Tensor, Tensor, int] | None = None,
        rank_one: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """``out = A volume``.

        With ``base = (x, betas, step)`` it is ``x + beta A volume``; with ``rank_one = (a, b)``, ``(N, SP)`` over
        slices and ``(C,)``, their product is added.
        """
        tiling = self.tiling("mix_slices", geometry)
        made = cut(geometry, tiling, self.channels, self.batch, 1, self.processors)
        rest, betas, step = base or (volume, matrix, 0)
        blocks = -(-geometry.slices // tiling.rows)
        self.launch(
            wide.mix_kernel,
            blocks * made.chunks * self.batch,
            (tiling.warps, tiling.stages),
            (
                *(volume, matrix, rest, betas, *(rank_one or (matrix, matrix)), out),
                *(step, geometry.slices, geometry.inner, made.chunks, *geometry.strides),
            ),
            *(self.channels, made.channels, made.places, tiling.columns, matrix.shape[1], tiling.rows, tiling.rows),
            *(transposed, base is not None, rank_one is not None, _row(volume), _row(out), self.precision),
        )


class Weights:
    """The weights of a block as the steps need them, each form made at its first use.

    Args:
        machine: launches the kernels.
        weights: the published ones.
        betas: one per step.
        scale: factor on the logits. It stays out of the weights, which half precision could not hold that small.
    """

    def __init__(self, machine: Machine, weights: Projections, betas: Tensor, scale: float) -> None:
        self.published = Projections(*(weight.contiguous() for weight in weights))
        self.betas = betas.contiguous()
        self.scale = scale
        # What the gradient of a step's logits is multiplied by.
        self.logit_betas = self.betas if scale == 1 else self.betas.to(machine.precise) * scale
        self._machine = machine
        self._narrow: dict[int, Folded] = {}
        self._wide: tuple[Folded, Tensor] | None = None
        self._matrices: tuple[Tensor, Tensor] | None = None
        self._precise_betas: tuple[Tensor, ...] = ()

    def narrow(self, columns: int) -> Folded:
        """Block-diagonal, for tiles of so many columns."""
        if columns not in self._narrow:
            self._narrow[columns] = self._machine.fold(self.published, columns)
        return self._narrow[columns]

    def wide(self) -> tuple[Folded, Tensor]:
        """``M`` and ``W`` side by side, with ``u`` and ``b``; and these two in the dtype of the volumes."""
        if self._wide is None:
            folded = self._machine.fold(self.published)
            self._wide = folded, folded.vectors.to(self._machine.dtype)
        return self._wide

    def matrices(self) -> tuple[Tensor, Tensor]:
        """``M`` and ``W``, ``(C, C)`` in the dtype of the volumes."""
        if self._matrices is None:
            self._matrices = self.wide()[0].matrices.chunk(2, 1)
        return self._matrices

    def beta(self, step: int) -> Tensor:
        """A step's beta in the accumulation dtype."""
        if not self._precise_betas:
            self._precise_betas = self.betas.to(self._machine.precise).unbind()
        return self._precise_betas[step]

    def value(self, rows: Tensor) -> Tensor:
        """Value of voxels ``(V, C)``."""
        return torch.addmm(self.wide()[1][1], rows, self.matrices()[1])

    def project(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Query, ``shrink`` times smaller, and value of voxels ``(V, C)``.

        They come of one product where both then start aligned: the voxels are read once.
        """
        folded, biases = self.wide()
        channels, shrink = rows.shape[1], self._machine.shrink
        if shrink != 1 or channels * rows.element_size() % ALIGNMENT:
            query = torch.addmm(biases[0], rows, self.matrices()[0], alpha=shrink, beta=shrink)
            return query, self.value(rows)
        both = torch.addmm(biases.view(-1), rows, folded.matrices)
        return both[:, :channels], both[:, channels:]


def _forward_step(
    machine: Machine, weights: Weights, step: int, x: Tensor, axis: int, target: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One step; returns its output, in ``target`` where that can be, and its map. ``target`` may be ``x``."""
    shape = geometry(machine.shape, axis)
    first, second = machine.tiling("map", shape), machine.tiling("mix", shape)
    if first and second:
        padded = tuning.padded(shape.slices, first, second)
        partial = machine.narrow_map(x, weights.narrow(first.columns), shape, first, padded)
        attention, rounded = machine.softmax(_scaled(partial, weights.scale), shape.slices)
        if target is None or (target is x and second.rows < padded):
            target = empty_packed(machine.shape, x)
        folded = weights.narrow(second.columns)
        machine.narrow_mix(x, rounded, folded, weights.betas, step, target, shape, second)
        return target, attention
    if target is None:
        target = empty_packed(machine.shape, x)
    base = (x, weights.betas, step)
    query, value = weights.project(rows_of(x))
    partial = _scaled(machine.contract(query, x, shape, machine.shrink), weights.scale)
    attention, rounded = machine.softmax(partial, shape.slices)
    machine.mix(rounded, value, target, shape, base=base)
    return target, attention


def _remix(machine: Machine, weights: Weights, step: int, x: Tensor, attention: Tensor, axis: int) -> Tensor:
    """What a step puts out, from its kept map."""
    shape = geometry(machine.shape, axis)
    out = empty_packed(machine.shape, x)
    tiling = machine.tiling("mix", shape)
    if tiling:
        rounded = machine.round(attention, tiling)
        machine.narrow_mix(x, rounded, weights.narrow(tiling.columns), weights.betas, step, out, shape, tiling)
    else:
        value = weights.value(rows_of(x))
        machine.mix(machine.round(attention), value, out, shape, base=(x, weights.betas, step))
    return out


def recurrent_slice_attention(
    x: Tensor, weights: Projections, betas: Tensor, axes: Sequence[int], scale: float, keep_inputs: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The whole block; see :mod:`rsa_kernels.ops` for the contract that all backends keep."""
    with OnDevice(x) as (device, stream):
        machine = Machine(x, device, stream, (*weights, betas))
        prepared = Weights(machine, weights, betas, scale)
        volume = pack(x, device, stream)
        maps, inputs = [], []
        for step, axis in enumerate(axes):
            # Without a backward to come, one buffer serves every step; the caller's volume stays as it is.
            own = step > 0 or volume.data_ptr() != x.data_ptr()
            target = volume if own and not keep_inputs else None
            if keep_inputs and step:
                inputs.append(rows_of(volume).reshape(-1))
            volume, attention = _forward_step(machine, prepared, step, volume, axis, target)
            maps.append(attention)
        return unpack(volume, x, device, stream), maps, inputs


class Totals(NamedTuple):
    """The gradients of the folded weights, summed over steps, and what betas' gradients are made of."""

    m: Tensor
    u: Tensor
    g_weight: Tensor
    grad_sums: Tensor
    """For each step, the sum of the upstream gradient over voxels: ``(steps, C)``."""
    row_dots: list[Tensor]
    """For each step, last first, ``rowsum(A * D)``: ``(N, SP)``."""

    @classmethod
    def zeros(cls, machine: Machine, steps: int) -> "Totals":
        """Sums to add to."""
        channels = machine.channels
        zeros = machine.empty(channels + 1 + steps, channels).zero_()
        m, u, grad_sums = zeros.split((channels, 1, steps))
        # What leaves is a tensor of its own: operators promise their results' place in memory, too.
        return cls(m, u[0], machine.empty(channels, channels).zero_(), grad_sums, [])


class Step(NamedTuple):
    """What the backward pass of a step works on."""

    index: int
    grad: Tensor
    """Of the step's output."""
    x: Tensor
    attention: Tensor
    geometry: Geometry
    grad_x: Tensor | None
    """Room for the gradient of ``x``, if it is wanted; it may be ``grad``."""
    need_folded: bool
    """Whether the gradients of M and u are wanted."""
    need_value: bool
    """Whether that of the value projection is."""


def _narrow_backward(
    machine: Machine, weights: Weights, totals: Totals, step: Step, first: Tiling, second: Tiling
) -> None:
    index, grad, x, attention, shape, grad_x, need_folded, need_value = step
    betas = weights.betas
    rounded = machine.round(attention, first, second)
    folded = weights.narrow(first.columns)
    partial, *sums = machine.narrow_map_backward(x, grad, rounded, folded, shape, first, need_value)
    machine.unfold(sums, betas, index, totals.g_weight, totals.grad_sums[index], need_value, True)
    grad_logits, row_dots = machine.softmax_backward(partial, attention, weights.logit_betas, index)
    totals.row_dots.append(row_dots)
    if grad_x is None and not need_folded:
        return
    folded = weights.narrow(second.columns)
    sums = machine.narrow_mix_backward(
        x, grad, rounded, grad_logits, folded, betas, index, grad_x, shape, second, need_folded
    )
    if need_folded:
        machine.unfold(sums, betas, index, totals.m, totals.u, True, False)


def _wide_backward(machine: Machine, weights: Weights, totals: Totals, step: Step) -> None:
    index, grad, x, attention, shape, grad_x, need_folded, need_value = step
    betas = weights.betas
    u = weights.wide()[0].vectors[0]
    m, w = weights.matrices()
    rows, grad_rows = rows_of(x), rows_of(grad)
    projected = grad_rows @ w.T
    partial = machine.contract(projected, x, shape)
    grad_logits, row_dots = machine.softmax_backward(partial, attention, weights.logit_betas, index)
    totals.row_dots.append(row_dots)
    torch.sum(grad_rows, 0, dtype=machine.precise, out=totals.grad_sums[index])
    rounded = machine.round(attention)
    moved = machine.scratch("moved", len(rows), machine.channels, dtype=machine.dtype)
    if need_value:
        machine.mix(rounded, grad, moved, shape, transposed=True)
        totals.g_weight.addcmul_(_correlate(moved, rows), weights.beta(index))
    # dX = G + beta A^T R + (dL^T X) M + (dL X) M^T + c u, c the columns' sums of dL. From here on G may be gone.
    if grad_x is not None:
        base, rank_one = (grad, betas, index), (grad_logits.sum(1, dtype=machine.precise), u)
        machine.mix(rounded, projected, grad_x, shape, transposed=True, base=base, rank_one=rank_one)
        machine.mix(grad_logits, x, moved, shape, transposed=True)
        grad_x_rows = grad_rows if grad_x is grad else rows_of(grad_x)
        grad_x_rows.addmm_(moved, m)
    if grad_x is None and not need_folded:
        return
    machine.mix(grad_logits, x, moved, shape)
    if grad_x is not None:
        grad_x_rows.addmm_(moved, m.T)
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
    with OnDevice(x) as (device, stream):
        machine = Machine(x, device, stream, (*weights, betas))
        prepared = Weights(machine, weights, betas, scale)
        volumes = [pack(volume, device, stream) for volume in (x, *(_unflat(flat, x.shape) for flat in inputs))]
        for step in range(len(volumes) - 1, len(axes) - 1):
            volumes.append(_remix(machine, prepared, step, volumes[-1], maps[step], axes[step]))

        need_folded = bool(needs.theta_weight or needs.theta_bias or needs.phi_weight)
        totals = Totals.zeros(machine, len(axes))
        upstream = pack(grad, device, stream)
        # Every step but the last reads and writes the one buffer of ours: the caller's gradient stays as it is.
        grad_x = upstream if upstream.data_ptr() != grad.data_ptr() else None
        for index in reversed(range(len(axes))):
            wanted = index > 0 or needs.x
            if grad_x is None and wanted:
                grad_x = empty_packed(machine.shape, x)
            shape = geometry(machine.shape, axes[index])
            target = grad_x if wanted else None
            step = Step(index, upstream, volumes.pop(), maps[index], shape, target, need_folded, bool(needs.g_weight))
            first, second = machine.tiling("map_backward", shape), machine.tiling("mix_backward", shape)
            if first and second:
                _narrow_backward(machine, prepared, totals, step, first, second)
            else:
                _wide_backward(machine, prepared, totals, step)
            upstream = grad_x
        gradients = _collect(machine, prepared, totals, weights, needs)
        return gradients._replace(x=unpack(grad_x, x, device, stream) if needs.x else None)


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
        dots = torch.stack([dots.sum() for dots in reversed(totals.row_dots)])
        result["g_bias"] = prepared.betas.to(precise) @ totals.grad_sums
        result["betas"] = dots + totals.grad_sums @ weights.g_bias.to(precise)
    return Gradients(**result)


def slice_attention(query: Tensor, key: Tensor, value: Tensor, axis: int, scale: float) -> tuple[Tensor, Tensor]:
    """The parameter-free core; see :mod:`rsa_kernels.ops` for the contract that all backends keep."""
    with OnDevice(query) as (device, stream):
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
    with OnDevice(query) as (device, stream):
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
            grad_logits, _ = machine.softmax_backward(_scaled(partial, scale), attention)
            if needs[0]:
                grads[0] = mix(grad_logits, key, query, False)
            if needs[1]:
                grads[1] = mix(grad_logits, query, key, True)
        if needs[2]:
            grads[2] = mix(machine.round(attention), upstream, value, True)
        return grads
