"""Breaks the kernels on purpose, one fault at a time, and proves that the tests see each: ``make check-mutations``.

Every fault is written into a copy of the sources, where the tests that should see it run in the interpreter. The
script fails if one of them stays green, or if a fault no longer fits the code.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
NARROW, WIDE, MAPS = (f"rsa_kernels/triton/{name}.py" for name in ("narrow", "wide", "maps"))
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
        NARROW,
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


def judge(fault):
    """Runs the tests on a copy with the fault; returns whether they saw it, and the line to print."""
    name, path, right, wrong, tests = fault
    with tempfile.TemporaryDirectory() as folder:
        for part in ("rsa_kernels", "rsanet", "tests", "benchmarks"):
            shutil.copytree(ROOT / part, Path(folder) / part, ignore=shutil.ignore_patterns("__pycache__", "results"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        source = Path(folder) / path
        text = source.read_text()
        if right not in text:
            return False, f"GONE  {name}: {path} has no {right!r}"
        source.write_text(text.replace(right, wrong))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "tests/triton", "-k", tests]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": folder}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    # A test failed; one that could not even be collected would prove nothing.
    seen = done.returncode == 1 and "FAILED" in done.stdout
    crashed = done.returncode < 0  # a read from memory that is not there
    return seen or crashed, f"{'seen ' if seen or crashed else 'MISSED'} {name}"


def main():
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = []
        for seen, line in pool.map(judge, FAULTS):
            print(line, flush=True)
            results.append(seen)
    print(f"{sum(results)} of {len(results)} faults seen")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
