"""The GPU benchmark's arithmetic, and its flow with a device that only pretends: a CPU and a made-up clock."""

import csv
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import __main__ as cpu
from benchmarks import gpu
from benchmarks.published import published
from rsa_kernels import recurrent_slice_attention

SHAPE = (2, 6, 4, 5, 3)
LIMITS = gpu.Limits(copy_gb_per_s=2000.0, matrix_tflops=500.0)


class PretendedGpu:
    """Calls what a GPU would be asked to time, and answers that every call takes two milliseconds."""

    device = "cpu"
    name = "Pretended GPU"
    cache_bytes = 1 << 14

    def versions(self):
        return {"device": self.name, "torch": torch.__version__, "triton": "0", "driver": "0"}

    def copy_gb_per_s(self):
        return LIMITS.copy_gb_per_s

    def matrix_tflops(self, dtype):
        return LIMITS.matrix_tflops

    def times(self, calls):
        for call in calls:
            call()
        return [1.0, 2.0, 7.0]

    def graph_ms(self, calls):
        return 1.5

    def host_ms(self, call):
        return 0.1

    def peak_mib(self, call):
        return 3.0

    def free(self):
        pass


@pytest.fixture
def small_case(monkeypatch):
    monkeypatch.setattr(gpu, "CASES", {"small": SHAPE})
    monkeypatch.setattr(cpu, "providers", lambda device: {"eager": published, "torch": recurrent_slice_attention})
    return gpu.Case("small", "float32", "channels_last_3d")


def arguments(tmp_path, *options):
    parsed = gpu.parse(["--workers", "0", "--output", str(tmp_path / "rows.csv"), *options])
    parsed.cases = ["small"]
    return parsed


def test_the_floor_counts_each_volume_once_per_pass():
    volume = math.prod(SHAPE) * 2
    assert gpu.floor_bytes(SHAPE, 2, "no_grad") == 3 * 3 * volume
    assert gpu.floor_bytes(SHAPE, 2, "full") == 3 * (3 + 5) * volume


@pytest.mark.parametrize("mode", cpu.MODES)
def test_the_floor_counts_the_operations_of_the_folded_algebra(mode, small_case):
    tensors = gpu.block_inputs(small_case, torch.float32, "cpu")
    with FlopCounterMode(display=False) as counter:
        cpu.run(recurrent_slice_attention, tensors, torch.ones(SHAPE), mode)
    assert sum(sum(gpu.pass_flops(SHAPE, axis, mode)) for axis in gpu.AXES) == counter.get_total_flops()


def test_the_floor_is_the_longer_time_of_each_pass():
    narrow, wide = (1, 32, 128, 128, 128), (1, 2048, 16, 16, 16)
    assert gpu.floor_ms(narrow, 2, "full", LIMITS) == pytest.approx(gpu.floor_bytes(narrow, 2, "full") / 2e9)
    flops = sum(sum(gpu.pass_flops(wide, axis, "full")) for axis in gpu.AXES)
    assert gpu.floor_ms(wide, 2, "full", LIMITS) == pytest.approx(flops / 5e11)


def test_a_row_sets_the_time_against_the_floor_and_the_other_providers(small_case):
    measured = gpu.Measurement([4.0, 1.0, 2.0], None, 0.1, 3.0, 1e-6, 1)
    cells = gpu.row(small_case, "no_grad", "torch", measured, LIMITS, {"eager": 3.0, "torch.compile": 1.0})
    floor = gpu.floor_ms(SHAPE, 4, "no_grad", LIMITS)
    assert (cells["median_ms"], cells["min_ms"], cells["max_ms"]) == ("2.0000", "1.0000", "4.0000")
    assert (cells["times_eager"], cells["times_compiled"]) == ("1.50", "0.50")
    assert float(cells["times_floor"]) == pytest.approx(2 / floor, rel=1e-2)
    assert set(cells) <= set(gpu.COLUMNS)


def test_what_replays_in_a_graph_is_held_against_the_floor(small_case):
    measured = gpu.Measurement([2.0], 0.5, 0.1, 3.0, 1e-6, 4)
    cells = gpu.row(small_case, "no_grad", "torch", measured, LIMITS, {})
    assert float(cells["times_floor"]) == pytest.approx(0.5 / gpu.floor_ms(SHAPE, 4, "no_grad", LIMITS), rel=1e-2)


def test_columns_of_both_benchmarks_have_the_same_names():
    assert set(cpu.COLUMNS) - set(gpu.COLUMNS) == {"threads"}


@pytest.mark.parametrize("shape", [(1, 32, 32, 32, 32), (1, 256, 5, 7, 5), (1, 3, 17, 3, 2)])
def test_graded_maps_are_neither_flat_nor_one_hot(shape, monkeypatch):
    monkeypatch.setattr(gpu, "CASES", {"any": shape})
    tensors = gpu.block_inputs(gpu.Case("any", "float32", "contiguous"), torch.float32, "cpu")
    _, maps = recurrent_slice_attention(*tensors, return_maps=True)
    for attention in maps:
        entropy = -(attention * attention.clamp_min(1e-30).log()).sum(-1).mean()
        assert 0.05 < entropy / math.log(attention.shape[1]) < 0.995


@pytest.mark.parametrize("name", gpu.DTYPES)
def test_settings_of_arithmetic_are_restored(name):
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [setting.allow_tf32 for setting in settings]
    with gpu.arithmetic(name) as dtype:
        assert dtype == gpu.DTYPES[name][0]
        assert {setting.allow_tf32 for setting in settings} == {name == "tf32"}
    assert [setting.allow_tf32 for setting in settings] == before


def test_every_row_is_written_as_soon_as_it_is_measured(small_case, tmp_path, capsys):
    assert gpu.measure_all(PretendedGpu(), arguments(tmp_path)) == 0
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert tuple(rows[0]) == tuple(gpu.COLUMNS)
    # Two dtypes, two formats, two modes, two providers.
    assert len(rows) == 16
    assert {row["median_ms"] for row in rows} == {"2.0000"}
    assert {int(row["input_sets"]) for row in rows} == {10, 20}
    assert {row["times_eager"] for row in rows} == {"1.00"}
    printed = capsys.readouterr().out
    assert printed.count("1.00 x eager") == 16
    assert "copy: 2000 GB/s" in printed


def test_only_what_fits_the_cache_takes_turns_and_replays(small_case, tmp_path, monkeypatch):
    monkeypatch.setattr(PretendedGpu, "cache_bytes", 64)
    gpu.measure_all(PretendedGpu(), arguments(tmp_path, "--dtypes", "float32"))
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert {(row["input_sets"], row["graph_ms"]) for row in rows} == {("1", "")}


def test_a_wrong_a_failing_and_a_too_large_provider_are_named_and_not_timed(small_case, tmp_path, monkeypatch, capsys):
    def fail(*tensors):
        raise ValueError("broken")

    def exhaust(*tensors):
        raise torch.OutOfMemoryError("no room")

    providers = {
        "eager": exhaust,
        "torch": recurrent_slice_attention,
        "wrong": lambda x, *rest: recurrent_slice_attention(1.001 * x, *rest),
        "not finite": lambda x, *rest: recurrent_slice_attention(x, *rest) * math.nan,
        "failing": fail,
    }
    monkeypatch.setattr(cpu, "providers", lambda device: providers)
    assert gpu.measure_all(PretendedGpu(), arguments(tmp_path, "--dtypes", "float32", "--formats", "contiguous")) == 1
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert [row["median_ms"] for row in rows] == 2 * [gpu.OUT_OF_MEMORY, "2.0000", gpu.WRONG, gpu.WRONG, gpu.FAILED]
    printed = capsys.readouterr().out
    assert printed.count("not timed, because wrong: wrong on small/float32/contiguous") == 2
    assert "failing on small/float32/contiguous, full: ValueError: broken" in printed


def test_where_the_published_equations_do_not_fit_the_folded_ones_are_the_truth(small_case, monkeypatch):
    def exhaust(*tensors):
        raise torch.OutOfMemoryError("no room")

    tensors, upstream = gpu.block_inputs(small_case, torch.float32, "cpu"), torch.ones(SHAPE)
    literal = gpu.truths(tensors, upstream)
    monkeypatch.setattr(gpu, "published", exhaust)
    assert cpu.worst_error(gpu.truths(tensors, upstream), literal) < 1e-12


def test_no_case_starts_when_time_is_over(small_case, tmp_path, capsys):
    gpu.measure_all(PretendedGpu(), arguments(tmp_path, "--budget-seconds", "0"))
    assert not (tmp_path / "rows.csv").exists()
    assert "not measured, because 0 s were over: small/bfloat16/contiguous, small" in capsys.readouterr().out


def test_compiling_ahead_calls_what_compiles(small_case, monkeypatch):
    called = []
    providers = dict.fromkeys(("eager", "torch.compile", "torch", "kernels"))
    monkeypatch.setattr(cpu, "providers", lambda device: {name: name for name in providers})
    monkeypatch.setattr(cpu, "run", lambda block, tensors, upstream, mode: called.append((block, mode)))
    gpu.compile_case(small_case, False, "cpu")
    gpu.compile_case(small_case, True, "cpu")
    assert called == [
        (name, mode) for names in [("kernels",), ("torch.compile", "kernels")] for name in names for mode in cpu.MODES
    ]


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert capsys.readouterr().out.count("needs a CUDA GPU, and torch finds none") == 1
