"""What there is to compute with: device, precision, memory layout, versions; and why it was chosen."""

import os
import platform
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import torch
from torch.nn.functional import conv3d

from rsa_kernels import available_backends, explain
from rsa_kernels.backends import AUTO, requested
from rsanet import __version__
from rsanet.attention import RSABlock
from rsanet.network import RSANet
from rsanet.segment.recipe import PRECISIONS

# The layout in which 3-D convolutions are fastest: by a fifth to a third in training on a CPU.
MEMORY_FORMAT = torch.channels_last_3d

# See `shallow_gradient_is_wrong`.
WRONG_DEPTH = 2

VERSIONS = ("torch", "triton", "numpy", "monai", "lightning", "nibabel", "scipy")


@dataclass(frozen=True)
class Precision:
    """A precision and the reason for it in words."""

    name: str
    reason: str

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context to run the network in."""
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.name == "bf16")

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` is the GPU where torch finds one, else the CPU; any other name has to work as given."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device is {name!r}: give auto, cpu, cuda or cuda:1.") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device is {name!r}: give auto, cpu, cuda or cuda:1.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        found = "no CUDA device" if count == 0 else f"{count} CUDA device{'s' if count > 1 else ''}"
        raise ValueError(f"--device is {name}, but torch {torch.__version__} finds {found} here: give --device cpu.")
    return device


def has_bf16_instructions(device: torch.device) -> bool:
    """Whether bfloat16 products run in hardware: emulated ones are slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check() for check in checks if check)


def pick_precision(name: str, device: torch.device) -> Precision:
    """``auto`` is bf16 where the hardware multiplies it and fp32 elsewhere."""
    if name not in PRECISIONS:
        raise ValueError(f"--precision is {name!r}: give one of {', '.join(PRECISIONS)}.")
    if name != "auto":
        return Precision(name, "as asked")
    if has_bf16_instructions(device):
        return Precision("bf16", f"this {device.type.upper().replace('CUDA', 'GPU')} multiplies bf16 in hardware")
    return Precision("fp32", f"this {device.type.upper().replace('CUDA', 'GPU')} has no bf16 matrix instructions")


@lru_cache(maxsize=1)
def shallow_gradient_is_wrong() -> bool:
    """Whether this CPU gives a convolution of a volume of `WRONG_DEPTH` slices a wrong gradient of its weights in bf16.

    The AVX-512 kernel of oneDNN 3.12 leaves them unwritten.
    """
    generator = torch.Generator().manual_seed(0)
    volume = torch.randn(1, 16, WRONG_DEPTH, 4, 4, generator=generator).bfloat16()
    weight = torch.randn(16, 16, 3, 3, 3, generator=generator).bfloat16()

    def gradient(dtype: torch.dtype) -> torch.Tensor:
        leaf = weight.to(dtype, copy=True).requires_grad_()
        out = conv3d(volume.to(dtype), leaf, padding=1)
        return torch.autograd.grad(out, leaf, torch.ones_like(out))[0].float()

    exact = gradient(torch.float32)
    return not all((gradient(torch.bfloat16) - exact).norm() < 0.1 * exact.norm() for _ in range(3))


def depths_of(patch: Sequence[int], levels: int) -> list[int]:
    """The slices of a patch at each level of the network."""
    return [-(-patch[0] // 2**level) for level in range(levels)]


def gradients_are_wrong(patch: Sequence[int], levels: int, precision: Precision, device: torch.device) -> bool:
    """Whether a network would train on wrong gradients in volumes as shallow as its patch becomes."""
    shallow = device.type == "cpu" and precision.name == "bf16" and WRONG_DEPTH in depths_of(patch, levels)
    return shallow and shallow_gradient_is_wrong()


def refuse_wrong_gradients(
    patch: Sequence[int], levels: int, precision: Precision, device: torch.device, compiled: bool
) -> None:
    """Names what would train on wrong gradients in silence, because of faults in the libraries below.

    Args:
        patch: voxels along z, y, x.
        levels: of the network; each halves the size.
        precision: to train in.
        device: to train on.
        compiled: whether the network is compiled.

    Raises:
        ValueError: with what to do instead.
    """
    if device.type != "cpu" or precision.name != "bf16":
        return
    if compiled:
        raise ValueError(
            "--compile is given with precision bf16 on a CPU, where torch computes wrong gradients of the decoder: "
            "leave --compile out, or give --precision fp32."
        )
    if gradients_are_wrong(patch, levels, precision, device):
        depths = depths_of(patch, levels)
        level, deepest = depths.index(WRONG_DEPTH), WRONG_DEPTH * 2 ** (levels - 1)
        raise ValueError(
            f"A patch {patch[0]} voxels deep is {WRONG_DEPTH} deep at the network's level {level + 1}, where this "
            f"CPU's bf16 convolutions give wrong gradients: give --patch more than {deepest} voxels, or "
            "--precision fp32."
        )


def processor_name() -> str:
    """The processor's name, from the system where it tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe_device(device: torch.device) -> str:
    """One phrase for the first line of a run."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return f"cpu ({threads} thread{'s' if threads > 1 else ''})"


def package_versions() -> dict[str, str]:
    """Versions of what a run depends on."""
    versions = {"python": platform.python_version(), "rsanet": __version__}
    for name in VERSIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed as a package"
    return versions


def attention_backend(network: RSANet, window: Sequence[int], device: torch.device, precision: Precision) -> str:
    """Name of the backend that runs the network's slice-wise attention on a window, or ``none``."""
    block = next((module for module in network.modules() if isinstance(module, RSABlock)), None)
    if block is None:
        return "none"
    name = requested(block.backend)
    if name != AUTO:
        return name
    # The first block is the coarsest of the encoder's, or else of the decoder's.
    level = (network.config["attention_levels"] or network.config["decoder_attention_levels"])[-1]
    size = [-(-width // 2**level) for width in window]
    dtype = torch.bfloat16 if precision.name == "bf16" else torch.float32
    return explain(torch.empty(1, block.channels, *size, dtype=dtype, device=device)).backend


def describe_environment() -> list[tuple[str, str]]:
    """What `rsanet doctor` prints first: versions, hardware, disk, and which attention backends run here or why not."""
    rows = [*package_versions().items(), ("system", f"{platform.system()} {platform.machine()}")]
    rows.append(("cpu", f"{processor_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"))
    rows.append(("cpu instructions", torch.backends.cpu.get_cpu_capability()))
    rows.append(("memory", describe_memory()))
    for name, folder in (("disk here", Path.cwd()), ("disk for temporary files", Path(tempfile.gettempdir()))):
        usage = shutil.disk_usage(folder)
        rows.append((name, f"{usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB free in {folder}"))
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows.append((f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"))
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}, but no device answers" if torch.version.cuda else "a CPU build"
        rows.append(("cuda", f"none: torch {torch.__version__} is {built}"))
    device = pick_device()
    rows.append(("device auto", str(device)))
    rows.append(("precision auto", str(pick_precision("auto", device))))
    rows += [(f"backend {name}", reason or "usable") for name, reason in available_backends().items()]
    return rows


def available_memory(device: torch.device) -> int:
    """Bytes that are free on a device: of a container's share, where the process is in one."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    known = [free for free in (_free_of_system(), _free_of_container()) if free is not None]
    return min(known) if known else 4 * 2**30  # where neither tells


def _free_of_system() -> int | None:
    return meminfo().get("MemAvailable")


def _free_of_container() -> int | None:
    folder = Path("/sys/fs/cgroup")
    try:
        most, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
        counted = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or no limit
        return None
    return most - used + int(counted.get("inactive_file", 0))  # the cache of files gives way


def meminfo() -> dict[str, int]:
    """The system's memory in bytes by the kernel's names; empty where it does not tell."""
    path = Path("/proc/meminfo")
    if not path.is_file():
        return {}
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) > 1}


def describe_memory() -> str:
    """Installed and available memory, where the system tells."""
    known = meminfo()
    if not known:
        return "unknown"
    free = available_memory(torch.device("cpu"))
    return f"{known['MemTotal'] / 2**30:.1f} GiB, {free / 2**30:.1f} GiB available"
