"""Faults of the CUDA kernels, which their tests see in the emulator; see :mod:`mutations`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from mutations import prove

INDEX, TILE, CONTRACT, MIX, MAPS, TRANSPOSE = (
    f"csrc/cuda/{name}.cuh" for name in ("index", "tile", "contract", "mix", "maps", "transpose")
)
BACKEND = "rsa_kernels/cuda.py"
CONTRACTION, MIXING = "test_contraction", "test_mix"

# What is wrong, where, the right code, the wrong code, which tests run.
FAULTS = [
    ("columns beyond a slice's last count", INDEX, "k < shape.columns()}", "true}", CONTRACTION),
    ("positions skip no rows", INDEX, "outer * shape.outer_step + ", "", "every_element"),
    (
        "chunks that do not fill a round are left out",
        INDEX,
        "(chunks - part - 1) / parts + 1",
        "chunks / parts",
        "chunk",
    ),
    ("tiles and parts are swapped", INDEX, "block / tiles % parts", "block % parts", "chunk"),
    (
        "ldmatrix reads the left operand's halves swapped",
        INDEX,
        "lane / 16 * 16; }\n// ... for",
        "16 - lane / 16 * 16; }\n// ... for",
        CONTRACTION,
    ),
    ("ldmatrix reads right operands in the other order", INDEX, "lane / 8 % 2 * 16", "lane / 16 * 16", CONTRACTION),
    (
        "summed rows are read in the other order",
        INDEX,
        "summed_row(int lane) { return lane % 16",
        "summed_row(int lane) { return lane / 16 * 8 + lane % 8",
        MIXING,
    ),
    ("a sum's rows are neighbours", INDEX, "lane / 4 + entry / 2 * 8", "lane / 4 * 2 + entry / 2", CONTRACTION),
    ("rows of a tile share a bank", INDEX, "return bytes + padding;", "return bytes + 0 * padding;", "bank"),
    (
        "copies are wider than voxels are aligned",
        INDEX,
        "static_cast<uint64_t>(row * number)",
        "static_cast<uint64_t>(row * 0)",
        "wider_products",
    ),
    (
        "slices beyond the last are read",
        TILE,
        "return slice + index < shape.slices",
        "return slice + index >= 0",
        "test_contraction or test_mix",
    ),
    (
        "tf32 operands are cut off, not rounded",
        TILE,
        "fragment[e] = nearest_tf32(fragment[e])",
        "fragment[e] = fragment[e]",
        "tf32",
    ),
    ("lanes exchange in one round", TILE, "bit <= 2; bit *= 2", "bit <= 1; bit *= 2", MIXING),
    (
        "a product starts before its copies have landed",
        CONTRACT,
        "wait_copies<Tile::stages - 2>()",
        "wait_copies<Tile::stages - 1>()",
        CONTRACTION,
    ),
    ("a buffer is filled while it is read", CONTRACT, "    barrier();\n    prefetch", "    prefetch", CONTRACTION),
    ("blocks of columns beyond the first are left out", CONTRACT, "program.tile % blocks * SIDE", "0", "more_slices"),
    (
        "a mix starts before its copies have landed",
        MIX,
        "wait_copies<Tile::stages - 2>()",
        "wait_copies<Tile::stages - 1>()",
        MIXING,
    ),
    (
        "blocks of the map that do not stay are not read again",
        MIX,
        "if (!resident || step < depths)",
        "if (step < depths)",
        "more_slices",
    ),
    ("a mix is not cleared for the next chunk", MIX, "      product.clear();\n", "", MIXING),
    ("beta is missing", MIX, "base + beta * value", "base + (0 * beta + 1) * value", MIXING),
    ("the rank-one term reads another channel", MIX, "slice, column.channel + e)", "slice, column.channel)", MIXING),
    ("a part of a sum is left out", MAPS, "other < groups", "other < groups - 1", "test_softmax"),
    (
        "padding of a map is not written",
        MAPS,
        "if (row >= slices || column >= slices) padded_row",
        "if (false) padded_row",
        "test_softmax",
    ),
    ("the largest logit is not taken off", MAPS, "logits[column] - largest)", "logits[column])", "large_logits"),
    ("the softmax's derivative forgets its row sum", MAPS, "(grads[column] - row_dot)", "grads[column]", "backward"),
    ("rounding loses the sums of the gradient's rows", MAPS, "grads[column] + lost", "grads[column]", "keeps_the_sums"),
    (
        "a tile is transposed without its last row",
        TRANSPOSE,
        "r < arguments.rows && c",
        "r + 1 < arguments.rows && c",
        "transpose",
    ),
    (
        "a step writes over the caller's volume",
        BACKEND,
        "own = step > 0 or volume.data_ptr() != x.data_ptr()",
        "own = True",
        "written_to",
    ),
    (
        "a step writes over the caller's gradient",
        BACKEND,
        "upstream if upstream.data_ptr() != grad.data_ptr() else None",
        "upstream",
        "written_to",
    ),
    (
        "the logits' gradient is not transposed",
        BACKEND,
        "machine.mix(transposed, x, axis, moved)",
        "machine.mix(grad_logits, x, axis, moved)",
        "any_shape",
    ),
    ("the query's bias has no part in the gradient", BACKEND, ", rank_one=rank_one)", ")", "any_shape"),
    ("half precision overflows", BACKEND, "HALF_SHRINK = 2.0**-8", "HALF_SHRINK = 1.0", "range_of_float16"),
]

if __name__ == "__main__":
    sys.exit(prove(FAULTS, "tests/cuda"))
