import csv
import json
import os
import subprocess
import sys
import threading
import warnings
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from segment.bright import segmenter

from rsanet.segment import cohort as cohorts
from rsanet.segment import processes
from rsanet.segment.cohort import predict_cohort, read_ahead
from rsanet.segment.processes import Processes, own_device
from rsanet.segment.volumes import DataWarning


def table(folder):
    with (folder / "predictions.csv").open() as file:
        return list(csv.DictReader(file))


def names(folder):
    """All files of a folder of masks but those beside each mask."""
    files = [path.name for path in folder.rglob("*") if path.is_file() and path.name != "dataset_description.json"]
    return sorted(name for name in files if not name.endswith("_mask.json"))


def mask_of(folder, case):
    return folder / case / "anat" / f"{case}_label-lesion_mask.nii.gz"


def check(reason):
    raise ValueError(reason)


def refuse(*args, **kwargs):
    raise AssertionError("computed")


@pytest.fixture
def three(tmp_path, phantoms):
    return phantoms.write_cohort(tmp_path / "data", 3)


@pytest.mark.parametrize("fault", ["image", "memory"])
def test_a_cohort_is_predicted_past_a_bad_case(tmp_path, three, phantoms, fault):
    model, done = segmenter(), []
    if fault == "image":
        phantoms.image_path(three, "sub-002", "T1w").write_text("no image")
    else:
        forward = model.network.forward

        def lack(x):
            if len(done) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(x)

        model.network.forward = lack
    rows, failures = predict_cohort(model, three, tmp_path / "out", progress=lambda *args: done.append(args))
    assert [row.case for row in rows] == ["sub-001", "sub-003"]
    assert list(failures) == ["sub-002"]
    assert ("T1w" if fault == "image" else "does not fit into memory") in failures["sub-002"]
    assert names(tmp_path / "out") == [
        "predictions.csv",
        "sub-001_label-lesion_mask.nii.gz",
        "sub-003_label-lesion_mask.nii.gz",
    ]
    found = table(tmp_path / "out")
    assert list(found[0]) == [
        "case",
        "mask",
        "lesions",
        "load_mm3",
        "seconds",
        "backend",
        "window",
        "made_by",
        "warnings",
    ]
    assert [row["case"] for row in found] == ["sub-001", "sub-003"]
    for row in found:
        mask = np.asarray(nib.load(tmp_path / "out" / row["mask"]).dataobj)
        assert float(row["load_mm3"]) == mask.sum()


def test_an_output_folder_is_checked_before_any_image_is_read(tmp_path, three, monkeypatch):
    (tmp_path / "out").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "out" and access(path, mode))
    with pytest.raises(ValueError, match="not writable"):
        predict_cohort(segmenter(), three, tmp_path / "out", progress=refuse)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file: give a folder"):
        predict_cohort(segmenter(), three, tmp_path / "file", progress=refuse)


def test_masks_that_exist_are_kept_unless_they_may_be_replaced(tmp_path, three):
    out = tmp_path / "out"
    mask_of(out, "sub-002").parent.mkdir(parents=True)
    mask_of(out, "sub-002").write_text("precious")
    with pytest.raises(ValueError, match=r"has files of 1 of 3 cases \(sub-002\): give --resume .* --overwrite"):
        predict_cohort(segmenter(), three, out, progress=refuse)
    assert names(out) == ["sub-002_label-lesion_mask.nii.gz"]
    assert mask_of(out, "sub-002").read_text() == "precious"
    with pytest.raises(ValueError, match="Both --resume and --overwrite"):
        predict_cohort(segmenter(), three, out, resume=True, overwrite=True)
    predict_cohort(segmenter(), three, out, overwrite=True)
    assert mask_of(out, "sub-002").read_bytes() != b"precious"
    assert len(table(out)) == 3


class Killed(BaseException):
    pass


def test_masks_of_another_model_or_threshold_are_not_mixed(three, tmp_path):
    predict_cohort(segmenter(), three, tmp_path)
    mask = mask_of(tmp_path, "sub-002")
    mask.unlink()
    with pytest.raises(ValueError, match=r"has masks of .*threshold 0\.5, .* would add some of .*threshold 0\.4,"):
        predict_cohort(segmenter(), three, tmp_path, threshold=0.4, resume=True)
    with pytest.raises(ValueError, match="elsewhere, threshold"):
        predict_cohort(replace(segmenter(), name="elsewhere"), three, tmp_path, resume=True)
    assert not mask.exists()
    rows, _ = predict_cohort(segmenter(), three, tmp_path, resume=True)
    assert mask.exists()
    assert len({row.made_by for row in rows}) == 1


def test_a_killed_run_goes_on_where_it_stopped(tmp_path, three):
    out = tmp_path / "out"

    def kill(number, total, result):
        if number == 2:
            raise Killed

    with pytest.raises(Killed):
        predict_cohort(segmenter(), three, out, progress=kill)
    assert [row["case"] for row in table(out)] == ["sub-001", "sub-002"]
    # Killed between a mask and its row: the mask is there, but not known to be whole.
    mask_of(out, "sub-003").parent.mkdir(parents=True)
    mask_of(out, "sub-003").write_text("who knows")
    before = mask_of(out, "sub-001").stat().st_mtime_ns
    rows_before, seen, lines = table(out), [], []
    rows, _ = predict_cohort(
        segmenter(),
        three,
        out,
        resume=True,
        progress=lambda number, total, result: seen.append((number, total, result.case)),
        say=lines.append,
    )
    assert seen == [(3, 3, "sub-003")]
    assert lines[1:] == ["2 of 3 masks are there already."]
    assert mask_of(out, "sub-001").stat().st_mtime_ns == before
    assert table(out)[:2] == rows_before
    assert [row.case for row in rows] == [row["case"] for row in table(out)] == ["sub-001", "sub-002", "sub-003"]
    assert nib.load(mask_of(out, "sub-003")).shape == (26, 30, 24)


def test_files_asked_for_on_resuming_are_made(tmp_path, three):
    predict_cohort(segmenter(), three, tmp_path / "out")
    seen = []
    predict_cohort(
        segmenter(),
        three,
        tmp_path / "out",
        resume=True,
        probability_map=True,
        progress=lambda *args: seen.append(args),
    )
    assert len(seen) == 3
    assert len(list((tmp_path / "out").glob("*/anat/*_label-lesion_probseg.nii.gz"))) == 3


def test_a_table_keeps_the_rows_of_other_masks_in_the_folder_alone(tmp_path, three, phantoms):
    out = tmp_path / "out"
    predict_cohort(segmenter(), three, out)
    mask_of(out, "sub-003").unlink()
    phantoms.write_subject(tmp_path / "more", "sub-009", 9)
    predict_cohort(segmenter(), tmp_path / "more", out)
    assert [row["case"] for row in table(out)] == ["sub-001", "sub-002", "sub-009"]


@pytest.mark.parametrize("content", [b"name,age\nme,40\n", b"\xff\xfe\x00", b"", b"a" * 200_000])
def test_a_foreign_table_is_not_lost(tmp_path, three, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "predictions.csv").write_bytes(content)
    with pytest.raises(ValueError, match="is not a table of rsanet predict"):
        predict_cohort(segmenter(), three, tmp_path / "out", progress=refuse)
    assert names(tmp_path / "out") == ["predictions.csv"]


def test_only_the_test_part_of_a_split_is_predicted(tmp_path, three):
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": ["sub-001"], "validation": [], "test": ["sub-003"]}))
    rows, _ = predict_cohort(segmenter(), three, tmp_path / "out", split=split)
    assert [row.case for row in rows] == ["sub-003"]
    assert not mask_of(tmp_path / "out", "sub-001").exists()
    split.write_text(json.dumps({"train": ["sub-001"]}))
    with pytest.raises(ValueError, match="has no test part"):
        predict_cohort(segmenter(), three, tmp_path / "b", split=split)


def test_a_model_of_other_contrasts_is_refused_before_anything_is_written(tmp_path, three, phantoms):
    for number in (1, 2, 3):
        phantoms.image_path(three, f"sub-{number:03d}").unlink()
    with pytest.raises(ValueError, match=r"^No case of .*data has a FLAIR, but the model takes FLAIR T1w T2w: give a"):
        predict_cohort(segmenter(), three, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_case_is_read_ahead_and_no_more():
    started = {case: threading.Event() for case in "abcd"}

    def read(case):
        started[case].set()
        return case.upper()

    for case, reading in read_ahead(read, "abcd"):
        assert reading.result() == case.upper()
        following = "abcd".partition(case)[2]
        if following:
            assert started[following[0]].wait(10)  # while this one is in work
        assert not any(started[later].is_set() for later in following[1:])
    assert [case for case, _ in read_ahead(read, "")] == []


def torchrun(*args):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rsanet.cli"]
        + [str(arg) for arg in args],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )


def test_processes_share_a_cohort_and_fail_together(trained, tmp_path, phantoms):
    root, out = phantoms.write_cohort(tmp_path / "data", 4), tmp_path / "out"
    phantoms.image_path(root, "sub-002").write_text("no image")
    out.mkdir()
    (out / cohorts.PART.format(rank=7)).write_text("case\n")  # of another version, and of no use
    done = torchrun("predict", trained, "--data", root, "-o", out, "--overwrite")
    assert done.returncode != 0
    # One line on the machine, and one a case: the other process may have begun before the first one speaks.
    cases = [line.split()[0] for line in done.stdout.splitlines() if "attention backend" not in line]
    assert sorted(cases) == ["1/4", "2/4", "3/4", "4/4"]
    assert done.stdout.count("attention backend") == 1
    assert done.stderr.count("rsanet: 1 of 4 cases has no mask: sub-002. The other masks are in") == 1
    assert [row["case"] for row in table(out)] == ["sub-001", "sub-003", "sub-004"]
    assert len(names(out)) == 4

    before = {case: mask_of(out, case).stat().st_mtime_ns for case in ("sub-001", "sub-003", "sub-004")}
    phantoms.write_subject(root, "sub-002", 2)
    (out / "predictions.csv").rename(out / cohorts.PART.format(rank=1))  # where a killed run leaves its rows
    done = torchrun("predict", trained, "--data", root, "-o", out, "--resume")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, f"The masks are in {out}, with predictions.csv.")
    assert {case: mask_of(out, case).stat().st_mtime_ns for case in before} == before
    assert [row["case"] for row in table(out)] == ["sub-001", "sub-002", "sub-003", "sub-004"]
    assert len(names(out)) == 5


def test_where_the_first_process_cannot_go_on_the_others_end_without_a_word(monkeypatch):
    sent = []
    monkeypatch.setattr(processes.distributed, "broadcast_object_list", lambda box, src: sent.append(list(box)))
    with pytest.raises(ValueError, match="no folder"):
        Processes(0, 2).decided_first(lambda: check("no folder"))
    with pytest.raises(SystemExit) as end:
        Processes(1, 2).decided_first(refuse)
    assert end.value.code == 1
    assert sent == [[None], [None]]


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_device("auto") == "auto"  # not under torchrun
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    for local_rank, device in (("0", "cuda:0"), ("1", "cuda:1"), ("2", "cuda:0")):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert own_device("auto") == device
    assert own_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert own_device("auto") == "auto"


def forms_apart(path):
    """Gives an image a qform that contradicts its sform: it is read with a warning."""
    image = nib.load(path)
    image = nib.Nifti1Image(np.asarray(image.dataobj), image.affine)
    image.set_sform(image.affine, 1)
    image.set_qform(np.diag([1.0, 1, 1, 1]) + np.eye(4, k=3) * 9, 1)
    nib.save(image, path)


def test_warnings_of_a_case_stand_in_its_row_and_its_json_and_in_no_other(tmp_path, three, phantoms):
    out = tmp_path / "out"
    for case in ("sub-001", "sub-002"):
        forms_apart(phantoms.image_path(three, case, "T1w"))
    with pytest.warns(DataWarning) as shown:
        rows, failures = predict_cohort(segmenter(), three, out)
    assert failures == {}
    for row, written in zip(rows, table(out), strict=True):
        told = json.loads(mask_of(out, row.case).with_name(f"{row.case}_label-lesion_mask.json").read_text())[
            "Warnings"
        ]
        assert written["warnings"] == row.warnings == "; ".join(told)
        if row.case == "sub-003":
            assert told == []
        else:
            assert len(told) == 1
            assert f"{row.case}_T1w.nii.gz: sform and qform put its voxels up to 9 mm apart" in told[0]
    assert sum("sform and qform" in str(warning.message) for warning in shown) == 2


def test_a_warning_is_recorded_again_where_it_is_not_shown_again(tmp_path, three, phantoms):
    forms_apart(phantoms.image_path(three, "sub-001", "T1w"))
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        first, _ = predict_cohort(segmenter(), three, tmp_path / "a")
        second, _ = predict_cohort(segmenter(), three, tmp_path / "b")
    assert len(shown) == 1
    assert first[0].warnings == second[0].warnings != ""


def test_the_table_of_an_earlier_version_is_read_and_gets_the_column(tmp_path, three, phantoms):
    forms_apart(phantoms.image_path(three, "sub-002", "T1w"))
    out = tmp_path / "out"
    with pytest.warns(DataWarning, match="sform"):
        predict_cohort(segmenter(), three, out)
    mask_of(out, "sub-002").unlink()
    before = table(out)
    with (out / "predictions.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [name for name in before[0] if name != "warnings"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(before)
    with pytest.warns(DataWarning, match="sform"):
        predict_cohort(segmenter(), three, out, resume=True)
    after = table(out)
    assert [row["case"] for row in after] == ["sub-001", "sub-002", "sub-003"]
    assert [bool(row["warnings"]) for row in after] == [False, True, False]


def test_registered_masks_are_not_mixed_with_others_and_their_transforms_are_outputs(tmp_path, three):
    pytest.importorskip("SimpleITK", reason="registration needs SimpleITK, of the extra formats")
    out = tmp_path / "out"
    model = segmenter(("FLAIR", "T1w"))
    rows, failures = predict_cohort(model, three, out, register=True)
    assert failures == {}
    assert all("registered" in row.made_by for row in rows)
    transforms = sorted(out.rglob("*.tfm"))
    assert [path.name for path in transforms] == [
        f"sub-00{number}_label-lesion_from-T1w_to-FLAIR_xfm.tfm" for number in (1, 2, 3)
    ]
    with pytest.raises(ValueError, match="--resume would add some of"):
        predict_cohort(model, three, out, resume=True)
    transforms[1].unlink()
    done = []
    predict_cohort(model, three, out, register=True, resume=True, progress=lambda *args: done.append(args[2].case))
    assert done == ["sub-002"]
    assert transforms[1].exists()


def test_the_package_has_the_functions_behind_the_command():
    import rsanet.segment
    from rsanet.segment.prediction import predict

    assert rsanet.segment.predict is predict
    assert rsanet.segment.predict_cohort is predict_cohort
