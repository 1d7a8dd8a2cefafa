"""Ten seconds of real work, to see that a machine can do it and how fast: what `rsanet doctor` ends with."""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from rsa_kernels.__main__ import check as check_backends
from rsanet.network import RSANet
from rsanet.segment.environment import MEMORY_FORMAT, pick_device, pick_precision
from rsanet.segment.segmenter import lesion_probability
from rsanet.segment.training import CRITERIA
from rsanet.segment.volumes import read_volume

WINDOW = (64, 64, 64)
PATCH = (48, 48, 48)
NARROW = (8, 16, 32, 64)  # a network that trains on a laptop


@dataclass(frozen=True)
class Check:
    """One piece of work.

    Attributes:
        name: what was done.
        seconds: how long it took, the first call's preparations included.
        problem: what went wrong, or None.
    """

    name: str
    seconds: float
    problem: str | None = None

    def __str__(self) -> str:
        verdict = "ok  " if self.problem is None else "FAIL"
        return f"{verdict} {self.name}: {self.problem or f'{self.seconds:.2f} s'}"


def self_check(device: str = "auto") -> Iterator[Check]:
    """Does what the command does, in small, on a device: attention, prediction, a training step, a NIfTI file.

    The attention backends print a line each of their own.
    """
    where = pick_device(device)
    precision = pick_precision("auto", where)
    network = RSANet(3, 2).to(where, memory_format=MEMORY_FORMAT).eval()
    narrow = RSANet(3, 2, NARROW).to(where, memory_format=MEMORY_FORMAT)

    def attend() -> None:
        if not check_backends(where.type, (torch.float32, torch.bfloat16)):
            raise ValueError("a backend above gives wrong numbers: do not use it, and report this")

    def predict() -> None:
        volume = torch.randn(1, 3, *WINDOW)
        finite(lesion_probability(network, volume, WINDOW, precision))

    def train() -> None:
        volume = torch.randn(2, 3, *PATCH, device=where)
        mask = (torch.rand(2, 1, *PATCH, device=where) > 0.99).to(torch.uint8)
        with precision.autocast(where):
            logits = narrow(volume.contiguous(memory_format=MEMORY_FORMAT))
        CRITERIA["dice_ce"]()(logits.float(), mask).backward()
        for parameter in narrow.parameters():
            finite(parameter.grad)

    def write() -> None:
        voxels = np.random.default_rng(0).random((181, 217, 181), np.float32)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "volume.nii.gz"
            nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
            if not np.array_equal(read_volume(path)[0], voxels):
                raise ValueError("a NIfTI file does not read back as it was written")

    window, patch = WINDOW[0], PATCH[0]
    yield timed("slice-wise attention, every backend against the published equations in float64", attend)
    yield timed(f"prediction of a window of {window}³ with the published network, {precision.name} on {where}", predict)
    yield timed(f"prediction of the same window again, {precision.name} on {where}", predict)
    yield timed(f"gradients of 2 patches of {patch}³ with a network of {len(NARROW)} levels, {precision.name}", train)
    yield timed(f"a NIfTI file of 181×217×181 voxels, written and read in {tempfile.gettempdir()}", write)


def finite(values: torch.Tensor) -> None:
    """Raises where a number is not finite."""
    if not torch.isfinite(values).all():
        raise ValueError("numbers that are not finite")


def timed(name: str, work: Callable[[], None]) -> Check:
    """Does the work, and says how it went."""
    started = time.perf_counter()
    problem = None
    try:
        work()
    except Exception as error:  # whatever it is, it is what the user has to know
        problem = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Check(name, time.perf_counter() - started, problem)
