"""The backend that ``auto`` takes is the one that the committed measurements speak for."""

from itertools import groupby

import pytest
import torch
from support import BACKENDS

from benchmarks.cases import DTYPES
from benchmarks.devices import arithmetic
from benchmarks.rows import block_paths, read
from benchmarks.table import MEASURED
from rsa_kernels import backends
from rsa_kernels.backends import choose

WHAT = ("threads", "case", "shape", "axes", "dtype", "format", "mode")


def slower_than_torch(rows, choose_backend):
    """What ``auto`` would run though the rows show it slower than the torch backend by more than the spread."""
    of_what = lambda row: tuple(row[column] for column in WHAT)  # noqa: E731
    found = []
    for what, group in groupby(sorted((row for row in rows if row["status"] == MEASURED), key=of_what), of_what):
        by_provider = {row["provider"]: row for row in group}
        chosen = choose_backend(*(dict(zip(WHAT, what, strict=True))[column] for column in ("shape", "axes", "dtype")))
        if {"torch", chosen} <= by_provider.keys() and float(by_provider[chosen]["low_ms"]) > float(
            by_provider["torch"]["high_ms"]
        ):
            found.append((chosen, *what))
    return found


def chosen_here(shape, axes, dtype):
    sizes = [int(size) for size in shape.split("x")]
    return choose(torch.empty(1, dtype=DTYPES[dtype][0]).expand(sizes), [int(axis) for axis in axes]).backend


@pytest.mark.parametrize("path", [path for path in block_paths() if "nvidia" in path.name], ids=lambda path: path.stem)
def test_auto_takes_nothing_on_a_gpu_that_the_rows_show_slower_than_torch(path, monkeypatch):
    monkeypatch.setattr(backends, "cannot_run", lambda name, x: "is for a CPU" if name == "cpp" else None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def chosen(shape, axes, dtype):
        with arithmetic(dtype):
            return chosen_here(shape, axes, dtype)

    rows = read(path)
    assert sum(row["provider"] == "torch" and row["status"] == MEASURED for row in rows) >= 8
    assert slower_than_torch(rows, chosen) == []
    assert chosen("1x32x64x64x64", "342", "bfloat16") == "triton"
    assert chosen("1x32x128x128x128", "342", "tf32") == "triton"


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the C++ extension is not built, so auto cannot take it")
@pytest.mark.parametrize(
    "path", [path for path in block_paths() if "nvidia" not in path.name], ids=lambda path: path.stem
)
def test_auto_takes_nothing_that_the_rows_show_slower_than_torch(path, monkeypatch):
    monkeypatch.setattr(backends, "_has_tiles", lambda: path.stem.endswith("-amx"))  # the rows' processor, not this one
    rows = read(path)
    assert sum(row["provider"] == "torch" and row["status"] == MEASURED for row in rows) >= 8
    assert slower_than_torch(rows, chosen_here) == []


@pytest.mark.parametrize("path", [path for path in block_paths() if "nvidia" in path.name], ids=lambda path: path.stem)
def test_without_kernels_on_a_gpu_auto_takes_what_the_rows_show_faster_in_a_full_pass(path, monkeypatch):
    monkeypatch.setattr(
        backends, "cannot_run", lambda name, x: None if name in ("torch", "reference") else "is not here"
    )
    rows = [row for row in read(path) if row["status"] == MEASURED]
    found = {}
    for row in rows:
        found.setdefault(tuple(row[column] for column in WHAT), {})[row["provider"]] = row
    compared = 0
    for what, by_provider in found.items():
        case = dict(zip(WHAT, what, strict=True))
        with arithmetic(case["dtype"]):
            chosen = chosen_here(case["shape"], case["axes"], case["dtype"])
        other = {"torch": "reference", "reference": "torch"}[chosen]
        if case["mode"] == "full" and {"torch", "reference"} <= by_provider.keys():
            compared += 1
            assert float(by_provider[chosen]["low_ms"]) <= float(by_provider[other]["high_ms"]), what
    assert compared >= 8
    assert slower_than_torch(rows, lambda *what: chosen_here(*what)) == []
    explanation = choose(torch.empty(1, 512, 10, 14, 10, dtype=torch.bfloat16), [3, 4, 2])
    assert explanation.backend == "reference"
    assert "than the equations do, for 1400 voxels of 512 channels" in explanation.others["torch"]
    assert choose(torch.empty(1, 32, 64, 64, 64, dtype=torch.bfloat16), [3, 4, 2]).backend == "torch"


def test_a_backend_slower_than_torch_beyond_the_spread_is_found():
    same = {
        "threads": "2",
        "case": "x",
        "shape": "1x8x4x4x4",
        "axes": "342",
        "dtype": "float32",
        "format": "contiguous",
    }
    rows = [
        {**same, "mode": mode, "provider": provider, "status": MEASURED, "low_ms": low, "high_ms": high}
        for mode, provider, low, high in [
            ("full", "torch", "1.0", "1.2"),
            ("full", "cpp", "1.3", "1.5"),
            ("no_grad", "torch", "1.0", "1.2"),
            ("no_grad", "cpp", "1.1", "1.5"),
        ]
    ]
    (found,) = slower_than_torch(rows, lambda *what: "cpp")
    assert (found[0], found[-1]) == ("cpp", "full")
    assert slower_than_torch(rows, lambda *what: "torch") == []


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the C++ extension is not built, so auto cannot take it")
@pytest.mark.parametrize("tiles", [False, True])
def test_one_step_along_depth_is_left_to_pytorch_where_its_products_are_fast(tiles, monkeypatch):
    monkeypatch.setattr(backends, "_has_tiles", lambda: tiles)
    assert chosen_here("1x32x64x64x64", "2", "float32") == ("torch" if tiles else "cpp")
    assert chosen_here("1x32x64x64x64", "2", "bfloat16") == "cpp"
    assert chosen_here("1x32x64x64x64", "3", "float32") == "cpp"
    assert chosen_here("1x32x64x64x64", "342", "float32") == "cpp"
    volume = torch.empty(1, 32, 8, 8, 8).contiguous(memory_format=torch.channels_last_3d)
    assert choose(volume, [2]).backend == "cpp"


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the C++ extension is not built, so auto cannot take it")
def test_few_channels_of_many_voxels_are_left_to_pytorch():
    assert chosen_here("1x1x61x67x71", "342", "float32") == "torch"
    assert chosen_here("1x6x32x32x32", "342", "float32") == "torch"
    assert chosen_here("1x8x61x67x71", "342", "float32") == "cpp"
    assert chosen_here("1x1x16x16x16", "342", "float32") == "cpp"
