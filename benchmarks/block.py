"""Measures the block: correctness first, then all providers in turn."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks import memory
from benchmarks.cases import CALL, DTYPES, Case
from benchmarks.devices import Device, arithmetic, best, drift_percent, first_line, others_load_percent, rounds
from benchmarks.floors import Ceilings, floor
from benchmarks.inputs import allowed, block_inputs, errors, exact_block, part_of, run, truths, upstream_gradient
from benchmarks.providers import AUTOCAST, COMPILED, EAGER, LONGEST_SECONDS, SDPA, Provider, providers
from benchmarks.table import FAILED, MEASURED, OUT_OF_MEMORY, SKIPPED, UNUSABLE, WRONG

# What is run; a full pass is timed in two parts.
RUNS = {"full": ("forward", "backward"), "no_grad": ("no_grad",)}
FEWEST, MOST = 3, 25
# What a user would write otherwise may round worse than eager PyTorch; what we offer may not.
OTHERS_ALLOWANCE = 5.0
# Where a turn of all providers takes longer than this, a sweep makes one.
LONG_TURN_SECONDS = 30.0


@dataclass
class Subject:
    """A provider, what it is given, and what is found out about it."""

    provider: Provider
    case: Case
    status: str = MEASURED
    note: str = ""
    inputs: list[tuple[list[Tensor], Tensor]] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    error_on: str = ""
    peaks: dict[str, float] = field(default_factory=dict)
    saved_mib: float | None = None
    times: dict[str, list[float]] = field(default_factory=dict)
    graph_ms: dict[str, float | None] = field(default_factory=dict)
    host_ms: dict[str, float | None] = field(default_factory=dict)

    def end(self, status: str, note: str) -> None:
        """Says why there are no times."""
        self.status, self.note, self.inputs = status, note, []

    def passes(self, mode: str) -> list[Callable[[Callable[[], None]], object]]:
        """A pass for each copy of the inputs."""
        return [partial(self._pass, *inputs, mode) for inputs in self.inputs]

    def _pass(self, tensors: list[Tensor], upstream: Tensor, mode: str, mark: Callable[[], None]) -> None:
        run(self.provider.block, tensors, upstream, mode, mark, self.case.axes)


def measure(
    device: Device, case: Case, seconds: float, calls: dict[tuple[str, ...], float], only: Sequence[str] = ()
) -> Iterator[dict[str, object]]:
    """The rows of a case.

    Args:
        device: to measure on.
        case: what to measure.
        seconds: to spend on the repeats.
        calls: milliseconds of a call by dtype, mode and provider, of a device where calls and work are one; the case
            ``call`` fills it.
        only: names of the providers that take part besides eager; none: all.
    """
    load = others_load_percent()
    before = device.ceilings(case.dtype)
    found = providers(case, device.kind)
    subjects = [Subject(provider, case) for provider in found if not only or provider.name in (*only, EAGER)]
    for subject in subjects:
        _exclude(subject, device, before)
    with arithmetic(case.dtype):
        _check(device, case, subjects)
        able = [subject for subject in subjects if subject.status == MEASURED]
        _time(device, case, able, seconds)
    after = device.ceilings(case.dtype)
    ceilings = best(before, after)
    common = {
        **device.where(),
        "load_percent": None if load is None else f"{load:.0f}",
        "drift_percent": f"{drift_percent(before, after):.0f}",
        "case": case.name,
        "shape": "x".join(map(str, case.shape)),
        "axes": "".join(map(str, case.axes)),
        "dtype": case.dtype,
        "format": case.memory_format,
        "matrix_gflop_per_s": _short(ceilings.matrix_gflop_per_s),
        "copy_gb_per_s": _short(ceilings.copy_gb_per_s),
    }
    for subject in subjects:
        for cells in _rows(subject, case, ceilings):
            key = (case.dtype, str(cells["mode"]), subject.provider.name)
            if case.name == CALL and device.kind == "cpu" and subject.status == MEASURED:
                calls[key] = float(str(cells["median_ms"]))
            if subject.status == MEASURED and not cells.get("host_ms") and key in calls:
                cells["host_ms"] = _short(calls[key])
            yield common | cells


def _exclude(subject: Subject, device: Device, ceilings: Ceilings) -> None:
    """What can be said before anything runs, and on a CPU the memory of a pass, each in a process of its own."""
    provider, case = subject.provider, subject.case
    if provider.block is None:
        return subject.end(UNUSABLE, provider.reason or "")
    if provider.flops:
        speed = ceilings.matrix_gflop_per_s
        if device.kind == "cpu" and case.dtype == "float16":
            speed = device.half_gflop_per_s()
        about = 3 * provider.flops(case) / speed / 1e9
        if about > LONGEST_SECONDS[device.kind]:
            return subject.end(SKIPPED, f"a full pass takes {about:.2g} s at the speed of a large matrix product")
    if device.kind == "cpu":
        found = memory.peaks(case, provider.name)
        if isinstance(found, tuple):
            return subject.end(*found)
        subject.peaks = found
    return None


def _check(device: Device, case: Case, subjects: list[Subject]) -> None:
    """Fills errors and saved bytes; ends those that are wrong or fail. Eager PyTorch sets the limit."""
    exact: dict[Case, list[Tensor]] = {}
    limits: dict[Case, float] = {}
    for subject in subjects:
        if subject.status != MEASURED:
            continue
        provider, part = subject.provider, part_of(case, subject.provider)
        subject.error_on = "" if part == case else "x".join(map(str, part.shape))
        block = exact_block(math.prod(part.shape)) if provider.same else provider.block
        try:
            torch._dynamo.reset()
            plain, upstream = block_inputs(part, device.kind), upstream_gradient(part, device.kind)
            if provider.same and part not in exact:
                exact[part] = truths(block, plain, upstream, case.axes)
            truth = exact[part] if provider.same else truths(block, plain, upstream, case.axes)
            tensors = block_inputs(part, device.kind, provider)
            results, subject.saved_mib = _saved(provider, tensors, upstream, case)
            if part != case:
                subject.saved_mib *= math.prod(case.shape) / math.prod(part.shape)
            found = errors(results, truth)
            without, seconds = _without_gradients(provider, tensors, upstream, case, truth)
            if device.kind == "cuda" and seconds > 1:  # it may have compiled something
                without, seconds = _without_gradients(provider, tensors, upstream, case, truth)
            if device.kind == "cuda" and seconds > 1:
                subject.end(SKIPPED, f"a pass without gradients takes {seconds:.1f} s")
                continue
        except torch.OutOfMemoryError:
            subject.end(OUT_OF_MEMORY, "the device's memory is too small")
            continue
        except Exception as error:
            subject.end(FAILED, first_line(error))
            continue
        finally:
            device.free()
        subject.errors = {
            "forward": found[0],
            "backward": max(found[1:]),
            "full": max(found),
            "no_grad": without[0],
        }
        if provider.name == EAGER:
            limits[part] = allowed([*found, *without], case.dtype)
        limit = limits.get(part) or allowed([], case.dtype)
        if provider.name in (COMPILED, SDPA, AUTOCAST):
            limit *= OTHERS_ALLOWANCE
        worst = max(subject.errors.values())
        if worst > limit and provider.same:
            subject.end(WRONG, f"the error is {worst:.1e}, at most {limit:.1e} may be")
            print(f"not timed, because wrong: {provider.name} on {case}: {subject.note}", flush=True)


def _without_gradients(
    provider: Provider, tensors: list[Tensor], upstream: Tensor, case: Case, truth: list[Tensor]
) -> tuple[list[float], float]:
    """The errors of a pass without gradients, and the seconds that it took."""
    start = time.perf_counter()
    return errors(run(provider.block, tensors, upstream, "no_grad", axes=case.axes), truth), time.perf_counter() - start


def _saved(provider: Provider, tensors: list[Tensor], upstream: Tensor, case: Case) -> tuple[list[Tensor], float]:
    """The results of a full pass, and the MiB that autograd kept for it, weights not counted."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        results = run(provider.block, tensors, upstream, "full", axes=case.axes)
    for weight in tensors[1:]:
        kept.pop(weight.untyped_storage().data_ptr(), None)
    return results, sum(kept.values()) / 2**20


def _time(device: Device, case: Case, subjects: list[Subject], seconds: float) -> None:
    """Times the providers in turn, after a pass each that is not counted; the first turn says how many follow."""
    torch._dynamo.reset()
    small = 0 < math.prod(case.shape) * DTYPES[case.dtype][0].itemsize <= device.cache_bytes
    shared: dict[torch.dtype | None, list[Tensor]] = {}
    upstream = upstream_gradient(case, device.kind)
    for subject in subjects:
        kind = subject.provider.weights
        tensors = shared.setdefault(kind, block_inputs(case, device.kind, subject.provider))
        size = sum(tensor.nbytes for tensor in tensors)
        # Inputs that fit the L2 cache take turns with copies of themselves, until all together are twice its size.
        count = math.ceil(2 * device.cache_bytes / size) if small else 1
        copies = [([tensor.clone() for tensor in tensors], upstream.clone()) for _ in range(count - 1)]
        subject.inputs = [(tensors, upstream), *copies]
    for mode in RUNS:
        able = [subject for subject in subjects if subject.status == MEASURED]
        first: list[float] = []
        found: dict[str, list[list[float]]] = {}
        for subject in able:
            try:
                device.times(subject.passes(mode), 1)  # compiles
                start = time.perf_counter()
                found[subject.provider.name] = device.times(subject.passes(mode), len(subject.inputs))
                first.append(time.perf_counter() - start)
            except torch.OutOfMemoryError:
                subject.end(OUT_OF_MEMORY, "the device's memory is too small")
                device.free()
        able = [subject for subject in able if subject.status == MEASURED]
        sweeping = case.name.startswith("sweep") and sum(first) > LONG_TURN_SECONDS
        turns = 1 if sweeping else rounds(first, seconds, FEWEST, MOST)
        for _ in range(turns - 1):
            for subject in able:
                found[subject.provider.name] += device.times(subject.passes(mode), len(subject.inputs))
        for subject in able:
            samples = found[subject.provider.name]
            for index, part in enumerate(RUNS[mode]):
                subject.times[part] = [parts[index] for parts in samples]
            subject.times[mode] = [sum(parts) for parts in samples]
            if small:
                subject.graph_ms[mode] = device.graph_ms(subject.passes(mode))
            subject.host_ms[mode] = device.host_ms(subject.passes(mode)[0])
            peak = device.peak_mib(subject.passes(mode)[0])
            if peak is not None:
                subject.peaks[mode] = peak
            device.free()


def _rows(subject: Subject, case: Case, ceilings: Ceilings) -> Iterator[dict[str, object]]:
    """The rows of a provider, without what all rows of the case share."""
    name = {"provider": subject.provider.name, "status": subject.status, "note": subject.note}
    if subject.status != MEASURED:
        for mode in RUNS:
            yield {**name, "mode": mode}
        return
    itemsize = DTYPES[case.dtype][0].itemsize
    for mode, times in subject.times.items():
        median = statistics.median(times)
        quartiles = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [median] * 3
        shortest = subject.graph_ms.get(mode) or median
        cells = {
            **name,
            "mode": mode,
            "samples": len(times),
            "median_ms": _short(median),
            "low_ms": _short(quartiles[0]),
            "high_ms": _short(quartiles[2]),
            "graph_ms": _short(subject.graph_ms.get(mode)),
            "host_ms": _short(subject.host_ms.get(mode)),
            "peak_extra_mib": _short(subject.peaks.get(mode)),
            "saved_mib": _short(subject.saved_mib) if mode in ("forward", "full") else None,
            "error": f"{subject.errors[mode]:.1e}",
            "error_on": subject.error_on,
        }
        if subject.provider.same:
            least = floor(case.shape, case.axes, itemsize, mode, ceilings)
            cells |= {
                "gflop": _short(least.gflop),
                "gbyte": _short(least.gbyte),
                "gflop_per_s": _short(1e3 * least.gflop / shortest),
                "gb_per_s": _short(1e3 * least.gbyte / shortest),
                "floor_ms": _short(least.ms),
                "percent_of_floor": f"{100 * least.ms / shortest:.0f}",
            }
        yield cells


def _short(value: float | None) -> str | None:
    """Four digits, never in powers of ten."""
    if value is None:
        return None
    digits = 3 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(0, digits)}f}"


def compile_case(case: Case, kind: str) -> None:
    """Calls all providers that compile something, once, so that compilers' caches on disk are filled."""
    with arithmetic(case.dtype):
        for provider in providers(case, kind):
            if provider.block is not None and provider.name in (COMPILED, "triton"):
                tensors = block_inputs(case, kind, provider)
                for mode in RUNS:
                    run(provider.block, tensors, torch.ones_like(tensors[0]), mode, axes=case.axes)
