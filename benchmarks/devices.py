"""A device as the benchmark asks it: what it is, what it does at its best, if it is quiet, how long passes take."""

import math
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from benchmarks.cases import DTYPES
from benchmarks.floors import Ceilings

Result = TypeVar("Result")
# A pass of a block: calls `mark` where one part of it ends and the next one begins.
Pass = Callable[[Callable[[], None]], object]

COPY_BYTES = 1 << 28
# Above these a row counts as noisy.
NOISY_LOAD, NOISY_DRIFT = 10.0, 15.0


class Device(Protocol):
    """What the two devices have in common."""

    name: str
    kind: str
    cache_bytes: int

    def where(self) -> dict[str, object]:
        """The columns that say what ran, but for load and drift."""

    def ceilings(self, dtype: str) -> Ceilings:
        """The speed of a large copy and of a large matrix product."""

    def times(self, passes: Sequence[Pass], count: int) -> list[list[float]]:
        """For each of ``count`` passes, which take turns, the milliseconds of each of its parts."""

    def graph_ms(self, passes: Sequence[Pass]) -> float | None:
        """Median milliseconds of a pass in a CUDA graph; None where there is none."""

    def host_ms(self, run: Pass) -> float | None:
        """Median milliseconds until a call returns that finds the device idle; None where work and call are one."""

    def peak_mib(self, run: Pass) -> float | None:
        """The largest allocation during a call, above what was allocated before; None where only a process tells."""

    def free(self) -> None:
        """Gives cached memory back, so that a case finds the same as the first one did."""


@contextmanager
def arithmetic(dtype: str) -> Iterator[torch.dtype]:
    """Sets what float32 products and convolutions may do for a name of ``DTYPES``; yields the dtype."""
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [setting.allow_tf32 for setting in settings]
    precision, tf32 = DTYPES[dtype]
    try:
        for setting in settings:
            setting.allow_tf32 = tf32
        yield precision
    finally:
        for setting, allowed in zip(settings, before, strict=True):
            setting.allow_tf32 = allowed


def here() -> "Device":
    """The GPU where torch finds one, else the CPU."""
    return Gpu() if torch.cuda.is_available() else Cpu()


def others_load_percent(seconds: float = 0.3) -> float | None:
    """Processor time that anyone takes while this process sleeps, of all cores; None where the system does not tell."""
    path = Path("/proc/stat")
    if not path.is_file():
        return None

    def counted() -> tuple[int, int]:
        numbers = [int(word) for word in path.read_text().split("\n", 1)[0].split()[1:9]]
        return sum(numbers), numbers[3] + numbers[4]

    before, idle_before = counted()
    time.sleep(seconds)
    after, idle_after = counted()
    return 100 * (1 - (idle_after - idle_before) / (after - before)) if after > before else 0.0


def drift_percent(before: Ceilings, after: Ceilings) -> float:
    """By how much two measurements of the matrix product's speed differ."""
    speeds = (before.matrix_gflop_per_s, after.matrix_gflop_per_s)
    return 100 * (max(speeds) / min(speeds) - 1)


def best(first: Ceilings, second: Ceilings) -> Ceilings:
    """A ceiling is the best that was seen."""
    return Ceilings(*map(max, first, second))


def commit() -> str:
    """The commit that is measured, with a plus where files differ from it; nothing outside a clone."""
    folder = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True, check=False
        ).stdout.strip()
        status = ["git", "status", "--porcelain", "--", ".", ":!results", "../rsa_kernels", "../rsanet", "../csrc"]
        changed = subprocess.run(status, cwd=folder, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""
    return found + ("+" if found and changed else "")


def _versions() -> dict[str, object]:
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = ""
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda or "",
        "commit": commit(),
        "date": date.today().isoformat(),
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in path.read_text().splitlines() if line.startswith("model name")
        ]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


class Cpu:
    """The processor, with as many threads as torch uses."""

    kind = "cpu"
    cache_bytes = 0  # that inputs fit a cache is nothing special: they are read from where the network left them

    def __init__(self) -> None:
        tiles = " AMX" if torch.cpu._is_amx_tile_supported() else ""
        self.name = f"{_processor()} {torch.backends.cpu.get_cpu_capability()}{tiles}"

    def where(self) -> dict[str, object]:
        """See ``Device``."""
        return {"device": self.name, "driver": "", **_versions()}

    def ceilings(self, dtype: str) -> Ceilings:
        """See ``Device``: the fastest of a few; for float16 the faster of its product and float32's."""
        source = torch.ones(COPY_BYTES // 4)
        target = torch.empty_like(source)
        seconds = self._fastest(lambda: target.copy_(source), 4)
        return Ceilings(2 * COPY_BYTES / seconds / 1e9, self._matrix_gflop_per_s(dtype))

    def _matrix_gflop_per_s(self, dtype: str) -> float:
        if dtype == "float16":
            # Without instructions for it, a product takes a hundred times as long as one in float32.
            return max(self.half_gflop_per_s(), self._product(torch.float32, 2048))
        return self._product(DTYPES[dtype][0], 2048)

    def half_gflop_per_s(self) -> float:
        """The speed of a product in float16."""
        return self._product(torch.float16, 256)

    def _product(self, dtype: torch.dtype, size: int) -> float:
        left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
        return 2 * size**3 / self._fastest(lambda: left @ right, 8) / 1e9

    @staticmethod
    def _fastest(call: Callable[[], object], count: int) -> float:
        call()
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    def times(self, passes: Sequence[Pass], count: int) -> list[list[float]]:
        """See ``Device``."""
        moments: list[float] = []

        def mark() -> None:
            moments.append(time.perf_counter())

        found = []
        for index in range(count):
            moments.clear()
            mark()
            passes[index % len(passes)](mark)
            mark()
            found.append([1e3 * (end - begin) for begin, end in pairwise(moments)])
        return found

    def graph_ms(self, passes: Sequence[Pass]) -> float | None:
        """None."""

    def host_ms(self, run: Pass) -> float | None:
        """None."""

    def peak_mib(self, run: Pass) -> float | None:
        """None: see ``benchmarks.memory``."""

    def free(self) -> None:
        """Nothing is cached."""


class Gpu:
    """The current CUDA device."""

    kind = "cuda"
    matrix_size = 8192
    most_in_graph = 8

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties("cuda")
        self.name = properties.name
        self.cache_bytes = properties.L2_cache_size

    def where(self) -> dict[str, object]:
        """See ``Device``."""
        driver = ""
        if shutil.which("nvidia-smi"):
            command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")[0]
        return {"device": self.name, "driver": driver, **_versions()}

    def ceilings(self, dtype: str) -> Ceilings:
        """See ``Device``: medians; of random numbers, since products of zeros are faster."""
        source = torch.ones(4 * COPY_BYTES, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        copying = self._median(lambda mark: target.copy_(source))
        with arithmetic(dtype) as precision:
            size = self.matrix_size
            left, right = (torch.randn(size, size, device="cuda").to(precision) for _ in range(2))
            multiplying = self._median(lambda mark: left @ right)
        return Ceilings(8 * COPY_BYTES / copying / 1e6, 2 * size**3 / multiplying / 1e6)

    def _median(self, run: Pass) -> float:
        return statistics.median(sum(parts) for parts in self.times([run], 12)[2:])

    def times(self, passes: Sequence[Pass], count: int) -> list[list[float]]:
        """See ``Device``: all passes are launched one behind the other, with events between their parts."""
        marks: list[list[torch.cuda.Event]] = []

        def record() -> None:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            marks[-1].append(event)

        for index in range(count):
            marks.append([])
            record()
            passes[index % len(passes)](record)
            record()
        torch.cuda.synchronize()
        return [[begin.elapsed_time(end) for begin, end in pairwise(row)] for row in marks]

    def graph_ms(self, passes: Sequence[Pass]) -> float | None:
        """See ``Device``: of up to ``most_in_graph`` passes in one graph."""
        passes = passes[: self.most_in_graph]

        def all_passes() -> None:
            for run in passes:
                run(lambda: None)

        try:
            graph, _ = capture(all_passes)
        except RuntimeError as error:
            print(f"no CUDA graph: {first_line(error)}")
            return None
        return self._median(lambda mark: graph.replay()) / len(passes)

    def host_ms(self, run: Pass) -> float | None:
        """See ``Device``."""
        seconds = []
        for _ in range(7):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run(lambda: None)
            seconds.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        return 1e3 * statistics.median(seconds)

    def peak_mib(self, run: Pass) -> float | None:
        """See ``Device``."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(lambda: None)
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def free(self) -> None:
        """See ``Device``."""
        torch.cuda.empty_cache()


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


def first_line(error: BaseException) -> str:
    """An error in one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def free_bytes(kind: str) -> int:
    """Memory that can still be had; more than anyone has where the system does not tell."""
    if kind == "cuda":
        return torch.cuda.mem_get_info()[0]
    path = Path("/proc/meminfo")
    if not path.is_file():
        return 1 << 62
    available = next(line for line in path.read_text().splitlines() if line.startswith("MemAvailable"))
    return int(available.split()[1]) * 1024


def rounds(first_seconds: Sequence[float], budget: float, fewest: int, most: int) -> int:
    """How often all providers take their turn within a budget of seconds."""
    total = sum(first_seconds)
    return most if total == 0 else max(fewest, min(most, math.floor(budget / total)))
