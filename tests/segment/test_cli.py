import ast
import csv
import gzip
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import typer

from rsanet import __version__ as version
from rsanet import cli
from rsanet.segment import files, segmenter, selfcheck, volumes
from rsanet.segment.words import counted

ROOT = Path(cli.__file__).parents[1]
HEAVY = ("torch", "monai", "lightning", "nibabel", "scipy", "numpy", "matplotlib")
COMMANDS = (
    *("simulate", "train", "predict", "evaluate", "report", "export", "export-bundle"),
    *("nnunet-path", "nnunet-plans", "nnunet-weights", "doctor"),
)


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        timeout=120,
    )


def is_one_sentence(err):
    return err.startswith("rsanet: ") and len(err.splitlines()) == 1 and "Traceback" not in err


def images_of(root, phantoms, subject="sub-001"):
    return [phantoms.image_path(root, subject, contrast) for contrast in ("FLAIR", "T1w", "T2w")]


@pytest.fixture
def told(monkeypatch):
    """What `train` was told by the command line."""
    seen = {}
    monkeypatch.setattr(
        "rsanet.segment.training.train",
        lambda data, out, recipe, resume: seen.update(data=data, recipe=recipe, resume=resume),
    )
    return seen


def test_from_images_to_scores_and_a_picture(trained, cohort, tmp_path, rsanet):
    masks = tmp_path / "masks"
    code, out, _ = rsanet("predict", trained, "--data", cohort, "-o", masks)
    assert code == 0
    first, *_, last = out.splitlines()
    assert "attention backend" in first
    assert "precision" in first
    assert "window 16×16×16" in first
    assert str(masks) in last

    code, out, _ = rsanet(
        "evaluate", masks, cohort, "--csv", tmp_path / "scores.csv", "--json", tmp_path / "scores.json"
    )
    assert code == 0
    assert "no clinical meaning" in out
    assert "26-connected" in out
    with (tmp_path / "scores.csv").open() as file:
        scores = list(csv.DictReader(file))
    assert [row["subject"] for row in scores] == ["sub-001", "sub-002", "sub-003", "sub-004"]
    assert sum(float(row["dice"]) for row in scores) / 4 > 0.5
    assert json.loads((tmp_path / "scores.json").read_text())["protocol"]["connectivity"] == 26

    picture = tmp_path / "report.png"
    code, out, _ = rsanet("report", picture, "--data", cohort, "--pred", masks, "--model", trained)
    assert code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in out


def test_one_subject_gets_one_mask(trained, cohort, phantoms, tmp_path, rsanet):
    out_file = tmp_path / "mask.nii.gz"
    code, out, err = rsanet("predict", trained, "-i", *images_of(cohort, phantoms), "-o", out_file)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == f"The mask is {out_file}."
    assert nib.load(out_file).get_data_dtype() == np.uint8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mask.json", "mask.nii.gz"]
    again = tmp_path / "again.nii"
    model = trained / "model.safetensors"
    options = [option for path in images_of(cohort, phantoms) for option in ("-i", path)]
    assert rsanet("predict", model, *options, "-o", again)[0] == 0
    assert np.array_equal(np.asarray(nib.load(again).dataobj), np.asarray(nib.load(out_file).dataobj))


def test_real_data_get_no_remark_about_simulation(cohort, tmp_path, phantoms, rsanet):
    mask = shutil.copy(phantoms.mask_path(cohort, "sub-001"), tmp_path / "sub-001.nii.gz")
    code, out, _ = rsanet("evaluate", mask, mask)
    assert code == 0
    assert "1.000" in out
    assert "clinical" not in out


def spoil(kind, path):
    """Turns a good image into one of the files that turn up in practice."""
    image = nib.load(path)
    voxels = np.asarray(image.dataobj).copy()
    path.unlink()
    if kind == "missing":
        return
    if kind == "text":
        path.write_text("This is not an image.\n")
    elif kind == "truncated":
        nib.save(nib.Nifti1Image(voxels, image.affine), path)
        path.write_bytes(path.read_bytes()[: -min(3000, path.stat().st_size // 2)])
    elif kind == "gzipped text":
        path.write_bytes(gzip.compress(b"This is not an image.\n"))
    else:
        voxels = {
            "zeros": np.zeros_like(voxels),
            "no voxels": voxels[:, :0],
            "NaN": np.where(voxels > 0, np.nan, voxels),
            "4-D": np.stack([voxels, voxels], -1),
        }[kind]
        nib.save(nib.Nifti1Image(voxels, image.affine), path)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("kind", ["missing", "text", "truncated", "gzipped text", "zeros", "no voxels", "NaN", "4-D"])
def test_a_bad_image_gets_one_sentence_and_no_mask(trained, tmp_path, phantoms, rsanet, kind, which):
    phantoms.write_subject(tmp_path / "in", "sub-001", 1)
    images = images_of(tmp_path / "in", phantoms)
    spoil(kind, images[which])
    (tmp_path / "out").mkdir()
    code, out, err = rsanet("predict", trained, "-i", *images, "-o", tmp_path / "out" / "mask.nii.gz")
    assert code == 1
    assert is_one_sentence(err)
    assert images[which].name in err
    assert "The mask is" not in out
    assert list((tmp_path / "out").iterdir()) == []


def test_the_wrong_number_of_images_names_the_wanted_contrasts(trained, cohort, phantoms, tmp_path, rsanet):
    code, _, err = rsanet("predict", trained, "-i", images_of(cohort, phantoms)[0], "-o", tmp_path / "m.nii.gz")
    assert code == 1
    assert is_one_sentence(err)
    assert "FLAIR T1w T2w" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("file/new/m.nii.gz", "file is a file"),
        ("m.png", "end it in .nii.gz"),
        ("file/m.nii.gz", "file is a file"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused(trained, cohort, phantoms, tmp_path, rsanet, name, reason):
    (tmp_path / "file").write_text("")
    code, _, err = rsanet("predict", trained, "-i", *images_of(cohort, phantoms), "-o", tmp_path / name)
    assert code == 1
    assert is_one_sentence(err)
    assert reason in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_output_folder_without_permission_is_refused(trained, cohort, phantoms, tmp_path, rsanet, monkeypatch):
    # Tests may run as root, to whom every folder is writable.
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and access(path, mode))
    code, _, err = rsanet("predict", trained, "-i", *images_of(cohort, phantoms), "-o", tmp_path / "m.nii.gz")
    assert code == 1
    assert is_one_sentence(err)
    assert "not writable" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", ["missing.safetensors", "empty", "text.safetensors"])
def test_what_is_no_model_is_refused(cohort, phantoms, tmp_path, rsanet, model):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("no weights")
    code, _, err = rsanet("predict", tmp_path / model, "-i", *images_of(cohort, phantoms), "-o", tmp_path / "m.nii.gz")
    assert code == 1
    assert is_one_sentence(err)
    assert model in err
    assert not (tmp_path / "m.nii.gz").exists()


def test_a_cohort_goes_on_past_a_bad_case_and_names_it_at_the_end(trained, tmp_path, phantoms, rsanet):
    root = phantoms.write_cohort(tmp_path / "data", 3)
    spoil("truncated", phantoms.image_path(root, "sub-002"))
    code, out, err = rsanet("predict", trained, "--data", root, "-o", tmp_path / "masks")
    assert code == 1
    assert is_one_sentence(err)
    assert "1 of 3" in err
    assert "sub-002" in err
    assert "2/3  no mask: " in out
    assert {path.name for path in (tmp_path / "masks").rglob("*.*")} == {
        "dataset_description.json",
        "predictions.csv",
        "sub-001_label-lesion_mask.json",
        "sub-001_label-lesion_mask.nii.gz",
        "sub-003_label-lesion_mask.json",
        "sub-003_label-lesion_mask.nii.gz",
    }


def test_training_names_every_bad_case_before_the_first_step(tmp_path, phantoms, rsanet, tiny):
    root = phantoms.write_cohort(tmp_path / "data", 4)
    phantoms.image_path(root, "sub-001", "T2w").unlink()
    spoil("NaN", phantoms.image_path(root, "sub-003"))
    code, out, err = rsanet("train", root, "-o", tmp_path / "run", *tiny)
    assert code == 1
    assert "2 of 4 cases" in err
    assert "sub-001 has no T2w" in err
    assert "sub-003_FLAIR.nii.gz" in err
    assert "Traceback" not in err
    assert "step" not in out
    assert not (tmp_path / "run").exists()


def test_a_run_that_has_a_model_is_refused(trained, cohort, rsanet, tiny):
    code, _, err = rsanet("train", cohort, "-o", trained, *tiny)
    assert code == 1
    assert is_one_sentence(err)
    assert "already holds model.safetensors" in err


def test_a_comparison_with_missing_masks_shows_the_others_and_fails(cohort, tmp_path, phantoms, rsanet):
    shutil.copy(phantoms.mask_path(cohort, "sub-002"), tmp_path / "sub-002.nii.gz")
    code, out, err = rsanet("evaluate", tmp_path, cohort)
    assert code == 1
    assert is_one_sentence(err)
    assert "3 cases" in err
    assert "sub-002" in out
    assert "sub-003 has a reference but no prediction" in out


def test_a_picture_is_kept_unless_overwrite_is_given(cohort, tmp_path, rsanet):
    kept = tmp_path / "r.png"
    kept.write_text("precious")
    options = ["report", kept, "--data", cohort, "--pred", cohort]
    code, out, err = rsanet(*options)
    assert (code, out) == (1, "")
    assert err == f"rsanet: {kept} exists: give another name, or --overwrite to replace it.\n"
    assert kept.read_text() == "precious"
    assert rsanet(*options, "--overwrite")[0] == 0
    assert kept.read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_nobody_is_refused(cohort, trained, tmp_path, rsanet):
    (tmp_path / "masks").mkdir()
    code, _, err = rsanet("report", tmp_path / "r.png", "--data", cohort, "--pred", tmp_path / "masks")
    assert code == 1
    assert is_one_sentence(err)
    assert "no predicted mask" in err
    assert not (tmp_path / "r.png").exists()


@pytest.mark.parametrize(
    "args",
    [
        ["predict", "model", "-o", "x.nii.gz"],
        ["predict", "model", "-i", "a.nii.gz"],
        ["train", "data"],
        ["train", "data", "-o", "run", "--steps", "many"],
        ["segment"],
        ["predict", "model", "-i", "a.nii.gz", "-o", "x.nii.gz", "--threshold", "2"],
        ["evaluate", "one"],
    ],
)
def test_wrong_usage_exits_with_2(rsanet, args):
    code, _, err = rsanet(*args)
    assert code == 2
    assert "Traceback" not in err


def test_settings_are_refused_before_anything_is_read(rsanet, tmp_path):
    code, _, err = rsanet("train", tmp_path / "nowhere", "-o", tmp_path / "run", "--lr", "-1")
    assert code == 1
    assert is_one_sentence(err)
    assert "--lr is -1.0" in err


def test_several_values_may_follow_one_option(rsanet, told):
    options = ["--contrasts", "FLAIR", "T2w", "--channels", "8", "16", "-o", "run", "--patch", "8", "9", "10"]
    assert rsanet("train", "data", *options)[0] == 0
    assert told["recipe"].contrasts == ("FLAIR", "T2w")
    assert told["recipe"].channels == (8, 16)
    assert told["recipe"].patch == (8, 9, 10)


def test_an_unexpected_error_is_one_sentence_and_debug_shows_its_traceback(monkeypatch, rsanet, tmp_path):
    def fail(path):
        raise KeyError("weights")

    (tmp_path / "model.safetensors").write_text("")
    monkeypatch.setattr(segmenter, "load_model", fail)
    args = ["predict", tmp_path, "-i", "a.nii.gz", "-o", tmp_path / "m.nii.gz"]
    code, _, err = rsanet(*args)
    assert code == 1
    assert is_one_sentence(err)
    assert "KeyError" in err
    assert "--debug shows the traceback" in err
    with pytest.raises(KeyError, match="weights"):
        cli.main([*(str(arg) for arg in args), "--debug"])


def test_the_command_line_imports_nothing_heavy():
    result = python(f"import sys, rsanet.cli; print([name for name in {HEAVY} if name in sys.modules])")
    assert result.stdout.strip() == "[]", result.stderr


def test_help_lists_every_command_and_says_research_only(rsanet):
    code, out, _ = rsanet("--help")
    assert code == 0
    assert all(command in out for command in COMMANDS)
    assert "Research use only" in out
    code, out, _ = rsanet("predict", "--help")
    assert "results depend on it" in " ".join(out.split())


@pytest.mark.parametrize("verb", cli.VERBS, ids=lambda verb: verb.__name__)
def test_the_help_of_every_verb_ends_with_an_example_that_it_accepts(rsanet, verb):
    example = cli.VERBS[verb]
    command = typer.main.get_command(cli.app)
    program, name, *args = shlex.split(example)
    assert (program, name) == ("rsanet", verb.__name__.replace("_", "-"))
    command.commands[name].make_context(name, args)  # raises where an option is unknown or an argument is missing
    status, out, _ = rsanet(name, "--help")
    assert status == 0
    assert out.rstrip().endswith(f"Example:\n    {example}")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("rsanet ev", {"evaluate"}),
        ("rsanet evaluate --pro", {"--protocol"}),
        ("rsanet evaluate masks cohort --protocol ", {"custom", "isbi2015", "msseg2016", "wmh2017", "shifts"}),
        ("rsanet train cohort --loss dice", {"dice_ce", "dice_focal"}),
        ("rsanet train cohort --precision ", {"auto", "fp32", "bf16"}),
        ("rsanet predict run --device c", {"cpu", "cuda"}),
        ("rsanet simulate out --kinds d", {"deep"}),
        ("rsanet export run --format ", {"onnx", "torch-export", "aoti"}),
    ],
)
def test_the_shell_completes_verbs_options_and_their_words(typed, offered):
    words = {"_RSANET_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    done = python("import sys; sys.argv[0] = 'rsanet'; from rsanet import cli; cli.main([])", **words)
    assert (done.returncode, set(done.stdout.split())) == (0, offered)


def test_tables_and_texts_are_utf8_whatever_the_locale(tmp_path):
    code = (
        "from pathlib import Path; from rsanet.segment.files import write_csv, write_text; "
        f"folder = Path({str(tmp_path)!r}); text = 'Jos\\xe9 32\\xd732 \\udce9'; "
        "write_text(folder / 'x.txt', text); write_csv(folder / 'x.csv', [{'window': text}])"
    )
    done = python(code, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0, done.stderr
    text = "José 32×32 ".encode() + b"\xe9"  # the last is of a file name that is no text
    assert (tmp_path / "x.txt").read_bytes() == text
    assert (tmp_path / "x.csv").read_bytes().split(b"\r\n")[1] == text


def test_a_missing_package_is_named_with_the_extra_that_brings_it():
    result = python(
        "import sys; sys.modules['monai'] = None; from rsanet.cli import main; main(['train', 'a', '-o', 'b'])"
    )
    assert result.returncode == 1
    assert is_one_sentence(result.stderr)
    assert "monai" in result.stderr
    assert 'pip install ".[segment]"' in result.stderr
    result = python("import sys; sys.modules['typer'] = None; import rsanet.cli")
    assert result.returncode == 1
    assert 'pip install ".[segment]"' in result.stderr
    assert "Traceback" not in result.stderr


def test_doctor_shows_versions_hardware_disk_and_backends(rsanet):
    code, out, _ = rsanet("doctor", "--no-check")
    assert code == 0
    facts = dict(line.split("  ", 1) for line in out.splitlines())
    assert facts["torch"].strip() == torch.__version__
    assert facts["python"].strip() == ".".join(map(str, sys.version_info[:3]))
    assert facts["backend torch"].strip() == "usable"
    assert "cores" in facts["cpu"]
    assert "GiB free in" in facts["disk here"]


def test_doctor_works_for_real_and_says_how_fast(rsanet, monkeypatch):
    monkeypatch.setattr(selfcheck, "WINDOW", (16, 16, 16))
    code, out, err = rsanet("doctor", "--device", "cpu")
    assert (code, err) == (0, "")
    checks = [line for line in out.splitlines() if line.startswith("ok   ")]
    assert sum("relative error" in line for line in checks) >= 4
    assert sum(line.endswith(" s") for line in checks) == len(checks)
    assert "All works." in out.splitlines()[-1]


def test_doctor_names_what_does_not_work(rsanet, monkeypatch):
    monkeypatch.setattr(selfcheck, "check_backends", lambda device, dtypes: False)
    monkeypatch.setattr(selfcheck, "lesion_probability", lambda *args: torch.tensor(float("nan")))
    code, out, err = rsanet("doctor", "--device", "cpu")
    assert code == 1
    assert is_one_sentence(err)
    assert "3 checks failed: slice-wise attention" in err
    assert "FAIL prediction of a window" in out
    assert "ok   a NIfTI file" in out


def test_our_warnings_are_a_line_and_those_of_libraries_are_silent(rsanet, monkeypatch, recwarn):
    def describe():
        warnings.warn_explicit("two voxels are odd.", UserWarning, segmenter.__file__, 1)
        warnings.warn_explicit("use another function", FutureWarning, torch.__file__, 1)
        return [("a", "b")]

    monkeypatch.setattr("rsanet.segment.environment.describe_environment", describe)
    assert rsanet("doctor", "--no-check")[2] == "rsanet: warning: two voxels are odd.\n"
    assert not recwarn
    with pytest.warns(FutureWarning, match="use another function"):
        rsanet("doctor", "--no-check", "--debug")


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), RuntimeError("CUDA out of memory")],
)
def test_too_little_memory_is_said_with_what_helps(error):
    assert cli.explain(error).startswith("There is not enough memory: give a smaller --patch")


@pytest.mark.parametrize(("signum", "status", "word"), [(2, 130, "interrupted"), (15, 143, "terminated")])
@pytest.mark.parametrize("saved", [True, False])
def test_a_stopped_training_says_so_and_what_it_leaves(
    cohort, tiny, tmp_path, monkeypatch, rsanet, signum, status, word, saved
):
    from rsanet.segment.training import Session

    step = Session.step

    def stop(self, batch):
        if self.run.checkpoint.exists() == saved:
            signal.raise_signal(signum)
        return step(self, batch)

    monkeypatch.setattr(Session, "step", stop)
    before = signal.getsignal(signum)
    options = ["--steps", "4", "--validate-every", "1", *tiny]
    code, out, err = rsanet("train", cohort, "-o", tmp_path / "run", *options)
    assert code == status
    assert is_one_sentence(err)
    assert word in err
    assert "checkpoint.pt: give --resume to go on" in err  # the step that the signal came in is saved, the first, too
    assert (tmp_path / "run" / "model.safetensors").exists() == saved
    assert "The model is" not in out
    assert signal.getsignal(signum) == before


def test_an_end_of_file_is_an_error_like_another(monkeypatch, rsanet):
    def fail():
        raise EOFError("Compressed file ended")

    monkeypatch.setattr("rsanet.segment.environment.describe_environment", fail)
    code, _, err = rsanet("doctor", "--no-check")
    assert code == 1
    assert is_one_sentence(err.lstrip())
    assert "EOFError" in err
    assert "Aborted" not in err


@pytest.mark.parametrize("signum", [2, 15])
def test_a_signal_in_a_destructor_is_not_lost(monkeypatch, rsanet, signum):
    class Loader:
        def __del__(self):
            signal.raise_signal(signum)

    def describe():
        Loader()
        time.sleep(5)

    monkeypatch.setattr("rsanet.segment.environment.describe_environment", describe)
    code, _, err = rsanet("doctor", "--no-check")
    assert code == 128 + signum
    assert is_one_sentence(err)


def test_a_configuration_is_read_back_and_options_come_before_it(trained, tmp_path, rsanet, told):
    config = trained / "config.yaml"
    code, _, err = rsanet("train", "data", "-o", tmp_path / "run", "--config", config, "--steps", "7", "--no-augment")
    assert (code, err) == (0, "")
    assert told["recipe"].steps == 7
    assert not told["recipe"].augment
    assert told["recipe"].channels == (8, 16)
    assert told["recipe"].lr == 0.01


def test_a_resumed_run_keeps_its_settings_but_for_the_machine(trained, rsanet, told):
    assert rsanet("train", "data", "-o", trained, "--resume", "--workers", "2")[0] == 0
    assert told["resume"]
    assert told["recipe"].workers == 2
    assert told["recipe"].steps == 80
    code, _, err = rsanet("train", "data", "-o", trained, "--resume", "--config", trained / "config.yaml")
    assert code == 2
    assert "leave --config out" in err


@pytest.mark.parametrize(
    ("text", "reason"),
    [("stepz: 5", "has stepz, which no run can be told"), ("steps: many", "not a whole number"), ("[", "is not YAML")],
)
def test_a_configuration_with_a_slip_is_refused(tmp_path, rsanet, told, text, reason):
    (tmp_path / "c.yaml").write_text(text)
    code, _, err = rsanet("train", "data", "-o", tmp_path / "run", "--config", tmp_path / "c.yaml")
    assert code == 1
    assert is_one_sentence(err)
    assert reason in err
    assert "c.yaml" in err
    assert not told


def test_a_run_that_is_not_there_cannot_be_resumed(cohort, tmp_path, rsanet):
    code, _, err = rsanet("train", cohort, "-o", tmp_path / "run", "--resume")
    assert code == 1
    assert is_one_sentence(err)
    assert "there is no run to resume" in err
    assert not list(tmp_path.iterdir())


def test_an_exit_that_a_library_makes_is_no_success(monkeypatch, rsanet):
    monkeypatch.setattr("rsanet.segment.environment.describe_environment", sys.exit)
    assert rsanet("doctor", "--no-check")[0] == 1


def test_a_stopped_process_has_the_status_of_its_signal():
    code = (
        "import os, signal, rsanet.cli as cli\n"
        "cli.app.command('wait')(lambda: os.kill(os.getpid(), signal.SIGTERM))\n"
        "cli.main(['wait'])"
    )
    result = python(code)
    assert (result.returncode, result.stderr) == (143, "rsanet: terminated.\n")


def test_a_cut_mask_stops_the_picture_with_a_sentence(cohort, tmp_path, phantoms, rsanet):
    mask = tmp_path / "masks" / "sub-001.nii.gz"
    mask.parent.mkdir()
    shutil.copy(phantoms.mask_path(cohort, "sub-001"), mask)
    spoil("truncated", mask)
    code, _, err = rsanet("report", tmp_path / "r.png", "--data", cohort, "--pred", tmp_path / "masks")
    assert code == 1
    assert is_one_sentence(err)
    assert f"{mask} cannot be read" in err
    assert not (tmp_path / "r.png").exists()


def test_a_single_bad_comparison_is_told_with_its_reason(cohort, tmp_path, phantoms, rsanet):
    for name in ("sub-001", "sub-002", "sub-003"):
        shutil.copy(phantoms.mask_path(cohort, name), tmp_path / f"{name}.nii.gz")
    code, _, err = rsanet("evaluate", tmp_path, cohort)
    assert code == 1
    assert err.startswith("rsanet: 1 case could not be compared: sub-004 has a reference but no prediction in ")
    (tmp_path / "sub-003.nii.gz").unlink()
    _, _, err = rsanet("evaluate", tmp_path, cohort)
    assert err.startswith("rsanet: 2 cases could not be compared: sub-003, sub-004; ")


def test_two_tables_do_not_share_a_file(cohort, tmp_path, rsanet):
    scores = tmp_path / "scores"
    code, _, err = rsanet(
        "evaluate", cohort, cohort, "--csv", scores, "--json", tmp_path / ".." / tmp_path.name / "scores"
    )
    assert code == 2
    assert "--csv" in err
    assert not scores.exists()


@pytest.mark.parametrize(("number", "words"), [(0, "0 lesions"), (1, "1 lesion"), (2, "2 lesions")])
def test_numbers_agree_with_their_nouns(number, words):
    assert counted(number, "lesion") == words


def test_a_full_disk_is_told_with_the_file(trained, cohort, phantoms, tmp_path, rsanet, monkeypatch):
    def disk_full(image, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nib, "save", disk_full)
    code, _, err = rsanet("predict", trained, "-i", *images_of(cohort, phantoms), "-o", tmp_path / "m.nii.gz")
    assert (code, err) == (1, f"rsanet: {tmp_path / 'm.nii.gz'}: no space left on device.\n")
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_system_without_a_file_is_no_surprise():
    assert cli.explain(OSError(28, "No space left on device")) == "No space left on device."


def test_the_version_is_told_at_once_and_is_that_of_the_code(rsanet):
    code, out, err = rsanet("--version")
    assert (code, out, err) == (0, f"rsanet {version}\n", "")
    assert version == __import__("rsanet").__version__
    done = python(f"import sys, rsanet; rsanet.__version__; print([name for name in {HEAVY} if name in sys.modules])")
    assert done.stdout == "[]\n"


def fail_in(path):
    with files.written_beside(path) as partial:
        partial.write_text("half")
        raise OSError("no room")


def test_an_output_gets_its_folders_and_a_failure_leaves_none(trained, cohort, phantoms, tmp_path, rsanet):
    images = images_of(cohort, phantoms)
    out = tmp_path / "new" / "folder" / "mask.nii.gz"
    code, _, err = rsanet("predict", trained, "-i", *images[:2], "-o", out)
    assert code == 1
    code, _, err = rsanet("evaluate", cohort, tmp_path / "nowhere", "--csv", tmp_path / "x" / "s.csv")
    assert code == 1
    code, _, err = rsanet("export", tmp_path / "nowhere", "-o", tmp_path / "y" / "m.onnx")
    assert code == 1
    with pytest.raises(OSError, match="no room"):
        fail_in(tmp_path / "z" / "a" / "t.txt")
    assert not list(tmp_path.iterdir())
    for args in (
        ("predict", trained, "-i", *images, "-o", out, "--preview", "--probability-map"),
        ("predict", trained, "--data", cohort, "-o", tmp_path / "a" / "b"),
        (
            "evaluate",
            tmp_path / "a" / "b",
            cohort,
            "--csv",
            tmp_path / "c" / "s.csv",
            "--json",
            tmp_path / "d" / "s.json",
        ),
        ("report", tmp_path / "e" / "r.png", "--data", cohort, "--pred", tmp_path / "a" / "b"),
        ("report", tmp_path / "f" / "g", "--data", cohort, "--pred", tmp_path / "a" / "b", "--subjects", "sub-001"),
    ):
        code, _, err = rsanet(*args)
        assert (code, err) == (0, ""), args
    made = ("new/folder/mask.png", "a/b/predictions.csv", "c/s.csv", "d/s.json", "e/r.png", "f/g/index.html")
    assert all((tmp_path / name).is_file() for name in made)


@pytest.mark.parametrize("end", [".NII.GZ", ".Nii.gz", ".NII"])
def test_a_mask_is_written_under_the_name_that_was_asked_for(trained, cohort, phantoms, tmp_path, rsanet, end):
    images = []
    for path in images_of(cohort, phantoms):
        image = nib.load(path)
        voxels = tmp_path / f"in{len(images)}.nii{'' if end == '.NII' else '.gz'}"
        nib.save(image, voxels)
        images.append(voxels.rename(tmp_path / f"in{len(images)}{end}"))
    code, _, err = rsanet("predict", trained, "-i", *images, "-o", tmp_path / f"out{end}", "--probability-map")
    assert (code, err) == (0, "")
    written = {path.name for path in tmp_path.iterdir()} - {path.name for path in images}
    assert written == {f"out{end}", "out.json", f"out_probseg{end}"}
    assert volumes.read_mask(tmp_path / f"out{end}")[0].any()


@pytest.fixture
def predicted(monkeypatch):
    """The models and the images that `predict` was told."""
    seen = []

    def note(models, images, out, **options):
        seen.append((models[0].name, [path.name for path in images]))
        return types.SimpleNamespace(lesions=0, load_mm3=0.0, seconds=0.0)

    monkeypatch.setattr("rsanet.segment.prediction.predict", note)
    return seen


@pytest.mark.parametrize(
    "args",
    [
        ["run", "-i", "a.nii", "b.nii", "-o", "o.nii"],
        ["-i", "a.nii", "b.nii", "run", "-o", "o.nii"],
        ["-o", "o.nii", "-i", "a.nii", "b.nii", "run"],
        ["-i", "a.nii", "b.nii", "-o", "o.nii", "run"],
        ["-i", "a.nii", "-i", "b.nii", "run", "-o", "o.nii", "--flips"],
        ["-o", "o.nii", "--roi", "8", "8", "8", "run", "-i", "a.nii", "b.nii"],
        ["--flips", "-i", "a.nii", "b.nii", "run", "-o", "o.nii", "--debug"],
    ],
)
def test_a_model_behind_the_images_is_understood(rsanet, predicted, tmp_path, monkeypatch, args):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").write_text("")
    monkeypatch.chdir(tmp_path)
    code, _, err = rsanet("predict", *args)
    assert (code, err) == (0, "")
    assert predicted == [("run", ["a.nii", "b.nii"])]


def test_an_option_that_took_the_argument_is_named(rsanet, tmp_path, monkeypatch, told):
    monkeypatch.chdir(tmp_path)
    for args, words in (
        (
            ["predict", "-i", "a.nii", "b.nii", "c.nii", "-o", "o.nii"],
            "-i took all that follows it (a.nii b.nii c.nii)",
        ),
        (["train", "-o", "run", "--contrasts", "FLAIR", "T1w", "data"], "--contrasts took all that follows it"),
    ):
        code, out, err = rsanet(*args)
        assert (code, out) == (2, "")
        assert words in " ".join(err.replace("│", " ").split())
        assert "in front" in err
    (tmp_path / "data").mkdir()
    assert rsanet("train", "-o", "run", "--contrasts", "FLAIR", "T1w", "data")[0] == 0
    assert (told["recipe"].contrasts, told["data"].name) == (("FLAIR", "T1w"), "data")


SOURCES = [*Path(cli.__file__).parent.rglob("*.py"), *(ROOT / "rsa_kernels").rglob("*.py")]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Of pip, torchrun, monai.bundle, python -m rsa_kernels and the benchmarks; nnU-Net's have underscores.
OTHERS = {
    "--no-build-isolation",
    "--nproc-per-node",
    "--datalist",
    "--check",
    "--shape",
    "--dtype",
    "--output",
    "--quick",
    "--batches",
}
OTHERS |= {"--install-completion", "--debug", "--help", "--version"}  # of every verb, or of none


def texts_of(path):
    """The texts of a Python file, formatted ones with a blank for each value."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else " " for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.mark.parametrize("path", [*SOURCES, *PAGES], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_messages_and_pages_name_what_there_is(path):
    commands = typer.main.get_command(cli.app).commands
    options = {name for command in commands.values() for param in command.params for name in param.opts}
    options |= {name for command in commands.values() for param in command.params for name in param.secondary_opts}
    for text in texts_of(path) if path.suffix == ".py" else [path.read_text(encoding="utf-8")]:
        assert not re.search(r"pip install [\"']?rsanet", text), f"no index has rsanet: {text}"
        for name in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+(?!\w)", text):
            assert name in options | OTHERS, (
                name,
                text[:200],
            )
        for verb in re.findall(r"(?:^|`|\$\(|: )rsanet ([a-z][a-z-]+)(?=[ `)]|$)", text, re.MULTILINE):
            assert verb in commands, (verb, text[:200])


@pytest.mark.parametrize("command", [["simulate", "{}", "--subjects", "1", "--spacing", "4"]])
def test_a_file_in_the_place_of_a_folder_is_named(tmp_path, rsanet, command):
    (tmp_path / "notes").write_text("kept")
    status, _, error = rsanet(*(part.format(tmp_path / "notes" / "x") for part in command))
    assert (status, error.strip().splitlines()[-1]) == (
        1,
        f"rsanet: {tmp_path}/notes/x cannot be used: {tmp_path}/notes is a file, not a folder; give another path.",
    )
    assert (tmp_path / "notes").read_text() == "kept"
