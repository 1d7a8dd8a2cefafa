"""``python -m benchmarks``: the block side by side with what a user would write or pick instead, on this machine."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks import cases
from benchmarks.block import compile_case, measure
from benchmarks.cases import Case
from benchmarks.devices import NOISY_DRIFT, NOISY_LOAD, Cpu, Device, Gpu
from benchmarks.table import FAILED, MEASURED, RESULTS, WRONG, Table, block_table
from rsa_kernels import available_backends

VERBS = {
    "run": "measure the block on a CPU (without a verb, too)",
    "gpu": "on a GPU: run its tests, then measure what matters most, in under nine minutes",
    "network": "measure training and inference of the whole network",
    "plot": "draw pictures and tables from the tables of results alone",
    "compare": "say what became slower between two tables, or since the last committed one",
}
# What measuring costs, in seconds: repeats of a case, and all that a GPU is lent for.
CASE_SECONDS, QUICK_CASE_SECONDS, GPU_SECONDS = 2.5, 1.5, 510.0
# The share of a GPU's time that compiling ahead may take.
COMPILING_SHARE = 0.3


def measure_all(device: Device, chosen: Sequence[Case], arguments: argparse.Namespace, table: Table) -> int:
    """Measures cases and puts each row into the table at once; 1 if a backend of ours was wrong or failed."""
    start, calls, status = time.monotonic(), {}, 0
    where = device.where()
    print(" · ".join(f"{name} {where[name]}" for name in ("device", "threads", "torch", "triton", "cuda", "commit")))
    for index, case in enumerate(chosen):
        if time.monotonic() - start > arguments.budget_seconds:
            rest = "; ".join(map(str, chosen[index:]))
            print(f"not measured, because {arguments.budget_seconds:.0f} s were over: {rest}")
            break
        print(f"[{index + 1}/{len(chosen)}, {time.monotonic() - start:.0f} s] {case}", flush=True)
        for row in measure(device, case, arguments.case_seconds, calls, arguments.providers):
            table.put([row])
            print(line(row), flush=True)
            ours = str(row["provider"]).split()[0] in available_backends()
            status |= ours and row["status"] in (WRONG, FAILED)
    print(f"rows: {table.path}, after {time.monotonic() - start:.0f} s")
    return int(status)


def line(row: dict[str, object]) -> str:
    """A row as it is printed."""
    start = f"  {row['provider']:15s} {row['mode']:8s}"
    if row["status"] != MEASURED:
        return f"{start} not timed: {row['status']}: {row['note']}"
    words = [f"{row['median_ms']:>8} ms ({row['low_ms']} to {row['high_ms']}, {row['samples']} samples)"]
    if row.get("graph_ms"):
        words.append(f"graph {row['graph_ms']} ms")
    if row.get("percent_of_floor"):
        words.append(f"{row['percent_of_floor']} % of the floor")
    if row.get("peak_extra_mib"):
        words.append(f"{row['peak_extra_mib']} MiB")
    words.append(f"error {row['error']}")
    if float(str(row["load_percent"] or 0)) > NOISY_LOAD or float(str(row["drift_percent"])) > NOISY_DRIFT:
        words.append(f"noisy: others' load {row['load_percent']} %, drift {row['drift_percent']} %")
    return f"{start} " + ", ".join(words)


def test_gpu(workers: int) -> int:
    """The exit status of the GPU's tests; compilers take most of their time, so several processes run them."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/gpu"]
    if workers and importlib.util.find_spec("xdist"):
        command += ["-n", str(workers), "--dist", "loadgroup"]
    return subprocess.run(command, check=False).returncode


def compile_ahead(chosen: Sequence[Case], workers: int, seconds: float) -> None:
    """Fills the compilers' caches on disk from several processes: alone, compiling would take most of a GPU's time."""
    deadline = time.monotonic() + seconds

    def compile_one(case: Case) -> None:
        command = [sys.executable, "-m", "benchmarks", "compile", json.dumps(case)]
        environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        left = max(0.0, deadline - time.monotonic())
        try:
            subprocess.run(command, env=environment, capture_output=True, check=False, timeout=left)
        except subprocess.TimeoutExpired:
            print(f"not compiled ahead, because time was over: {case}")

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(compile_one, chosen))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads what follows the verbs ``run`` and ``gpu``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog="verbs:\n" + "\n".join(f"  {name:9s}{text}" for name, text in VERBS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a few cases, enough for the pictures")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="only these, by name, 'sweep V' among them")
    parser.add_argument("--dtypes", nargs="+", choices=list(cases.DTYPES), help="only these")
    parser.add_argument("--formats", nargs="+", choices=list(cases.FORMATS), help="only these")
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="only these, and eager")
    parser.add_argument(
        "--case-seconds", type=float, help=f"spent on repeats of a case and mode (default: {CASE_SECONDS})"
    )
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="start no case later")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder of the table (default: benchmarks/results)"
    )
    workers = max(2, min(12, (os.cpu_count() or 2) - 2))
    parser.add_argument(
        "--workers", type=int, default=workers, help=f"processes that test and compile for a GPU (default: {workers})"
    )
    arguments = parser.parse_args(argv)
    arguments.case_seconds = arguments.case_seconds or (QUICK_CASE_SECONDS if arguments.quick else CASE_SECONDS)
    return arguments


def selected(everything: Sequence[Case], arguments: argparse.Namespace) -> list[Case]:
    """The cases that the arguments name; a sentence and status 2 if there are none."""
    found = [
        case
        for case in everything
        if (not arguments.cases or case.name in arguments.cases)
        and (not arguments.dtypes or case.dtype in arguments.dtypes)
        and (not arguments.formats or case.memory_format in arguments.formats)
    ]
    if not found:
        names = ", ".join(dict.fromkeys(f"'{case.name}'" for case in everything))
        asked = " or ".join(arguments.cases or ["so"])
        print(f"no case is called {asked} in this dtype and format: name some of {names}", file=sys.stderr)
        raise SystemExit(2)
    return found


def run_on_cpu(arguments: argparse.Namespace) -> int:
    """Measures the block on the CPU."""
    device = Cpu()
    chosen = selected(cases.quick() if arguments.quick else cases.everything(), arguments)
    return measure_all(device, chosen, arguments, block_table(device.name, arguments.output))


def run_on_gpu(arguments: argparse.Namespace) -> int:
    """The GPU's tests, then the block, the most important cases first."""
    if not torch.cuda.is_available():
        print("python -m benchmarks gpu needs a CUDA GPU, and torch finds none: python -m benchmarks measures this CPU")
        return 1
    start = time.monotonic()
    if arguments.budget_seconds == float("inf"):
        arguments.budget_seconds = GPU_SECONDS
    chosen = selected(cases.on_gpu(), arguments)
    status = 0
    if not arguments.quick:
        status = test_gpu(arguments.workers)
        print(f"tests/gpu: exit {status}, after {time.monotonic() - start:.0f} s", flush=True)
    if arguments.workers:
        compile_ahead(chosen, arguments.workers, COMPILING_SHARE * arguments.budget_seconds)
        print(f"compiled ahead, after {time.monotonic() - start:.0f} s", flush=True)
    arguments.budget_seconds -= time.monotonic() - start
    device = Gpu()
    return measure_all(device, chosen, arguments, block_table(device.name, arguments.output)) or status


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb."""
    words = list(sys.argv[1:] if argv is None else argv)
    verb = words.pop(0) if words and not words[0].startswith("-") else "run"
    if verb == "compile":  # what `gpu` starts for each case
        name, shape, dtype, memory_format, axes = json.loads(words[0])
        compile_case(Case(name, tuple(shape), dtype, memory_format, tuple(axes)), "cuda")
        return 0
    if verb not in VERBS:
        print(f"there is no verb {verb!r}; python -m benchmarks has:")
        print("\n".join(f"  {name:9s}{text}" for name, text in VERBS.items()))
        return 2
    if verb == "network":
        from benchmarks import network

        return network.main(words)
    if verb == "plot":
        from benchmarks import plot

        return plot.main([Path(word) for word in words])
    if verb == "compare":
        from benchmarks import compare

        return compare.main([Path(word) for word in words])
    arguments = parse(words)
    return run_on_gpu(arguments) if verb == "gpu" else run_on_cpu(arguments)


if __name__ == "__main__":
    sys.exit(main())
