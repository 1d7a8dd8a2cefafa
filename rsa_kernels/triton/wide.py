"""The kernels of the wide regime: contraction and mix alone; the library's matrix products do the projections.

They serve any number of slices and channels: the map is cut into blocks of ``BI x BJ``, the channels into blocks of
``BC``. :func:`rsa_kernels.slice_attention`, which has no projections, runs on them too.
"""

import triton
import triton.language as tl

from rsa_kernels.triton.tiles import dot, kernel, places


@triton.jit
def place_columns(
    chunk,
    P2,
    v1,
    v2,
    C: tl.constexpr,
    BC: tl.constexpr,
    PB: tl.constexpr,
    K: tl.constexpr,
):
    """Where the columns of a chunk lie: positions as voxels from the sample's first, channels, which exist.

    A chunk holds ``PB`` positions and ``BC`` channels of each.
    """
    channel_blocks: tl.constexpr = (C + BC - 1) // BC
    group = chunk // channel_blocks
    blocks = tl.cdiv(P2, PB)
    outer = group // blocks
    first = (group - outer * blocks) * PB
    k = tl.arange(0, K)
    place = k // BC
    channel = chunk % channel_blocks * BC + k % BC
    exists = (place < PB) & (place < P2 - first) & (channel < C)
    return outer * v1.to(tl.int64) + first * v2.to(tl.int64), place * v2, channel, exists


@triton.jit
def load_tile(volume, start, offsets, channel, exists, rows, slices, vs, ROW: tl.constexpr):
    """A tile of slices ``rows``; ``ROW`` elements lie between neighbouring voxels."""
    entries = (start + places(rows, offsets, vs, 1)) * ROW + channel[None, :]
    return tl.load(volume + entries, mask=(rows[:, None] < slices) & exists[None, :], other=0.0)


@kernel()
def contract_kernel(
    left,
    right,
    partial,
    slices: tl.int32,
    P2: tl.int32,
    chunks: tl.int32,
    parts: tl.int32,
    vn: tl.int64,
    vs: tl.int64,
    v1: tl.int64,
    v2: tl.int64,
    C: tl.constexpr,
    BC: tl.constexpr,
    PB: tl.constexpr,
    K: tl.constexpr,
    SP: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    LEFT_ROW: tl.constexpr,
    RIGHT_ROW: tl.constexpr,
    SHRINK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial maps ``<left_i, right_j> / SHRINK``, ``(N, parts, SP, SP)``; reads each once per block of the other.

    Blocks wholly beyond the last slice are neither made nor written; who sums the parts does not read them.
    """
    column_blocks = tl.cdiv(slices, BJ)
    blocks = tl.cdiv(slices, BI) * column_blocks
    block = tl.program_id(0) % blocks
    part = tl.program_id(0) // blocks % parts
    n = (tl.program_id(0) // blocks // parts).to(tl.int64)
    left += n * vn * LEFT_ROW
    right += n * vn * RIGHT_ROW
    i = block // column_blocks * BI + tl.arange(0, BI)
    j = block % column_blocks * BJ + tl.arange(0, BJ)
    total = tl.zeros((BI, BJ), partial.dtype.element_ty)
    for chunk in range(part, chunks, parts):
        start, offsets, channel, exists = place_columns(chunk, P2, v1, v2, C, BC, PB, K)
        rows = load_tile(left, start, offsets, channel, exists, i, slices, vs, LEFT_ROW)
        columns = load_tile(right, start, offsets, channel, exists, j, slices, vs, RIGHT_ROW)
        total = dot(rows, tl.trans(columns), total, PRECISION)
    tl.store(partial + (n * parts + part) * SP * SP + i[:, None] * SP + j[None, :], total / SHRINK)


@kernel("betas")
def mix_kernel(
    volume,
    matrix,
    base,
    betas,
    out,
    step: tl.int32,
    slices: tl.int32,
    P2: tl.int32,
    chunks: tl.int32,
    vn: tl.int64,
    vs: tl.int64,
    v1: tl.int64,
    v2: tl.int64,
    C: tl.constexpr,
    BC: tl.constexpr,
    PB: tl.constexpr,
    K: tl.constexpr,
    SP: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BASE: tl.constexpr,
    VOLUME_ROW: tl.constexpr,
    OUT_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out_i = sum_j A_ij volume_j``, or ``base + beta * (...)`` with ``BASE``.

    ``A`` is ``matrix`` ``(N, SP, SP)``, or its transpose with ``TRANSPOSED``. One program per ``BI`` slices and chunk.
    """
    blocks = tl.cdiv(slices, BI)
    i = tl.program_id(0) % blocks * BI + tl.arange(0, BI)
    chunk = tl.program_id(0) // blocks % chunks
    n = (tl.program_id(0) // blocks // chunks).to(tl.int64)
    start, offsets, channel, exists = place_columns(chunk, P2, v1, v2, C, BC, PB, K)
    matrix += n * SP * SP
    volume += n * vn * VOLUME_ROW
    dtype: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros((BI, K), dtype)
    for first in range(0, slices, BJ):
        j = first + tl.arange(0, BJ)
        if TRANSPOSED:
            block = tl.trans(tl.load(matrix + j[:, None] * SP + i[None, :]))
        else:
            block = tl.load(matrix + i[:, None] * SP + j[None, :])
        tile = load_tile(volume, start, offsets, channel, exists, j, slices, vs, VOLUME_ROW)
        total = dot(block, tile, total, PRECISION)
    if BASE:
        rest = load_tile(base + n * vn * C, start, offsets, channel, exists, i, slices, vs, C)
        total = rest.to(dtype) + tl.load(betas + step).to(dtype) * total
    entries = (start + places(i, offsets, vs, 1)) * OUT_ROW + channel[None, :]
    tl.store(
        out + n * vn * OUT_ROW + entries,
        total.to(out.dtype.element_ty),
        mask=(i[:, None] < slices) & exists[None, :],
    )


@kernel()
def mix_backward_kernel(
    x,
    grad,
    matrices,
    moved,
    first: tl.int32,
    count: tl.int32,
    batch: tl.int32,
    slices: tl.int32,
    P2: tl.int32,
    chunks: tl.int32,
    vn: tl.int64,
    vs: tl.int64,
    v1: tl.int64,
    v2: tl.int64,
    C: tl.constexpr,
    BC: tl.constexpr,
    PB: tl.constexpr,
    K: tl.constexpr,
    SP: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    ROW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Volumes side by side in ``moved`` ``(V, ROW)``: ``dL^T X``, ``beta A^T G``, ``dL X``, ``C`` columns each.

    ``matrices`` ``(3, N, SP, SP)`` holds the three factors; ``count`` products are made, from number ``first`` on. With
    ``dL^T X`` come the remaining columns of ``moved``: ``c_j = sum_i dL_ij``, and zeros. One program per product,
    ``BI`` slices and chunk; those that read the same chunk are neighbours.
    """
    which = first + tl.program_id(0) % count
    blocks = tl.cdiv(slices, BI)
    rest = tl.program_id(0) // count
    i = rest % blocks * BI + tl.arange(0, BI)
    chunk = rest // blocks % chunks
    n = (rest // blocks // chunks).to(tl.int64)
    start, offsets, channel, exists = place_columns(chunk, P2, v1, v2, C, BC, PB, K)
    matrix = matrices + (which * batch + n) * SP * SP
    volume = tl.where(which == 1, grad, x) + n * vn * C
    dtype: tl.constexpr = tl.float64 if moved.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros((BI, K), dtype)
    for column in range(0, slices, BJ):
        j = column + tl.arange(0, BJ)
        block = tl.load(matrix + i[:, None] * SP + j[None, :])
        tile = load_tile(volume, start, offsets, channel, exists, j, slices, vs, C)
        total = dot(block, tile, total, PRECISION)
    entries = (n * vn + start + places(i, offsets, vs, 1)) * ROW + channel[None, :]
    inside = (i[:, None] < slices) & exists[None, :]
    tl.store(moved + which * C + entries, total.to(moved.dtype.element_ty), mask=inside)
    if (which == 0) & (chunk % ((C + BC - 1) // BC) == 0):
        row_sums = tl.zeros((BI,), dtype)
        for column in range(0, slices, BJ):
            j = column + tl.arange(0, BJ)
            row_sums += tl.sum(tl.load(matrix + i[:, None] * SP + j[None, :]).to(dtype), 1)
        rest_of_row = tl.where(channel[None, :] == 0, row_sums[:, None], 0.0).to(moved.dtype.element_ty)
        tl.store(moved + 3 * C + entries, rest_of_row, mask=inside & (channel < ROW - 3 * C)[None, :])


@kernel()
def sum_kernel(
    grad,
    moved,
    partial_b,
    partial_u,
    step: tl.int32,
    voxels: tl.int64,
    slots: tl.int32,
    C: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
    ROW: tl.constexpr,
    MOVED: tl.constexpr,
):
    """Sums over voxels: of the gradient ``(V, C)`` into ``partial_b`` ``(steps, slots, C)``, and of ``dL X``.

    The latter, with ``MOVED``, is the third volume of ``moved`` ``(V, ROW)``, and added to ``partial_u``
    ``(slots, C)``. A program sums ``BC`` channels of every ``slots``-th block of ``BR`` voxels.
    """
    blocks: tl.constexpr = (C + BC - 1) // BC
    column = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    slot = tl.program_id(0) // blocks
    total_b = tl.zeros((BR, BC), partial_b.dtype.element_ty)
    total_u = tl.zeros((BR, BC), partial_b.dtype.element_ty)
    for block in range(slot, tl.cdiv(voxels, BR).to(tl.int32), slots):
        row = block * tl.full((BR,), BR, tl.int64) + tl.arange(0, BR)
        inside = (row[:, None] < voxels) & (column[None, :] < C)
        total_b += tl.load(grad + row[:, None] * C + column[None, :], mask=inside, other=0.0).to(total_b.dtype)
        if MOVED:
            values = tl.load(moved + row[:, None] * ROW + 2 * C + column[None, :], mask=inside, other=0.0)
            total_u += values.to(total_u.dtype)
    tl.store(partial_b + (step * slots + slot) * C + column, tl.sum(total_b, 0), mask=column < C)
    if MOVED:
        target = partial_u + slot * C + column
        before = tl.load(target, mask=column < C, other=0.0)
        tl.store(target, before + tl.sum(total_u, 0), mask=column < C)
