"""Measures tilings on this GPU and writes those that beat the launch table: ``python -m rsa_kernels tune``."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import triton
from torch import Tensor

from rsa_kernels.folding import Gradients, Projections
from rsa_kernels.triton import block, tuning
from rsa_kernels.triton.tuning import Tiling

# A tiling has to be faster by this factor to be written, in each of several measurements taken in turn: less is noise.
WORTHWHILE = 0.97
REPEATS = 5
CHOICES = {"warps": (4, 8), "stages": (1, 2, 3, 4), "programs": (1, 2, 3, 4, 6)}


@contextmanager
def _entry(arch: str, key: str, entry: Tiling | None) -> Iterator[None]:
    """Puts an entry into the table for a while."""
    entries = tuning.overrides().setdefault(arch, {})
    before = dict(entries)
    entries[key] = entry
    tuning.tiling.cache_clear()
    try:
        yield
    finally:
        entries.clear()
        entries.update(before)
        tuning.tiling.cache_clear()


def candidates(kernel: str, now: Tiling, slices: int, channels: int) -> Iterator[tuple[str, Sequence[int]]]:
    """Field by field, what to try in place of what a tiling has now."""
    padded, width = tuning.bucket(slices), tuning.bucket(channels)
    narrow = kernel in tuning.NARROW_KERNELS
    yield "columns", [size for size in (16, 32, 64, 128) if not narrow or size >= width]
    if "backward" not in kernel:
        yield "rows", [size for size in (16, 32, 64, 128) if size <= padded]
    for field, values in CHOICES.items():
        if kernel != "mix_slices" or field != "programs":  # there each program has one tile
            yield field, values


def kernels_of(arch: str, kind: str, slices: int, channels: int) -> Iterator[tuple[str, bool]]:
    """The kernels that a step runs by the table, and whether its backward pass is what runs them."""

    def served(*kernels: str) -> bool:
        return all(tuning.tiling(kernel, arch, kind, slices, channels) for kernel in kernels)

    if served("map", "mix"):
        yield from (("map", False), ("mix", False))
    else:
        yield from (("contract", False), ("mix_slices", False))
    if served("map_backward", "mix_backward"):
        yield from (("map_backward", True), ("mix_backward", True))
    else:
        yield from (("contract", True), ("mix_slices", True))


def improve(
    kernel: str, arch: str, kind: str, slices: int, channels: int, measure: Callable[[], float]
) -> Tiling | None:
    """The fastest tiling found by changing one field after the other; None where the table's is as good.

    Args:
        kernel: a name of the launch table.
        arch: see :func:`rsa_kernels.triton.tuning.architecture`.
        kind: see :func:`rsa_kernels.triton.tuning.kind`.
        slices: number of slices.
        channels: number of channels.
        measure: milliseconds of a pass that runs the kernel by the table as it is then, infinite if it cannot run.

    Returns:
        A tiling that is faster than the table's, or None.
    """
    key = tuning.key(kernel, kind, slices, channels)
    start = best = tuning.tiling(kernel, arch, kind, slices, channels)
    if start is None:
        return None
    best_time = measure()
    for field, values in candidates(kernel, start, slices, channels):
        for value in values:
            entry = best._replace(**{field: value})
            if entry == best:
                continue
            with _entry(arch, key, entry):
                time = measure()
            if time < best_time:
                best, best_time = entry, time
    for _ in range(REPEATS if best != start else 0):
        before = measure()
        with _entry(arch, key, best):
            if not measure() < WORTHWHILE * before:
                return None
    return best if best != start else None


def _passes(shape: Sequence[int], dtype: torch.dtype, axis: int, device: str) -> dict[bool, Callable[[], list[Tensor]]]:
    """One step forward, and one backward, under ``False`` and ``True``."""
    generator = torch.Generator().manual_seed(0)
    channels = shape[1]

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    x = random(*shape).to(dtype).contiguous(memory_format=torch.channels_last_3d)
    grad = random(*shape).to(dtype).contiguous(memory_format=torch.channels_last_3d)
    sizes = [(channels, channels), (channels,)] * 3
    weights = Projections(*(random(*size).to(torch.promote_types(dtype, torch.float32)) * 0.02 for size in sizes))
    betas = torch.full((1,), 0.5, device=device, dtype=weights.g_bias.dtype)

    def forward() -> list[Tensor]:
        out, maps, _ = block.recurrent_slice_attention(x, weights, betas, [axis], 1.0, False)
        return [out, *maps]

    def backward() -> list[Tensor]:
        needs = Gradients(*[True] * 8)
        gradients = block.recurrent_slice_attention_backward(grad, x, [], maps, weights, betas, [axis], 1.0, needs)
        return [gradient for gradient in gradients if gradient is not None]

    maps = forward()[1:]
    return {False: forward, True: backward}


def _measure(run: Callable[[], list[Tensor]], truths: Sequence[Tensor]) -> float:
    """Milliseconds of a pass; infinite if it cannot run, or computes something else."""
    try:
        results = run()
        for result, truth in zip(results, truths, strict=True):
            # Other tilings sum in another order; a wrong one is wrong altogether.
            if not (result.double() - truth.double()).norm() <= 0.05 * truth.double().norm() + 1e-6:
                return float("inf")
        return triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median")
    except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError, triton.CompilationError):
        return float("inf")


def tune(shape: Sequence[int], dtype: torch.dtype, device: str, report: Callable[[str], None]) -> dict[str, dict]:
    """Measures every kernel that a block of a shape runs.

    Args:
        shape: ``(N, C, D, H, W)``.
        dtype: of the volume.
        device: a CUDA device.
        report: takes a line of progress.

    Returns:
        The entries that beat the table's, as :func:`rsa_kernels.triton.tuning.read_table` reads them.
    """
    arch, kind = tuning.architecture(torch.device(device).index or 0), tuning.kind(dtype)
    found: dict[str, dict] = {}
    tried = set()
    for axis in (2, 3, 4):
        passes = _passes(shape, dtype, axis, device)
        for kernel, backward in kernels_of(arch, kind, shape[axis], shape[1]):
            key = tuning.key(kernel, kind, shape[axis], shape[1])
            if key in tried:
                continue
            tried.add(key)
            run = passes[backward]
            entry = improve(kernel, arch, kind, shape[axis], shape[1], partial(_measure, run, run()))
            report(f"{key}: {'the table is as good' if entry is None else entry}")
            if entry is not None:
                found[key] = entry._asdict()
    return {arch: found}


def write(table: dict[str, dict], path: Path) -> None:
    """Adds entries to a table's file; the file is whole at every moment."""
    if path.exists():
        tuning.read_table(path)
        old = json.loads(path.read_text())
        table = {arch: {**old.get(arch, {}), **table.get(arch, {})} for arch in {**old, **table}}
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(table, indent=1) + "\n")
    os.replace(beside, path)
