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


@triton.jit
def whole_map(attention, n, j, slices, like):
    """A sample's map from ``(N, S, S)``, padded with zeros to ``(SP, SP)``, in the dtype that ``like`` points to."""
    inside = (j[:, None] < slices) & (j[None, :] < slices)
    entries = (n * slices + j[:, None]) * slices + j[None, :]
    return tl.load(attention + entries, mask=inside, other=0.0).to(like.dtype.element_ty)


@kernel("attention", "betas")
def map_backward_kernel(
    x,
    grad,
    attention,
    matrices,
    betas,
    partial,
    partial_w,
    partial_b,
    step: tl.int32,
    slots: tl.int32,
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

    Reads ``x`` and the gradient once. ``partial`` ``(N, parts, SP, SP)``; ``partial_b`` ``(steps, slots, K)``, with at
    least ``N * parts`` slots, sums the gradient over voxels; with ``WEIGHTS`` ``beta G^T (A X)`` is added to
    ``partial_w`` ``(slots, K, K)``.
    """
    part = tl.program_id(0) % parts
    n = (tl.program_id(0) // parts).to(tl.int64)
    x += n * vn * C
    grad += n * vn * C
    j = tl.arange(0, SP)
    k = tl.arange(0, K)
    weights = tl.load(matrices + 2 * K * K + k[:, None] * K + k[None, :])
    if WEIGHTS:
        mixing = whole_map(attention, n, j, slices, x)
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
    tl.store(partial_b + (step * slots + index) * K + k, total_b)
    if WEIGHTS:
        target = partial_w + index * K * K + k[:, None] * K + k[None, :]
        tl.store(target, tl.load(target) + tl.load(betas + step).to(total_w.dtype) * total_w)


@kernel("betas")
def mix_backward_kernel(
    x,
    grad,
    planes,
    matrices,
    vectors,
    betas,
    grad_x,
    partial_m,
    partial_u,
    step: tl.int32,
    batch: tl.int32,
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

    ``planes`` ``(2, N, SP, SP)`` are dL and A. Reads ``x`` and the gradient, writes ``grad_x`` (which may be ``grad``)
    with ``VOLUME``. With ``WEIGHTS`` ``X^T (dL X)`` is added to ``partial_m`` ``(slots, K, K)``, and the columns' sums
    of ``dL X`` to ``partial_u`` ``(slots, K)``.
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
    plane = planes + n * SP * SP + j[:, None] * SP + j[None, :]
    spread = tl.load(plane)
    bias = tl.load(vectors + k)
    if VOLUME:
        weights = tl.load(matrices + 2 * K * K + square)
        mixing = tl.load(plane + batch.to(tl.int64) * SP * SP)
        column_sums = tl.sum(spread.to(bias.dtype), 0)
    scale = tl.load(betas + step).to(bias.dtype)
    index = n * parts + part
    if WEIGHTS:
        total_m = tl.load(partial_m + index * K * K + square)
        total_u = tl.load(partial_u + index * K + k)
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
        tl.store(partial_m + index * K * K + square, total_m)
        tl.store(partial_u + index * K + k, total_u)
