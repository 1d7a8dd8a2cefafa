"""The benchmark measures what is right, and nothing else."""

import csv
import sys

import pytest
import torch
from support import BACKENDS

from benchmarks import __main__ as benchmarks
from rsa_kernels import recurrent_slice_attention


def test_a_wrong_provider_is_not_timed(monkeypatch, capsys):
    wrong = {
        "eager": benchmarks.published,
        "right": recurrent_slice_attention,
        "wrong": lambda x, *rest: recurrent_slice_attention(1.001 * x, *rest),
    }
    monkeypatch.setattr(benchmarks, "providers", lambda: wrong)
    monkeypatch.setattr(benchmarks, "CASES", {"small": (1, 6, 4, 5, 3)})
    monkeypatch.setattr(benchmarks, "peak_extra_mib", lambda *_: dict.fromkeys(benchmarks.MODES, 1.0))
    rows = benchmarks.measure("small", "channels_last_3d", repeats=2)
    assert [(row["mode"], row["provider"]) for row in rows] == [
        (mode, provider) for mode in benchmarks.MODES for provider in ("eager", "right")
    ]
    assert all(0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"] for row in rows)
    assert capsys.readouterr().out.count("not timed, because wrong: wrong on small") == len(benchmarks.MODES)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's own peak memory")
def test_the_peak_of_a_pass_counts_its_volumes(monkeypatch, capsys):
    monkeypatch.setattr(benchmarks, "CASES", {"one": (1, 8, 64, 64, 64)})
    benchmarks._measure_peak("one", "eager", "contiguous", "float32")
    full, no_grad = map(float, capsys.readouterr().out.split())
    volume = 8
    assert full > 10 * volume
    assert 2 * volume < no_grad < full


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's own peak memory")
@pytest.mark.skipif("cpp" not in BACKENDS, reason="the C++ extension is not built")
def test_cpp_keeps_the_promise_of_its_memory(monkeypatch, capsys):
    monkeypatch.setattr(benchmarks, "CASES", {"one": (1, 32, 64, 64, 64)})
    benchmarks._measure_peak("one", "cpp", "contiguous", "float32")
    full, no_grad = map(float, capsys.readouterr().out.split())
    volume = 32
    assert volume < no_grad < 1.2 * volume
    assert 4 * volume < full < 4.4 * volume


def test_rows_have_the_columns_of_the_table(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmarks, "RESULTS", tmp_path)
    monkeypatch.setattr(benchmarks, "providers", lambda: {"eager": benchmarks.published})
    monkeypatch.setattr(benchmarks, "CASES", {"small": (1, 6, 4, 5, 3)})
    monkeypatch.setattr(benchmarks, "peak_extra_mib", lambda *_: dict.fromkeys(benchmarks.MODES, 1.0))
    monkeypatch.setattr("sys.argv", ["benchmarks", "--repeats", "1"])
    benchmarks.main()
    (table,) = tmp_path.iterdir()
    rows = list(csv.DictReader(table.open()))
    assert tuple(rows[0]) == benchmarks.COLUMNS
    assert len(rows) == len(benchmarks.FORMATS) * len(benchmarks.MODES)
    assert {row["torch"] for row in rows} == {torch.__version__}
