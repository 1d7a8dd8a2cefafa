"""How much memory a pass takes on the CPU: the high-water mark of a process that does nothing else.

The process is forked from a server that has imported everything and computed nothing. It may not take more than is
free, so that a provider that needs more fails there with an error, and the machine goes on.
"""

import ctypes
import gc
import math
import resource
import signal
import sys
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.cases import Case
from benchmarks.devices import arithmetic, first_line, free_bytes
from benchmarks.inputs import block_inputs, run, upstream_gradient
from benchmarks.providers import providers
from benchmarks.table import FAILED, OUT_OF_MEMORY

# What is left to others, in bytes.
RESERVE = 1 << 30
# Libraries and thread pools take their memory in a first pass; beside volumes of this size that is nothing.
LARGE_BYTES = 1 << 28


def peaks(case: Case, provider: str) -> dict[str, float] | tuple[str, str]:
    """MiB above the level before a pass, by mode, full and no_grad; or a status and a note. Empty but on Linux."""
    if sys.platform != "linux":
        return {}
    context = get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.memory"])
    receiver, sender = context.Pipe(duplex=False)
    limit = free_bytes("cpu") - RESERVE
    process = context.Process(target=_measure, args=(case, provider, limit, sender))
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        process.join()
        # By SIGKILL the system ends a process that takes the last of its memory.
        killed = process.exitcode == -signal.SIGKILL
        return (OUT_OF_MEMORY if killed else FAILED, f"the process ended with {process.exitcode}")
    process.join()
    return answer


def _measure(case: Case, name: str, limit: int, answer: Connection) -> None:
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (int(_status_mib("VmData") * 2**20) + limit,) * 2)
        answer.send(measure(case, name))
    except Exception as error:
        short = any(words in str(error) for words in ("allocate memory", "bad alloc")) or isinstance(error, MemoryError)
        answer.send((OUT_OF_MEMORY, f"{limit / 2**30:.1f} GiB were free") if short else (FAILED, first_line(error)))


def measure(case: Case, name: str) -> dict[str, float]:
    """In this process; see ``peaks``."""
    provider = next(provider for provider in providers(case, "cpu") if provider.name == name)
    with arithmetic(case.dtype) as dtype:
        tensors, upstream = block_inputs(case, "cpu", provider), upstream_gradient(case, "cpu")
        found = {}
        for mode in ("full", "no_grad"):
            if math.prod(case.shape) * dtype.itemsize < LARGE_BYTES:
                run(provider.block, tensors, upstream, mode, axes=case.axes)
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets the mark
            before = _status_mib("VmRSS")
            run(provider.block, tensors, upstream, mode, axes=case.axes)
            found[mode] = _status_mib("VmHWM") - before
    return found


def _status_mib(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024
