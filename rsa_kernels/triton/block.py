"""The ``triton`` backend: the kernels in the order that a block needs them.

A step forward is three launches in the narrow regime (map, softmax, mix), four in the wide one (a product for query and
value, two where they would not be aligned; contraction, softmax, mix). Nothing here waits for the device. See
:mod:`rsa_kernels.ops` for the contract that all backends keep.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rsa_kernels.folding import Gradients, Projections, accumulation_dtype
from rsa_kernels.triton import maps, narrow, tuning, wide
from rsa_kernels.triton.launch import INTERPRETED, OnDevice, bind
from rsa_kernels.triton.tuning import Tiling
from rsa_kernels.triton.volumes import ALIGNMENT, Geometry, empty_packed, geometry, pack, unpack
from rsa_kernels.triton.weights import PAD, collect_kernel, fold_kernel, unfold_kernel

# A program that walks chunks should have some, or its share of a partial map costs more than it saves.
CHUNKS_PER_PROGRAM = 2
# Elements of partial results that a program loads together: they wait for memory at once, not one behind the other.
ROW_ELEMENTS = 8192
# Half precision ends at 65504, and the folded query, a product with two weights, can be larger than either alone: it is
# rounded as many times smaller, and the logits, which are float32, are as many times larger again.
HALF_SHRINK = 2.0**-8
# Elements that a program sums over voxels together, of at most so many channels.
SUM_ELEMENTS = 4096
SUM_CHANNELS = 64


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


def sum_tile(channels: int) -> tuple[int, int]:
    """Voxels and channels that a program sums at a time."""
    columns = min(SUM_CHANNELS, tuning.bucket(channels))
    return SUM_ELEMENTS // columns, columns


def rows_of(volume: Tensor) -> Tensor:
    """A packed volume as ``(voxels, C)``."""
    return volume.permute(0, 2, 3, 4, 1).reshape(-1, volume.shape[1])


def _row(volume: Tensor) -> int:
    """Elements from a voxel to the next in memory."""
    return volume.stride(0) if volume.dim() == 2 else volume.shape[1]


class Folded(NamedTuple):
    """Weights as kernels or products read them; see :func:`rsa_kernels.triton.weights.fold_kernel`."""

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
        self,
        partial: Tensor,
        attention: Tensor,
        scales: tuple[Tensor, Tensor, int] | None = None,
        row_dots: Tensor | None = None,
        planes: int = 1,
    ) -> Tensor:
        """The padded gradient of the logits; fills ``row_dots`` with ``rowsum(A * D)``.

        ``scales`` are the betas, what the logits' gradients are multiplied by, and the step; without them they count as
        one. ``row_dots`` is ``(steps, N, SP or more)``. What comes with it as so many ``planes`` says
        :func:`rsa_kernels.triton.maps.softmax_backward_kernel`.
        """
        parts, padded = partial.shape[1:3]
        shape = (self.batch, padded, padded) if planes == 1 else (planes, self.batch, padded, padded)
        grad_logits = self.scratch("grad_logits", *shape, dtype=self.dtype)
        if row_dots is None:
            row_dots = self.empty(1, self.batch, padded)
        betas, logit_betas, step = scales or (row_dots, row_dots, 0)
        arguments = (partial, attention, betas, logit_betas, grad_logits, row_dots)
        numbers = (step, attention.shape[1], parts, self.batch, self.batch * row_dots.shape[2])
        # 0 without betas; else 1 or 2, for they may come in the caller's dtype or in ours.
        scaled = 0 if scales is None else 1 + (logit_betas.dtype == self.precise)
        self.launch_rows(
            maps.softmax_backward_kernel, (*arguments, *numbers), padded, parts_at_once(padded), scaled, planes
        )
        return grad_logits

    # Weights -------------------------------------------------------------------------------------------------------

    def _products_of_weights(self) -> tuple[int, str]:
        """The side of the tiles, and the precision: weights of 16-bit volumes need be no more exact than in float32."""
        if self.kind == "half" and self.arch.startswith("sm_"):
            # On 8.0 the larger tile does not fit registers.
            widest = 64 if self.channels > 64 and self.arch != "sm_80" else 32
            return min(widest, tuning.bucket(self.channels)), "tf32x3"
        return (max(16, tuning.bucket(self.channels)) if INTERPRETED else 32), "ieee"

    def fold(self, published: Projections, layout: str, columns: int = 0) -> Folded:
        """The weights in a layout of :func:`rsa_kernels.triton.weights.fold_kernel`; in blocks of so many columns."""
        channels = self.channels
        columns = columns or channels
        rows = 3 * channels + min(channels, PAD)
        shape = {"blocks": (3, columns, columns), "row": (channels, 2 * channels), "column": (rows, channels)}[layout]
        vectors_dtype = self.precise if layout == "blocks" else self.dtype
        folded = Folded(self.empty(*shape, dtype=self.dtype), self.empty(2, columns, dtype=vectors_dtype))
        theta_weight, theta_bias, phi_weight, _, g_weight, g_bias = published
        tile, precision = self._products_of_weights()
        self.launch(
            fold_kernel,
            (-(-columns // tile)) ** 2,
            (4, 3 if tile == 64 else 2),
            (theta_weight, theta_bias, phi_weight, g_weight, g_bias, *folded),
            *(channels, columns // channels, columns, tile, layout, rows, precision),
        )
        return folded

    def unfold(self, sums: "Sums", totals: "Totals") -> None:
        """Adds what the programs of all steps have summed to the totals."""
        channels, width, steps = self.channels, tuning.bucket(self.channels), len(totals.vectors) - 1
        rows = width if INTERPRETED else 1
        matrices = sums.w is not None
        self.launch(
            unfold_kernel,
            (2 * -(-channels // rows) if matrices else 0) + steps + 1,
            (4 if self.kind == "double" else 8, 1),
            (
                *(sums.w if matrices else sums.b, sums.m if matrices else sums.u, sums.b, sums.u, totals.matrices),
                *(totals.vectors, steps, sums.slots_w, sums.slots_m),
            ),
            *(channels, sums.columns_w // channels, sums.columns_w, sums.columns_m // channels, sums.columns_m),
            *(width, rows, parts_at_once(width), matrices),
        )

    def collect(self, published: Projections, betas: Tensor, totals: "Totals") -> list[Tensor]:
        """The gradients of the published weights and of the betas, in their order and dtypes."""
        gradients = [torch.empty_like(tensor) for tensor in (*published, betas)]
        theta_weight, theta_bias, phi_weight, _, _, g_bias = published
        tile, precision = self._products_of_weights()
        tile = tile if INTERPRETED else 32  # two products at once: larger tiles do not fit registers
        steps, batch, padded = totals.row_dots.shape
        self.launch(
            collect_kernel,
            (-(-self.channels // tile)) ** 2,
            (4 if self.kind == "double" else 8, 2),
            (
                *(theta_weight, theta_bias, phi_weight, g_bias, betas),
                *(totals.matrices, totals.vectors, totals.row_dots, *gradients, steps, batch * padded),
            ),
            *(self.channels, tile, precision),
        )
        return gradients

    # Narrow --------------------------------------------------------------------------------------------------------

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
        self, step: "Step", folded: Folded, betas: Tensor, sums: "Sums", tiling: Tiling, padded: int
    ) -> Tensor:
        """Partial ``D``; adds to the sums for the value projection, and keeps that of the upstream gradient."""
        made, numbers = self._narrow_cut(step.geometry, tiling, 1)
        partial = self.scratch("partial", self.batch, made.parts, padded, padded)
        self.launch(
            narrow.map_backward_kernel,
            made.parts * self.batch,
            (tiling.warps, tiling.stages),
            (
                *(step.x, step.grad, step.attention, folded.matrices, betas, partial, sums.w, sums.b),
                *(step.index, sums.slots_w, *numbers),
            ),
            *(self.channels, made.places, tiling.columns, padded, step.geometry.flat, step.need_value, self.precision),
        )
        return partial

    def narrow_mix_backward(
        self, step: "Step", matrices: Tensor, folded: Folded, betas: Tensor, sums: "Sums", tiling: Tiling
    ) -> None:
        """Fills ``step.grad_x``, and adds to the sums for M and u, where they are wanted."""
        made, numbers = self._narrow_cut(step.geometry, tiling, 1)
        target = step.x if step.grad_x is None else step.grad_x
        self.launch(
            narrow.mix_backward_kernel,
            made.parts * self.batch,
            (tiling.warps, tiling.stages),
            (
                *(step.x, step.grad, matrices, *folded, betas, target, sums.m, sums.u),
                *(step.index, self.batch, *numbers),
            ),
            *(self.channels, made.places, tiling.columns, matrices.shape[2], step.geometry.flat),
            *(step.grad_x is not None, step.need_folded, self.precision),
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
    ) -> None:
        """``out = A volume``; with ``base = (x, betas, step)`` it is ``x + beta A volume``."""
        tiling = self.tiling("mix_slices", geometry)
        made = cut(geometry, tiling, self.channels, self.batch, 1, self.processors)
        rest, betas, step = base or (volume, matrix, 0)
        blocks = -(-geometry.slices // tiling.rows)
        self.launch(
            wide.mix_kernel,
            blocks * made.chunks * self.batch,
            (tiling.warps, tiling.stages),
            (
                *(volume, matrix, rest, betas, out),
                *(step, geometry.slices, geometry.inner, made.chunks, *geometry.strides),
            ),
            *(self.channels, made.channels, made.places, tiling.columns, matrix.shape[1], tiling.rows, tiling.rows),
            *(transposed, base is not None, _row(volume), _row(out), self.precision),
        )

    def mix_backward(self, step: "Step", matrices: Tensor, moved: Tensor, first: int, count: int) -> None:
        """Fills ``moved`` with products of so many factors, see :func:`rsa_kernels.triton.wide.mix_backward_kernel`."""
        shape = step.geometry
        tiling = self.tiling("mix_slices", shape)
        made = cut(shape, tiling, self.channels, self.batch, 1, self.processors)
        blocks = -(-shape.slices // tiling.rows)
        self.launch(
            wide.mix_backward_kernel,
            blocks * made.chunks * self.batch * count,
            (tiling.warps, tiling.stages),
            (
                *(step.x, step.grad, matrices, moved, first, count, self.batch),
                *(shape.slices, shape.inner, made.chunks, *shape.strides),
            ),
            *(self.channels, made.channels, made.places, tiling.columns, matrices.shape[2], tiling.rows, tiling.rows),
            *(moved.stride(0), self.precision),
        )

    def sum_voxels(self, step: "Step", moved: Tensor, sums: "Sums", need: bool) -> None:
        """Keeps the upstream gradient's sum over voxels; with ``need`` adds to the sums that of ``dL X``."""
        rows, columns = sum_tile(self.channels)
        self.launch(
            wide.sum_kernel,
            sums.slots_w * -(-self.channels // columns),
            (4, 1),
            (step.grad, moved, sums.b, sums.u, step.index, len(moved), sums.slots_w),
            *(self.channels, columns, rows, moved.stride(0), need),
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
        self._folded: dict[tuple[str, int], Folded] = {}

    def folded(self, layout: str, columns: int = 0) -> Folded:
        """In a layout of :func:`rsa_kernels.triton.weights.fold_kernel`."""
        folded = self._folded.get((layout, columns))
        if folded is None:
            folded = self._folded[layout, columns] = self._machine.fold(self.published, layout, columns)
        return folded

    def narrow(self, columns: int) -> Folded:
        """Block-diagonal, for tiles of so many columns."""
        return self.folded("blocks", columns)

    def project(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Query, ``shrink`` times smaller, and value of voxels ``(V, C)``.

        They come of one product where both then start aligned: the voxels are read once.
        """
        matrices, biases = self.folded("row")
        channels, shrink = rows.shape[1], self._machine.shrink
        if shrink != 1 or channels * rows.element_size() % ALIGNMENT:
            query = torch.addmm(biases[0], rows, matrices[:, :channels], alpha=shrink, beta=shrink)
            return query, torch.addmm(biases[1], rows, matrices[:, channels:])
        both = torch.addmm(biases.view(-1), rows, matrices)
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
        matrices, biases = weights.folded("column")
        value = torch.addmm(biases[1], rows_of(x), matrices[machine.channels : 2 * machine.channels].T)
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
                inputs.append(volume.permute(0, 2, 3, 4, 1))
            volume, attention = _forward_step(machine, prepared, step, volume, axis, target)
            maps.append(attention)
        return unpack(volume, x, device, stream), maps, inputs


class Sums(NamedTuple):
    """Sums that the programs of a regime keep, each in slots of its own, over all steps."""

    columns_w: int
    columns_m: int
    slots_w: int
    slots_m: int
    w: Tensor | None
    """For the value projection, ``(slots_w, columns_w, columns_w)``; the wide regime adds to the totals at once."""
    m: Tensor | None
    """For M, ``(slots_m, columns_m, columns_m)``."""
    b: Tensor
    """Of the upstream gradient over voxels, ``(steps, slots_w, columns_w)``."""
    u: Tensor
    """For u, ``(slots_m, columns_m)``."""


class Totals(NamedTuple):
    """The gradients of the folded weights, summed over steps, and what betas' gradients are made of."""

    matrices: Tensor
    """Of Wv, and of M, transposed: ``(2 C, C)``."""
    vectors: Tensor
    """For each step, the sum of the upstream gradient over voxels, and last the gradient of u: ``(steps + 1, C)``."""
    row_dots: Tensor
    """For each step ``rowsum(A * D)``, ``(steps, N, SP)``."""


class Plan(NamedTuple):
    """How a step goes backward."""

    geometry: Geometry
    tilings: tuple[Tiling, Tiling] | None
    """Of the two kernels of the narrow regime."""
    padded: int

    @property
    def group(self) -> tuple[int, int]:
        """Steps with the same columns share their sums."""
        return (self.tilings[0].columns, self.tilings[1].columns) if self.tilings else (0, 0)


def _plan(machine: Machine, axis: int) -> Plan:
    shape = geometry(machine.shape, axis)
    first, second = machine.tiling("map_backward", shape), machine.tiling("mix_backward", shape)
    if first and second:
        return Plan(shape, (first, second), tuning.padded(shape.slices, first, second))
    return Plan(shape, None, tuning.bucket(shape.slices))


def _room(machine: Machine, plans: Sequence[Plan]) -> tuple[Totals, dict[tuple[int, int], Sums]]:
    """Totals, and sums for each group, all zero and of one allocation."""
    channels, steps = machine.channels, len(plans)
    padded = max(plan.padded for plan in plans)
    sizes = [2 * channels * channels, (steps + 1) * channels, steps * machine.batch * padded]
    groups = {}
    for plan in plans:
        if plan.tilings:
            slots = [
                machine.batch * cut(plan.geometry, tiling, channels, machine.batch, 1, machine.processors).parts
                for tiling in plan.tilings
            ]
        else:
            rows, columns = sum_tile(channels)
            voxels = math.prod(machine.shape) // channels
            slots = [max(1, min(-(-voxels // rows), 2 * machine.processors // -(-channels // columns)))] * 2
        groups[plan.group] = [max(pair) for pair in zip(slots, groups.get(plan.group, (1, 1)), strict=True)]
    for (columns_w, columns_m), (slots_w, slots_m) in groups.items():
        sizes += [slots_w * columns_w**2, slots_m * columns_m**2]
        sizes += [steps * slots_w * (columns_w or channels), slots_m * (columns_m or channels)]
    aligned = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    matrices, vectors, row_dots, *rest = machine.like.new_zeros(sum(aligned), dtype=machine.precise).split(aligned)
    totals = Totals(
        matrices[: sizes[0]].view(2 * channels, channels),
        vectors[: sizes[1]].view(steps + 1, channels),
        row_dots[: sizes[2]].view(steps, machine.batch, padded),
    )
    sums = {}
    for index, ((columns_w, columns_m), slots) in enumerate(groups.items()):
        w, m, b, u = rest[4 * index : 4 * index + 4]
        if columns_w:
            sums[columns_w, columns_m] = Sums(columns_w, columns_m, *slots, w, m, b, u)
        else:
            sums[0, 0] = Sums(channels, channels, *slots, None, None, b, u)
    return totals, sums


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


def _narrow_backward(machine: Machine, weights: Weights, totals: Totals, sums: Sums, step: Step, plan: Plan) -> None:
    first, second = plan.tilings
    betas = weights.betas
    partial = machine.narrow_map_backward(step, weights.narrow(first.columns), betas, sums, first, plan.padded)
    scales = (betas, weights.logit_betas, step.index)
    matrices = machine.softmax_backward(partial, step.attention, scales, totals.row_dots, planes=2)
    if step.grad_x is not None or step.need_folded:
        machine.narrow_mix_backward(step, matrices, weights.narrow(second.columns), betas, sums, second)


def _wide_backward(machine: Machine, weights: Weights, totals: Totals, sums: Sums, step: Step) -> None:
    channels = machine.channels
    column = weights.folded("column").matrices
    rows, grad_rows = rows_of(step.x), rows_of(step.grad)
    # Three volumes side by side; until they are made, what the gradient is projected to is where the first will be.
    moved = machine.scratch("moved", len(rows), len(column), dtype=machine.dtype)
    torch.mm(grad_rows, column[channels : 2 * channels], out=moved[:, :channels])
    partial = machine.contract(moved, step.x, step.geometry)
    scales = (weights.betas, weights.logit_betas, step.index)
    matrices = machine.softmax_backward(partial, step.attention, scales, totals.row_dots, planes=3)
    need_x = step.grad_x is not None
    first = 0 if need_x else 1 if step.need_value else 2
    last = 3 if need_x or step.need_folded else 2 if step.need_value else 0
    if last > first:
        machine.mix_backward(step, matrices, moved, first, last - first)
    machine.sum_voxels(step, moved, sums, step.need_folded)
    # The second volume is correlated for the value projection, the third for M.
    start, end = 0 if step.need_value else channels, 2 * channels if step.need_folded else channels
    if end > start:
        _correlate(moved[:, channels + start : channels + end], rows, totals.matrices[start:end])
    if need_x:
        # dX = G + (dL^T X) M + (beta A^T G) Wv + (dL X) M^T + c u. From here on G may be gone.
        torch.addmm(grad_rows, moved, column, out=grad_rows if step.grad_x is step.grad else rows_of(step.grad_x))


def _correlate(columns: Tensor, rows: Tensor, total: Tensor) -> None:
    """Adds ``columns^T rows``, summed in the accumulation dtype, to ``total``."""
    if total.dtype == rows.dtype:
        total.addmm_(columns.T, rows)
    elif rows.is_cuda:
        torch.addmm(total, columns.T, rows, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(columns.T.float(), rows.float())


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
        volumes = [pack(volume, device, stream) for volume in (x, *(kept.permute(0, 4, 1, 2, 3) for kept in inputs))]
        maps = [attention.contiguous() for attention in maps]
        for step in range(len(volumes) - 1, len(axes) - 1):
            volumes.append(_remix(machine, prepared, step, volumes[-1], maps[step], axes[step]))

        need_weights = any(needs[1:])
        need_folded = bool(needs.theta_weight or needs.theta_bias or needs.phi_weight)
        plans = [_plan(machine, axis) for axis in axes]
        totals, sums = _room(machine, plans)
        upstream = pack(grad, device, stream)
        # Every step but the last reads and writes the one buffer of ours: the caller's gradient stays as it is.
        grad_x = upstream if upstream.data_ptr() != grad.data_ptr() else None
        for index in reversed(range(len(axes))):
            wanted = index > 0 or needs.x
            if grad_x is None and wanted:
                grad_x = empty_packed(machine.shape, x)
            plan = plans[index]
            target = grad_x if wanted else None
            step = Step(
                *(index, upstream, volumes.pop(), maps[index], plan.geometry, target, need_folded, bool(needs.g_weight))
            )
            if plan.tilings:
                _narrow_backward(machine, prepared, totals, sums[plan.group], step, plan)
            else:
                _wide_backward(machine, prepared, totals, sums[plan.group], step)
            upstream = grad_x
        gradients = [None] * len(needs[1:])
        if need_weights:
            for group in sums.values():
                machine.unfold(group, totals)
            gradients = machine.collect(prepared.published, prepared.betas, totals)
        return Gradients(unpack(grad_x, x, device, stream) if needs.x else None, *gradients)


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
        attention = attention.contiguous()
        grads: list[Tensor | None] = [None, None, None]

        def mix(matrix: Tensor, volume: Tensor, like: Tensor, transposed: bool) -> Tensor:
            out = empty_packed(machine.shape, like)
            machine.mix(matrix, pack(volume, device, stream), out, shape, transposed)
            return unpack(out, like, device, stream)

        if needs[0] or needs[1]:
            partial = machine.contract(upstream, pack(value, device, stream), shape)
            grad_logits = machine.softmax_backward(_scaled(partial, scale), attention)
            if needs[0]:
                grads[0] = mix(grad_logits, key, query, False)
            if needs[1]:
                grads[1] = mix(grad_logits, query, key, True)
        if needs[2]:
            grads[2] = mix(machine.round(attention), upstream, value, True)
        return grads
