"""Faults of the Triton kernels, which their tests see in the interpreter; see :mod:`mutations`."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from mutations import prove

NARROW, WIDE, MAPS, WEIGHTS = (f"rsa_kernels/triton/{name}.py" for name in ("narrow", "wide", "maps", "weights"))
TILES, VOLUMES, BLOCK = (f"rsa_kernels/triton/{name}.py" for name in ("tiles", "volumes", "block"))
SHAPES = "any_shape_in_every_regime"

# What is wrong, where, the right code, the wrong code, which tests run.
FAULTS = [
    ("a tile reads positions of the next row", TILES, "(place < PB) & (place < P2 - first)", "place < PB", SHAPES),
    (
        "a tile's columns beyond its positions count",
        TILES,
        "(place < PB) & (place < P2 - first)",
        "place < P2 - first",
        SHAPES,
    ),
    ("slices lie one voxel further apart", TILES, "rows[:, None] * (vs", "rows[:, None] * ((vs + 1)", SHAPES),
    ("offsets are of 32 bits", TILES, "vs.to(tl.int64) * C", "vs * C", "thirty_one"),
    (
        "the chunks that do not fill a round are left out",
        NARROW,
        "range(part, chunks, parts)",
        "range(part, chunks - part, parts)",
        SHAPES,
    ),
    ("the query's bias is missing", NARROW, "(query + bias[None, :]) * SHRINK", "query * SHRINK", SHAPES),
    ("beta is missing forward", NARROW, "+ scale * value)", "+ value)", SHAPES),
    ("beta is missing backward", NARROW, "value = scale * product(", "value = product(", SHAPES),
    ("the map is not transposed backward", NARROW, "dot(tl.trans(mixing), value", "dot(mixing, value", SHAPES),
    (
        "only the first diagonal block of the weights' gradient counts",
        WEIGHTS,
        "(place % PB) * C * (K + 1)",
        "0",
        SHAPES,
    ),
    (
        "padded slices take part in the softmax",
        MAPS,
        "tl.where(columns[None, :] < slices, logits",
        "tl.where(columns[None, :] < 2 * slices, logits",
        SHAPES,
    ),
    ("a last group of partial maps is left out", MAPS, "range(0, parts, NQ)", "range(0, parts - 1, NQ)", SHAPES),
    ("the softmax's derivative forgets its row sum", MAPS, "(contracted - row_dot[:, None])", "contracted", SHAPES),
    (
        "padding of a map is not written",
        MAPS,
        "tl.store(rounded + place, weights.to(rounded.dtype.element_ty))",
        "tl.store(rounded + place, weights.to(rounded.dtype.element_ty), mask=inside)",
        "memory_is_written",
    ),
    ("rounding loses the sums of the gradient's rows", MAPS, "matrix + lost[:, None]", "matrix", "keep_the_sums"),
    (
        "one weight serves for both, side by side",
        WEIGHTS,
        "matrices + K + place, value",
        "matrices + place, value",
        SHAPES,
    ),
    ("the last step's sums replace the others'", NARROW, "tl.load(target) + tl.load(betas", "tl.load(betas", SHAPES),
    ("the gradient of u reaches no weight", WEIGHTS, "phi_total += bias[:, None] *", "phi_total += 0 *", SHAPES),
    ("what u adds to the volume's gradient is missing", WIDE, "row_sums[:, None], 0.0)", "0.0, 0.0)", SHAPES),
    ("channels beyond the last count", WIDE, " & (channel < C)", "", SHAPES),
    (
        "blocks of columns beyond the first are left out",
        WIDE,
        "for first in range(0, slices, BJ)",
        "for first in range(0, BJ, BJ)",
        "many_slices or in_blocks",
    ),
    (
        "a volume is transposed without its last columns",
        VOLUMES,
        "column_blocks = -(-rows // block), -(-columns // block)",
        "column_blocks = -(-rows // block), max(1, columns // block)",
        "there_and_back",
    ),
    (
        "a step writes over the caller's volume",
        BLOCK,
        "own = step > 0 or volume.data_ptr() != x.data_ptr()",
        "own = True",
        "inputs_are_left",
    ),
]

if __name__ == "__main__":
    sys.exit(prove(FAULTS, "tests/triton", workers=os.cpu_count(), TRITON_INTERPRET="1"))
