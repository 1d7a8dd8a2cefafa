import csv
import json
import math
import types
from itertools import pairwise

import pytest
import torch

from rsanet.checkpoints import load_model
from rsanet.segment import environment, training
from rsanet.segment.datasets import Case
from rsanet.segment.recipe import Recipe, triple

SMALL = {"channels": (8, 16), "patch": (16, 16, 16), "val_fraction": 0.25, "lr": 1e-2}


def weights(run):
    return load_model(run / "model.safetensors").state_dict()


def rows(run):
    with (run / "log.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_run_folder_tells_all_about_the_run(trained):
    config = json.loads((trained / "config.json").read_text())
    assert config["contrasts"] == ["FLAIR", "T1w", "T2w"]
    assert sorted(config["training"] + config["held_out"]) == ["sub-001", "sub-002", "sub-003", "sub-004"]
    assert len(config["held_out"]) == 1
    assert config["recipe"]["steps"] == 80
    assert config["recipe"]["seed"] == 0
    assert config["versions"]["torch"] == torch.__version__
    log = rows(trained)
    assert [row["step"] for row in log] == ["40", "80"]
    assert float(log[1]["loss"]) < float(log[0]["loss"])
    assert float(log[1]["dice"]) > 0.5
    assert {path.name for path in trained.iterdir()} == {"config.json", "log.csv", "model.safetensors"}


def test_the_model_file_knows_its_contrasts_and_window(trained):
    extra = load_model(trained / "model.safetensors").extra
    assert extra == {"contrasts": ["FLAIR", "T1w", "T2w"], "roi": [16, 16, 16], "spacing": None}


def test_the_same_seed_gives_the_same_weights(cohort, tmp_path):
    for name, seed in (("one", 3), ("again", 3), ("other", 4)):
        training.train(cohort, tmp_path / name, Recipe(steps=4, seed=seed, **SMALL))
    one, again, other = (weights(tmp_path / name) for name in ("one", "again", "other"))
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)
    assert (tmp_path / "one" / "config.json").read_text() == (tmp_path / "again" / "config.json").read_text()


def test_the_last_steps_are_validated_too(cohort, tmp_path):
    training.train(cohort, tmp_path, Recipe(steps=5, validate_every=2, **SMALL))
    assert [row["step"] for row in rows(tmp_path)] == ["2", "4", "5"]
    assert all(row["dice"] for row in rows(tmp_path))


def test_only_the_best_weights_are_kept(cohort, tmp_path, monkeypatch):
    scores, saved = iter([0.5, 0.9, 0.1]), []
    save_model = training.save_model

    def note(network, path, extra):
        saved.append({key: value.clone() for key, value in network.state_dict().items()})
        save_model(network, path, extra)

    monkeypatch.setattr(training, "dice", lambda prediction, mask: next(scores))
    monkeypatch.setattr(training, "save_model", note)
    training.train(cohort, tmp_path, Recipe(steps=3, validate_every=1, **SMALL))
    assert [row["dice"] for row in rows(tmp_path)] == ["0.5", "0.9", "0.1"]
    assert len(saved) == 2
    kept = weights(tmp_path)
    assert all(torch.equal(kept[key], saved[1][key]) for key in kept)


def test_without_held_out_cases_the_last_weights_are_kept(cohort, tmp_path, capsys):
    training.train(cohort, tmp_path, Recipe(steps=2, validate_every=1, **{**SMALL, "val_fraction": 0}))
    assert [row["dice"] for row in rows(tmp_path)] == ["", ""]
    assert "Training on 4 cases (FLAIR, T1w, T2w), 0 held out" in capsys.readouterr().out
    assert weights(tmp_path)


def test_a_finished_run_is_not_overwritten(trained, cohort):
    before = (trained / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"already holds model\.safetensors"):
        training.train(cohort, trained, Recipe(steps=1, **SMALL))
    assert (trained / "model.safetensors").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_with_the_names_of_its_cases(cohort, tmp_path, monkeypatch):
    monkeypatch.setattr(training.RSANet, "forward", lambda self, x: x[:, :2] * self.final[1].weight.sum() * math.nan)
    with pytest.raises(ValueError, match=r"loss is nan at step 1 on sub-00\d, sub-00\d"):
        training.train(cohort, tmp_path, Recipe(steps=2, **SMALL))
    assert not (tmp_path / "model.safetensors").exists()


def test_weights_that_are_not_finite_are_not_saved(cohort, tmp_path, monkeypatch):
    monkeypatch.setattr(
        training.LesionSegmentation, "on_validation_end", lambda self: self.network.final[1].weight.data.fill_(math.nan)
    )
    monkeypatch.setattr(training, "dice", lambda prediction, mask: 1.0)
    with pytest.raises(ValueError, match="weights are not finite at step 1"):
        training.train(cohort, tmp_path, Recipe(steps=2, validate_every=1, **SMALL))
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("attention", ["non_local", "none"])
def test_other_attentions_train(cohort, tmp_path, attention):
    training.train(cohort, tmp_path, Recipe(steps=1, attention=attention, **SMALL))
    keys = weights(tmp_path).keys()
    assert any("non_local" in key for key in keys) == (attention == "non_local")
    assert not any("rsa" in key for key in keys)


def test_contrasts_and_attention_scale_reach_the_network(cohort, tmp_path):
    training.train(cohort, tmp_path, Recipe(steps=1, attention_scale=0.1, **SMALL), ["T2w", "FLAIR"])
    network = load_model(tmp_path / "model.safetensors")
    assert network.config["in_channels"] == 2
    assert network.config["scale"] == 0.1
    assert network.extra["contrasts"] == ["T2w", "FLAIR"]


def test_bf16_trains_when_asked_for(cohort, tmp_path, capsys):
    training.train(cohort, tmp_path, Recipe(steps=2, precision="bf16", **SMALL))
    assert "precision bf16 (as asked)" in capsys.readouterr().out
    assert all(math.isfinite(float(row["loss"])) for row in rows(tmp_path))
    assert all(value.dtype == torch.float32 for value in weights(tmp_path).values())


def test_training_prints_its_own_lines_alone(cohort, tmp_path, capfd):
    training.train(cohort, tmp_path / "run", Recipe(steps=2, validate_every=1, **SMALL))
    out, err = capfd.readouterr()
    assert err == ""
    first, *steps = out.splitlines()
    assert first.startswith("Training on 3 cases (FLAIR, T1w, T2w), 1 held out: ")
    assert "attention backend " in first
    assert len(steps) == 2
    assert all(line.startswith("step ") and "held-out Dice" in line for line in steps)


def test_patches_can_be_prepared_by_other_processes(cohort, tmp_path):
    for name in ("one", "again"):
        training.train(cohort, tmp_path / name, Recipe(steps=3, workers=1, **SMALL))
    one, again = weights(tmp_path / "one"), weights(tmp_path / "again")
    assert all(torch.equal(one[key], again[key]) for key in one)


@pytest.mark.parametrize(("has_bf16", "name"), [(True, "bf16"), (False, "fp32")])
def test_auto_precision_is_bf16_only_where_the_hardware_has_it(monkeypatch, has_bf16, name):
    monkeypatch.setattr(environment, "has_bf16_instructions", lambda device: has_bf16)
    assert environment.pick_precision("auto", torch.device("cpu")).name == name
    assert environment.pick_precision("fp32", torch.device("cpu")).name == "fp32"


def test_a_device_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="finds no CUDA device"):
        environment.pick_device("cuda")
    with pytest.raises(ValueError, match="give auto, cpu"):
        environment.pick_device("abacus")


def test_the_split_divides_the_cases_and_follows_the_seed():
    cases = [Case(f"sub-{number}") for number in range(10)]
    kept, held_out = training.split_cases(cases, 0.2, seed=1)
    assert len(held_out) == 2
    assert sorted(kept + held_out, key=cases.index) == cases
    assert training.split_cases(cases, 0.2, seed=1) == (kept, held_out)
    assert any(training.split_cases(cases, 0.2, seed=seed)[1] != held_out for seed in range(2, 6))
    assert len(training.split_cases(cases[:3], 0.1, seed=0)[1]) == 1
    with pytest.raises(ValueError, match="1 case cannot be split"):
        training.split_cases(cases[:1], 0.2, seed=0)


def test_the_learning_rate_warms_up_and_decays():
    factors = [training.learning_rate_factor(step, 100) for step in range(101)]
    assert factors[0] == pytest.approx(0.2)
    assert max(factors) == factors[5] == 1
    assert all(before > after for before, after in pairwise(factors[5:]))
    assert factors[100] == 0
    assert training.learning_rate_factor(0, 1) == 1


def test_dice_counts_empty_as_agreement():
    empty, full = torch.zeros(4, dtype=torch.bool), torch.tensor([True, True, False, False])
    assert training.dice(empty, empty) == 1
    assert training.dice(empty, full) == 0
    assert training.dice(torch.tensor([True, False, True, False]), full) == 0.5


@pytest.mark.parametrize(
    "setting",
    [
        {"steps": 0},
        {"batch": 0},
        {"lr": 0.0},
        {"lr": math.nan},
        {"patch": (0, 8, 8)},
        {"channels": ()},
        {"channels": (8,)},
        {"lr": math.inf},
        {"seed": -1},
        {"seed": 2**32},
        {"spacing": (1.0, math.inf, 1.0)},
        {"spacing": (1.0, math.nan, 1.0)},
        {"spacing": (1.0, 1.0, 21.0)},
        {"val_fraction": 1.0},
        {"dropout": 1.0},
        {"attention": "cubic"},
        {"attention_scale": 0.0},
        {"spacing": (1.0, 0.0, 1.0)},
        {"validate_every": 0},
        {"workers": -1},
    ],
)
def test_settings_that_cannot_train_are_refused_by_name(setting):
    (name,) = setting
    with pytest.raises(ValueError, match="--" + name.replace("_", "-")):
        Recipe(**setting)


def test_one_value_stands_for_three_axes():
    assert triple([8], "--patch") == (8, 8, 8)
    assert triple([8, 9, 10], "--patch") == (8, 9, 10)
    with pytest.raises(ValueError, match="--patch has 2 values"):
        triple([8, 9], "--patch")


def test_a_network_that_cannot_be_made_leaves_no_folder(cohort, tmp_path):
    with pytest.raises(ValueError, match="65536 is the most"):
        training.train(cohort, tmp_path / "run", Recipe(**{**SMALL, "channels": (8, 2**17)}))
    assert not (tmp_path / "run").exists()


def test_the_backend_is_asked_for_the_window_of_the_level_with_attention(monkeypatch):
    seen = []
    backend = types.SimpleNamespace(backend="torch")
    monkeypatch.setattr(environment, "explain", lambda x: seen.append(tuple(x.shape)) or backend)
    network = training.RSANet(1, 2, (8, 8, 8))
    precision = environment.pick_precision("fp32", torch.device("cpu"))
    assert environment.attention_backend(network, (16, 32, 64), torch.device("cpu"), precision) == "torch"
    assert seen == [(1, 8, 4, 8, 16)]
