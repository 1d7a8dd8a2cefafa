"""Which backends there are, which one runs a volume, and the sentence that says why another does not.

A reason is one text wherever it appears: in :func:`available_backends`, in an :class:`Explanation`, and in the error
that an explicit choice raises.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module, metadata
from types import ModuleType

import torch
from torch import Tensor

from rsa_kernels import native

AUTO = "auto"
ENVIRONMENT_VARIABLE = "RSA_KERNELS_BACKEND"
OLDEST_TRITON = (3, 6)
LONE_CHANNELS, LONE_CHANNELS_VOXELS = 6, 1 << 15
FEW_CHANNELS = 512
BFLOAT16_VOXELS = 4
FLOAT32_CHANNELS, FLOAT32_VOXELS = 64, 1 << 20

# In order of preference. A module is imported when it is first needed.
_MODULES = {
    "triton": "rsa_kernels.triton.block",
    "cuda": "rsa_kernels.cuda",
    "cpp": "rsa_kernels.cpp",
    "torch": "rsa_kernels.folded",
    "reference": "rsa_kernels.reference",
}

_imported: dict[str, ModuleType] = {}

# Plain values of the process, not of a thread: the compiler can then guard on them, and backward passes, which run on
# threads of their own, need not look. Each choice is a list of one name, so that it can be told from its equals.
_choices: list[list[str]] = []
_environment = os.environ.get(ENVIRONMENT_VARIABLE) or AUTO


def available_backends() -> dict[str, str | None]:
    """Every backend of this package.

    Returns:
        Name to ``None`` where the backend is usable on this machine, else to the reason in a sentence.
    """
    return {name: _is_missing(name) for name in _MODULES}


def _is_missing(name: str) -> str | None:
    """Why a backend cannot run on this machine, in a sentence; None if it can."""
    if name == "triton":
        return triton_is_missing()
    if name == "cuda":
        return native.missing(name) or _gpu_is_missing()
    return native.missing(name) if name == "cpp" else None


def _gpu_is_missing() -> str | None:
    return None if torch.cuda.is_available() else "needs a GPU, and torch finds none: use the torch backend here"


def module(name: str) -> ModuleType:
    """The module of a backend."""
    found = _imported.get(name)
    if found is None:
        found = _imported[name] = import_module(_MODULES[name])
    return found


def interpreted() -> bool:
    """Whether Triton interprets its kernels, on CPU tensors: for tests."""
    value = os.environ.get("TRITON_INTERPRET")
    return value is not None and value.lower() in ("1", "true", "on", "yes", "y")


@lru_cache(maxsize=1)
def _triton_version() -> str | None:
    for package in ("triton", "triton-rocm", "pytorch-triton-rocm", "pytorch-triton"):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None


def triton_is_missing() -> str | None:
    """Why Triton cannot run on this machine, in a sentence; None if it can."""
    return _triton_is_missing(interpreted())


@lru_cache(maxsize=2)
def _triton_is_missing(interpreted: bool) -> str | None:
    version = _triton_version()
    wanted = ".".join(map(str, OLDEST_TRITON))
    if version is None:
        return f"needs Triton {wanted} or later, which is not installed: pip install triton"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"needs Triton {wanted} or later, but {version} is installed: upgrade torch, which pins it"
    if interpreted:
        return None
    return _gpu_is_missing() or _triton_fails()


def _triton_fails() -> str | None:
    """Why Triton does not start though it is installed: it builds its launcher with the system's C compiler."""
    try:
        from triton.runtime import driver

        driver.active.utils  # noqa: B018 made at its first use
    except Exception as error:
        cause = str(error).strip().splitlines() or [type(error).__name__]
        return f"is installed but does not start ({cause[0]}): install a C compiler, or use the torch backend"
    return None


@lru_cache(maxsize=64)
def _gpu_is_too_old(index: int) -> str | None:
    if torch.version.hip or (capability := torch.cuda.get_device_capability(index)) >= (8, 0):
        return None
    found = ".".join(map(str, capability))
    return f"needs compute capability 8.0 or later, and this GPU has {found}: use the torch backend"


def cannot_run(name: str, x: Tensor) -> str | None:
    """Why a backend cannot run a volume, in a sentence; None if it can."""
    if name in ("torch", "reference"):
        return None
    if name == "cpp":
        if x.device.type != "cpu":
            return f"runs tensors on the CPU, and this one is on {x.device}: move it, or use the torch backend"
        return native.missing(name)
    in_python = name == "triton" and interpreted()
    reason = _triton_is_missing(in_python) if name == "triton" else _is_missing(name)
    if reason or in_python:
        return reason
    if not x.is_cuda:
        return f"runs tensors on a GPU, and this one is on {x.device}: move it, or use the torch backend"
    return _gpu_is_too_old(x.device.index)


def allows_tf32() -> bool:
    """Whether products of float32 on a GPU may round their operands to TensorFloat-32."""
    try:
        return torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # torch refuses the question where its two kinds of settings were mixed
        return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _is_at_its_best_in_the_library(x: Tensor, channels: int, voxels: int) -> str | None:
    """Why no kernels of ours are chosen on a GPU for a dtype, in a sentence; None if they are."""
    if x.dtype == torch.float64:
        return "is not measured against the library's float64 products: ask for it by its name"
    few, many = channels <= FLOAT32_CHANNELS, voxels >= FLOAT32_VOXELS
    if x.dtype == torch.float32 and few and many and not allows_tf32():
        return "is no faster than the library's products of float32: allow TensorFloat-32, or use bfloat16"
    return None


def _is_not_preferred(x: Tensor, channels: int, voxels: int) -> str | None:
    """Why ``auto`` does not take Triton where it can run, in a sentence; None if it does."""
    if interpreted():
        return "is interpreted here, which is for tests: unset TRITON_INTERPRET"
    if torch.version.hip:
        return "is not tested on AMD GPUs: ask for it by its name"
    return _is_at_its_best_in_the_library(x, channels, voxels)


def known(name: object, source: str = "backend") -> str:
    """Returns a backend's name, or raises ValueError if there is none of that name."""
    if not isinstance(name, str) or (name != AUTO and name not in _MODULES):
        raise ValueError(f"{source} is {name!r}, but must be one of {', '.join([AUTO, *_MODULES])}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Chooses the backend of every call inside the ``with`` block that does not name one itself.

    Blocks nest, and a choice ends with its block, by an exception too. The choice holds for the whole
    process, all threads. A backward pass runs on the backend of its forward pass, wherever it is called.

    Args:
        name: a key of :func:`available_backends`, or ``"auto"``.

    Raises:
        ValueError: if there is no backend of that name.
    """
    choice = [known(name)]
    _choices.append(choice)
    try:
        yield
    finally:
        # Blocks of several threads may end in any order.
        _choices[:] = [other for other in _choices if other is not choice]


def requested(argument: str | None) -> str:
    """The name in force: the argument, then :func:`use_backend`, then the environment variable, then ``auto``.

    The environment variable counts as it was when the package was imported.
    """
    if argument is not None:
        return known(argument)
    if _choices:
        return _choices[-1][0]
    return known(_environment, f"the environment variable {ENVIRONMENT_VARIABLE}")


def resolve(name: str, x: Tensor, axes: Sequence[int] = ()) -> str:
    """What stands for ``auto`` from here on, in backward too: ``auto:NAME``; any other name as it is."""
    return f"{AUTO}:{choose(x, axes).backend}" if name == AUTO else name


def left_to_auto(name: str) -> bool:
    """Whether nobody asked for a backend."""
    return name.startswith(AUTO)


def name_of(name: str) -> str:
    """The backend that a name, resolved or not, stands for."""
    return name.removeprefix(f"{AUTO}:")


def load(name: str, x: Tensor, axes: Sequence[int] = ()) -> ModuleType:
    """The module that runs ``x``: the one that was asked for, or the one that is best for these axes of a block.

    Raises:
        RuntimeError: if the one that was asked for cannot run ``x``.
    """
    chosen = name_of(resolve(name, x, axes))
    if chosen != name:
        return module(chosen)
    if reason := cannot_run(name, x):
        raise RuntimeError(f"backend {name!r} was asked for, but it {reason}")
    return module(name)


@dataclass(frozen=True)
class Explanation:
    """The backend that ``auto`` chooses for a volume, and why each other one is not chosen."""

    backend: str
    others: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.backend}: runs this volume"]
        return "\n".join(lines + [f"{name}: {reason}" for name, reason in self.others.items()])


def _fills_few_lanes(channels: int, voxels: int, axes: Sequence[int]) -> str | None:
    """Why a block of few channels is left to PyTorch where there are voxels enough to make its calls worth while."""
    if axes and channels <= LONE_CHANNELS and voxels >= LONE_CHANNELS_VOXELS:
        return f"fills {channels} of 16 lanes with channels, which does not pay on {voxels} voxels"
    return None


@lru_cache(maxsize=1)
def _has_tiles() -> bool:
    """Whether the processor has AMX: Intel's, where PyTorch's float32 products are at their best."""
    check = getattr(torch.cpu, "_is_amx_tile_supported", None)  # a private name, which a later torch may not have
    return check is not None and check()


def _reads_pages_for_lines(x: Tensor, axes: Sequence[int]) -> str | None:
    """Why one step along depth is left to PyTorch where its products are fast enough; the other axes win that back."""
    if list(axes) == [2] and x.dtype == torch.float32 and _number(x.stride(1)) != 1 and _has_tiles():
        return "is no faster in one step along depth, for slices far apart in memory, on a processor with AMX"
    return None


def _takes_more_calls_than_it_saves(x: Tensor, channels: int, voxels: int, axes: Sequence[int]) -> str | None:
    """Why the folded algebra in plain PyTorch is left for the equations where a volume is small and wide."""
    if axes and x.dtype == torch.bfloat16 and voxels < BFLOAT16_VOXELS * channels:
        return f"takes more and smaller products than the equations do, for {voxels} voxels of {channels} channels"
    return None


def _number(size: int | torch.SymInt) -> int:
    """A size; one that a compiler leaves open counts as what it was at first, and sets no condition on it."""
    return size if isinstance(size, int) else size.node.hint or 1


def choose(x: Tensor, axes: Sequence[int]) -> Explanation:
    """The backend for a volume, by rules that the benchmarks justify; without axes, for attention alone."""
    batch, channels, *sizes = (_number(size) for size in x.shape)
    voxels = batch * math.prod(sizes)
    reasons = {
        "triton": cannot_run("triton", x) or _is_not_preferred(x, channels, voxels),
        "cuda": cannot_run("cuda", x) or _is_at_its_best_in_the_library(x, channels, voxels),
        "cpp": cannot_run("cpp", x) or _fills_few_lanes(channels, voxels, axes) or _reads_pages_for_lines(x, axes),
        "torch": _takes_more_calls_than_it_saves(x, channels, voxels, axes),
        "reference": None,
    }
    chosen = next(name for name, reason in reasons.items() if reason is None)
    # The C++ backend folds small weights in about the time that the others take to be called, and large ones faster,
    # too: of 512 channels on 27 voxels it trains in two thirds of the time and predicts in a tenth to a fifth more.
    folds_fast = chosen == "cpp" and (channels <= FEW_CHANNELS or 4 * voxels * len(axes) >= channels)
    if axes and voxels * len(axes) < channels and not folds_fast:
        chosen = "reference"
        waste = f"folding the weights of {channels} channels costs more than it saves on {voxels} voxels"
        slower = dict.fromkeys(reasons, waste)
    else:
        slower = {
            "cuda": "is for where Triton cannot run",
            "torch": "makes several passes where fused kernels make one",
            "reference": "makes three projections and three rearranged copies a step",
        }
    return Explanation(chosen, {name: reason or slower[name] for name, reason in reasons.items() if name != chosen})
