"""The launch table: which tiles, warps and stages a kernel gets, by architecture, dtype, slices and channels.

The table is static, so that results do not depend on what was measured in a process. The variable
``RSA_KERNELS_TRITON_TABLE`` names a JSON file whose entries go before it; ``python -m rsa_kernels tune`` writes one.
Sizes are bucketed by the next power of two, so a volume of a new size compiles nothing in a bucket that was used.
"""

import json
import os
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from rsa_kernels.backends import allows_tf32
from rsa_kernels.triton.launch import INTERPRETED

ENVIRONMENT_VARIABLE = "RSA_KERNELS_TRITON_TABLE"
NARROW_KERNELS = ("map", "mix", "map_backward", "mix_backward")
WIDE_KERNELS = ("contract", "mix_slices")
# Arithmetic: 16-bit tensor cores, TensorFloat-32, IEEE float32, float64.
KINDS = ("half", "tf32", "float", "double")


class Tiling(NamedTuple):
    """How a kernel is cut and compiled."""

    columns: int
    """Columns ``K`` of a tile: positions times channels."""
    rows: int
    """Slices per block of rows."""
    warps: int
    stages: int
    programs: int = 1
    """Programs per multiprocessor that a kernel walking chunks is spread over."""
    split: bool = False
    """Whether logits are made from split operands, nearly as exact as in float32."""


def bucket(size: int) -> int:
    """The power of two that a number of slices or channels is padded to, at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def padded(slices: int, *tilings: Tiling) -> int:
    """The slices that a map is padded to: whole blocks of every kernel that works on it."""
    return max(bucket(slices), *(tiling.rows for tiling in tilings), 0)


@cache
def architecture(device: int) -> str:
    """The family whose table serves a CUDA device.

    Compute capability 8.6, 8.9 and 12.x have the instructions of 8.0, and no more than 99 KiB of shared memory, which
    its table heeds. AMD devices get ``hip``: the kernels of the wide regime in sizes that any matrix core has; not
    tested.
    """
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip:
        return "hip"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


@cache
def processors(device: int) -> int:
    """Multiprocessors of a device."""
    return 3 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def kind(dtype: torch.dtype) -> str:
    """The arithmetic for volumes of a dtype, as torch's settings say."""
    if dtype == torch.float64:
        return "double"
    if dtype == torch.float32:
        return "tf32" if allows_tf32() else "float"
    return "half"


def key(kernel: str, kind: str, slices: int, channels: int) -> str:
    """The name of a table's entry, say ``map/half/128/32``."""
    return f"{kernel}/{kind}/{bucket(slices)}/{bucket(channels)}"


@lru_cache(maxsize=4096)
def tiling(kernel: str, arch: str, kind: str, slices: int, channels: int) -> Tiling | None:
    """The tiling of a kernel, or None where it does not serve: then the wide regime does, which always serves.

    Args:
        kernel: one of ``NARROW_KERNELS`` or ``WIDE_KERNELS``.
        arch: see :func:`architecture`.
        kind: one of ``KINDS``.
        slices: number of slices.
        channels: number of channels.
    """
    padded, width = bucket(slices), bucket(channels)
    entries = overrides().get(arch, {})
    if (name := key(kernel, kind, slices, channels)) in entries:
        return entries[name]
    # Where loads are shorter than 16 bytes, their addresses take the registers that large tiles need.
    aligned = channels % 8 == 0
    if kernel in WIDE_KERNELS:
        return _wide(kernel, arch, kind, padded, aligned)
    if not aligned and padded > (16 if "backward" in kernel else 128) and arch != "interpreter":
        return None
    return _narrow(kernel, arch, kind, padded, width)


# The narrow kernels for 16-bit volumes: by kernel and number of padded slices, the tiling for up to 32, 64 and 128
# channels; None where a tile does not fit registers and shared memory, as `make check-triton` finds. Logits are split
# where that is free: the map costs 2 K + 2 SP operations per element, or twice that, and its read pays for about 400.
_NONE = (None, None, None)
_SM_80 = {
    ("map", 16): (Tiling(64, 16, 4, 3, 3, True), Tiling(64, 16, 4, 3, 3, True), Tiling(128, 64, 8, 3)),
    ("map", 32): (Tiling(64, 32, 4, 3, 3, True), Tiling(64, 32, 4, 3, 3, True), Tiling(128, 64, 8, 3)),
    ("map", 64): (Tiling(32, 64, 4, 3, 3, True), Tiling(64, 64, 4, 3, 2), Tiling(128, 64, 8, 3)),
    ("map", 128): (Tiling(32, 128, 8, 3), Tiling(64, 128, 8, 3), None),
    ("map", 256): (Tiling(32, 64, 8, 2), Tiling(64, 64, 8, 2), None),
    ("mix", 16): (Tiling(64, 16, 4, 3, 6), Tiling(64, 16, 4, 3, 6), Tiling(128, 64, 8, 3)),
    ("mix", 32): (Tiling(64, 32, 4, 3, 4), Tiling(64, 32, 4, 3, 4), Tiling(128, 64, 8, 3)),
    ("mix", 64): (Tiling(64, 64, 4, 3, 2), Tiling(64, 64, 4, 3, 2), Tiling(128, 64, 8, 3)),
    ("mix", 128): (Tiling(32, 128, 8, 3), Tiling(64, 128, 8, 3), None),
    ("mix", 256): (Tiling(32, 64, 8, 2), Tiling(64, 64, 8, 2), None),
    ("map_backward", 16): (Tiling(64, 16, 4, 2, 2), Tiling(64, 16, 4, 2, 2), None),
    ("map_backward", 32): (Tiling(32, 32, 4, 2, 3), Tiling(64, 32, 4, 2, 2), None),
    ("map_backward", 64): (Tiling(32, 64, 8, 2), None, None),
    ("mix_backward", 16): (Tiling(64, 16, 4, 2, 3), Tiling(64, 16, 4, 2, 3), None),
    ("mix_backward", 32): (Tiling(32, 32, 4, 2, 3), Tiling(64, 32, 8, 2), None),
    ("mix_backward", 64): (Tiling(32, 64, 4, 2, 2), None, None),
}
_SM_90 = {
    ("map", 16): (Tiling(64, 16, 4, 3, 3, True), Tiling(64, 16, 4, 3, 3, True), Tiling(128, 16, 4, 3, 2)),
    ("map", 32): (Tiling(64, 32, 4, 3, 3, True), Tiling(64, 32, 4, 3, 3, True), Tiling(128, 64, 8, 3)),
    ("map", 64): (Tiling(32, 64, 4, 3, 4, True), Tiling(64, 64, 8, 3, 2), Tiling(128, 64, 8, 3)),
    ("map", 128): (Tiling(64, 128, 8, 4), Tiling(64, 128, 8, 4), Tiling(128, 128, 8, 3)),
    ("map", 256): (Tiling(32, 128, 8, 2), Tiling(64, 128, 8, 2), None),
    ("mix", 16): (Tiling(64, 16, 4, 3, 6), Tiling(64, 16, 4, 3, 6), Tiling(128, 16, 4, 3, 4)),
    ("mix", 32): (Tiling(64, 32, 4, 3, 4), Tiling(64, 32, 4, 3, 4), Tiling(128, 64, 8, 3)),
    ("mix", 64): (Tiling(64, 64, 4, 3, 4), Tiling(64, 64, 4, 3, 4), Tiling(128, 64, 8, 3)),
    ("mix", 128): (Tiling(64, 128, 8, 4), Tiling(64, 128, 8, 3, 2), Tiling(128, 128, 8, 3)),
    ("mix", 256): (Tiling(32, 128, 8, 2, 2), Tiling(64, 128, 8, 2), None),
    ("map_backward", 16): (Tiling(64, 16, 4, 2, 4), Tiling(64, 16, 4, 2, 4), Tiling(128, 16, 8, 2)),
    ("map_backward", 32): (Tiling(64, 32, 4, 2, 4), Tiling(64, 32, 4, 2, 4), Tiling(128, 32, 8, 2)),
    ("map_backward", 64): (Tiling(64, 64, 4, 2, 2), Tiling(64, 64, 4, 2, 2), None),
    ("map_backward", 128): (Tiling(64, 128, 8, 4), Tiling(64, 128, 8, 4), None),
    ("mix_backward", 16): (Tiling(64, 16, 4, 2, 3), Tiling(64, 16, 4, 2, 3), Tiling(128, 16, 8, 2)),
    ("mix_backward", 32): (Tiling(64, 32, 4, 2, 2), Tiling(64, 32, 4, 2, 2), Tiling(128, 32, 8, 2)),
    ("mix_backward", 64): (Tiling(32, 64, 4, 2, 3), Tiling(64, 64, 4, 3, 2), None),
    ("mix_backward", 128): (Tiling(64, 128, 8, 4), Tiling(64, 128, 8, 4), None),
}
_SM_100 = {
    ("map", 16): (Tiling(64, 16, 4, 3, 3, True), Tiling(64, 16, 4, 3, 3, True), Tiling(128, 16, 4, 3, 2)),
    ("map", 32): (Tiling(64, 32, 4, 3, 2, True), Tiling(64, 32, 4, 3, 2, True), Tiling(128, 64, 8, 3)),
    ("map", 64): (Tiling(32, 64, 4, 3, 2, True), Tiling(64, 64, 8, 3, 4), Tiling(128, 64, 8, 3, 2)),
    ("map", 128): (Tiling(32, 128, 8, 3, 2), Tiling(64, 128, 8, 3, 2), Tiling(128, 128, 8, 3)),
    ("map", 256): (Tiling(32, 128, 8, 2), Tiling(64, 128, 8, 2), None),
    ("mix", 16): (Tiling(64, 16, 4, 3, 6), Tiling(64, 16, 4, 3, 6), Tiling(128, 16, 4, 3, 4)),
    ("mix", 32): (Tiling(64, 32, 4, 3, 4), Tiling(64, 32, 4, 3, 4), Tiling(128, 64, 8, 3)),
    ("mix", 64): (Tiling(64, 64, 8, 3, 3), Tiling(64, 64, 8, 3, 3), Tiling(128, 64, 8, 3)),
    ("mix", 128): (Tiling(32, 128, 8, 3, 3), Tiling(64, 128, 8, 3), Tiling(128, 128, 8, 3)),
    ("mix", 256): (Tiling(32, 128, 8, 2, 2), Tiling(64, 128, 8, 2), None),
    ("map_backward", 16): (Tiling(64, 16, 4, 2, 6), Tiling(64, 16, 4, 2, 6), Tiling(128, 16, 8, 2, 2)),
    ("map_backward", 32): (Tiling(64, 32, 4, 2, 5), Tiling(64, 32, 4, 2, 5), Tiling(128, 32, 8, 2)),
    ("map_backward", 64): (Tiling(64, 64, 4, 2, 2), Tiling(64, 64, 4, 2, 2), None),
    ("mix_backward", 16): (Tiling(64, 16, 4, 2, 5), Tiling(64, 16, 4, 2, 5), Tiling(128, 16, 8, 2)),
    ("mix_backward", 32): (Tiling(64, 32, 4, 2, 3), Tiling(64, 32, 4, 2, 3), Tiling(128, 32, 8, 2)),
    ("mix_backward", 64): (Tiling(32, 64, 8, 2, 2), Tiling(64, 64, 8, 2), None),
}
_HALF = {"sm_80": _SM_80, "sm_90": _SM_90, "sm_100": _SM_100}


def _narrow(kernel: str, arch: str, kind: str, padded: int, width: int) -> Tiling | None:
    if arch == "interpreter" and width <= 128 and padded <= 256:
        # Two positions and more in a tile, and blocks of rows for many slices, so that tests see both.
        return Tiling(max(64, width), padded if "backward" in kernel else min(padded, 64), 4, 1, 1, padded <= 32)
    if kind != "half" or width > 128:
        return None
    by_width = _HALF.get(arch, {}).get((kernel, padded), _NONE)
    return by_width[max(0, width.bit_length() - 6)]


def _wide(kernel: str, arch: str, kind: str, padded: int, aligned: bool) -> Tiling:
    columns = {"half": 64, "tf32": 32, "float": 32, "double": 16}[kind]
    rows = min(padded, {"half": 128 if aligned else 32, "tf32": 64, "float": 64, "double": 16}[kind])
    if arch == "sm_100" and kernel == "mix_slices":
        rows = min(rows, 64)
    if arch == "interpreter":
        columns, rows = 128, min(padded, 64)
    elif kind == "half" and rows == 16 and aligned:
        columns = 128  # flat tiles: longer ones keep more bytes in flight
    if kernel == "contract" and kind == "float":
        return Tiling(columns, rows, 4, 3)
    return Tiling(columns, rows, 8 if rows >= 64 else 4, 3 if kernel == "contract" and kind != "double" else 2)


@lru_cache(maxsize=1)
def overrides() -> dict[str, dict[str, Tiling | None]]:
    """The entries of the user's table, by architecture."""
    path = os.environ.get(ENVIRONMENT_VARIABLE)
    return read_table(Path(path)) if path else {}


def read_table(path: Path) -> dict[str, dict[str, Tiling | None]]:
    """Reads a table: ``{"sm_90": {"map/half/128/32": {"columns": 64, ...} or null}}``.

    Raises:
        ValueError: if it is no such table.
    """
    try:
        content = json.loads(path.read_text())
        return {
            arch: {name: _checked(arch, name, entry and Tiling(**entry)) for name, entry in entries.items()}
            for arch, entries in content.items()
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the launch table {path}, which {ENVIRONMENT_VARIABLE} names, cannot be used ({error}): write one with "
            "python -m rsa_kernels tune, or unset the variable"
        ) from error


def _checked(arch: str, name: str, entry: Tiling | None) -> Tiling | None:
    kernel, arithmetic, slices, channels = name.split("/")
    if arch not in ("interpreter", "hip", *_HALF):
        raise ValueError(f"there is no architecture {arch}")
    known = kernel in NARROW_KERNELS + WIDE_KERNELS and arithmetic in KINDS
    if not known or name != key(kernel, arithmetic, int(slices), int(channels)):
        raise ValueError(f"there is no entry {name}")
    if entry is None:
        if kernel in WIDE_KERNELS:
            raise ValueError(f"{name} serves where nothing else does, and cannot be null")
        return None
    # A narrow tile holds all channels, and backward all slices; a wide one no more slices than there are.
    fits = entry.rows <= int(slices) if kernel in WIDE_KERNELS else entry.columns >= int(channels)
    fits &= "backward" not in kernel or entry.rows >= int(slices)
    if not all(type(size) is int and size >= 1 for size in entry[:-1]) or type(entry.split) is not bool:
        raise ValueError(f"{name} has a size that is no whole number of at least 1: {entry}")
    powers = all(size >= 16 and size & (size - 1) == 0 for size in (entry.columns, entry.rows))
    if not (fits and powers and entry.warps in (1, 2, 4, 8, 16)):
        raise ValueError(f"{name} has sizes that do not fit: {entry}")
    return entry
