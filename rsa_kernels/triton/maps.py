"""The kernels on maps: softmax and its derivative.

A contraction over ``C * P`` terms is split over programs, and each leaves a partial map. Here the partial maps are
summed, always in the same order, so that results repeat bitwise without an atomic. Maps that kernels exchange are
padded with zeros to ``(N, SP, SP)``; those that leave are ``(N, S, S)``.

Products read maps in the dtype of the volume. A row of the logits' gradient sums to zero, which rounding to 16 bits
would break; and what it sums to instead is multiplied by the volume's mean, which can be large. So what rounding takes
from such a row is given back to its smallest entry, where numbers lie closest. (A row of the map needs no such care:
its entries are of one sign, so that their roundings together are no worse than that of the result.)
"""

import triton
import triton.language as tl

from rsa_kernels.triton.tiles import kernel


@triton.jit
def round_rows(matrix, columns, inside, target):
    """Rows ``(BR, SP)`` in the dtype that ``target`` points to, with the sums of their entries ``inside`` kept."""
    dtype = target.dtype.element_ty
    if dtype == matrix.dtype:
        return matrix
    lost = tl.sum(matrix - matrix.to(dtype).to(matrix.dtype), 1)
    size = tl.where(inside, tl.abs(matrix), float("inf"))
    is_smallest = size == tl.min(size, 1)[:, None]
    smallest = tl.min(tl.where(is_smallest, columns[None, :], columns.shape[0]), 1)
    given = (columns[None, :] == smallest[:, None]) & inside
    return tl.where(given, matrix + lost[:, None], matrix).to(dtype)


@triton.jit
def softmax_rows(logits, columns, inside, slices):
    """Softmax over the first ``slices`` entries of rows ``(R, SP)``, zero elsewhere."""
    logits = tl.where(columns[None, :] < slices, logits, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    return tl.where(inside, weights / tl.sum(weights, 1)[:, None], 0.0)


@triton.jit
def rows_of_program(slices, SP: tl.constexpr, BR: tl.constexpr):
    """What a program works on: sample, rows, columns, which entries ``(BR, SP)`` are of the map, padded places."""
    blocks: tl.constexpr = SP // BR
    n = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BR + tl.arange(0, BR)
    j = tl.arange(0, SP)
    return n, i, j, (i[:, None] < slices) & (j[None, :] < slices), (n * SP + i[:, None]) * SP + j[None, :]


@triton.jit
def sum_partial(partial, n, i, j, inside, parts, SP: tl.constexpr, NQ: tl.constexpr):
    """Sums rows ``i`` of ``parts`` padded maps, ``NQ`` at a time, in a fixed order: ``(BR, SP)``."""
    q = tl.arange(0, NQ)
    total = tl.zeros((i.shape[0], SP), partial.dtype.element_ty)
    for first in range(0, parts, NQ):
        index = n * parts + first + q[:, None, None]
        rows = tl.load(
            partial + (index * SP + i[None, :, None]) * SP + j[None, None, :],
            mask=(first + q[:, None, None] < parts) & inside[None, :, :],
            other=0.0,
        )
        total += tl.sum(rows, 0)
    return total


@kernel("attention")
def softmax_kernel(
    partial,
    attention,
    rounded,
    slices: tl.int32,
    parts: tl.int32,
    SP: tl.constexpr,
    BR: tl.constexpr,
    NQ: tl.constexpr,
):
    """Sums partial logits ``(N, parts, SP, SP)``, takes the softmax, writes the map ``(N, S, S)`` and a padded copy.

    One program per ``BR`` rows of the padded map.
    """
    n, i, j, inside, place = rows_of_program(slices, SP, BR)
    weights = softmax_rows(sum_partial(partial, n, i, j, inside, parts, SP, NQ), j, inside, slices)
    tl.store(attention + (n * slices + i[:, None]) * slices + j[None, :], weights, mask=inside)
    tl.store(rounded + place, weights.to(rounded.dtype.element_ty))


@kernel("attention")
def round_kernel(attention, rounded, slices: tl.int32, SP: tl.constexpr, BR: tl.constexpr):
    """Pads maps ``(N, S, S)`` with zeros to ``(N, SP, SP)`` in the volumes' dtype. One program per ``BR`` rows."""
    n, i, j, inside, place = rows_of_program(slices, SP, BR)
    weights = tl.load(attention + (n * slices + i[:, None]) * slices + j[None, :], mask=inside, other=0.0)
    tl.store(rounded + place, weights.to(rounded.dtype.element_ty))


@kernel("attention", "betas", "logit_betas")
def softmax_backward_kernel(
    partial,
    attention,
    betas,
    logit_betas,
    rounded,
    row_dots,
    step: tl.int32,
    slices: tl.int32,
    parts: tl.int32,
    batch: tl.int32,
    dots: tl.int32,
    SP: tl.constexpr,
    BR: tl.constexpr,
    NQ: tl.constexpr,
    SCALED: tl.constexpr,
    PLANES: tl.constexpr,
):
    """``dL = logit_beta * A * (D - rowsum(A * D))`` from partial ``D``, padded and rounded; and ``rowsum(A * D)``.

    One program per ``BR`` rows. ``rounded`` ``(PLANES, N, SP, SP)`` is written whole: 1 is ``dL``, 2 are ``dL`` and
    ``A``, 3 are ``dL^T``, ``beta * A^T`` and ``dL``. ``row_dots`` is ``(steps, N, dots / N)``. Without ``SCALED`` there
    are no betas.
    """
    n, i, j, inside, place = rows_of_program(slices, SP, BR)
    contracted = sum_partial(partial, n, i, j, inside, parts, SP, NQ)
    weights = tl.load(attention + (n * slices + i[:, None]) * slices + j[None, :], mask=inside, other=0.0)
    row_dot = tl.sum(weights * contracted, 1)
    grad = weights * (contracted - row_dot[:, None])
    if SCALED:
        grad *= tl.load(logit_betas + step).to(grad.dtype)
    grad = round_rows(grad, j, inside, rounded)
    plane = batch.to(tl.int64) * SP * SP
    if PLANES == 3:
        transposed = (n * SP + j[None, :]) * SP + i[:, None]
        scaled = tl.load(betas + step).to(weights.dtype) * weights
        tl.store(rounded + transposed, grad)
        tl.store(rounded + plane + transposed, scaled.to(grad.dtype))
        tl.store(rounded + 2 * plane + place, grad)
    else:
        tl.store(rounded + place, grad)
        if PLANES == 2:
            tl.store(rounded + plane + place, weights.to(grad.dtype))
    tl.store(row_dots + step * dots + n * (dots // batch) + i, row_dot)
