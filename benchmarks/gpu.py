"""``python -m benchmarks.gpu``: the block on a GPU, held against the hardware and against what a user would write.

Every provider is checked against the published equations in float64 before it is timed; a wrong one is named, not
timed. Times are medians of CUDA events after warming up. The inputs of a case that fits the L2 cache take turns with
copies of themselves, until all together are twice its size; only such cases are also timed in a CUDA graph. The floor
is the sum over steps and passes of the larger of two times: that of the bytes that a fused kernel has to move, at the
speed of a device copy, and that of the folded algebra's operations, at the speed of a large matrix product. Copy and
product are measured in the same run. TensorFloat-32 is off in products and convolutions for float32, on for tf32.
"""

import argparse
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import date
from functools import partial
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from benchmarks import __main__ as cpu
from benchmarks.published import published
from rsa_kernels import recurrent_slice_attention
from rsa_kernels.__main__ import FLOORS

Result = TypeVar("Result")

AXES = (3, 4, 2)
CASES = {
    "narrow32": (1, 32, 128, 128, 128),
    "tiny512": (1, 512, 10, 14, 10),
    "wide256": (1, 256, 20, 28, 20),
    "middle128": (1, 128, 32, 32, 32),
    "narrow64": (1, 64, 48, 56, 48),
    "narrow16": (1, 16, 160, 192, 160),
    "tiny512x2": (2, 512, 10, 14, 10),
}
QUICK = ("narrow32", "tiny512", "wide256")
# Name to the dtype of volumes and weights, and whether TensorFloat-32 is allowed.
DTYPES = {
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "float64": (torch.float64, False),
}
# Volumes that a step has to read or write: x for the map, x and out for the mix; backward x and the gradient for the
# map, both and dX for the mix.
FORWARD_VOLUMES, BACKWARD_VOLUMES = 3, 5
MATRIX_SIZE = 8192
COPY_BYTES = 1 << 30
# Time spent on the repeats of one measurement, and how many there are at least and at most.
MEASURED_MS, FEWEST, MOST = 200, 7, 200
MOST_IN_GRAPH = 8
# The share of a run's time that compiling ahead may take.
COMPILING_SHARE = 0.4
# What stands in a row instead of a time.
OUT_OF_MEMORY, WRONG, FAILED = "out of memory", "wrong", "failed"

COLUMNS = {
    "device": "name of the GPU",
    "torch": "version",
    "triton": "version",
    "driver": "version of the GPU's driver",
    "commit": "of this repository",
    "date": "of the run",
    "case": "name of the volume's shape",
    "shape": "N x C x D x H x W",
    "dtype": "of volumes and weights; tf32 is float32 with TensorFloat-32 allowed",
    "format": "memory format of the volume",
    "mode": "no_grad: forward without gradients; full: forward and backward with all gradients",
    "provider": "eager and torch.compile: the published equations in PyTorch; else a backend of rsa_kernels",
    "median_ms": f"of one pass, calls launched one by one; or why there is none: {OUT_OF_MEMORY}, {WRONG}, {FAILED}",
    "min_ms": "the fastest",
    "max_ms": "the slowest",
    "graph_ms": "of one pass in a CUDA graph, median; only where the inputs fit the L2 cache",
    "host_ms": "until the call returns, on an idle device, median",
    "peak_extra_mib": "largest allocation above that of the inputs",
    "error": "largest relative error of output and gradients against float64",
    "gb_per_s": "bytes of the traffic floor over the median, or over graph_ms where there is one",
    "copy_percent": "gb_per_s in percent of copy_gb_per_s",
    "floor_ms": "the least time that the hardware allows, see the module",
    "times_floor": "median_ms over floor_ms, or graph_ms over it where there is one",
    "times_eager": "median_ms of eager over median_ms",
    "times_compiled": "median_ms of torch.compile over median_ms",
    "copy_gb_per_s": "device copy in this run, bytes read and written",
    "matrix_tflops": f"product of {MATRIX_SIZE} x {MATRIX_SIZE} matrices of this dtype in this run",
    "input_sets": "copies of the inputs that take turns",
}


class Limits(NamedTuple):
    """What the hardware does at its best, measured."""

    copy_gb_per_s: float
    matrix_tflops: float


class Measurement(NamedTuple):
    """What was measured of one provider in one mode."""

    times: list[float]
    graph_ms: float | None
    host_ms: float
    peak_mib: float
    error: float
    input_sets: int


class Case(NamedTuple):
    """What a row is about, besides the provider."""

    name: str
    dtype: str
    memory_format: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The volume's."""
        return CASES[self.name]


# The arithmetic of floors ------------------------------------------------------------------------------------------


def pass_volumes(mode: str) -> tuple[int, ...]:
    """For each pass of a step, forward and backward, how many volumes it has to move."""
    return (FORWARD_VOLUMES,) if mode == "no_grad" else (FORWARD_VOLUMES, BACKWARD_VOLUMES)


def floor_bytes(shape: Sequence[int], itemsize: int, mode: str) -> int:
    """Bytes that the steps of a block have to move, whatever the memory format."""
    return len(AXES) * sum(pass_volumes(mode)) * math.prod(shape) * itemsize


def pass_flops(shape: Sequence[int], axis: int, mode: str) -> tuple[int, ...]:
    """For each pass of a step, the operations of the folded algebra; a multiply-add is two."""
    forward = 2 * math.prod(shape) * (2 * shape[1] + 2 * shape[axis])
    backward = 2 * math.prod(shape) * (6 * shape[1] + 4 * shape[axis])
    return (forward,) if mode == "no_grad" else (forward, backward)


def floor_ms(shape: Sequence[int], itemsize: int, mode: str, limits: Limits) -> float:
    """The sum over steps and passes of the time for bytes or for operations, whichever is longer."""
    volume = math.prod(shape) * itemsize
    return sum(
        max(volumes * volume / limits.copy_gb_per_s / 1e6, flops / limits.matrix_tflops / 1e9)
        for axis in AXES
        for volumes, flops in zip(pass_volumes(mode), pass_flops(shape, axis, mode), strict=True)
    )


def row(
    case: Case, mode: str, provider: str, measured: Measurement | str, limits: Limits, medians: dict[str, float]
) -> dict:
    """A row of the table, without what all rows of a run share.

    Args:
        case: what was measured.
        mode: of the pass.
        provider: of the block.
        measured: of the provider, or why it was not.
        limits: of the hardware, for this dtype.
        medians: of the providers that were measured before.
    """
    itemsize = DTYPES[case.dtype][0].itemsize
    floor = floor_ms(case.shape, itemsize, mode, limits)
    result = {
        "case": case.name,
        "shape": "x".join(map(str, case.shape)),
        "dtype": case.dtype,
        "format": case.memory_format,
        "mode": mode,
        "provider": provider,
        "median_ms": measured,
        "floor_ms": f"{floor:.4f}",
        "copy_gb_per_s": f"{limits.copy_gb_per_s:.0f}",
        "matrix_tflops": f"{limits.matrix_tflops:.1f}",
    }
    if isinstance(measured, str):
        return result
    median = statistics.median(measured.times)
    best = median if measured.graph_ms is None else measured.graph_ms
    speed = floor_bytes(case.shape, itemsize, mode) / best / 1e6
    ratios = {"times_eager": "eager", "times_compiled": "torch.compile"}
    return {
        **result,
        "median_ms": f"{median:.4f}",
        "min_ms": f"{min(measured.times):.4f}",
        "max_ms": f"{max(measured.times):.4f}",
        "graph_ms": "" if measured.graph_ms is None else f"{measured.graph_ms:.4f}",
        "host_ms": f"{measured.host_ms:.4f}",
        "peak_extra_mib": f"{measured.peak_mib:.1f}",
        "error": f"{measured.error:.1e}",
        "gb_per_s": f"{speed:.0f}",
        "copy_percent": f"{100 * speed / limits.copy_gb_per_s:.0f}",
        "times_floor": f"{best / floor:.2f}",
        **{column: f"{medians[other] / median:.2f}" for column, other in ratios.items() if other in medians},
        "input_sets": measured.input_sets,
    }


def line(cells: dict) -> str:
    """A row as it is printed."""
    start = f"{cells['case']:9s} {cells['format']:16s} {cells['dtype']:8s} {cells['mode']:7s} {cells['provider']:13s}"
    if cells["median_ms"] in (OUT_OF_MEMORY, WRONG, FAILED):
        return f"{start} not timed: {cells['median_ms']}"
    graph = f", graph {cells['graph_ms']}" if cells["graph_ms"] else ""
    ratios = [(cells.get("times_eager"), "eager"), (cells.get("times_compiled"), "compiled")]
    return (
        f"{start} {cells['median_ms']:>9s} ms{graph}, host {cells['host_ms']}, {cells['gb_per_s']:>5s} GB/s "
        f"({cells['copy_percent']} % of a copy), {cells['times_floor']} x floor, "
        + "".join(f"{ratio} x {name}, " for ratio, name in ratios if ratio)
        + f"{cells['peak_extra_mib']} MiB, error {cells['error']}"
    )


# Inputs and correctness --------------------------------------------------------------------------------------------


@contextmanager
def arithmetic(dtype: str) -> Iterator[torch.dtype]:
    """Sets what float32 products and convolutions may do for a name of ``DTYPES``; yields the dtype."""
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [setting.allow_tf32 for setting in settings]
    dtype, tf32 = DTYPES[dtype]
    try:
        for setting in settings:
            setting.allow_tf32 = tf32
        yield dtype
    finally:
        for setting, allowed in zip(settings, before, strict=True):
            setting.allow_tf32 = allowed


def grade(tensors: list[Tensor], gain: float = 1.0) -> list[Tensor]:
    """Scales the query projection so that maps are graded, neither flat nor one-hot, whatever the size.

    The logits of random volumes grow with the number of positions; where they are hundreds, a softmax in half
    precision is noise, and no error says much.

    Args:
        tensors: a volume, six weights and the betas.
        gain: of the key and query projections, relative to ``1 / sqrt(C)``.
    """
    x, theta_weight, theta_bias, *rest = tensors
    positions = x[0, 0].numel() // min(x.shape[2:])
    scale = 4 / gain**2 / math.sqrt(positions * max(positions, x.shape[1]))
    return [x, theta_weight * scale, theta_bias * scale, *rest]


def block_inputs(case: Case, dtype: torch.dtype, device: str) -> list[Tensor]:
    """A volume, six weights and the betas."""
    tensors = grade(cpu.inputs(case.shape, cpu.FORMATS[case.memory_format]), gain=0.3)
    return [tensor.to(device, dtype) for tensor in tensors]


def truths(tensors: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """Output and gradients in float64: the published equations, or where memory is short the folded ones."""
    exact, upstream = [tensor.double() for tensor in tensors], upstream.double()
    try:
        return cpu.run(published, exact, upstream, "full")
    except torch.OutOfMemoryError:
        pass  # only after this is what the error refers to given back
    return cpu.run(partial(recurrent_slice_attention, backend="torch"), exact, upstream, "full")


def allowed(errors: dict[str, float | str], dtype: torch.dtype) -> float:
    """The error that a provider may have: twice that of eager PyTorch, or of the torch backend where eager has none."""
    found = [errors[name] for name in ("eager", "torch") if isinstance(errors.get(name), float)]
    return 2 * next(filter(math.isfinite, found), 0.0) + FLOORS[dtype]


# The device --------------------------------------------------------------------------------------------------------


def capture(call: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Captures a call in a CUDA graph; returns it and the call's results, which every replay writes again."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # what only first calls do, such as loading a kernel, cannot be captured
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


class Gpu:
    """The current CUDA device, as this benchmark asks it."""

    device = "cuda"

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties("cuda")
        self.name = properties.name
        self.cache_bytes = properties.L2_cache_size

    def versions(self) -> dict[str, str]:
        """The columns that say what ran."""
        try:
            triton = metadata.version("triton")
        except metadata.PackageNotFoundError:
            triton = ""
        driver = ""
        if shutil.which("nvidia-smi"):
            command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")[0]
        return {"device": self.name, "torch": torch.__version__, "triton": triton, "driver": driver}

    def times(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        """Milliseconds of calls in turn, by events around each, after a round that is not counted."""
        for call in calls:
            call()
        first = self._events(calls[:1], 1)[0]
        return self._events(calls, min(MOST, max(FEWEST, int(MEASURED_MS / first))))

    def _events(self, calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
        torch.cuda.synchronize()
        pairs = []
        for index in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            calls[index % len(calls)]()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    def graph_ms(self, calls: Sequence[Callable[[], object]]) -> float | None:
        """Median milliseconds of a call where all of them replay as one CUDA graph; None if they cannot."""

        def all_calls() -> None:
            for call in calls:
                call()

        try:
            graph, _ = capture(all_calls)
        except RuntimeError as error:
            print(f"no CUDA graph: {_first_line(error)}")
            return None
        return statistics.median(self.times([graph.replay])) / len(calls)

    def host_ms(self, call: Callable[[], object]) -> float:
        """Median milliseconds until a call returns that finds the device idle."""
        seconds = []
        for _ in range(FEWEST):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        return 1e3 * statistics.median(seconds)

    def peak_mib(self, call: Callable[[], object]) -> float:
        """The largest allocation during a call, above what was allocated before."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def copy_gb_per_s(self) -> float:
        """The speed of a device copy, bytes read and written."""
        source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * COPY_BYTES / statistics.median(self.times([lambda: target.copy_(source)])) / 1e6

    def matrix_tflops(self, dtype: str) -> float:
        """The speed of a large matrix product; of random numbers, since zeros are faster."""
        with arithmetic(dtype) as precision:
            left, right = (torch.randn(MATRIX_SIZE, MATRIX_SIZE, device=self.device).to(precision) for _ in range(2))
            return 2 * MATRIX_SIZE**3 / statistics.median(self.times([lambda: left @ right])) / 1e9

    def free(self) -> None:
        """Gives cached memory back, so that a case finds the same as the first one did."""
        torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


# Measuring ---------------------------------------------------------------------------------------------------------


def measure(gpu: Gpu, case: Case, compiled: bool, limits: Limits) -> Iterator[dict]:
    """The rows of one case, each as soon as it is measured.

    Args:
        gpu: the device.
        case: what to measure.
        compiled: whether torch.compile is a provider.
        limits: of the device.
    """
    torch._dynamo.reset()
    blocks = cpu.providers(gpu.device)
    blocks = {name: block for name, block in blocks.items() if compiled or name != "torch.compile"}
    with arithmetic(case.dtype) as dtype:
        tensors = block_inputs(case, dtype, gpu.device)
        upstream = torch.randn(case.shape, generator=torch.Generator().manual_seed(1))
        # A network hands a gradient back in the memory format that it got the volume in.
        upstream = upstream.contiguous(memory_format=cpu.FORMATS[case.memory_format]).to(gpu.device, dtype)
        errors = check(gpu, case, blocks, tensors, upstream)
        small = tensors[0].nbytes <= gpu.cache_bytes
        count = math.ceil(2 * gpu.cache_bytes / sum(tensor.nbytes for tensor in tensors)) if small else 1
        copies = [([tensor.clone() for tensor in tensors], upstream.clone()) for _ in range(count - 1)]
        for mode in cpu.MODES:
            medians: dict[str, float] = {}
            for provider, block in blocks.items():
                calls = [partial(cpu.run, block, *inputs, mode) for inputs in [(tensors, upstream), *copies]]
                measured = _measure_one(gpu, calls, errors[mode][provider], small)
                if isinstance(measured, Measurement):
                    medians[provider] = statistics.median(measured.times)
                yield row(case, mode, provider, measured, limits, medians)
                gpu.free()


def _measure_one(
    gpu: Gpu, calls: list[Callable[[], object]], error: float | str, with_graph: bool
) -> Measurement | str:
    if isinstance(error, str):
        return error
    try:
        times = gpu.times(calls)
        graph = gpu.graph_ms(calls[:MOST_IN_GRAPH]) if with_graph else None
        return Measurement(times, graph, gpu.host_ms(calls[0]), gpu.peak_mib(calls[0]), error, len(calls))
    except torch.OutOfMemoryError:
        return OUT_OF_MEMORY


def check(
    gpu: Gpu, case: Case, blocks: dict[str, Callable[..., Tensor]], tensors: list[Tensor], upstream: Tensor
) -> dict[str, dict[str, float | str]]:
    """By mode and provider, the error, or why the provider is not to be timed. Names those that are wrong."""
    exact = truths(tensors, upstream)
    found: dict[str, dict[str, float | str]] = {}
    for mode in cpu.MODES:
        found[mode] = {}
        for provider, block in blocks.items():
            try:
                results = cpu.run(block, tensors, upstream, mode)
                found[mode][provider] = cpu.worst_error(results, exact[: len(results)])
                del results
            except torch.OutOfMemoryError:
                found[mode][provider] = OUT_OF_MEMORY
            except Exception as error:
                found[mode][provider] = FAILED
                print(f"not timed, because it failed: {provider} on {'/'.join(case)}, {mode}: {_first_line(error)}")
            gpu.free()
        limit = allowed(found[mode], tensors[0].dtype)
        for provider, error in found[mode].items():
            if isinstance(error, float) and error > limit:
                found[mode][provider] = WRONG
                print(
                    f"not timed, because wrong: {provider} on {'/'.join(case)}, {mode} "
                    f"({error:.1e}, at most {limit:.1e})"
                )
    return found


# The command -------------------------------------------------------------------------------------------------------


def compile_ahead(cases: Sequence[Case], compile_dtypes: Sequence[str], workers: int, seconds: float) -> None:
    """Fills the compilers' caches on disk from several processes: alone, compiling would take most of the run."""
    deadline = time.monotonic() + seconds

    def compile_one(case: Case) -> None:
        command = [sys.executable, "-m", "benchmarks.gpu", "--compile-only", *case, "--compile", *compile_dtypes]
        environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        left = max(0.0, deadline - time.monotonic())
        try:
            subprocess.run(command, env=environment, capture_output=True, check=False, timeout=left)
        except subprocess.TimeoutExpired:
            print(f"not compiled ahead, because time was over: {'/'.join(case)}")

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(compile_one, cases))


def compile_case(case: Case, compiled: bool, device: str) -> None:
    """Calls all providers that compile something, once."""
    blocks = cpu.providers(device)
    skipped = {"eager", "torch"} if compiled else {"eager", "torch", "torch.compile"}
    with arithmetic(case.dtype) as dtype:
        tensors = block_inputs(case, dtype, device)
        for (provider, block), mode in product(blocks.items(), cpu.MODES):
            if provider not in skipped:
                cpu.run(block, tensors, torch.ones_like(tensors[0]), mode)


def measure_all(gpu: Gpu, arguments: argparse.Namespace) -> int:
    """Measures what the arguments ask for; returns the exit status, 1 if a provider was wrong or failed."""
    start = time.monotonic()
    common = {**gpu.versions(), "commit": arguments.commit or cpu.commit(), "date": date.today().isoformat()}
    path = arguments.output or cpu.table(gpu.name)
    copy = gpu.copy_gb_per_s()
    limits = {dtype: Limits(copy, gpu.matrix_tflops(dtype)) for dtype in arguments.dtypes}
    gpu.free()
    print(" · ".join(f"{name} {common[name]}" for name in ("device", "torch", "triton", "driver", "commit")))
    print(f"copy: {copy:.0f} GB/s, read and written; L2 cache: {gpu.cache_bytes >> 20} MiB")
    speeds = ", ".join(f"{dtype} {limits[dtype].matrix_tflops:.0f} TFLOP/s" for dtype in limits)
    print(f"product of {MATRIX_SIZE} x {MATRIX_SIZE} matrices: {speeds}", flush=True)
    cases = [Case(*case) for case in product(arguments.cases, arguments.dtypes, arguments.formats)]
    if arguments.workers:
        compile_ahead(cases, arguments.compile, arguments.workers, COMPILING_SHARE * arguments.budget_seconds)
        print(f"compiled ahead, after {time.monotonic() - start:.0f} s", flush=True)
    status = 0
    for index, case in enumerate(cases):
        if time.monotonic() - start > arguments.budget_seconds:
            rest = ", ".join("/".join(case) for case in cases[index:])
            print(f"not measured, because {arguments.budget_seconds:.0f} s were over: {rest}")
            break
        for cells in measure(gpu, case, case.dtype in arguments.compile, limits[case.dtype]):
            cpu.append(path, tuple(COLUMNS), [{**common, **cells}])
            print(line(cells), flush=True)
            status |= cells["median_ms"] in (WRONG, FAILED)
    print(f"rows: {path}, after {time.monotonic() - start:.0f} s")
    return int(status)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        epilog="columns of the table:\n" + "\n".join(f"  {name:16s}{text}" for name, text in COLUMNS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", nargs="+", choices=list(CASES), help="default: all")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), help="default: bfloat16 float32")
    parser.add_argument("--formats", nargs="+", choices=list(cpu.FORMATS), default=list(cpu.FORMATS))
    parser.add_argument(
        "--compile",
        nargs="*",
        choices=list(DTYPES),
        default=["bfloat16"],
        help="dtypes in which torch.compile is timed",
    )
    parser.add_argument("--quick", action="store_true", help=f"cases {', '.join(QUICK)}, bfloat16, no torch.compile")
    parser.add_argument("--budget-seconds", type=float, default=240, help="start no case later (default: 240)")
    parser.add_argument("--output", type=Path, help="table to add to (default: benchmarks/results/<GPU>.csv)")
    parser.add_argument("--commit", default="", help="what to write as the commit, outside a clone")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile ahead; 0: none (default: 8)")
    parser.add_argument("--compile-only", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.compile = []
    arguments.cases = arguments.cases or list(QUICK if arguments.quick else CASES)
    arguments.dtypes = arguments.dtypes or (["bfloat16"] if arguments.quick else ["bfloat16", "float32"])
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and adds the rows."""
    arguments = parse(argv)
    if not torch.cuda.is_available():
        print("python -m benchmarks.gpu needs a CUDA GPU, and torch finds none: run python -m benchmarks here")
        return 1
    if arguments.compile_only:
        case = Case(*arguments.compile_only)
        compile_case(case, case.dtype in arguments.compile, Gpu.device)
        return 0
    return measure_all(Gpu(), arguments)


if __name__ == "__main__":
    sys.exit(main())
