"""The benchmark of the whole network holds ours against the published one, and times only what is right."""

import sys
from functools import partial

import pytest
import torch

from benchmarks import network as benchmark
from benchmarks.devices import Cpu
from benchmarks.floors import Ceilings
from benchmarks.network import EAGER, PREDICTING, TRAIN, TRAINING, WHOLE, WINDOWED, Source, Workload
from rsanet import save_model
from rsanet.attention import RSABlock

SMALL = {"channels": (4, 8), "norm": ("group", {"num_groups": 2})}
OURS = next(provider for provider in PREDICTING if provider.name == "ours fp32")
EXTRA = {"contrasts": ["FLAIR", "T1w", "T2w"], "roi": [8, 8, 8], "spacing": None}


class Quick(Cpu):
    """Without the second that ceilings take."""

    def ceilings(self, dtype):
        return Ceilings(10.0, 100.0)


class Counting(Cpu):
    """On which every pass takes 5 ms."""

    def times(self, passes, count):
        for run in passes:
            run(lambda: None)
        return [[5.0]] * count


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(benchmark, "SMALL", (8, 6, 6))
    monkeypatch.setattr(benchmark, "peak_mib", lambda *_: 1.0)
    return Source(config=SMALL)


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(Source(config=SMALL).network(), path, EXTRA)
    return path


def rows_of(source, work, providers):
    return list(benchmark.measure(Quick(), source, work, providers, 0.0))


@pytest.mark.parametrize("size", [(16, 16, 16), (9, 7, 12)])
def test_the_published_network_computes_the_same_function(size):
    ours = Source(config=SMALL | {"attention_levels": (0, -1), "scale": 0.1}).network().double()
    twin = benchmark.published_network(ours)
    volume = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(twin(volume), ours(volume), rtol=1e-9, atol=1e-11)
    without = Source(config=SMALL | {"attention": None}).network().double()
    without.load_state_dict(ours.state_dict(), strict=False)
    assert (without(volume) - ours(volume)).abs().max() > 1e-3


def test_the_published_network_has_none_of_our_shortcuts(monkeypatch):
    network, volume = Source(config=SMALL).network(), torch.randn(1, 3, 32, 32, 32)
    ours, twin = network(volume), benchmark.published_network(network)

    def shortcut(*arguments):
        raise AssertionError

    monkeypatch.setattr("rsanet.unet.conv_of_upsampled", shortcut)
    monkeypatch.setattr("rsanet.unet.torch.einsum", shortcut)
    with pytest.raises(AssertionError):
        network(volume)
    torch.testing.assert_close(twin(volume), ours, rtol=1e-3, atol=1e-4)


def test_weights_go_both_ways_between_the_networks():
    ours = Source(config=SMALL).network()
    twin = benchmark.published_network(ours)
    ours.load_state_dict(twin.state_dict(), strict=True)
    twin.load_state_dict(ours.state_dict(), strict=True)
    assert list(twin.state_dict()) == list(ours.state_dict())


def test_the_published_network_attends_by_the_published_equations(monkeypatch):
    twin = benchmark.published_network(Source(config=SMALL).network())
    volume = torch.randn(1, 3, 8, 8, 8)
    before = twin(volume)
    monkeypatch.setattr(benchmark, "published", lambda x, *rest: x)
    assert not torch.allclose(twin(volume), before)


@pytest.mark.parametrize("name", [TRAIN, WINDOWED])
def test_a_wrong_provider_is_not_timed(small, monkeypatch, name):
    right = benchmark.build

    def build(source, provider, kind):
        network = right(source, provider, kind)
        if provider == OURS:
            next(block for block in network.modules() if isinstance(block, RSABlock)).betas[0].data += 0.5
        return network

    monkeypatch.setattr(benchmark, "build", build)
    *_, rows = rows_of(small, Workload(name, (1, 3, 8, 8, 8), (8, 8, 8)), [EAGER, OURS])
    assert [row["status"] for row in rows] == ["measured", "wrong"]
    assert rows[0]["samples"] == benchmark.FEWEST
    assert "median_ms" not in rows[1]


def test_without_bf16_instructions_bf16_is_not_timed(small, monkeypatch):
    monkeypatch.setattr(benchmark, "has_bf16_instructions", lambda device: False)
    *_, rows = rows_of(small, Workload(TRAIN, (1, 3, 8, 8, 8), (8, 8, 8)), TRAINING)
    assert {row["status"] for row in rows if "bf16" in row["provider"]} == {"unusable"}
    assert {row["status"] for row in rows if "bf16" not in row["provider"]} == {"measured"}


def test_a_provider_that_fails_ends_alone(small, monkeypatch):
    def fail(network, provider, *rest):
        if provider == OURS:
            raise RuntimeError("no such kernel")
        return right(network, provider, *rest)

    right = benchmark.predict
    monkeypatch.setattr(benchmark, "predict", fail)
    *_, rows = rows_of(small, Workload(WHOLE, (1, 3, 8, 8, 8), (8, 8, 8)), [EAGER, OURS])
    assert [(row["status"], row["note"]) for row in rows] == [
        ("measured", "no Dice: no trained model was given"),
        ("failed", "RuntimeError: no such kernel"),
    ]


def test_rows_are_handed_out_after_every_turn(small):
    found = rows_of(small, Workload(TRAIN, (1, 3, 8, 8, 8), (8, 8, 8)), [EAGER])
    assert [rows[0]["samples"] for rows in found] == [1, 2, 3, 3]
    assert ["drift_percent" in rows[0] for rows in found] == [False, False, False, True]


def test_a_step_moves_the_weights_and_leaves_no_gradient():
    network = Source(config=SMALL).network()
    before = [parameter.clone() for parameter in network.parameters()]
    for provider in TRAINING:
        benchmark.training_step(network, provider, (1, 3, 8, 8, 8), "cpu")()
        assert all(parameter.grad is None for parameter in network.parameters()), provider
        moved = [not torch.equal(one, other) for one, other in zip(before, network.parameters(), strict=True)]
        assert all(moved), provider
        before = [parameter.clone() for parameter in network.parameters()]


def test_ours_predicts_what_the_published_network_does():
    network = Source(config=SMALL).network()
    volume, window = torch.randn(1, 3, 12, 10, 8), (8, 8, 8)
    ours = benchmark.predict(network, OURS, volume, window)
    torch.testing.assert_close(benchmark.predict(benchmark.published_network(network), EAGER, volume, window), ours)


def test_attention_is_counted_in_every_window():
    network = Source(config=SMALL).network()
    with benchmark.features_of_attention(network) as features:
        benchmark.predict(network, EAGER, torch.randn(1, 3, 14, 8, 8), (8, 8, 8))
    assert {key: count for key, (_, count) in features.items()} == {("rsa_block", (2, 8, 4, 4, 4)): 1}
    with benchmark.features_of_attention(network) as features:
        for _ in range(3):
            network(torch.randn(1, 3, 8, 8, 8))
    one = {("rsa_block", (1, 8, 4, 4, 4)): [torch.randn(1, 8, 4, 4, 4), 1]}
    assert [count for _, count in features.values()] == [3]
    spent = partial(benchmark.attention_ms, Counting(), network, EAGER)
    assert spent(features, training=True) == 3 * spent(one, training=True) == 15.0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's own peak memory")
def test_the_peak_of_a_step_counts_what_is_kept_for_backward(model):
    shape = (2, 3, 64, 64, 64)
    volume = 8  # MiB of the finest features
    step, whole = (
        benchmark.peak_mib(Source(model), Workload(name, shape, shape[2:]), EAGER) for name in (TRAIN, WHOLE)
    )
    assert 3 * volume < whole < step
    assert 10 * volume < step < 60 * volume


def test_the_command_writes_rows_with_the_columns_of_the_table(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "SMALL", (8, 6, 6))
    monkeypatch.setattr(benchmark, "peak_mib", lambda *_: 1.0)
    monkeypatch.setattr(benchmark, "here", Quick)
    monkeypatch.setattr(benchmark, "QUICK_SECONDS", 0.0)
    right = benchmark.workloads
    monkeypatch.setattr(
        benchmark, "workloads", lambda *given: [work._replace(shape=(1, 3, 8, 8, 8)) for work in right(*given)]
    )
    words = ["--quick", "--model", str(model), "--output", str(tmp_path / "results"), "--only", "predict"]
    words += ["--providers", EAGER.name, OURS.name]
    assert benchmark.main(words) == 0
    (path,) = (tmp_path / "results").iterdir()
    rows = benchmark.network_table(Cpu().name, path.parent).read()
    assert [(row["case"], row["provider"]) for row in rows] == [
        (name, provider.name) for name in (WINDOWED, WHOLE) for provider in (EAGER, OURS)
    ]
    assert all(set(row) == set(benchmark.COLUMNS) for row in rows)
    assert all(0 < float(row["low_ms"]) <= float(row["median_ms"]) <= float(row["high_ms"]) for row in rows)
    assert {(row["dice"], row["note"]) for row in rows} == {("", "no Dice: no image was given")}
    assert str(path) in capsys.readouterr().out


def test_masks_of_a_trained_model_on_an_image_are_compared():
    subjects = [benchmark.Subject(EAGER), benchmark.Subject(OURS)]
    one = torch.zeros(1, 1, 4, 4, 4, dtype=torch.bool)
    one[..., :2] = True
    other = one.clone()
    other[..., 1] = False
    benchmark.compare(subjects, {EAGER.name: one, OURS.name: other}, Source("model", ("image",)))
    assert [subject.dice for subject in subjects] == [1.0, pytest.approx(2 / 3)]
    assert [subject.note for subject in subjects] == ["", ""]


def test_a_wrong_call_is_told_in_a_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["--image", str(tmp_path)])
    assert ended.value.code == 2
    assert "give --model, too" in capsys.readouterr().err
    assert benchmark.main(["--model", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_quick_measures_less():
    network = Source(config=SMALL).network()
    for quick, full in zip(*(benchmark.workloads(network, Source(), quick) for quick in (True, False)), strict=True):
        assert quick.name == full.name
        assert torch.Size(quick.shape).numel() < torch.Size(full.shape).numel()
