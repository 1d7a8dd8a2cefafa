"""The kernels of csrc/cuda on the CPU: compiled by g++ over emulator.hpp, called on tensors."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc" / "cuda"
NUMBERS = {"bfloat16": 0, "float16": 1, "tf32": 2, "float32": 3, "float64": 4}
DTYPES = {name: getattr(torch, name) for name in NUMBERS if name != "tf32"} | {"tf32": torch.float32}
PADDING = 16


def compiler():
    """g++, where there are the fibers that the emulator is made of."""
    return shutil.which("g++") if sys.platform == "linux" else None


def compile_into(folder, sources=SOURCES):
    """Compiles the kernels' bodies to a shared object, and loads it."""
    path = Path(folder) / "emulate.so"
    command = [compiler(), "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    command += [f"-I{sources}", f"-I{HERE}", str(HERE / "emulate.cpp"), "-o", str(path)]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(path))
    library.element_of.restype = library.parts_for.restype = library.chunks_for.restype = ctypes.c_int64
    library.round_trip.restype = ctypes.c_float
    return Emulator(library)


def padded(slices):
    return -(-slices // PADDING) * PADDING


def precise(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def address(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


class Emulator:
    """Kernels by name; volumes are ``(N, D, H, W, C)``, with any distance between voxels."""

    def __init__(self, library):
        self.library = library

    @staticmethod
    def sizes(volume):
        batch, depth, height, width, channels = volume.shape
        return (ctypes.c_int64 * 5)(batch, channels, depth, height, width)

    @staticmethod
    def row(volume):
        return ctypes.c_int64(volume.stride(3))

    def width(self, volume):
        channels, row, number = volume.shape[4], volume.stride(3), volume.element_size()
        return self.library.width_for(
            ctypes.c_uint64(volume.data_ptr()), ctypes.c_int64(channels), ctypes.c_int64(row), number
        )

    def contract(self, number, side, left, right, axis, parts):
        slices = left.shape[axis - 1]
        partial = torch.full((left.shape[0], parts, slices, slices), float("nan"), dtype=precise(left.dtype))
        self.library.emulate_contract(
            *(NUMBERS[number], side, self.sizes(left), axis, address(left), self.row(left)),
            *(address(right), self.row(right), min(self.width(left), self.width(right))),
            *(ctypes.c_int64(parts), address(partial)),
        )
        return partial

    def mix(
        self, number, side, matrix, volume, axis, parts, base=None, beta=None, row_scale=None, vector=None, out=None
    ):
        if out is None:
            out = torch.full(volume.shape, float("nan"), dtype=volume.dtype)
        aligned = self.width(out) == 16 and (base is None or self.width(base) == 16)
        self.library.emulate_mix(
            *(NUMBERS[number], side, self.sizes(volume), axis, address(matrix), address(volume), self.row(volume)),
            *(address(base), self.row(out if base is None else base), address(beta), address(row_scale)),
            *(address(vector), address(out), self.row(out), self.width(volume), int(aligned), ctypes.c_int64(parts)),
        )
        return out

    def softmax(self, number, partial, factor):
        batch, parts, slices, _ = partial.shape
        attention = torch.full((batch, slices, slices), float("nan"), dtype=partial.dtype)
        rounded = torch.full((batch, padded(slices), padded(slices)), float("nan"), dtype=DTYPES[number])
        self.library.emulate_softmax(
            *(NUMBERS[number], *map(ctypes.c_int64, (batch, slices, parts)), address(partial)),
            *(ctypes.c_double(factor), address(attention), address(rounded)),
        )
        return attention, rounded

    def pad(self, number, attention, transposed):
        batch, slices, _ = attention.shape
        rounded = torch.full((batch, padded(slices), padded(slices)), float("nan"), dtype=DTYPES[number])
        numbers = map(ctypes.c_int64, (batch, slices))
        self.library.emulate_pad(NUMBERS[number], *numbers, address(attention), int(transposed), address(rounded))
        return rounded

    def softmax_backward(self, number, partial, attention, beta, factor):
        batch, parts, slices, _ = partial.shape
        side = padded(slices)
        plain, transposed = (torch.full((batch, side, side), float("nan"), dtype=DTYPES[number]) for _ in range(2))
        row_dots = torch.full((batch, side), float("nan"), dtype=partial.dtype)
        self.library.emulate_softmax_backward(
            *(NUMBERS[number], *map(ctypes.c_int64, (batch, slices, parts)), address(partial), address(attention)),
            *(address(beta), ctypes.c_double(factor), address(plain), address(transposed), address(row_dots)),
        )
        return plain, transposed, row_dots

    def transpose(self, source):
        batch, rows, columns = source.shape
        target = torch.full((batch, columns, rows), 77, dtype=source.dtype)
        sizes = map(ctypes.c_int64, (batch, rows, columns))
        self.library.emulate_transpose(source.element_size(), *sizes, address(source), address(target))
        return target
