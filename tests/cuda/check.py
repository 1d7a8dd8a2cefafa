"""Compiles the CUDA extension for GPUs that this machine need not have: ``python tests/cuda/check.py``.

Every kernel is compiled for compute capability 8.0, 9.0 and 10.0, and a table printed of its registers, spills and
shared memory. The binding is compiled and linked, and the extension loaded, if only to read what operators it defines.
It fails on a spill, on more shared memory than the least GPU gives a block, on a contraction or mix without tensor
cores or 128-bit accesses, and on a symbol that nobody provides. Needs nvcc, g++, and torch, which may be without CUDA.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import emulation

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
# KiB of shared memory that a block may have on GPUs of compute capability 8.6, 8.9 and 12.x, which have the least.
SHARED_LIMIT = 99
# Of libtorch_cuda, which a torch without CUDA lacks.
OF_TORCH_CUDA = {
    "aoti_torch_get_current_cuda_stream",
    "torch_c10_cuda_check_msg",
    "torch_c10_cuda_free_error_msg",
}
OPERATION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9a-z._]+)", re.MULTILINE)
OPERATORS = ("contract", "mix", "pad", "softmax", "softmax_backward", "transpose")
MACROS = ("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000")
TORCH = Path(torch.__file__).parent
LOAD = """
import importlib.util, os, sys, torch
sys.setdlopenflags(os.RTLD_LAZY)
spec = importlib.util.spec_from_file_location("rsa_kernels._cuda", sys.argv[1])
spec.loader.exec_module(importlib.util.module_from_spec(spec))
for name in sys.argv[2:]:
    print(getattr(torch.ops.rsa_kernels_cuda, name).default._schema)
"""


class CheckError(Exception):
    """What is wrong, in a sentence."""


def run(*command, **options):
    """Exit status and output of a command."""
    done = subprocess.run(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    return done.returncode, done.stdout


def find_nvcc():
    """nvcc, and the root of its toolkit: what is on the path may be a script that is somewhere else."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=Path(home, "bin")) if home else shutil.which("nvcc")
    if nvcc is None:
        raise CheckError("needs nvcc, and there is none on the path or in CUDA_HOME: install the CUDA toolkit")
    _, output = run(nvcc, "--dryrun", "-x", "cu", os.devnull)
    top = re.search(r"^#\$ TOP=(.*)$", output, re.MULTILINE)
    if top is None:
        raise CheckError(f"nvcc --dryrun names no root of the toolkit: {output.strip()[:200]}")
    return nvcc, Path(top.group(1).strip()).resolve()


def compile_kernels(nvcc, source, arch, target):
    """Compiles a file for an architecture; returns a row of the table for each of its kernels."""
    capability = arch.removeprefix("sm_")
    status, output = run(
        *(nvcc, "-std=c++17", "-O3", "-gencode", f"arch=compute_{capability},code={arch}"),
        *("-Xptxas", "-v,-warn-spills,-Werror", "-Xcompiler", "-fPIC,-fvisibility=hidden"),
        *("-c", source, "-o", target),
    )
    if status:
        raise CheckError(f"{source.name} does not compile for {arch}:\n{output}")
    rows = []
    for function in re.split(r"Compiling entry function ", output)[1:]:
        name = re.match(r"'(\w+)'", function).group(1)
        if "_kernel" not in name:  # of the runtime's own
            continue
        rows.append(
            {
                "arch": arch,
                "kernel": describe(name),
                "registers": int(re.search(r"Used (\d+) registers", function).group(1)),
                "spills": sum(map(int, re.findall(r"(\d+) bytes spill", function))),
                "static": int((re.search(r"(\d+) bytes smem", function) or [0, "0"])[1]),
            }
        )
    if not rows:
        raise CheckError(f"nvcc names no kernel of {source.name}")
    return rows


def describe(mangled):
    """Kernel, type of numbers, side of the tile, read from a mangled name."""
    kernel, arguments = re.search(r"\d+([a-z_]+)_kernelI(\w+?)EEv", mangled).groups()
    kernel = re.sub(r"^.*cu_[0-9a-f]+_?\d*", "", kernel)
    side = re.search(r"Li(\d+)", arguments)
    named = re.search(r"bfloat16|float16|tf32", arguments)
    letters = {"f": "float32", "d": "float64", "t": "16 bits", "j": "32 bits", "m": "64 bits"}
    return kernel, named.group() if named else letters[arguments[0]], int(side.group(1)) if side else None


def find_cuobjdump(toolkit):
    """The disassembler of the toolkit, or the one that comes with Triton; None if there is neither."""
    found = shutil.which("cuobjdump", path=f"{toolkit / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None and (triton := importlib.util.find_spec("triton")):
        found = shutil.which("cuobjdump", path=Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return found


def check_instructions(cuobjdump, target, arch):
    """What is wrong with the machine code of contraction and mix: it must use tensor cores and whole vectors."""
    _, output = run(cuobjdump, "-sass", target)
    faults = []
    for function in output.split("Function : ")[1:]:
        kernel, number, side = describe(function.split()[0])
        operations = OPERATION.findall(function)
        wanted = {"LDGSTS": ".128", **({"STG": ".128", "LDG": ".128"} if kernel == "mix" else {})}
        if number in ("bfloat16", "float16", "tf32"):
            wanted |= {"HMMA": "", "LDSM": ""}
        for name, suffix in wanted.items():
            if not any(op.startswith(name + ".") and suffix in op for op in operations):
                faults.append(f"{arch} {kernel} {number} {side}: has no {name}{suffix}")
    return faults


def dynamic_shared(library, kernel, number, side):
    """Bytes of shared memory that a launch asks for."""
    if kernel == "transpose":
        return library.shared_of_transpose(int(number.split()[0]) // 8)
    if kernel == "pad":
        return 0
    if kernel.startswith("softmax"):
        return library.shared_of_maps(emulation.NUMBERS[number])
    return getattr(library, f"shared_of_{kernel}")(emulation.NUMBERS[number], side)


def compile_binding(toolkit, target):
    status, output = run(
        *(emulation.compiler(), "-std=c++17", "-O2", "-Wall", "-fPIC", "-fvisibility=hidden", *MACROS),
        *(f"-I{TORCH / 'include'}", f"-I{toolkit / 'include'}", f"-I{sysconfig.get_path('include')}"),
        *("-c", emulation.SOURCES / "binding.cpp", "-o", target),
    )
    if status:
        raise CheckError(f"binding.cpp does not compile:\n{output}")


def link(toolkit, objects, target):
    """Links the extension; returns the symbols that none of its libraries provides."""
    runtime = next(iter(sorted(toolkit.rglob("libcudart.so"))), None)
    if runtime is None:
        raise CheckError(f"there is no libcudart.so under {toolkit}")
    status, output = run(
        *(emulation.compiler(), "-shared", *objects, "-o", target, f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"),
        *(f"-L{runtime.parent}", "-lcudart", f"-Wl,-rpath,{runtime.parent}"),
        *("-Wl,-z,defs", "-Wl,-z,lazy", "-Wl,--warn-unresolved-symbols"),
    )
    if status:
        raise CheckError(f"the extension does not link:\n{output}")
    return set(re.findall(r"undefined reference to [`'\"]?([\w@.:]+)", output))


def check_symbols(unresolved):
    """Fails unless the unresolved symbols are those of libtorch_cuda that are known, and Python's."""
    foreign = {symbol for symbol in unresolved if not re.match(r"_?Py[A-Z_]", symbol)}
    if foreign - OF_TORCH_CUDA:
        raise CheckError(f"nobody provides {', '.join(sorted(foreign - OF_TORCH_CUDA))}")
    if OF_TORCH_CUDA - foreign:
        raise CheckError(f"these were to be unresolved, but are not: {', '.join(sorted(OF_TORCH_CUDA - foreign))}")
    return foreign


def check(architectures):
    """The whole check; raises a CheckError."""
    nvcc, toolkit = find_nvcc()
    if emulation.compiler() is None:
        raise CheckError("needs g++, and there is none on the path")
    print(run(nvcc, "--version")[1].strip().splitlines()[-1] + f", torch {torch.__version__}")
    cuobjdump = find_cuobjdump(toolkit)
    if cuobjdump is None:
        print("no cuobjdump in the toolkit or in Triton: the machine code is not looked at")
    faults, count = [], 0
    with tempfile.TemporaryDirectory() as folder:
        library = emulation.compile_into(folder).library
        objects = []
        for arch in architectures:
            for source in sorted(emulation.SOURCES.glob("*.cu")):
                target = Path(folder, f"{source.stem}.{arch}.o")
                for row in compile_kernels(nvcc, source, arch, target):
                    kernel, number, side = row["kernel"]
                    shared = (row["static"] + dynamic_shared(library, kernel, number, side)) / 1024
                    line = f"{arch:8s}{kernel:18s}{number:10s}{side or '':>4}"
                    line += f"{row['registers']:5d} reg {row['spills']:4d} spilled {shared:6.1f} KiB"
                    print(line, flush=True)
                    count += 1
                    if row["spills"]:
                        faults.append(f"{line}: spills registers")
                    if shared > SHARED_LIMIT:
                        faults.append(f"{line}: more shared memory than {SHARED_LIMIT} KiB")
                if cuobjdump and source.stem in ("contract", "mix"):
                    faults += check_instructions(cuobjdump, target, arch)
                if arch == architectures[0]:
                    objects.append(target)
        binding, extension = Path(folder, "binding.o"), Path(folder, "_cuda.abi3.so")
        compile_binding(toolkit, binding)
        unresolved = check_symbols(link(toolkit, [*objects, binding], extension))
        print("links; left to libtorch_cuda: " + ", ".join(sorted(unresolved)))
        status, output = run(sys.executable, "-c", LOAD, extension, *OPERATORS)
        if status:
            raise CheckError(f"the extension does not load:\n{output}")
        print("loads, and defines\n" + output, end="")
    if faults:
        raise CheckError("\n".join(faults))
    print(f"{count} kernels compiled, none spills; nothing was run on a GPU")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES), help="say sm_86")
    try:
        check(parser.parse_args().arch)
    except CheckError as fault:
        print(f"FAIL {fault}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
