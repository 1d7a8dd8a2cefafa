"""Compiles every kernel that the launch table can choose, for GPUs that this machine need not have.

``python tests/triton/ahead_of_time.py`` prints a table: registers, spills, shared memory, tensor memory, 128-bit global
loads of all, matrix instructions. It fails on a spill, on memory over the architecture's limit, and where matrix
instructions, or for 16-bit volumes 128-bit loads, are missing from a kernel that should have them. ``--arch``,
``--kernel`` and ``--dtype`` narrow it.
"""

import argparse
import functools
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

import recording  # noqa: E402

from rsa_kernels.triton import maps, narrow, tuning, volumes, weights, wide  # noqa: E402

MODULES = {"maps": maps, "narrow": narrow, "volumes": volumes, "weights": weights, "wide": wide}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# KiB of shared memory a program may have. The table of 8.0 also serves 8.6, 8.9 and 12.x, which have the least.
SHARED_LIMITS = {"sm_80": 99, "sm_90": 227, "sm_100": 227}
TENSOR_MEMORY_LIMIT = 512
SLICES = (16, 32, 64, 128, 256, 512)
# For each bucket of channels one that fills it and one that does not.
CHANNELS = (3, 16, 20, 32, 64, 128, 256)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
DTYPES["fp64"] = torch.float64
OPERATION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9a-z._]+)", re.MULTILINE)
MATRIX = ("HMMA", "HGMMA", "DMMA", "UTCHMMA", "UTCQMMA", "UTCMMA")
PRODUCTS = {"narrow.map", "narrow.mix", "narrow.map_backward", "narrow.mix_backward"}
PRODUCTS |= {"wide.contract", "wide.mix", "wide.mix_backward"}


def launches(arch, dtype_name):
    """Every kernel that a block or attention alone can launch on an architecture, each once."""
    dtype = DTYPES[dtype_name]
    found = {}
    kind = {"tf32": "tf32", "fp32": "float", "fp64": "double"}.get(dtype_name, "half")
    original = tuning.kind
    tuning.kind = lambda dtype: kind
    try:
        with recording.recording(arch) as made:
            for slices in SLICES if dtype_name == "bf16" else SLICES[::2]:
                for channels in CHANNELS if dtype_name == "bf16" else (32, 256):
                    recording.run_block((1, channels, slices, 1, 9), (2,), dtype)
                    recording.run_block((1, channels, 3, 3, slices), (4,), dtype)
                recording.run_attention((1, 64, slices, 1, 5), 2, dtype)
            recording.run_block((1, 32, 4, 4, 4), (2,), dtype, torch.contiguous_format)
        for launch, *_ in made:
            found.setdefault(launch)
    finally:
        tuning.kind = original
    return list(found)


def compile_one(job):
    """Compiles a launch for an architecture; returns the row of the table."""
    arch, dtype_name, launch = job
    module, name = launch.kernel.split(".")
    kernel = getattr(MODULES[module], f"{name}_kernel")
    pointers, signature, attributes = iter(launch.pointers), {}, {}
    unaligned = {kernel.arg_names[p] if isinstance(p, int) else p for p in kernel.do_not_specialize}
    constants = launch.constant
    annotations = kernel.fn.__annotations__
    for index, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif annotations.get(argument) in (tl.int32, tl.int64):
            signature[argument] = "i32" if annotations[argument] is tl.int32 else "i64"
        else:
            signature[argument] = "*" + next(pointers)
            if argument not in unaligned:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs=attributes,
    )
    start = time.perf_counter()
    try:
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", int(arch.removeprefix("sm_")), 32),
            options={"num_warps": launch.warps, "num_stages": launch.stages},
        )
    except Exception as error:
        return {"arch": arch, "dtype": dtype_name, "launch": launch, "error": f"{type(error).__name__}: {error}"[:300]}
    seconds = time.perf_counter() - start
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _dump("--dump-resource-usage", file.name)
        operations = OPERATION.findall(_dump("-sass", file.name))
    loads = [operation for operation in operations if operation.startswith(("LDG", "LDGSTS", "UBLKCP", "UTMALDG"))]
    return {
        "arch": arch,
        "dtype": dtype_name,
        "launch": launch,
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "stack": int(re.search(r"STACK:(\d+)", usage).group(1)),
        "spills": sum(operation.startswith(("STL", "LDL")) for operation in operations),
        "shared": compiled.metadata.shared,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", None) or 0,
        "wide_loads": sum(".128" in operation for operation in loads),
        "loads": len(loads),
        "matrix": sum(operation.split(".")[0] in MATRIX for operation in operations),
        "seconds": seconds,
    }


def _dump(option, path):
    return subprocess.run([TOOLS / "cuobjdump", option, path], capture_output=True, text=True, check=True).stdout


def faults(row):
    """What is wrong with a compiled kernel, in words."""
    if "error" in row:
        return [row["error"]]
    launch, found = row["launch"], []
    if row["spills"] or row["stack"]:
        found.append(f"{row['spills']} spills, {row['stack']} bytes of stack")
    if row["shared"] > SHARED_LIMITS[row["arch"]] * 1024:
        found.append(f"{row['shared'] / 1024:.0f} KiB of shared memory, at most {SHARED_LIMITS[row['arch']]}")
    if row["tensor_memory"] > TENSOR_MEMORY_LIMIT:
        found.append(f"{row['tensor_memory']} columns of tensor memory, at most {TENSOR_MEMORY_LIMIT}")
    if launch.kernel in PRODUCTS:
        if row["dtype"] in ("bf16", "fp16", "tf32") and not row["matrix"]:
            found.append("no matrix instructions")
        if row["dtype"] in ("bf16", "fp16") and launch.constant["C"] % 16 == 0 and not row["wide_loads"]:
            found.append("no 128-bit loads")
    return found


def describe(row):
    """A line of the table."""
    launch = row["launch"]
    constants = launch.constant
    shape = " ".join(f"{key}={constants[key]:d}" for key in ("SP", "BI", "C", "K", "FLAT", "SPLIT") if key in constants)
    left = f"{row['arch']:7s}{row['dtype']:5s}{launch.kernel:22s}{shape:40s} {launch.warps}w {launch.stages}s "
    if "error" in row:
        return left + "did not compile"
    return left + (
        f"{row['registers']:4d} reg {row['spills']:3d} spill {row['shared'] / 1024:6.1f} KiB "
        f"{row['tensor_memory']:4d} tmem {row['wide_loads']:3d}/{row['loads']:<3d} loads {row['matrix']:4d} mma "
        f"{row['seconds']:5.1f} s"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=list(SHARED_LIMITS), choices=list(SHARED_LIMITS))
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--kernel", default="", help="only kernels whose name starts so, say narrow.map")
    arguments = parser.parse_args()
    print(f"Triton {triton.__version__}")
    jobs = [
        (arch, dtype, launch)
        for arch in arguments.arch
        for dtype in arguments.dtype
        for launch in launches(arch, dtype)
        if launch.kernel.startswith(arguments.kernel)
    ]
    print(f"{len(jobs)} kernels", flush=True)
    wrong = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for row in pool.map(compile_one, jobs):
            print(describe(row), flush=True)
            wrong += [f"{describe(row)}: {fault}" for fault in faults(row)]
    print(*(f"FAIL {line}" for line in wrong), sep="\n")
    print(f"{len(jobs)} kernels compiled with Triton {triton.__version__}, {len(wrong)} faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    print = functools.partial(print, flush=True)
    sys.exit(main())
