import csv
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from itertools import pairwise

import numpy as np
import pytest
import torch
import yaml

from rsanet.checkpoints import load_model
from rsanet.segment import runs, training
from rsanet.segment.checks import is_summary
from rsanet.segment.recipe import Recipe
from rsanet.segment.volumes import DataWarning

SMALL = {"channels": (8, 16), "patch": (16, 16, 16), "val_fraction": 0.25, "lr": 1e-2}


def weights(run, name="model"):
    return load_model(run / f"{name}.safetensors").state_dict()


def rows(run):
    with (run / "log.csv").open() as file:
        return list(csv.DictReader(file))


FILES = {
    "checkpoint.pt",
    "config.yaml",
    "curve.png",
    "ema.safetensors",
    "last.safetensors",
    "log.csv",
    "model.safetensors",
}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def command(*args):
    """The command in a process of its own, which can be killed and can start others."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "rsanet.cli", *map(str, args)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_run_folder_tells_all_about_the_run(trained):
    config = yaml.safe_load((trained / "config.yaml").read_text())
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
    assert {path.name for path in trained.iterdir()} == FILES
    assert (trained / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_model_file_knows_its_contrasts_and_window(trained):
    extra = load_model(trained / "model.safetensors").extra
    assert is_summary(extra.pop("trained_on"), 3)
    assert extra == {
        "contrasts": ["FLAIR", "T1w", "T2w"],
        "roi": [16, 16, 16],
        "spacing": None,
        "voxel_size": [1, 1, 1],
    }


def test_the_same_seed_gives_the_same_weights(cohort, tmp_path):
    for name, seed in (("one", 3), ("again", 3), ("other", 4)):
        training.train(cohort, tmp_path / name, Recipe(steps=4, seed=seed, **SMALL))
    one, again, other = (weights(tmp_path / name) for name in ("one", "again", "other"))
    assert same(one, again)
    assert not same(one, other)
    assert (tmp_path / "one" / "config.yaml").read_text() == (tmp_path / "again" / "config.yaml").read_text()


def test_the_last_steps_are_validated_too(cohort, tmp_path):
    training.train(cohort, tmp_path, Recipe(steps=5, validate_every=2, **SMALL))
    assert [row["step"] for row in rows(tmp_path)] == ["2", "4", "5"]
    assert all(row["dice"] for row in rows(tmp_path))


def test_only_the_best_weights_are_kept(cohort, tmp_path, monkeypatch):
    scores, saved = iter([0.5, 0.9, 0.1]), []
    save_model = training.save_model

    def note(network, path, extra):
        if path.name == "model.safetensors":
            saved.append({key: value.clone() for key, value in network.state_dict().items()})
        save_model(network, path, extra)

    monkeypatch.setattr(training, "dice", lambda prediction, mask: next(scores))
    monkeypatch.setattr(training, "save_model", note)
    training.train(cohort, tmp_path, Recipe(steps=3, validate_every=1, ema=0.0, **SMALL))
    assert [row["dice"] for row in rows(tmp_path)] == ["0.5", "0.9", "0.1"]
    assert len(saved) == 2
    assert same(weights(tmp_path), saved[1])


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
    step = training.Session.step

    def spoil(self, batch):
        loss = step(self, batch)
        self.average.module.final[1].weight.data.fill_(math.nan)
        return loss

    monkeypatch.setattr(training.Session, "step", spoil)
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
    training.train(cohort, tmp_path, Recipe(steps=1, attention_scale=0.1, contrasts=["T2w", "FLAIR"], **SMALL))
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


def test_other_processes_prepare_the_same_patches(cohort, tmp_path):
    for name, workers in (("none", 0), ("one", 1), ("two", 2)):
        training.train(cohort, tmp_path / name, Recipe(steps=3, workers=workers, **SMALL))
    none, one, two = (weights(tmp_path / name) for name in ("none", "one", "two"))
    assert same(none, one)
    assert same(none, two)


def test_a_killed_run_goes_on_to_the_weights_of_an_unbroken_one(cohort, tiny, tmp_path):
    options = ["--steps", "12", "--validate-every", "4", *tiny, "--dropout", "0.2"]
    unbroken = command("train", cohort, "-o", tmp_path / "unbroken", *options)
    assert unbroken.wait(120) == 0
    run = tmp_path / "killed"
    killed = command("train", cohort, "-o", run, *options)
    while not (run / "checkpoint.pt").exists() and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(60) == -signal.SIGKILL
    resumed = command("train", cohort, "-o", run, "--resume")
    out, err = resumed.communicate(timeout=120)
    assert (resumed.returncode, err) == (0, "")
    assert "Resuming at step" in out
    for name in ("model", "last", "ema"):
        assert same(weights(tmp_path / "unbroken", name), weights(run, name)), name
    for one, other in zip(rows(tmp_path / "unbroken"), rows(run), strict=True):
        assert {**one, "seconds": ""} == {**other, "seconds": ""}
    assert {path.name for path in run.iterdir()} == FILES


@pytest.mark.parametrize("stop", range(1, 6))
def test_a_run_goes_on_from_any_step(cohort, tmp_path, monkeypatch, stop):
    recipe = Recipe(steps=6, validate_every=4, **SMALL)
    training.train(cohort, tmp_path / "unbroken", recipe)
    step = training.Session.step

    def fail(self, batch):
        if self.progress.step == stop:
            raise MemoryError
        return step(self, batch)

    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(training.Session, "step", fail)
    with pytest.raises(MemoryError):
        training.train(cohort, tmp_path / "stopped", recipe)
    monkeypatch.setattr(training.Session, "step", step)
    assert runs.Run(tmp_path / "stopped").load_checkpoint()["progress"]["step"] == stop
    training.train(cohort, tmp_path / "stopped", resume=True)
    for name in ("model", "last", "ema"):
        assert same(weights(tmp_path / "unbroken", name), weights(tmp_path / "stopped", name)), name


@pytest.mark.parametrize("change", [("steps: 80", "steps: 90"), ("precision: fp32", "precision: bf16")])
def test_a_checkpoint_is_taken_up_with_the_settings_it_was_made_with(cohort, tmp_path, change):
    training.train(cohort, tmp_path, Recipe(steps=80, validate_every=1, patience=1, precision="fp32", **SMALL))
    config = tmp_path / "config.yaml"
    config.write_text(config.read_text().replace(*change))
    with pytest.raises(ValueError, match=r"checkpoint\.pt was made with other settings than .*config\.yaml"):
        training.train(cohort, tmp_path, resume=True)


def test_a_resumed_run_remembers_its_best(cohort, tmp_path, monkeypatch):
    step = training.Session.step

    def fail(self, batch):
        if self.progress.step == 1:
            raise MemoryError
        return step(self, batch)

    monkeypatch.setattr(training, "dice", lambda prediction, mask: 0.9)
    monkeypatch.setattr(training.Session, "step", fail)
    with pytest.raises(MemoryError):
        training.train(cohort, tmp_path, Recipe(steps=2, validate_every=1, **SMALL))
    best = weights(tmp_path)
    monkeypatch.setattr(training, "dice", lambda prediction, mask: 0.5)
    monkeypatch.setattr(training.Session, "step", step)
    training.train(cohort, tmp_path, resume=True)
    assert [row["dice"] for row in rows(tmp_path)] == ["0.9", "0.5"]
    assert same(weights(tmp_path), best)
    assert not same(weights(tmp_path, "last"), best)


def test_a_run_killed_before_its_first_checkpoint_begins_again(cohort, tmp_path, monkeypatch):
    recipe = Recipe(steps=2, **SMALL)
    fit = training.Session.fit
    monkeypatch.setattr(training.Session, "fit", lambda self, volumes: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        training.train(cohort, tmp_path, recipe)
    monkeypatch.setattr(training.Session, "fit", fit)
    with pytest.raises(ValueError, match=r"already holds config\.yaml: give another folder to -o, or --resume"):
        training.train(cohort, tmp_path, recipe)
    training.train(cohort, tmp_path, resume=True)
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2"]


def test_what_would_give_other_weights_cannot_be_resumed(trained, cohort, tmp_path, phantoms):
    begun = runs.read_recipe(trained / "config.yaml")
    with pytest.raises(ValueError, match=r"--lr is 0\.5, but .* was begun with 0\.01"):
        training.train(cohort, trained, Recipe(**{**vars(begun), "lr": 0.5}), resume=True)
    other = phantoms.write_cohort(tmp_path / "other", 3)
    with pytest.raises(ValueError, match="has other cases than"):
        training.train(other, trained, resume=True)
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        training.train(cohort, tmp_path / "nowhere", resume=True)


def test_a_finished_run_has_nothing_left_to_do(trained, cohort, capsys):
    before = (trained / "model.safetensors").read_bytes()
    begun = runs.read_recipe(trained / "config.yaml")
    elsewhere = Recipe(**{**vars(begun), "workers": 1, "device": "cpu"})
    assert training.train(cohort, trained, elsewhere, resume=True) == trained / "model.safetensors"
    assert "ended at step 80" in capsys.readouterr().out
    assert (trained / "model.safetensors").read_bytes() == before


def test_two_processes_have_the_loss_curve_of_one(cohort, tmp_path):
    options = ["--channels", "8", "16", "--patch", "16", "--dropout", "0", "--precision", "fp32", "--lr", "1e-2"]
    options += ["--steps", "8", "--validate-every", "2", "--batch", "4", "--device", "cpu", "--val-fraction", "0.5"]
    both = [
        command("train", cohort, "-o", tmp_path / name, *options, "--devices", devices)
        for name, devices in (("one", 1), ("two", 2))
    ]
    outputs = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert "2 processes" in outputs[1][0]
    assert outputs[1][0].count("The model is") == 1
    assert outputs[1][1] == ""
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert float(one["loss"]) == pytest.approx(float(two["loss"]), rel=1e-3)
    first, shared = (float(rows(tmp_path / name)[0]["loss"]) for name in ("one", "two"))
    assert first == pytest.approx(shared, abs=2e-5)


def test_a_run_without_a_better_dice_ends_early(cohort, tmp_path, monkeypatch, capsys):
    scores = iter([0.5, 0.4, 0.6, 0.1, 0.2])
    monkeypatch.setattr(training, "dice", lambda prediction, mask: next(scores))
    training.train(cohort, tmp_path, Recipe(steps=9, validate_every=1, patience=2, ema=0.0, **SMALL))
    assert [row["dice"] for row in rows(tmp_path)] == ["0.5", "0.4", "0.6", "0.1", "0.2"]
    assert "No better Dice in 2 validations" in capsys.readouterr().out
    training.train(cohort, tmp_path, resume=True)
    assert len(rows(tmp_path)) == 5


def test_the_average_lags_behind_the_weights(cohort, tmp_path):
    training.train(cohort, tmp_path / "average", Recipe(steps=3, **SMALL))
    assert not same(weights(tmp_path / "average", "ema"), weights(tmp_path / "average", "last"))
    training.train(cohort, tmp_path / "plain", Recipe(steps=3, ema=0.0, **SMALL))
    assert not (tmp_path / "plain" / "ema.safetensors").exists()
    assert same(weights(tmp_path / "plain", "last"), weights(tmp_path / "average", "last"))


@pytest.mark.parametrize(("dices", "kept"), [((0.4, 0.6), "ema"), ((0.6, 0.4), "last")])
def test_the_better_of_weights_and_average_is_the_model(cohort, tmp_path, monkeypatch, capsys, dices, kept):
    scores = iter(dices)
    monkeypatch.setattr(training, "dice", lambda prediction, mask: next(scores))
    training.train(cohort, tmp_path, Recipe(steps=2, validate_every=2, **SMALL))
    assert same(weights(tmp_path), weights(tmp_path, kept))
    assert [(row["dice"], row["dice_ema"]) for row in rows(tmp_path)] == [tuple(map(str, dices))]
    assert f"held-out Dice {dices[0]:.3f}, of the average {dices[1]:.3f} (best, saved)" in capsys.readouterr().out


def test_the_average_forgets_its_first_steps_sooner():
    network = torch.nn.Linear(1, 1, bias=False)
    average = training.moving_average(network, 0.9)
    expected = None
    for step in range(30):
        network.weight.data.fill_(float(step))
        average.update_parameters(network)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = float(step) if expected is None else decay * expected + (1 - decay) * step
        assert average.module.weight.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("setting", [{"loss": "dice_focal"}, {"loss": "tversky"}, {"optimizer": "sgd"}])
def test_other_losses_and_optimizers_train(cohort, tmp_path, setting):
    training.train(cohort, tmp_path, Recipe(steps=12, validate_every=6, **{**SMALL, "lr": None}, **setting))
    first, last = (float(row["loss"]) for row in rows(tmp_path))
    assert last < first


def test_a_missed_lesion_costs_tversky_more_than_a_false_one():
    mask = torch.zeros(1, 1, 8, 8, 8)
    mask[..., :4] = 1
    missed, false = torch.full((1, 2, 8, 8, 8), -9.0), torch.full((1, 2, 8, 8, 8), -9.0)
    missed[:, 0], missed[:, :, ..., :2] = 9.0, torch.tensor([-9.0, 9.0]).reshape(1, 2, 1, 1, 1)
    false[:, 0], false[:, :, ..., :6] = 9.0, torch.tensor([-9.0, 9.0]).reshape(1, 2, 1, 1, 1)
    loss = training.CRITERIA["tversky"]()
    assert loss(missed, mask) > loss(false, mask) + 0.05


def test_the_patch_follows_the_volumes_where_none_is_given(cohort, tmp_path, capsys):
    training.train(cohort, tmp_path, Recipe(steps=1, **{**SMALL, "patch": None}))
    assert "patch 22×28×24" in capsys.readouterr().out
    assert load_model(tmp_path / "model.safetensors").extra["roi"] == [22, 28, 24]


def test_voxels_of_different_sizes_are_brought_to_their_median(tmp_path, phantoms):
    for number, thick in enumerate((1.0, 2.0, 2.0, 2.0), start=1):
        phantoms.write_subject(
            tmp_path / "data", f"sub-{number:03d}", number, torch.diag(torch.tensor([1, 1, thick, 1])).numpy()
        )
    training.train(tmp_path / "data", tmp_path / "run", Recipe(steps=1, **SMALL))
    assert load_model(tmp_path / "run" / "model.safetensors").extra["spacing"] == [2.0, 1.0, 1.0]


def test_cases_beyond_the_memory_are_read_at_every_use(cohort, tmp_path, monkeypatch):
    training.train(cohort, tmp_path / "kept", Recipe(steps=2, **SMALL))
    monkeypatch.setattr(training, "available_memory", lambda device: 2 * 400_000)
    with pytest.warns(UserWarning, match="memory holds 1 of 3 prepared cases"):
        training.train(cohort, tmp_path / "read", Recipe(steps=2, **SMALL))
    assert same(weights(tmp_path / "kept"), weights(tmp_path / "read"))


def test_a_compiled_network_trains_to_the_same_names(cohort, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(training.RSANet, "compile", lambda self: compiled.append(self))
    training.train(cohort, tmp_path, Recipe(steps=1, compile=True, **{**SMALL, "precision": "fp32"}))
    assert len(compiled) == 1


def test_tensorboard_gets_the_log_where_it_is_installed(tmp_path, monkeypatch):
    written = []
    writer = types.SimpleNamespace(add_scalar=lambda *args: written.append(args), flush=lambda: None)
    module = types.SimpleNamespace(SummaryWriter=lambda folder: written.append(folder) or writer)
    monkeypatch.setattr(runs, "find_spec", lambda name: name == "tensorboard")
    monkeypatch.setattr(runs, "import_module", lambda name: module)
    runs.TensorBoard(tmp_path).add({"step": 4, "loss": 0.5, "dice": "", "dice_ema": 0.7, "lr": 0.1, "seconds": 3})
    assert written == [tmp_path / "tensorboard", ("loss", 0.5, 4), ("dice_ema", 0.7, 4), ("lr", 0.1, 4)]
    monkeypatch.setattr(runs, "find_spec", lambda name: None)
    runs.TensorBoard(tmp_path).add({})


def test_a_checkpoint_is_data_and_never_code(trained, cohort, tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harmed"), "w"))

    run = runs.Run(tmp_path / "run")
    run.begin(yaml.safe_load((trained / "config.yaml").read_text()))
    torch.save({"network": Harm()}, run.checkpoint)
    with pytest.raises(ValueError, match="is damaged, or no checkpoint"):
        training.train(cohort, run.folder, resume=True)
    assert not (tmp_path / "harmed").exists()
    torch.save({"network": {}}, run.checkpoint)
    with pytest.raises(ValueError, match="is not of this run"):
        training.train(cohort, run.folder, resume=True)


@pytest.mark.parametrize("content", [b"", b"junk", b"\x80\x02}", b"\x80\x02X\x01\x00\x00\x00\xff."])
def test_a_checkpoint_of_other_bytes_is_refused(tmp_path, content):
    run = runs.Run(tmp_path)
    run.checkpoint.write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged, or no checkpoint"):
        run.load_checkpoint()


@pytest.mark.parametrize("text", ["- a list", "recipe: 5", "{", "\x00"])
def test_a_configuration_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "config.yaml"))):
        runs.read_recipe(tmp_path / "config.yaml")


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    run = runs.Run(tmp_path)
    run.save_checkpoint({"progress": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # a write beyond fails as on a full disk
    try:
        with pytest.raises(OSError, match=r"checkpoint\.pt cannot be written: make room on its disk"):
            run.save_checkpoint({"progress": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run.load_checkpoint() == {"progress": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_run_without_its_best_weights_is_not_resumed(trained, cohort, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors, the best weights so far, is missing"):
        training.train(cohort, run, resume=True)


def test_a_run_without_its_configuration_is_not_said_to_go_on(trained, cohort, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"already holds model\.safetensors: give another folder to -o\.$"):
        training.train(cohort, run, Recipe(steps=1, **SMALL))


@pytest.mark.parametrize("patch", [24, ["x", 24, 24], [24, 24]])
def test_a_patch_that_was_edited_to_none_is_refused_by_name(trained, cohort, tmp_path, patch):
    run = shutil.copytree(trained, tmp_path / "run")
    content = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**content, "patch": patch}))
    with pytest.raises(ValueError, match=r"config\.yaml: --patch "):
        training.train(cohort, run, resume=True)


def test_the_curve_marks_the_step_whose_weights_are_kept(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda self, path, **_: (figures.append(self), path.touch())
    )
    dices = (0.1, 0.7, 0.7, 0.2)
    progress = training.Progress()
    best = []
    for progress.step, score in enumerate(dices, start=1):
        progress.losses.append(1.0)
        progress.log({"dice": score}, 0.1)
        best += [progress.step] * (progress.validations_since_best == 0)
    runs.draw_curve(progress.rows, tmp_path / "curve.png")
    (note,) = figures[0].axes[1].texts
    assert (note.get_text(), note.xy) == ("best 0.700", (best[-1], 0.7))


def test_an_option_goes_with_the_settings_of_a_file(cohort, tmp_path, rsanet):
    (tmp_path / "config.yaml").write_text("{steps: 1, channels: [8, 16], patch: [16], folds: 2, fold: 0, batch: 3}")
    again = ["train", cohort, "-o", tmp_path / "run", "--config", tmp_path / "config.yaml", "--fold", "1"]
    assert rsanet(*again)[0] == 0
    begun = runs.read_recipe(tmp_path / "run" / "config.yaml")
    assert (begun.folds, begun.fold, begun.batch) == (2, 1, 3)
    status, out, _ = rsanet("train", cohort, "-o", tmp_path / "run", "--resume", "--fold", "1")
    assert (status, "nothing left to do" in out) == (0, True)


def test_settings_by_hand_may_be_short_and_stand_once(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("lr: 1e-3\ndropout: 2E-1\n")
    assert runs.read_recipe(path) == Recipe(lr=1e-3, dropout=0.2)
    path.write_text("steps: 10\nlr: 0.1\nsteps: 20\n")
    with pytest.raises(ValueError, match=r"config\.yaml is not YAML \(steps stands there twice"):
        runs.read_recipe(path)


def test_masks_without_any_lesion_are_nothing_to_train_on(tmp_path, phantoms):
    for number in range(1, 4):
        phantoms.write_subject(tmp_path / "data", f"sub-{number:03d}", number)
        phantoms.save(
            phantoms.mask_path(tmp_path / "data", f"sub-{number:03d}"), np.zeros((26, 30, 24)), None, np.uint8
        )
    with pytest.raises(ValueError, match="None of the 2 masks to train on has a lesion"):
        training.train(tmp_path / "data", tmp_path / "run", Recipe(steps=1, **SMALL))
    assert not (tmp_path / "run").exists()


def test_the_end_of_another_process_is_said_in_words(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="Another process of this run has ended"), training.hearing_of_others():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:2784")
    with pytest.raises(RuntimeError, match="no such thing"), training.hearing_of_others():
        raise RuntimeError("no such thing")


@pytest.mark.parametrize(("seconds", "words"), [(48, "48 s"), (720, "12 min"), (12600, "3.5 h")])
def test_times_are_said_as_people_do(seconds, words):
    assert training.duration(seconds) == words


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


def test_a_network_that_cannot_be_made_leaves_no_folder(cohort, tmp_path):
    with pytest.raises(ValueError, match="65536 is the most"):
        training.train(cohort, tmp_path / "run", Recipe(**{**SMALL, "channels": (8, 2**17)}))
    assert not (tmp_path / "run").exists()


# --- a training that came to nothing, and one that is ended -------------------------------------------------


def remarks(run):
    return yaml.safe_load((run / "config.yaml").read_text()).get("remarks", [])


ADVICE = (
    "give more --steps, a smaller --attention-scale .*, another --lr or a larger --patch, and look whether each mask"
)


@pytest.mark.parametrize("held_out", [True, False])
def test_a_training_that_found_nothing_says_so_and_what_to_try(cohort, tiny, tmp_path, rsanet, held_out):
    shares = [] if held_out else ["--val-fraction", "0", "--attention-scale", "0.005"]
    advice = ADVICE if held_out else ADVICE.replace("a smaller --attention-scale .*, ", "")
    run = tmp_path / "run"
    code, out, err = rsanet("train", cohort, "-o", run, *tiny, *shares, "--steps", "2", "--lr", "1e-9")
    where = "of the 1 held-out case" if held_out else "of 3 training cases, no held-out case having any"
    (remark,) = remarks(run)
    assert re.fullmatch(
        rf"The model finds next to none of the lesions {where} \(Dice 0\.0\d\d\): {advice} fits its images\.", remark
    )
    assert (code, err) == (0, f"rsanet: warning: {remark}\n")
    doubtful = f"but it may be of no use: the remarks in {run / 'config.yaml'} say why."
    assert out.splitlines()[-1] == f"The model is {run / 'model.safetensors'}, {doubtful}"
    assert training.train(cohort, run, resume=True) == run / "model.safetensors"


def test_held_out_cases_without_lesions_do_not_speak_for_a_model(tmp_path, phantoms, monkeypatch):
    root = phantoms.write_cohort(tmp_path / "data", 3)
    phantoms.save(phantoms.mask_path(root, "sub-003"), np.zeros((26, 30, 24)), dtype=np.uint8)
    split = tmp_path / "split.json"
    split.write_text('{"train": ["sub-001", "sub-002"], "validation": ["sub-003"]}')
    monkeypatch.setattr(training, "lesion_probability", lambda network, image, *rest: torch.zeros_like(image[:, :1]))
    with pytest.warns(
        DataWarning, match="finds next to none of the lesions of 2 training cases, no held-out case having any"
    ):
        training.train(root, tmp_path / "run", Recipe(steps=1, split=str(split), **SMALL))
    assert rows(tmp_path / "run")[0]["dice"] == "1.0"  # nothing is marked where nothing is


@pytest.mark.parametrize("dices", [[0.5, 0.4, 0.5], [0.3, 0.3], [0.4, 0.5]])
def test_a_dice_that_never_rose_is_told(cohort, tmp_path, monkeypatch, dices):
    scores = iter(dices)
    monkeypatch.setattr(training, "dice", lambda prediction, mask: next(scores))
    monkeypatch.setattr(training, "lesion_probability", lambda network, image, *rest: torch.ones_like(image[:, :1]))
    training.train(cohort, tmp_path, Recipe(steps=len(dices), validate_every=1, ema=0.0, **SMALL))
    never = [f"The held-out Dice never rose above the {dices[0]:.3f} of step 1"] * (max(dices) == dices[0])
    assert [remark.partition(":")[0] for remark in remarks(tmp_path)] == never


def test_a_loss_that_is_not_finite_stays_in_the_record_until_the_run_does_better(cohort, tmp_path, monkeypatch):
    forward = training.RSANet.forward
    monkeypatch.setattr(training.RSANet, "forward", lambda self, x: forward(self, x) * math.nan)
    with pytest.raises(ValueError, match="loss is nan at step 1"):
        training.train(cohort, tmp_path, Recipe(steps=1, **SMALL))
    assert "The loss is nan at step 1 on sub-00" in remarks(tmp_path)[0]
    monkeypatch.setattr(training.RSANet, "forward", forward)
    monkeypatch.setattr(training, "dice", lambda prediction, mask: 0.9)
    training.train(cohort, tmp_path, resume=True)
    assert remarks(tmp_path) == []


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_training_that_is_ended_early_saves_its_steps(cohort, tiny, tmp_path, signum, status):
    run = tmp_path / "run"
    running = command("train", cohort, "-o", run, "--steps", "5000", "--validate-every", "5000", *tiny)
    assert running.stdout.readline().startswith("Training on")
    running.send_signal(signum)
    out, err = running.communicate(timeout=120)
    assert running.returncode == status, err
    step = int(re.search(r"Saved at step (\d+) of 5000\.", out)[1])
    assert 1 <= step < 5000
    words = {130: "interrupted", 143: "terminated"}[status]
    told, end = err.splitlines()
    assert told == "rsanet: this step is finished and saved; Ctrl-C again ends at once, without."
    assert end == f"rsanet: {words}. The run is kept in {run / 'checkpoint.pt'}: give --resume to go on."
    assert runs.Run(run).load_checkpoint()["progress"]["step"] == step
    assert {path.name for path in run.iterdir()} == {"checkpoint.pt", "config.yaml"}


def test_an_ended_run_goes_on_to_the_weights_of_an_unbroken_one(cohort, tmp_path, monkeypatch):
    recipe = Recipe(steps=4, validate_every=2, **SMALL)
    training.train(cohort, tmp_path / "unbroken", recipe)
    step, look = training.Session.step, training.lesion_probability

    def end_in_step(self, batch):
        if self.progress.step == 0:
            signal.raise_signal(signal.SIGINT)
        return step(self, batch)

    def end_in_validation(*args):
        signal.raise_signal(signal.SIGINT)
        return look(*args)

    run = tmp_path / "ended"
    monkeypatch.setattr(training.Session, "step", end_in_step)
    with pytest.raises(KeyboardInterrupt):
        training.train(cohort, run, recipe)
    monkeypatch.setattr(training.Session, "step", step)
    monkeypatch.setattr(training, "lesion_probability", end_in_validation)
    with pytest.raises(KeyboardInterrupt):
        training.train(cohort, run, resume=True)  # in the first validation, which is done after
    assert not rows(run) if (run / "log.csv").exists() else True
    monkeypatch.setattr(training, "lesion_probability", look)
    training.train(cohort, run, resume=True)
    for name in ("model", "last", "ema"):
        assert same(weights(tmp_path / "unbroken", name), weights(run, name)), name
    for one, other in zip(rows(tmp_path / "unbroken"), rows(run), strict=True):
        assert {**one, "seconds": ""} == {**other, "seconds": ""}


def test_a_second_signal_ends_at_once(cohort, tmp_path, monkeypatch):
    def end(self, batch):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError

    monkeypatch.setattr(training.Session, "step", end)
    with pytest.raises(KeyboardInterrupt):
        training.train(cohort, tmp_path, Recipe(steps=2, **SMALL))
    assert not (tmp_path / "checkpoint.pt").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_that_is_ended_before_its_first_step_leaves_nothing(cohort, tiny, tmp_path, monkeypatch, rsanet):
    monkeypatch.setattr(training, "prepare", lambda *args: signal.raise_signal(signal.SIGINT))
    code, _, err = rsanet("train", cohort, "-o", tmp_path / "run", *tiny)
    assert (code, err) == (130, "rsanet: interrupted. No step was done yet, and nothing is left.\n")
    assert not (tmp_path / "run").exists()
