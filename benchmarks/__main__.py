"""``python -m benchmarks``: the block side by side with what a user would write, on this machine.

Providers are timed in turn within one run; a wrong one is never timed. Rows go to ``benchmarks/results/<device>.csv``.
"""

import argparse
import csv
import ctypes
import datetime
import gc
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.published import published
from rsa_kernels import available_backends, recurrent_slice_attention
from rsa_kernels.backends import cannot_run

CASES = {
    "tiny": (1, 512, 10, 14, 10),
    "wide": (1, 256, 20, 28, 20),
    "middle 128": (1, 128, 32, 32, 32),
    "middle 64": (1, 64, 48, 56, 48),
    "narrow": (1, 32, 64, 64, 64),
}
QUICK = ("tiny", "middle 128")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last_3d": torch.channels_last_3d}
MODES = ("full", "no_grad")
# To each dtype, what an error may be besides twice eager's.
FLOORS = {"float32": 1e-6, "bfloat16": 1.6e-2}
RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    *("device", "threads", "torch", "commit", "date", "case", "shape", "dtype", "format", "mode", "provider"),
    *("median_ms", "min_ms", "max_ms", "peak_extra_mib", "error"),
)


def providers(device: str = "cpu") -> dict[str, Callable[..., Tensor]]:
    """Name to the block as that provider computes it, for volumes on a device."""
    found = {"eager": published, "torch.compile": torch.compile(published)}
    volume = torch.empty((1,) * 5, device=device)
    for name in available_backends():
        if name != "reference" and cannot_run(name, volume) is None:
            found[name] = lambda *tensors, name=name: recurrent_slice_attention(*tensors, backend=name)
    return found


def inputs(
    shape: tuple[int, ...], memory_format: torch.memory_format, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """A volume, six weights and the betas, with logits as tame as those of a trained network."""
    generator = torch.Generator().manual_seed(0)
    channels = shape[1]
    tensors = [torch.randn(shape, generator=generator).contiguous(memory_format=memory_format)]
    for _ in range(3):
        tensors.append(torch.randn(channels, channels, generator=generator) * 0.3 / channels**0.5)
        tensors.append(torch.randn(channels, generator=generator) * 0.1)
    return [tensor.to(dtype) for tensor in (*tensors, torch.full((3,), 0.5))]


def run(block: Callable[..., Tensor], tensors: list[Tensor], upstream: Tensor, mode: str) -> list[Tensor]:
    """One pass; returns the output, and the gradients in mode ``full``."""
    if mode == "no_grad":
        with torch.no_grad():
            return [block(*tensors)]
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = block(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def worst_error(results: list[Tensor], truths: list[Tensor]) -> float:
    """The largest relative error of the output and all gradients but that of phi_bias, which is zero.

    Infinite where anything is not finite.
    """
    errors = [((r.double() - t).norm() / t.norm()).item() for r, t in zip(results, truths, strict=True)]
    return max(error if math.isfinite(error) else math.inf for index, error in enumerate(errors) if index != 5)


def peak_extra_mib(case: str, provider: str, memory_format: str, dtype: str) -> dict[str, float]:
    """Per mode, the high-water mark of resident memory above its level before the pass, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks", "--peak", case, provider, memory_format, dtype]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return dict(zip(MODES, map(float, printed), strict=True))


def _measure_peak(case: str, provider: str, memory_format: str, dtype: str) -> None:
    block = providers()[provider]
    tensors = inputs(CASES[case], FORMATS[memory_format], getattr(torch, dtype))
    upstream = torch.ones_like(tensors[0])
    for mode in MODES:
        # Once before: libraries, thread pools and the compiler's work are not the pass's memory.
        run(block, tensors, upstream, mode)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the mark
        before = _status_mib("VmRSS")
        run(block, tensors, upstream, mode)
        print(_status_mib("VmHWM") - before)


def _status_mib(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def measure(case: str, memory_format: str, repeats: int, dtype: str = "float32") -> list[dict]:
    """The rows of one case: correctness first, then all providers in turn, ``repeats`` times."""
    torch._dynamo.reset()
    shape = CASES[case]
    tensors = inputs(shape, FORMATS[memory_format], getattr(torch, dtype))
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(tensors[0].dtype)
    rows = []
    # What the kernel tells of a process's memory it tells on Linux.
    on_linux = sys.platform == "linux"
    peaks = {name: peak_extra_mib(case, name, memory_format, dtype) for name in providers()} if on_linux else {}
    for mode in MODES:
        truths = run(published, [tensor.double() for tensor in tensors], upstream.double(), mode)
        blocks = providers()
        errors = {name: worst_error(run(block, tensors, upstream, mode), truths) for name, block in blocks.items()}
        limit = 2 * errors["eager"] + FLOORS[dtype]
        times: dict[str, list[float]] = {name: [] for name in blocks if errors[name] <= limit}
        for name in blocks.keys() - times.keys():
            print(f"not timed, because wrong: {name} on {case} ({errors[name]:.1e}, at most {limit:.1e})")
        for _ in range(repeats):
            for name, seconds in times.items():
                start = time.perf_counter()
                run(blocks[name], tensors, upstream, mode)
                seconds.append(time.perf_counter() - start)
        for name, seconds in times.items():
            rows.append(
                {
                    "case": case,
                    "shape": "x".join(map(str, shape)),
                    "dtype": dtype,
                    "format": memory_format,
                    "mode": mode,
                    "provider": name,
                    "median_ms": round(1e3 * statistics.median(seconds), 2),
                    "min_ms": round(1e3 * min(seconds), 2),
                    "max_ms": round(1e3 * max(seconds), 2),
                    "peak_extra_mib": round(peaks[name][mode], 1) if peaks else "",
                    "error": f"{errors[name]:.1e}",
                }
            )
            eager = statistics.median(times["eager"]) / statistics.median(seconds)
            row = rows[-1]
            print(
                f"{case:11s} {dtype} {memory_format:16s} {mode:8s} {name:14s} {row['median_ms']:9.1f} ms, "
                f"{eager:.2f} x eager, {row['peak_extra_mib']:>7} MiB, error {row['error']}",
                flush=True,
            )
    return rows


def _processor() -> str:
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit that is measured, or nothing outside a clone."""
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def table(device: str) -> Path:
    """The file that keeps a device's rows."""
    return RESULTS / f"{device.lower().replace(' ', '-')}.csv"


def append(path: Path, columns: Sequence[str], rows: Iterable[dict]) -> None:
    """Adds rows to a table, which starts with the names of its columns."""
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Measures and appends the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"only the cases {' and '.join(QUICK)}")
    parser.add_argument("--repeats", type=int, default=9, help="passes of each provider (default: 9)")
    parser.add_argument("--dtype", choices=FLOORS, default="float32", help="of the volumes (default: float32)")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        _measure_peak(*arguments.peak)
        return
    device = f"{_processor()} {torch.backends.cpu.get_cpu_capability()}"
    common = {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    path = table(device)
    for case in QUICK if arguments.quick else CASES:
        for memory_format in FORMATS:
            rows = measure(case, memory_format, arguments.repeats, arguments.dtype)
            append(path, COLUMNS, ({**common, **row} for row in rows))
    print(f"rows: {path}")


if __name__ == "__main__":
    main()
