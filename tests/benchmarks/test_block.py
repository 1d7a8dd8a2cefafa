"""The benchmark of the block measures what is right, and says of the rest why there is no time."""

import math
import sys
from functools import partial

import pytest
import torch
from support import BACKENDS
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import __main__ as benchmarks_main
from benchmarks import block, inputs, memory, table
from benchmarks.__main__ import main
from benchmarks.cases import DTYPES, Case
from benchmarks.devices import Cpu, arithmetic, best, drift_percent, rounds
from benchmarks.floors import Ceilings, floor, step_bytes, step_flops
from benchmarks.providers import NON_LOCAL, Provider, providers
from benchmarks.published import published
from rsa_kernels import recurrent_slice_attention

SHAPE = (2, 6, 4, 5, 3)
SMALL = Case("small", SHAPE, memory_format="channels_last_3d")
CEILINGS = Ceilings(copy_gb_per_s=2000.0, matrix_gflop_per_s=500_000.0)


class PretendedDevice:
    """Calls what it is asked to time, and answers that every part of a pass takes two milliseconds."""

    name, kind, cache_bytes = "Pretended device", "cpu", 0

    def where(self):
        return {"device": self.name, "torch": torch.__version__, "threads": 1}

    def ceilings(self, dtype):
        return CEILINGS

    def times(self, passes, count):
        found = []
        for index in range(count):
            marks = []
            passes[index % len(passes)](lambda marks=marks: marks.append(0))
            found.append([2.0] * (len(marks) + 1))
        return found

    def graph_ms(self, passes):
        return 1.5

    def host_ms(self, run):
        return 0.1

    def peak_mib(self, run):
        return 3.0

    def free(self):
        pass


def scaled(factor, x, *rest, axes):
    return recurrent_slice_attention(factor * x, *rest, axes=axes)


def fail(*tensors, axes):
    raise ValueError("broken")


def exhaust(*tensors, axes):
    raise torch.OutOfMemoryError("no room")


@pytest.fixture
def measured(monkeypatch):
    """The rows of the small case from providers that a test names."""

    def of(*found, device=None, case=SMALL, calls=None):
        monkeypatch.setattr(block, "providers", lambda case, kind: list(found))
        monkeypatch.setattr(memory, "peaks", lambda case, name: {"full": 7.0, "no_grad": 5.0})
        return list(block.measure(device or PretendedDevice(), case, 0.0, {} if calls is None else calls))

    return of


EAGER = Provider("eager", published)


def test_a_wrong_a_failing_and_a_too_large_provider_are_named_and_not_timed(measured, capsys):
    rows = measured(
        EAGER,
        Provider("right", recurrent_slice_attention),
        Provider("wrong", partial(scaled, 1.001)),
        Provider("not finite", partial(scaled, math.nan)),
        Provider("failing", fail),
        Provider("large", exhaust),
        Provider("absent", None, "needs what is not here"),
    )
    status = {row["provider"]: (row["status"], row["note"]) for row in rows}
    assert status["right"] == status["eager"] == ("measured", "")
    assert status["wrong"][0] == status["not finite"][0] == "wrong"
    assert status["failing"] == ("failed", "ValueError: broken")
    assert status["large"][0] == "out of memory"
    assert status["absent"] == ("unusable", "needs what is not here")
    assert all(("median_ms" in row) == (row["status"] == "measured") for row in rows)
    assert capsys.readouterr().out.count("not timed, because wrong: wrong on small") == 1


def test_eager_comes_before_the_limit_that_it_sets(measured):
    # Eager PyTorch in half precision is off by more than the floor; that is what others may be, too.
    rounded = Provider("rounded", lambda x, *rest, axes: published(x.bfloat16().float(), *rest, axes=axes))
    assert {row["status"] for row in measured(EAGER, rounded) if row["provider"] == "rounded"} == {"wrong"}


def test_a_full_pass_is_forward_and_backward(measured):
    rows = {row["mode"]: row for row in measured(EAGER)}
    assert {mode: float(row["median_ms"]) for mode, row in rows.items()} == {
        "forward": 2.0,
        "backward": 2.0,
        "full": 4.0,
        "no_grad": 2.0,
    }
    assert float(rows["full"]["floor_ms"]) == pytest.approx(
        float(rows["forward"]["floor_ms"]) + float(rows["backward"]["floor_ms"]), rel=1e-2
    )
    assert rows["full"]["saved_mib"]
    assert not rows["no_grad"]["saved_mib"]


def test_rows_fit_the_table(measured, tmp_path):
    results = table.block_table("Some Device, 1", tmp_path)
    results.put(measured(EAGER, Provider("absent", None, "is not here")))
    results.put(measured(EAGER))
    rows = results.read()
    assert results.path.name == "some-device-1.csv"
    assert tuple(rows[0]) == tuple(table.BLOCK)
    assert len(rows) == 6
    with pytest.raises(ValueError, match="has no column weather"):
        results.put([{"weather": "fine"}])


def test_a_call_without_work_is_the_host_time_of_a_cpu(measured):
    calls = {}
    measured(EAGER, case=SMALL._replace(name="call"), calls=calls)
    PretendedDevice.host_ms, before = (lambda self, run: None), PretendedDevice.host_ms
    try:
        rows = measured(EAGER, calls=calls)
    finally:
        PretendedDevice.host_ms = before
    assert {row["mode"]: float(row["host_ms"]) for row in rows} == {
        "forward": 2.0,
        "backward": 2.0,
        "full": 4.0,
        "no_grad": 2.0,
    }


def test_only_what_fits_the_cache_takes_turns_and_replays(measured):
    class Cached(PretendedDevice):
        cache_bytes = 1 << 14

    assert {row.get("graph_ms") for row in measured(EAGER)} == {None}
    rows = measured(EAGER, device=Cached())
    assert {row["graph_ms"] for row in rows if row["mode"] in ("full", "no_grad")} == {"1.500"}
    assert {row["samples"] for row in rows} == {block.FEWEST * math.ceil((1 << 15) / (4 * (720 + 3 * 42 + 3)))}


def test_what_takes_too_long_is_skipped_with_the_time_that_it_would_take(measured):
    slow = Provider("slow", recurrent_slice_attention, flops=lambda case: 4e15)
    (note,) = {row["note"] for row in measured(EAGER, slow) if row["provider"] == "slow"}
    assert note == "a full pass takes 24 s at the speed of a large matrix product"


def test_the_floor_counts_each_volume_once_per_pass():
    volume = math.prod(SHAPE) * 2
    assert step_bytes(SHAPE, 2, "forward") == 3 * volume
    assert step_bytes(SHAPE, 2, "backward") == 5 * volume
    assert floor(SHAPE, (3, 4, 2), 2, "full", CEILINGS).gbyte == pytest.approx(3 * 8 * volume / 1e9)


@pytest.mark.parametrize("mode", ["no_grad", "full"])
def test_the_floor_counts_the_operations_of_the_folded_algebra(mode):
    shape = (1, 3, 9, 11, 7)  # more slices than channels: six products with the weights and four over slices
    case = Case("any", shape)
    with FlopCounterMode(display=False) as counter:
        inputs.run(recurrent_slice_attention, inputs.block_inputs(case, "cpu"), torch.ones(shape), mode)
    assert floor(shape, (3, 4, 2), 4, mode, CEILINGS).gflop == pytest.approx(counter.get_total_flops() / 1e9)


def test_the_floor_is_the_longer_time_of_each_pass():
    narrow, wide = (1, 32, 128, 128, 128), (1, 2048, 16, 16, 16)
    of_narrow, of_wide = (floor(shape, (3, 4, 2), 2, "full", CEILINGS) for shape in (narrow, wide))
    assert of_narrow.ms == pytest.approx(1e3 * of_narrow.gbyte / 2000)
    assert of_wide.ms == pytest.approx(1e3 * of_wide.gflop / 500_000)
    assert step_flops(wide, 2, "backward") == 2 * math.prod(wide) * 5 * (2048 + 16)


@pytest.mark.parametrize("shape", [(1, 32, 32, 32, 32), (1, 256, 5, 7, 5), (1, 3, 17, 3, 2)])
def test_graded_maps_are_neither_flat_nor_one_hot(shape):
    _, maps = recurrent_slice_attention(*inputs.block_inputs(Case("any", shape), "cpu"), return_maps=True)
    for attention in maps:
        entropy = -(attention * attention.clamp_min(1e-30).log()).sum(-1).mean()
        assert 0.05 < entropy / math.log(attention.shape[1]) < 0.995


@pytest.mark.parametrize("name", DTYPES)
def test_settings_of_arithmetic_are_restored(name):
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [setting.allow_tf32 for setting in settings]
    with arithmetic(name) as dtype:
        assert dtype == DTYPES[name][0]
        assert {setting.allow_tf32 for setting in settings} == {name == "tf32"}
    assert [setting.allow_tf32 for setting in settings] == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_provider_that_computes_the_block_computes_the_same(dtype):
    case = Case("odd", (2, 5, 6, 3, 4), dtype)
    exact = inputs.truths(published, inputs.block_inputs(case, "cpu"), inputs.upstream_gradient(case, "cpu"), case.axes)
    able = [provider for provider in providers(case, "cpu") if provider.block and provider.name != "torch.compile"]
    assert len(able) >= 4
    for provider in able:
        tensors = inputs.block_inputs(case, "cpu", provider)
        found = inputs.errors(inputs.run(provider.block, tensors, inputs.upstream_gradient(case, "cpu"), "full"), exact)
        assert (max(found) < {"float32": 1e-5, "bfloat16": 0.1}[dtype]) == provider.same, provider.name
    assert (NON_LOCAL in {provider.name for provider in able}) == (dtype == "float32")


def test_large_volumes_are_checked_on_a_part():
    large = Case("large", (1, 32, 160, 192, 160))
    assert inputs.part_of(large, EAGER).shape == (1, 32, 64, 64, 64)
    assert inputs.part_of(SMALL, EAGER) == SMALL
    assert inputs.part_of(large, EAGER._replace(same=False)).shape == (1, 32, 8, 8, 8)


def test_turns_keep_to_the_budget_and_are_some():
    assert rounds([1.0, 1.0], 10, 3, 25) == 5
    assert rounds([100.0], 10, 3, 25) == 3
    assert rounds([0.001], 10, 3, 25) == 25


def test_a_ceiling_is_the_best_that_was_seen_and_drift_is_how_far_they_are_apart():
    slow, fast = Ceilings(30.0, 100.0), Ceilings(20.0, 150.0)
    assert best(slow, fast) == (30.0, 150.0)
    assert drift_percent(slow, fast) == drift_percent(fast, slow) == pytest.approx(50)


def test_a_pass_is_timed_in_its_parts():
    ((first, second),) = Cpu().times([lambda mark: (sum(range(1000)), mark(), sum(range(1000)))], 1)
    assert first > 0
    assert second > 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's own peak memory")
def test_the_peak_of_a_pass_counts_its_volumes():
    peaks = memory.peaks(Case("one", (1, 8, 64, 64, 64)), "eager")
    volume = 8
    assert peaks["full"] > 10 * volume
    assert 2 * volume < peaks["no_grad"] < peaks["full"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's own peak memory")
@pytest.mark.skipif("cpp" not in BACKENDS, reason="the C++ extension is not built")
def test_cpp_keeps_the_promise_of_its_memory():
    peaks = memory.peaks(Case("one", (1, 32, 64, 64, 64)), "cpp")
    volume = 32
    assert volume < peaks["no_grad"] < 1.2 * volume
    assert 4 * volume < peaks["full"] < 4.4 * volume


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's memory")
def test_a_provider_may_not_take_more_than_is_free(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda kind: memory.RESERVE + (64 << 20))
    assert memory.peaks(Case("one", (1, 32, 64, 64, 64)), "eager") == (table.OUT_OF_MEMORY, "0.1 GiB were free")


def test_a_case_that_there_is_not_is_named(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--cases", "huge"])
    assert ended.value.code == 2
    assert "no case is called huge" in capsys.readouterr().err


@pytest.mark.parametrize(("provider", "status"), [("cpp", 1), ("cpp recompute", 1), ("sdpa", 0)])
def test_a_run_fails_by_what_is_ours_alone(provider, status, monkeypatch, tmp_path, capsys):
    row = {"provider": provider, "mode": "full", "status": "wrong", "note": "off", "case": "tiny 512"}
    monkeypatch.setattr(benchmarks_main, "measure", lambda *arguments: [row])
    assert main(["--quick", "--cases", "tiny 512", "--output", str(tmp_path)]) == status
    assert "not timed: wrong: off" in capsys.readouterr().out


def test_a_verb_that_there_is_not_is_named(capsys):
    assert main(["fly"]) == 2
    assert capsys.readouterr().out.startswith("there is no verb 'fly'")


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu"]) == 1
    assert "needs a CUDA GPU, and torch finds none" in capsys.readouterr().out
