"""Faults of the C++ kernels, which are built with each; see :mod:`mutations`. Half a minute and a test run a fault."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from mutations import prove

KERNELS, BFLOAT16, AMX = (f"csrc/cpu/{name}.h" for name in ("kernels", "kernels_bf16", "kernels_amx"))
BLOCK, STORAGE, NORM, NORM_KERNELS = (
    f"csrc/cpu/{name}" for name in ("block.cpp", "storage.h", "norm.cpp", "norm_kernels.h")
)
EXACT, BITS, SCRATCH, ROUNDED = "as_exact", "bits_do", "scratch_is_written", "rounded_as_torch"
IS_NORM = "is_group_norm"

# What is wrong, where, the right code, the wrong code, which tests run.
FAULTS = [
    (
        "the cut depends on the threads",
        BLOCK,
        "emplace_back(passes_, x, axis, most_parts)",
        "emplace_back(passes_, x, axis, std::min(most_parts, host_.threads))",
        BITS,
    ),
    ("threads share scratch", BLOCK, "scratch_ + host_.thread() * scratch_elements_", "scratch_", BITS),
    ("parts share the gradient of M", BLOCK, "u_, folded.of(part)", "u_, folded.of(0)", BITS),
    ("partial gradients start as they are", BLOCK, "sums->data + end, T(0)", "sums->data + begin, T(0)", SCRATCH),
    ("the gradient stays where it was between passes", BLOCK, "below.data && s == 0 ?", "below.data && s < 0 ?", EXACT),
    ("the softmax's derivative forgets its row sum", BLOCK, "(sums[j] - dot)", "sums[j]", EXACT),
    ("u has no part in the gradient of phi", BLOCK, "static_cast<T>(bias[row] * u_grad[c])", "T(0)", EXACT),
    ("beta is not in the gradient of the bias", BLOCK, "+= betas[s] * sum;", "+= sum;", EXACT),
    (
        "one sample's map serves all",
        BLOCK,
        "attention + task.sample * square, read_value_, bias_,",
        "attention, read_value_, bias_,",
        EXACT,
    ),
    ("the pitch's left over is not zeroed", KERNELS, "if (step > positions)", "if (false)", SCRATCH),
    ("lanes beyond C are not zeroed", KERNELS, "column < channels ? from[at] : 0", "from[at % channels]", EXACT),
    ("a row of positions is read again", KERNELS, "runs.length) column = 0, ++outer", "runs.length) column = 0", EXACT),
    ("channels-last rows never end", KERNELS, "if (++column == range.inner)", "if (++column > range.inner)", EXACT),
    ("a tile's copy is not made again", KERNELS, "if (begin + positions > end_)", "if (end_ < 0)", BITS),
    ("rows of a block are left out", KERNELS, "row < rows; row += block", "row + 1 < rows; row += block", EXACT),
    ("T3 is not transposed", KERNELS, "matrix, 1, range.slices, tile,", "matrix, range.slices, 1, tile,", EXACT),
    ("float16's subnormal numbers are lost", STORAGE, "rest < 0x38800000", "rest < 0", ROUNDED),
    ("bfloat16 is cut off, not rounded", STORAGE, "(bits + 0x7fff + (bits >> 16 & 1))", "bits", ROUNDED),
    ("the gradient's mean stays", NORM, "-reciprocal * grad / count - slope * mean", "-slope * mean", IS_NORM),
    ("a rounded mean is not mended", NORM, "products[c] -= (", "if (false) products[c] -= (", IS_NORM),
    ("a mean is not rounded to the volume's dtype", NORM, "as_stored(-moments[group])", "T(-moments[group])", IS_NORM),
    (
        "parts of a sample are left out",
        NORM,
        "int64_t part = 1; part < parts_",
        "int64_t part = 2; part < parts_",
        IS_NORM,
    ),
    ("one sample's moments serve all", NORM, "at / norm_.channels * norm_.groups + ", "", IS_NORM),
    (
        "the cut of the norm depends on the threads",
        NORM,
        "(norm.voxels + MOST_PARTS - 1) / MOST_PARTS",
        "norm.voxels / norm.host.threads",
        BITS,
    ),
    ("sums are of numbers far from zero", NORM, "minus[c] = -minus[c];", "minus[c] = 0;", "far_from_zero"),
    ("a lone row is left out", NORM_KERNELS, "if (row < rows)", "if (row > rows)", IS_NORM),
    ("the ReLU lets all through", NORM_KERNELS, "relu ? V::positive(value, value) : value", "value", IS_NORM),
    ("the ReLU stops no gradient", NORM_KERNELS, "if (!relu) return above;", "return above;", IS_NORM),
    ("the logits' low half is dropped", BFLOAT16, "contract_tiles<true>(", "contract_tiles<false>(", "large_logits"),
    ("slices beyond the last are not zeroed", BFLOAT16, "pair) clear_beyond(shape, pair);", "pair) {}", SCRATCH),
    ("subnormal numbers stay as they are", BLOCK, "before_ | FLUSH_RESULTS | FLUSH_OPERANDS", "before_", "below"),
    ("the thread goes on without them", BLOCK, "{ _mm_setcsr(before_); }", "{}", "below"),
    # Those below are seen on processors with AMX alone.
    ("channels are not padded", AMX, "(channels + 2 * PAIRS - 1) / (2 * PAIRS) * (2 * PAIRS)", "panels.padded", EXACT),
    ("the second row of tiles is the first", AMX, "load_tile<5>(left + run.left_second,", "load_tile<5>(left,", EXACT),
    ("voxels left over are left out", AMX, "if (!over) return;", "if (over >= 0) return;", EXACT),
    ("voxels left over are not zeroed", AMX, "(PAIRS - rows) * width * sizeof(Pair)", "0", SCRATCH),
    ("low halves of the query are dropped", AMX, "(shape, {high, low}, room", "(shape, {high}, room", "large_logits"),
    ("a chain begins where the last one did", AMX, "begin * squares * SQUARE, 4 * N", "0, 4 * N", EXACT),
    ("the bias beyond C is what was there", AMX, "(panels.padded - channels) * sizeof(float)", "0", SCRATCH),
]


if __name__ == "__main__":
    sys.exit(prove(FAULTS, "tests/cpp", build=True, RSA_BUILD_EXT="1", FORCE_CPU="1"))
