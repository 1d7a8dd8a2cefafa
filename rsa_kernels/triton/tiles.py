"""What the kernels share on the device: where a tile lies in a volume, and products of tiles.

Every volume that a kernel sees is dense in channels-last order: voxel ``v`` has its ``C`` channels at ``v * C``. A step
along one axis reads it as ``x[n, s, p, c]``, slice ``s`` and position ``p`` within the slice, where

    voxel(n, s, p) = n * vn + s * vs + (p // P2) * v1 + (p % P2) * v2

A tile is a matrix: one row per slice, one column per pair of position and channel, ``k = place * C + c`` with ``PB``
positions side by side, ``K >= PB * C`` columns in all. Projections then are products with block-diagonal matrices, and
no tile is ever reshaped or permuted. Offsets are 64-bit.
"""

import inspect
from collections.abc import Callable

import triton
import triton.language as tl

# The interpreter's product of bfloat16 tiles is wrong; in float32 it is right.
INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))


def kernel(*unaligned: str) -> Callable[[Callable], triton.runtime.JITFunction]:
    """``triton.jit`` for functions whose numbers are all annotated ``tl.int32`` or ``tl.int64``.

    None of them is specialised, so one compiled kernel serves volumes of every size. Pointers count as aligned to
    16 bytes, but for those that are named here.
    """

    def decorate(function: Callable) -> triton.runtime.JITFunction:
        parameters = inspect.signature(function).parameters.values()
        numbers = [parameter.name for parameter in parameters if parameter.annotation in (tl.int32, tl.int64)]
        return triton.jit(function, do_not_specialize=[*unaligned, *numbers])

    return decorate


@triton.jit
def columns(chunk, P2, v1, v2, C: tl.constexpr, PB: tl.constexpr, K: tl.constexpr, FLAT: tl.constexpr):
    """Where the columns of a chunk of positions lie: the first element, offsets from it ``(K,)``, which exist."""
    blocks = tl.cdiv(P2, PB)
    outer = chunk // blocks
    first = (chunk - outer * blocks) * PB
    k = tl.arange(0, K)
    place = k // C
    if FLAT:  # v2 == 1: the columns are one run of memory
        offsets = k
    else:
        offsets = place * (v2 * C) + k % C
    start = (outer * v1.to(tl.int64) + first * v2.to(tl.int64)) * C
    return start, offsets, (place < PB) & (place < P2 - first)


@triton.jit
def places(rows, offsets, vs, C: tl.constexpr):
    """Where the entries of a tile lie, from its first column on: slices ``rows``, columns ``offsets``."""
    return rows[:, None] * (vs.to(tl.int64) * C) + offsets[None, :]


@triton.jit
def nearest_tf32(x):
    """Rounds float32 to TensorFloat-32; the matrix instructions would cut the bits off, which is biased."""
    bits = tl.inline_asm_elementwise(
        "cvt.rna.tf32.f32 $0, $1;", "=r,r", [x.to(tl.int32, bitcast=True)], dtype=tl.int32, is_pure=True, pack=1
    )
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` in the precision of ``acc``; with ``PRECISION`` ``"tf32"`` of operands rounded to that."""
    if INTERPRETED:
        if acc.dtype == tl.float32:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
    elif PRECISION == "tf32":
        a = nearest_tf32(a)
        b = nearest_tf32(b)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def product(a, b, like, PRECISION: tl.constexpr):
    """``a @ b`` in the precision of ``like``."""
    return dot(a, b, tl.zeros((a.shape[0], b.shape[1]), like.dtype), PRECISION)
