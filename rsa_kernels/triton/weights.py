"""The kernels on weights: the folded ones from the published ones, and the way back for their gradients.

``M = theta^T phi`` and ``u = phi^T theta_bias`` project the query, ``W = Wv^T`` and ``b`` the value; see
:mod:`rsa_kernels.folding`. Gradients come as partial sums of many programs and leave in the dtype of the parameters.
"""

import triton
import triton.language as tl

from rsa_kernels.triton.tiles import dot, kernel

# Columns that :func:`rsa_kernels.triton.wide.mix_backward_kernel` appends to three volumes; only the first is not zero.
PAD = 8


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
    LAYOUT: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The folded weights from the published ones: one program per ``T x T`` tile of ``(K, K)``.

    ``LAYOUT`` ``"blocks"`` is for the kernels of the narrow regime: ``matrices`` ``(3, K, K)``, in the dtype of the
    volumes, holds M, what rounding took from it, and W, each ``PB`` times along the diagonal; ``vectors`` ``(2, K)``,
    not rounded, u and b. The others, with ``K == C``, are for products of the library: ``"row"`` is ``(C, 2 C)``, M and
    W, ``"column"`` is ``(ROWS, C)``: M, the transposes of W and M, u, zeros. ``vectors`` ``(2, C)`` then is rounded.
    """
    tiles: tl.constexpr = (K + T - 1) // T
    row = tl.program_id(0) // tiles * T + tl.arange(0, T)
    column = tl.program_id(0) % tiles * T + tl.arange(0, T)
    row_exists = row < PB * C
    column_exists = column < PB * C
    dtype: tl.constexpr = tl.float64 if matrices.dtype.element_ty == tl.float64 else tl.float32
    # Products of 16-bit numbers are exact in float32.
    short: tl.constexpr = (
        theta.dtype.element_ty == phi.dtype.element_ty and theta.dtype.element_ty.primitive_bitwidth == 16
    )
    operand: tl.constexpr = theta.dtype.element_ty if short else dtype
    folded = tl.zeros((T, T), dtype)
    folded_bias = tl.zeros((T,), dtype)
    for first in range(0, C, T):
        o = first + tl.arange(0, T)
        o_exists = o < C
        left = tl.load(
            theta + o[:, None] * C + row[None, :] % C, mask=o_exists[:, None] & row_exists[None, :], other=0.0
        ).to(operand)
        right = tl.load(
            phi + o[:, None] * C + column[None, :] % C, mask=o_exists[:, None] & column_exists[None, :], other=0.0
        ).to(operand)
        left_bias = tl.load(theta_bias + o, mask=o_exists, other=0.0).to(dtype)
        folded = dot(tl.trans(left), right, folded, PRECISION)
        folded_bias += tl.sum(right.to(dtype) * left_bias[:, None], 0)
    same_place = (row[:, None] // C == column[None, :] // C) & row_exists[:, None] & column_exists[None, :]
    folded = tl.where(same_place, folded, 0.0)
    inside = (row[:, None] < K) & (column[None, :] < K)
    high = folded.to(matrices.dtype.element_ty)
    bias = tl.load(g_bias + column % C, mask=column_exists, other=0.0).to(vectors.dtype.element_ty)
    folded_bias = tl.where(column_exists, folded_bias, 0.0).to(vectors.dtype.element_ty)
    if LAYOUT == "column":
        place = row[:, None] * K + column[None, :]
        value = tl.load(g + place, mask=inside, other=0.0).to(high.dtype)  # W's transpose is what was published
        tl.store(matrices + place, high, mask=inside)
        tl.store(matrices + K * K + place, value, mask=inside)
        tl.store(matrices + 2 * K * K + column[None, :] * K + row[:, None], high, mask=inside)
        if tl.program_id(0) < tiles:
            tl.store(matrices + 3 * K * K + column, folded_bias, mask=column < K)
            for zeros in range(3 * K + 1, ROWS):
                tl.store(matrices + zeros * K + column, tl.zeros((T,), high.dtype), mask=column < K)
    else:
        value = tl.load(g + (column[None, :] % C) * C + row[:, None] % C, mask=same_place, other=0.0).to(high.dtype)
        if LAYOUT == "row":
            place = row[:, None] * (2 * K) + column[None, :]
            tl.store(matrices + place, high, mask=inside)
            tl.store(matrices + K + place, value, mask=inside)
        else:
            place = row[:, None] * K + column[None, :]
            tl.store(matrices + place, high, mask=inside)
            tl.store(matrices + K * K + place, (folded - high.to(dtype)).to(high.dtype), mask=inside)
            tl.store(matrices + 2 * K * K + place, value, mask=inside)
    if tl.program_id(0) < tiles:
        tl.store(vectors + column, folded_bias, mask=column < K)
        tl.store(vectors + K + column, bias, mask=column < K)


@triton.jit
def sum_blocks(partial, slots, row, column, C: tl.constexpr, PB: tl.constexpr, K: tl.constexpr, NQ: tl.constexpr):
    """Rows of ``(C, C)`` summed over ``slots`` matrices ``(K, K)`` and the ``PB`` blocks of their diagonals."""
    q = tl.arange(0, NQ)
    sums = tl.zeros((row.shape[0], column.shape[0]), partial.dtype.element_ty)
    inside = (row[:, None] < C) & (column[None, :] < C)
    for first in range(0, slots * PB, NQ):
        place = first + q
        start = (place // PB).to(tl.int64) * K * K + (place % PB) * C * (K + 1)
        blocks = tl.load(
            partial + start[:, None, None] + row[None, :, None] * K + column[None, None, :],
            mask=(place < slots * PB)[:, None, None] & inside[None, :, :],
            other=0.0,
        )
        sums += tl.sum(blocks, 0)
    return sums


@triton.jit
def add_vector(partial, total, slots, column, C: tl.constexpr, PB: tl.constexpr, K: tl.constexpr, NQ: tl.constexpr):
    """Adds ``PB`` pieces of ``C`` entries from each row of ``(slots, K)`` to ``total`` ``(C,)``."""
    q = tl.arange(0, NQ)
    sums = tl.zeros((column.shape[0],), total.dtype.element_ty)
    for first in range(0, slots * PB, NQ):
        place = first + q
        start = (place // PB) * K + (place % PB) * C
        inside = (place[:, None] < slots * PB) & (column[None, :] < C)
        sums += tl.sum(tl.load(partial + start[:, None] + column[None, :], mask=inside, other=0.0), 0)
    tl.store(total + column, tl.load(total + column, mask=column < C, other=0.0) + sums, mask=column < C)


@kernel()
def unfold_kernel(
    partial_w,
    partial_m,
    partial_b,
    partial_u,
    matrices,
    vectors,
    steps: tl.int32,
    slots_w: tl.int32,
    slots_m: tl.int32,
    C: tl.constexpr,
    PB_W: tl.constexpr,
    K_W: tl.constexpr,
    PB_M: tl.constexpr,
    K_M: tl.constexpr,
    CP: tl.constexpr,
    BR: tl.constexpr,
    NQ: tl.constexpr,
    MATRICES: tl.constexpr,
):
    """Adds the partial sums of all programs, in a fixed order, to the totals.

    ``partial_w`` ``(slots_w, K_W, K_W)`` and ``partial_m`` ``(slots_m, K_M, K_M)``, block-diagonal, are added to
    ``matrices`` ``(2, C, C)``, the latter transposed, by a program for ``BR`` rows of each; ``partial_b``
    ``(steps, slots_w, K_W)`` and ``partial_u`` ``(slots_m, K_M)`` to ``vectors`` ``(steps + 1, C)``, by a program each.
    """
    groups: tl.constexpr = (C + BR - 1) // BR if MATRICES else 0
    pid = tl.program_id(0)
    column = tl.arange(0, CP)
    vector = pid - 2 * groups
    if MATRICES and vector < 0:
        row = pid % groups * BR + tl.arange(0, BR)
        if pid < groups:
            sums = sum_blocks(partial_w, slots_w, row, column, C, PB_W, K_W, NQ)
            target = matrices + row[:, None] * C + column[None, :]
        else:
            sums = sum_blocks(partial_m, slots_m, row, column, C, PB_M, K_M, NQ)
            target = matrices + C * C + column[None, :] * C + row[:, None]
        inside = (row[:, None] < C) & (column[None, :] < C)
        tl.store(target, tl.load(target, mask=inside, other=0.0) + sums, mask=inside)
    total = vectors + vector * C
    if vector == steps:
        add_vector(partial_u, total, slots_m, column, C, PB_M, K_M, NQ)
    elif vector >= 0:
        add_vector(partial_b + vector * slots_w * K_W, total, slots_w, column, C, PB_W, K_W, NQ)


@kernel(
    *("theta", "theta_bias", "phi", "g_bias", "betas", "grad_theta", "grad_theta_bias", "grad_phi", "grad_phi_bias"),
    *("grad_g", "grad_g_bias", "grad_betas"),
)
def collect_kernel(
    theta,
    theta_bias,
    phi,
    g_bias,
    betas,
    matrices,
    vectors,
    row_dots,
    grad_theta,
    grad_theta_bias,
    grad_phi,
    grad_phi_bias,
    grad_g,
    grad_g_bias,
    grad_betas,
    steps: tl.int32,
    dots: tl.int32,
    C: tl.constexpr,
    T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The published weights' gradients from the totals of the folded ones: a program per ``T x T`` tile of ``(C, C)``.

    ``matrices`` ``(2, C, C)`` holds the gradients of Wv and of M, transposed; ``vectors`` ``(steps + 1, C)``, of each
    step the upstream gradient's sum over voxels, and last the gradient of u; ``row_dots`` ``(steps, dots)`` what a
    step's beta scales, without the bias.
    """
    tiles: tl.constexpr = (C + T - 1) // T
    dtype: tl.constexpr = matrices.dtype.element_ty
    row = tl.program_id(0) // tiles * T + tl.arange(0, T)
    column = tl.program_id(0) % tiles * T + tl.arange(0, T)
    row_exists, column_exists = row < C, column < C
    inside = row_exists[:, None] & column_exists[None, :]
    place = row[:, None] * C + column[None, :]
    total = matrices + C * C
    sum_u = vectors + steps * C
    theta_total = tl.zeros((T, T), dtype)
    phi_total = tl.zeros((T, T), dtype)
    theta_bias_total = tl.zeros((T,), dtype)
    for first in range(0, C, T):
        k = first + tl.arange(0, T)
        k_exists = k < C
        weights = row[:, None] * C + k[None, :]
        exists = row_exists[:, None] & k_exists[None, :]
        from_phi = tl.load(phi + weights, mask=exists, other=0.0).to(dtype)
        from_theta = tl.load(theta + weights, mask=exists, other=0.0).to(dtype)
        grad_columns = tl.load(
            total + k[:, None] * C + column[None, :], mask=k_exists[:, None] & column_exists[None, :], other=0.0
        )
        grad_rows = tl.load(
            total + column[:, None] * C + k[None, :], mask=column_exists[:, None] & k_exists[None, :], other=0.0
        )
        theta_total = dot(from_phi, grad_columns, theta_total, PRECISION)
        phi_total = dot(from_theta, tl.trans(grad_rows), phi_total, PRECISION)
        theta_bias_total += tl.sum(from_phi * tl.load(sum_u + k, mask=k_exists, other=0.0)[None, :], 1)
    bias = tl.load(theta_bias + row, mask=row_exists, other=0.0).to(dtype)
    phi_total += bias[:, None] * tl.load(sum_u + column, mask=column_exists, other=0.0)[None, :]
    tl.store(grad_theta + place, theta_total.to(grad_theta.dtype.element_ty), mask=inside)
    tl.store(grad_phi + place, phi_total.to(grad_phi.dtype.element_ty), mask=inside)
    value = tl.load(matrices + place, mask=inside, other=0.0)
    tl.store(grad_g + place, value.to(grad_g.dtype.element_ty), mask=inside)
    if tl.program_id(0) % tiles == 0:
        tl.store(grad_theta_bias + row, theta_bias_total.to(grad_theta_bias.dtype.element_ty), mask=row_exists)
    if tl.program_id(0) < tiles:
        bias_total = tl.zeros((T,), dtype)
        for step in range(steps):
            sums = tl.load(vectors + step * C + column, mask=column_exists, other=0.0)
            bias_total += tl.load(betas + step).to(dtype) * sums
        tl.store(grad_g_bias + column, bias_total.to(grad_g_bias.dtype.element_ty), mask=column_exists)
        nothing = tl.zeros((T,), grad_phi_bias.dtype.element_ty)
        tl.store(grad_phi_bias + column, nothing, mask=column_exists)
    if tl.program_id(0) == 0:
        t = tl.arange(0, T)
        for step in range(steps):
            terms = tl.zeros((T,), dtype)
            for first in range(0, dots, T):
                terms += tl.load(row_dots + step * dots + first + t, mask=first + t < dots, other=0.0)
            for first in range(0, C, T):
                exists = first + t < C
                sums = tl.load(vectors + step * C + first + t, mask=exists, other=0.0)
                terms += sums * tl.load(g_bias + first + t, mask=exists, other=0.0).to(dtype)
            tl.store(grad_betas + step, tl.sum(terms, 0).to(grad_betas.dtype.element_ty))
