"""The kernels of the narrow regime: projections fused into the passes that contract and mix.

A program walks chunks of positions, ``part, part + parts, ...``, and holds everything that a chunk does not change:
the map, the block-diagonal weights ``(K, K)``, the sums. Of memory in multiples of ``C * V``, a step forward reads 2
and writes 1 (with slices in several blocks of rows, each reads once more), a step backward reads 4 and writes 1.

With slices in rows, ``Q' = X M + u`` and ``Y = Z W + b`` where ``M = theta^T phi`` and ``W = Wv^T``, each repeated
along the diagonal once per position of a tile.
"""

import triton
import triton.language as tl

from rsa_kernels.triton.tiles import columns, dot, kernel, places, product


@kernel("theta", "theta_bias", "phi", "g", "g_bias")
def fold_kernel(
    theta,
    theta_bias,
    phi,
    g,
    g_bias,
    matrices,
    vectors,
    C: tl.constexpr,
    PB: tl.constexpr,
    K: tl.constexpr,
    T: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,
):
    """The block-diagonal weights from the published ones: one program per ``T x T`` tile of ``(K, K)``.

    ``matrices`` ``(3, K, K)``, in the dtype of the volumes, holds M, what rounding took from it, and W; ``vectors``
    ``(2, K)``, not rounded, u and b. The other kernels of this module take both as they are. With ``SIDE_BY_SIDE``
    ``matrices`` is ``(K, 2 K)``, M and W, for products of the library.
    """
    tiles: tl.constexpr = (K + T - 1) // T
    ROW: tl.constexpr = 2 * K if SIDE_BY_SIDE else K
    W_FROM: tl.constexpr = K if SIDE_BY_SIDE else 2 * K * K
    row = tl.program_id(0) // tiles * T + tl.arange(0, T)
    column = tl.program_id(0) % tiles * T + tl.arange(0, T)
    row_exists = row < PB * C
    column_exists = column < PB * C
    dtype = vectors.dtype.element_ty
    folded = tl.zeros((T, T), dtype)
    folded_bias = tl.zeros((T,), dtype)
    for first in range(0, C, T):
        o = first + tl.arange(0, T)
        o_exists = o < C
        left = tl.load(
            theta + o[:, None] * C + row[None, :] % C, mask=o_exists[:, None] & row_exists[None, :], other=0.0
        ).to(dtype)
        right = tl.load(
            phi + o[:, None] * C + column[None, :] % C, mask=o_exists[:, None] & column_exists[None, :], other=0.0
        ).to(dtype)
        left_bias = tl.load(theta_bias + o, mask=o_exists, other=0.0).to(dtype)
        folded = dot(tl.trans(left), right, folded, "ieee")
        folded_bias += tl.sum(right * left_bias[:, None], 0)
    same_place = (row[:, None] // C == column[None, :] // C) & row_exists[:, None] & column_exists[None, :]
    folded = tl.where(same_place, folded, 0.0)
    value = tl.load(g + (column[None, :] % C) * C + row[:, None] % C, mask=same_place, other=0.0).to(dtype)
    high = folded.to(matrices.dtype.element_ty)
    place = row[:, None] * ROW + column[None, :]
    inside = (row[:, None] < K) & (column[None, :] < K)
    tl.store(matrices + place, high, mask=inside)
    tl.store(matrices + W_FROM + place, value.to(high.dtype), mask=inside)
    if not SIDE_BY_SIDE:
        tl.store(matrices + K * K + place, (folded - high.to(dtype)).to(high.dtype), mask=inside)
    if tl.program_id(0) < tiles:
        tl.store(vectors + column, tl.where(column_exists, folded_bias, 0.0), mask=column < K)
        bias = tl.load(g_bias + column % C, mask=column_exists, other=0.0).to(dtype)
        tl.store(vectors + K + column, bias, mask=column < K)


@kernel()
def map_kernel(
    x,
    matrices,
    vectors,
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
    PB: tl.constexpr,
    K: tl.constexpr,
    SP: tl.constexpr,
    BI: tl.constexpr,
    FLAT: tl.constexpr,
    SPLIT: tl.constexpr,
    SHRINK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial logits ``<X_i M + u, X_j>``, ``(N, parts, SP, SP)``: one read of ``x``, projected on the way.

    A program makes ``BI`` rows of the map over its share of the chunks. With ``SPLIT`` the products' operands are kept
    as the sum of two 16-bit numbers each (``x`` is exact as it is): logits nearly as exact as in float32. The query is
    rounded ``SHRINK`` times smaller, a power of two, where its dtype has too small a range.
    """
    blocks: tl.constexpr = SP // BI
    block = tl.program_id(0) % blocks
    part = tl.program_id(0) // blocks % parts
    n = (tl.program_id(0) // blocks // parts).to(tl.int64)
    x += n * vn * C
    j = tl.arange(0, SP)
    i = block * BI + tl.arange(0, BI)
    k = tl.arange(0, K)
    weights = tl.load(matrices + k[:, None] * K + k[None, :])
    if SPLIT:
        weights_low = tl.load(matrices + K * K + k[:, None] * K + k[None, :])
    bias = tl.load(vectors + k)
    logits = tl.zeros((BI, SP), partial.dtype.element_ty)
    for chunk in range(part, chunks, parts):
        start, offsets, exists = columns(chunk, P2, v1, v2, C, PB, K, FLAT)
        tile = tl.load(
            x + start + places(j, offsets, vs, C),
            mask=(j[:, None] < slices) & exists[None, :],
            other=0.0,
        )
        rows = tile
        if blocks > 1:
            rows = tl.load(
                x + start + places(i, offsets, vs, C),
                mask=(i[:, None] < slices) & exists[None, :],
                other=0.0,
            )
        query = product(rows, weights, logits, PRECISION)
        if SPLIT:
            query = dot(rows, weights_low, query, PRECISION)
        query = (query + bias[None, :]) * SHRINK
        high = query.to(tile.dtype)
        logits = dot(high, tl.trans(tile), logits, PRECISION)
        if SPLIT:
            logits = dot((query - high.to(query.dtype)).to(tile.dtype), tl.trans(tile), logits, PRECISION)
    tl.store(partial + (n * parts + part) * SP * SP + i[:, None] * SP + j[None, :], logits / SHRINK)


@kernel("betas")
def mix_kernel(
    x,
    attention,
    matrices,
    vectors,
    betas,
    out,
    step: tl.int32,
    slices: tl.int32,
    P2: tl.int32,
    chunks: tl.int32,
    parts: tl.int32,
    vn: tl.int64,
    vs: tl.int64,
    v1: tl.int64,
    v2: tl.int64,
    C: tl.constexpr,
    PB: tl.constexpr,
    K: tl.constexpr,
    SP: tl.constexpr,
    BI: tl.constexpr,
    FLAT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out = x + beta * ((A X) W + b)``: one read, one write. ``out`` may be ``x`` where ``BI == SP``."""
    blocks: tl.constexpr = SP // BI
    block = tl.program_id(0) % blocks
    part = tl.program_id(0) // blocks % parts
    n = (tl.program_id(0) // blocks // parts).to(tl.int64)
    x += n * vn * C
    out += n * vn * C
    j = tl.arange(0, SP)
    i = block * BI + tl.arange(0, BI)
    k = tl.arange(0, K)
    weights = tl.load(matrices + 2 * K * K + k[:, None] * K + k[None, :])
    bias = tl.load(vectors + K + k)
    scale = tl.load(betas + step).to(bias.dtype)
    mixing = tl.load(attention + n * SP * SP + i[:, None] * SP + j[None, :])
    for chunk in range(part, chunks, parts):
        start, offsets, exists = columns(chunk, P2, v1, v2, C, PB, K, FLAT)
        tile = tl.load(
            x + start + places(j, offsets, vs, C),
            mask=(j[:, None] < slices) & exists[None, :],
            other=0.0,
        )
        rows = tile
        if blocks > 1:
            rows = tl.load(
                x + start + places(i, offsets, vs, C),
                mask=(i[:, None] < slices) & exists[None, :],
                other=0.0,
            )
        mixed = product(mixing, tile, bias, PRECISION)
        value = product(mixed.to(tile.dtype), weights, bias, PRECISION) + bias[None, :]
        tl.store(
            out + start + places(i, offsets, vs, C),
            (rows.to(bias.dtype) + scale * value).to(tile.dtype),
            mask=(i[:, None] < slices) & exists[None, :],
        )


@kernel()
def map_backward_kernel(
    x,
    grad,
    attention,
    matrices,
    partial,
    partial_w,
    partial_b,
    slices: tl.int32,
    P2: tl.int32,
    chunks: tl.int32,
    parts: tl.int32,
    vn: tl.int64,
    vs: tl.int64,
    v1: tl.int64,
    v2: tl.int64,
    C: tl.constexpr,
    PB: tl.constexpr,
    K: tl.constexpr,
    SP: tl.constexpr,
    FLAT: tl.constexpr,
    WEIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """First pass backward: partial ``D_ij = <G_i Wv, X_j>``, and the value projection's gradients on the way.

    Reads ``x`` and the gradient once. ``partial`` ``(N, parts, SP, SP)``; ``partial_b`` ``(N, parts, K)`` sums the
    gradient over voxels; with ``WEIGHTS`` ``partial_w`` ``(N, parts, K, K)`` holds ``G^T (A X)``.
    """
    part = tl.program_id(0) % parts
    n = (tl.program_id(0) // parts).to(tl.int64)
    x += n * vn * C
    grad += n * vn * C
    j = tl.arange(0, SP)
    k = tl.arange(0, K)
    weights = tl.load(matrices + 2 * K * K + k[:, None] * K + k[None, :])
    if WEIGHTS:
        mixing = tl.load(attention + n * SP * SP + j[:, None] * SP + j[None, :])
    contracted = tl.zeros((SP, SP), partial.dtype.element_ty)
    total_w = tl.zeros((K, K), partial.dtype.element_ty)
    total_b = tl.zeros((K,), partial.dtype.element_ty)
    for chunk in range(part, chunks, parts):
        start, offsets, exists = columns(chunk, P2, v1, v2, C, PB, K, FLAT)
        entries = start + places(j, offsets, vs, C)
        inside = (j[:, None] < slices) & exists[None, :]
        tile = tl.load(x + entries, mask=inside, other=0.0)
        upstream = tl.load(grad + entries, mask=inside, other=0.0)
        projected = product(upstream, tl.trans(weights), contracted, PRECISION).to(tile.dtype)
        contracted = dot(projected, tl.trans(tile), contracted, PRECISION)
        total_b += tl.sum(upstream.to(total_b.dtype), 0)
        if WEIGHTS:
            mixed = product(mixing, tile, contracted, PRECISION).to(tile.dtype)
            total_w = dot(tl.trans(upstream), mixed, total_w, PRECISION)
    index = n * parts + part
    tl.store(partial + index * SP * SP + j[:, None] * SP + j[None, :], contracted)
    tl.store(partial_b + index * K + k, total_b)
    if WEIGHTS:
        tl.store(partial_w + index * K * K + k[:, None] * K + k[None, :], total_w)


@kernel("betas")
def mix_backward_kernel(
    x,
    grad,
    attention,
    grad_logits,
    matrices,
    vectors,
    betas,
    grad_x,
    partial_m,
    partial_u,
    step: tl.int32,
    slices: tl.int32,
    P2: tl.int32,
    chunks: tl.int32,
    parts: tl.int32,
    vn: tl.int64,
    vs: tl.int64,
    v1: tl.int64,
    v2: tl.int64,
    C: tl.constexpr,
    PB: tl.constexpr,
    K: tl.constexpr,
    SP: tl.constexpr,
    FLAT: tl.constexpr,
    VOLUME: tl.constexpr,
    WEIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Second pass backward: ``dX = G + beta A^T (G Wv) + (dL X) M^T + (dL^T X) M + c u``, where ``c_j = sum_i dL_ij``.

    Reads ``x`` and the gradient, writes ``grad_x`` (which may be ``grad``) with ``VOLUME``. With ``WEIGHTS``
    ``partial_m`` ``(N, parts, K, K)`` holds ``X^T (dL X)``, ``partial_u`` ``(N, parts, K)`` its columns' sums,
    those of ``dL X``.
    """
    part = tl.program_id(0) % parts
    n = (tl.program_id(0) // parts).to(tl.int64)
    x += n * vn * C
    grad += n * vn * C
    grad_x += n * vn * C
    j = tl.arange(0, SP)
    k = tl.arange(0, K)
    square = k[:, None] * K + k[None, :]
    folded = tl.load(matrices + square)
    spread = tl.load(grad_logits + n * SP * SP + j[:, None] * SP + j[None, :])
    bias = tl.load(vectors + k)
    if VOLUME:
        weights = tl.load(matrices + 2 * K * K + square)
        mixing = tl.load(attention + n * SP * SP + j[:, None] * SP + j[None, :])
        column_sums = tl.sum(spread.to(bias.dtype), 0)
    scale = tl.load(betas + step).to(bias.dtype)
    total_m = tl.zeros((K, K), bias.dtype)
    total_u = tl.zeros((K,), bias.dtype)
    for chunk in range(part, chunks, parts):
        start, offsets, exists = columns(chunk, P2, v1, v2, C, PB, K, FLAT)
        entries = start + places(j, offsets, vs, C)
        inside = (j[:, None] < slices) & exists[None, :]
        tile = tl.load(x + entries, mask=inside, other=0.0)
        moved = product(spread, tile, bias, PRECISION)
        if WEIGHTS:
            total_u += tl.sum(moved, 0)
        moved = moved.to(tile.dtype)
        if WEIGHTS:
            total_m = dot(tl.trans(tile), moved, total_m, PRECISION)
        if VOLUME:
            upstream = tl.load(grad + entries, mask=inside, other=0.0)
            total = dot(moved, tl.trans(folded), upstream.to(bias.dtype), PRECISION)
            value = scale * product(upstream, tl.trans(weights), bias, PRECISION)
            total = dot(tl.trans(mixing), value.to(tile.dtype), total, PRECISION)
            moved = product(tl.trans(spread), tile, bias, PRECISION).to(tile.dtype)
            total = dot(moved, folded, total, PRECISION) + column_sums[:, None] * bias[None, :]
            tl.store(grad_x + entries, total.to(tile.dtype), mask=inside)
    if WEIGHTS:
        index = n * parts + part
        tl.store(partial_m + index * K * K + square, total_m)
        tl.store(partial_u + index * K + k, total_u)


@triton.jit
def add_vectors(partial, total, parts, column, C: tl.constexpr, PB: tl.constexpr, K: tl.constexpr, NQ: tl.constexpr):
    """Adds ``PB`` pieces of ``C`` entries from each row of ``(parts, K)`` to ``total`` ``(C,)``."""
    q = tl.arange(0, NQ)
    sums = tl.zeros((column.shape[0],), total.dtype.element_ty)
    for first in range(0, parts * PB, NQ):
        place = first + q
        start = (place // PB) * K + (place % PB) * C
        inside = (place[:, None] < parts * PB) & (column[None, :] < C)
        sums += tl.sum(tl.load(partial + start[:, None] + column[None, :], mask=inside, other=0.0), 0)
    target = total + column
    tl.store(target, tl.load(target, mask=column < C, other=0.0) + sums, mask=column < C)


@kernel("betas", "total", "total_vector")
def unfold_kernel(
    partial,
    partial_vector,
    betas,
    total,
    total_vector,
    step: tl.int32,
    parts: tl.int32,
    C: tl.constexpr,
    PB: tl.constexpr,
    K: tl.constexpr,
    CP: tl.constexpr,
    BR: tl.constexpr,
    NQ: tl.constexpr,
    MATRIX: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Sums partial gradients of block-diagonal weights in a fixed order: a program for ``BR`` rows of ``(C, C)``.

    ``partial`` ``(parts, K, K)`` and ``partial_vector`` ``(parts, K)`` are summed over parts and over the ``PB``
    diagonal blocks. ``total`` ``(C, C)`` is added to, times beta with ``SCALED``; ``total_vector`` ``(C,)`` too,
    unscaled.
    """
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    column = tl.arange(0, CP)
    q = tl.arange(0, NQ)
    if MATRIX:
        sums = tl.zeros((BR, CP), total.dtype.element_ty)
        inside = (row[:, None] < C) & (column[None, :] < C)
        for first in range(0, parts * PB, NQ):
            place = first + q
            start = (place // PB).to(tl.int64) * K * K + (place % PB) * C * (K + 1)
            blocks = tl.load(
                partial + start[:, None, None] + row[None, :, None] * K + column[None, None, :],
                mask=(place < parts * PB)[:, None, None] & inside[None, :, :],
                other=0.0,
            )
            sums += tl.sum(blocks, 0)
        if SCALED:
            sums *= tl.load(betas + step).to(sums.dtype)
        target = total + row[:, None] * C + column[None, :]
        tl.store(target, tl.load(target, mask=inside, other=0.0) + sums, mask=inside)
    if tl.program_id(0) == 0:
        add_vectors(partial_vector, total_vector, parts, column, C, PB, K, NQ)
