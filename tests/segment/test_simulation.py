"""Simulated cohorts on disk: reproducible, never half-written, and as the reader of data sets wants them."""

import csv
import gzip
import hashlib
import json
import os
import signal
import sys

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from rsanet.segment.datasets import list_cases, read_split
from rsanet.segment.scenario import KINDS, Scenario
from rsanet.segment.simulation import anatomy, cohort, simulate, subject_seed
from rsanet.segment.simulation.painting import SMALLEST_LESION

SPACING = 3.0
SEED = 11
AT_3_MM = Scenario(spacing=(SPACING, SPACING, SPACING))
SMALL = Scenario(spacing=(4.0, 4.0, 4.0), contrasts=("FLAIR",))
PAIRS = Scenario(spacing=(4.0, 4.0, 4.0), contrasts=("FLAIR",), sessions=2)
CONTRASTS = ("FLAIR", "T1w", "T2w")


def digests(root):
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def mask_path(root, name):
    return root / "derivatives" / "lesions" / name / "anat" / f"{name}_label-lesion_mask.nii.gz"


def sidecar(root, name):
    return json.loads(mask_path(root, name).with_name(f"{name}_label-lesion_mask.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("simulated") / "cohort"
    simulate(out, 3, AT_3_MM, seed=SEED)
    return out


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    out = tmp_path_factory.mktemp("simulated") / "pairs"
    simulate(out, 2, PAIRS, seed=SEED, split=(0.5, 0, 0.5))
    return out


def test_the_layout_is_bids_with_masks_in_derivatives(folder):
    expected = {"README", "dataset_description.json", "participants.tsv"}
    expected.add("derivatives/lesions/dataset_description.json")
    for name in ("sub-001", "sub-002", "sub-003"):
        expected |= {f"{name}/anat/{name}_{contrast}.nii.gz" for contrast in CONTRASTS}
        expected |= {f"derivatives/lesions/{name}/anat/{name}_label-lesion_mask{end}" for end in (".nii.gz", ".json")}
    assert set(digests(folder)) == expected
    readme = (folder / "README").read_text()
    assert "no clinical meaning" in readme
    assert "Fonov" in readme
    assert json.loads((folder / "dataset_description.json").read_text())["BIDSVersion"]


def test_headers_say_where_and_how_large_voxels_are(folder):
    mask = nibabel.load(mask_path(folder, "sub-001"))
    assert mask.get_data_dtype() == np.uint8
    for contrast in CONTRASTS:
        image = nibabel.load(folder / "sub-001" / "anat" / f"sub-001_{contrast}.nii.gz")
        assert image.get_data_dtype() == np.int16
        assert image.shape == mask.shape
        assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
        for form, code in (image.get_sform(coded=True), image.get_qform(coded=True)):
            assert code == 1
            np.testing.assert_allclose(form, mask.affine, atol=1e-5)
        np.testing.assert_allclose(image.header.get_zooms(), SPACING)
        assert image.header.get_xyzt_units()[0] == "mm"


def test_the_same_seed_gives_the_same_bytes_whatever_the_number_of_subjects(folder, tmp_path):
    simulate(tmp_path / "two", 2, AT_3_MM, seed=SEED)
    small, large = digests(tmp_path / "two"), digests(folder)
    images = {name for name in small if "sub-" in name}
    assert len(images) == 2 * 5
    assert all(small[name] == large[name] for name in images)


def test_images_carry_no_time_of_writing(folder):
    with gzip.open(mask_path(folder, "sub-001")) as file:
        file.read(1)
        assert file.mtime == 0


def test_subjects_and_seeds_differ(folder):
    flair = [
        nibabel.load(folder / name / "anat" / f"{name}_FLAIR.nii.gz").get_fdata() for name in ("sub-001", "sub-002")
    ]
    assert not np.array_equal(*flair)
    assert subject_seed(SEED, 1) != subject_seed(SEED + 1, 1)
    assert len({subject_seed(seed, number) for seed in range(20) for number in range(1, 50)}) == 20 * 49


@pytest.mark.parametrize("name", ["sub-001", "sub-002", "sub-003"])
def test_the_sidecar_agrees_with_the_mask(folder, name):
    image = nibabel.load(mask_path(folder, name))
    mask = np.asarray(image.dataobj)
    assert set(np.unique(mask)) == {0, 1}
    labels, count = ndimage.label(mask, np.ones((3, 3, 3)))
    content = sidecar(folder, name)
    assert content["Simulated"] is True
    assert content["LesionCount"] == len(content["Lesions"]) == count > 0
    assert content["LesionLoad_mm3"] == pytest.approx(mask.sum() * SPACING**3)
    for lesion in content["Lesions"]:
        voxels = np.argwhere(labels == lesion["id"])
        assert lesion["voxels"] == len(voxels) >= SMALLEST_LESION
        assert lesion["volume_mm3"] == pytest.approx(len(voxels) * SPACING**3)
        centre = nibabel.affines.apply_affine(image.affine, voxels.mean(0))
        np.testing.assert_allclose(lesion["centre_mm"], centre, atol=0.01)
        assert lesion["kind"] in KINDS


def test_participants_lists_what_the_sidecars_say(folder):
    with (folder / "participants.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [row["participant_id"] for row in rows] == ["sub-001", "sub-002", "sub-003"]
    for number, row in enumerate(rows, start=1):
        content = sidecar(folder, row["participant_id"])
        assert int(row["seed"]) == content["Seed"] == subject_seed(SEED, number)
        assert int(row["lesion_count"]) == content["LesionCount"]
        assert float(row["lesion_load_mm3"]) == content["LesionLoad_mm3"]


# --- sessions -----------------------------------------------------------------------------------------------


def test_every_session_is_a_case_with_its_own_lesion_mask_and_not_that_of_the_new_lesions(pairs):
    cases, contrasts = list_cases(pairs)
    assert contrasts == ["FLAIR"]
    assert [case.id for case in cases] == ["sub-001_ses-01", "sub-001_ses-02", "sub-002_ses-01", "sub-002_ses-02"]
    for case in cases:
        assert case.mask.name == f"{case.id}_label-lesion_mask.nii.gz"
        assert case.images["FLAIR"].name == f"{case.id}_FLAIR.nii.gz"
        assert not case.several


def test_new_lesions_have_a_mask_that_agrees_with_the_sidecar(pairs):
    found = 0
    for case in list_cases(pairs)[0]:
        content = json.loads(case.mask.with_name(f"{case.id}_label-lesion_mask.json").read_text())
        file = case.mask.with_name(f"{case.id}_label-newlesion_mask.nii.gz")
        assert file.exists() == case.id.endswith("ses-02") == ("NewLesionCount" in content)
        if file.exists():
            new = np.asarray(nibabel.load(file).dataobj)
            assert new.sum() * 64 == content["NewLesionLoad_mm3"]
            assert ndimage.label(new, np.ones((3, 3, 3)))[1] == content["NewLesionCount"]
            found += content["NewLesionCount"]
    assert found > 0
    with (pairs / "participants.tsv").open() as table:
        assert sum(int(row["new_lesion_count"]) for row in csv.DictReader(table, delimiter="\t")) == found


# --- stopped runs and other folders ----------------------------------------------------------------------------


def test_a_stopped_cohort_is_completed_and_subjects_on_disk_stay(pairs, tmp_path, monkeypatch):
    out = tmp_path / "cohort"
    write, calls = cohort._write_image, []

    def stop(file, volume, affine):
        calls.append(file)
        if len(calls) == 9:  # in the second session of the second subject
            raise KeyboardInterrupt
        write(file, volume, affine)

    monkeypatch.setattr(cohort, "_write_image", stop)
    with pytest.raises(KeyboardInterrupt):
        simulate(out, 2, PAIRS, seed=SEED, split=(0.5, 0, 0.5))
    assert [p.name for p in sorted(out.glob("sub-*"))] == ["sub-001"], "no half of the second subject"
    assert not list(out.glob(".sub-*"))
    assert not (out / "split.json").exists(), "no split of a cohort that is not there"
    first = (out / "sub-001" / "ses-01" / "anat" / "sub-001_ses-01_FLAIR.nii.gz").stat().st_mtime_ns
    monkeypatch.setattr(cohort, "_write_image", write)
    seen = []
    subjects = simulate(
        out, 2, PAIRS, seed=SEED, split=(0.5, 0, 0.5), progress=lambda number, total, one: seen.append((number, one))
    )
    assert seen == list(enumerate(subjects, start=1))
    assert [subject.participant_id for subject in subjects] == ["sub-001", "sub-002"]
    assert (out / "sub-001" / "ses-01" / "anat" / "sub-001_ses-01_FLAIR.nii.gz").stat().st_mtime_ns == first
    assert digests(out) == digests(pairs)


def test_a_kill_between_the_two_renames_leaves_a_subject_to_be_made_again(pairs, tmp_path):
    out = tmp_path / "cohort"
    simulate(out, 1, PAIRS, seed=1)
    before = digests(out)
    (out / "sub-001").rename(tmp_path / "gone")  # as if only the masks had been put in place
    (out / ".sub-001.half").mkdir()
    simulate(out, 1, PAIRS, seed=1)
    assert digests(out) == before


def test_another_cohort_and_foreign_folders_are_refused(folder, tmp_path):
    before = digests(folder)
    with pytest.raises(ValueError, match="holds a cohort made with seed 11: give a new folder"):
        simulate(folder, 3, AT_3_MM, seed=SEED + 1)
    with pytest.raises(ValueError, match=r"made with spacing \[3\.0, 3\.0, 3\.0\], contrasts"):
        simulate(folder, 3, SMALL, seed=SEED)
    assert digests(folder) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        simulate(tmp_path, 1, SMALL)
    with pytest.raises(ValueError, match="is a file"):
        simulate(tmp_path / "notes.txt", 1, SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "dataset_description.json").write_text('{"Name": "Real patients"}')
    with pytest.raises(ValueError, match="another data set"):
        simulate(tmp_path, 1, SMALL)


def test_without_nilearn_one_sentence_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "nilearn", None)
    monkeypatch.setattr(cohort, "load_anatomy", anatomy.load_anatomy.__wrapped__)  # past its cache
    with pytest.raises(RuntimeError, match=r'pip install "\.\[demo\]"'):
        simulate(tmp_path / "cohort", 1)
    assert not (tmp_path / "cohort").exists()


# --- the split ------------------------------------------------------------------------------------------------


def test_the_split_names_every_case_once_and_keeps_the_sessions_of_a_subject_together(pairs):
    split = json.loads((pairs / "split.json").read_text())
    assert split == {
        "train": ["sub-001_ses-01", "sub-001_ses-02"],
        "validation": [],
        "test": ["sub-002_ses-01", "sub-002_ses-02"],
    }
    cases = list_cases(pairs)[0]
    assert sorted(case for part in split.values() for case in part) == [case.id for case in cases]
    read = read_split(pairs / "split.json", cases)
    assert {part: [case.id for case in read[part]] for part in read} == split, "as `rsanet train --split` reads it"


def test_a_growing_cohort_leaves_its_subjects_in_their_parts(tmp_path):
    out = tmp_path / "cohort"
    simulate(out, 2, SMALL, split=(0.5, 0, 0.5))
    small = json.loads((out / "split.json").read_text())
    simulate(out, 4, SMALL, split=(0.5, 0, 0.5))
    large = json.loads((out / "split.json").read_text())
    assert [len(part) for part in large.values()] == [2, 0, 2]
    assert all(set(small[part]) <= set(large[part]) for part in small)
    simulate(out, 2, SMALL, split=(0.5, 0, 0.5))
    assert json.loads((out / "split.json").read_text()) == large, "the subjects that are there stay in the split"


def test_a_split_that_moves_a_subject_is_refused(pairs):
    before = digests(pairs)
    with pytest.raises(ValueError, match="has sub-002_ses-01 in test, and --split would move it to validation"):
        simulate(pairs, 2, PAIRS, seed=SEED, split=(0.5, 0.5, 0))
    assert digests(pairs) == before


# --- the command ------------------------------------------------------------------------------------------------


def test_the_command_reports_each_subject_and_what_to_do_next(rsanet, tmp_path):
    out = tmp_path / "my cohort"
    options = ["--spacing", "4", "--contrasts", "FLAIR", "PDw", "--load", "light", "--kinds", "deep", "periventricular"]
    options += ["--sessions", "2", "--noise", "0.05", "--slice-thickness", "8", "--plane", "coronal"]
    status, printed, _ = rsanet("simulate", out, "--subjects", "2", *options, "--split", "0.5", "0", "0.5")
    lines = printed.splitlines()
    assert status == 0
    assert lines[0].startswith("1/2  sub-001: ")
    assert "mm³; later " in lines[1]
    assert lines[-2] == f"{out} holds 2 simulated patients."
    assert lines[-1] == f"To train on them: rsanet train '{out}' --split '{out}/split.json' -o run"
    made = json.loads((out / "dataset_description.json").read_text())["GeneratedBy"][0]["Settings"]
    assert (made["contrasts"], made["load"], made["sessions"]) == (["FLAIR", "PDw"], "light", 2)
    assert (made["kinds"], made["noise"]) == (["periventricular", "deep"], 0.05)
    image = nibabel.load(out / "sub-001" / "ses-02" / "anat" / "sub-001_ses-02_PDw.nii.gz")
    assert image.header.get_zooms() == (4, 8, 4)
    status, printed, _ = rsanet("simulate", out, "--subjects", "1", *options)
    assert status == 0
    assert printed.splitlines()[-1] == f"To train on them: rsanet train '{out}' -o run"


def test_a_stopped_command_says_how_to_go_on(rsanet, tmp_path, monkeypatch):
    monkeypatch.setattr(cohort, "simulate_patient", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    status, _, error = rsanet("simulate", tmp_path / "cohort", "--subjects", "1")
    assert status == 130
    assert error == f"rsanet: interrupted. The same command completes {tmp_path / 'cohort'}.\n"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--subjects", "0"], "--subjects is 0: ask for 1 to 999"),
        (["--subjects", "1000"], "--subjects is 1000: ask for 1 to 999"),
        (["--subjects", "1", "--seed", "-1"], "--seed is -1: give a whole number of 0 or more"),
        (["--subjects", "1", "--spacing", "0.1"], "--spacing is 0.1 0.1 0.1: give voxel sizes in mm, each from 0.5"),
        (["--subjects", "1", "--spacing", "1", "1"], "--spacing has 2 values: give one for all the axes, or three"),
        (["--subjects", "1", "--slice-thickness", "nan"], "--slice-thickness is nan: give a thickness in mm"),
        (["--subjects", "1", "--slice-thickness", "5", "--plane", "oblique"], "--plane is 'oblique': give axial, cor"),
        (["--subjects", "1", "--plane", "coronal"], "--plane is coronal, but the slices have no thickness"),
        (["--subjects", "1", "--load", "huge"], "--load is 'huge': give one of none, light, typical, heavy"),
        (["--subjects", "1", "--kinds", "deep", "spinal"], "--kinds has 'spinal': give some of periventricular"),
        (["--subjects", "1", "--contrasts", "T1"], "--contrasts has 'T1': give some of FLAIR, T1w, T2w, PDw"),
        (["--subjects", "1", "--noise", "2"], "--noise is 2.0: give a fraction of the brightest tissue, from 0 to 0.5"),
        (["--subjects", "1", "--sessions", "0"], "--sessions is 0: ask for 1 to 9 scans of each patient"),
        (["--subjects", "9", "--split", "0.7", "0.3"], "--split is 0.7 0.3: give the shares of train, validation"),
        (["--subjects", "9", "--split", "0.7", "0.1", "0.3"], "--split is 0.7 0.1 0.3: give the shares of train"),
        (["--subjects", "9", "--split", "0", "0.5", "0.5"], "--split is 0 0.5 0.5: give the first part, train"),
        (
            ["--subjects", "2", "--split", "0.6", "0.2", "0.2"],
            "With 2 subjects the test part of the split would be empty: ask for more",
        ),
    ],
)
def test_what_cannot_be_simulated_is_refused_in_one_sentence_before_anything_is_written(
    rsanet, tmp_path, options, sentence
):
    status, printed, error = rsanet("simulate", tmp_path / "cohort", *options)
    assert (status, printed) == (1, "")
    assert error.startswith(f"rsanet: {sentence}")
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "cohort").exists()
