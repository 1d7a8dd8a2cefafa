"""What `rsanet evaluate` keeps of its user's files, prints, and returns."""

import json
import os

import nibabel
import numpy as np
import pytest


def save(path, *starts):
    """A mask of cubes of 8 mm³."""
    mask = np.zeros((12, 12, 12), np.uint8)
    for start in starts:
        mask[start : start + 2, 2:4, 2:4] = 1
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), path)
    return path


@pytest.fixture
def folders(tmp_path):
    """Two subjects: references, a good and a worse prediction."""
    for number in (1, 2):
        save(tmp_path / "ref" / f"sub-{number}.nii.gz", 1, 6)
        save(tmp_path / "good" / f"sub-{number}.nii.gz", 1, 6)
        save(tmp_path / "worse" / f"sub-{number}.nii.gz", 2)
    return tmp_path / "ref", tmp_path / "good", tmp_path / "worse"


@pytest.mark.parametrize("option", ["--csv", "--json"])
def test_a_file_that_exists_is_kept_unless_overwrite_is_given(folders, tmp_path, rsanet, option):
    ref, good, _ = folders
    kept = tmp_path / "scores"
    kept.write_text("precious")
    code, out, err = rsanet("evaluate", good, ref, option, kept)
    assert (code, out) == (1, "")
    assert err == f"rsanet: {kept} exists: give another name, or --overwrite to replace it.\n"
    assert kept.read_text() == "precious"
    code, out, err = rsanet("evaluate", good, ref, option, kept, "--overwrite")
    assert (code, err) == (0, "")
    assert "sub-2" in kept.read_text()


@pytest.mark.parametrize("option", ["--csv", "--json"])
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_compared_is_never_overwritten(folders, rsanet, option, which):
    masks = [folder / "sub-1.nii.gz" for folder in folders[:2]]
    before = masks[which].read_bytes()
    code, out, err = rsanet("evaluate", *masks, option, masks[which], "--overwrite")
    assert (code, out) == (1, "")
    assert err == f"rsanet: {masks[which]} is compared here, and would be lost: give another name to the table.\n"
    assert masks[which].read_bytes() == before


def test_a_pipe_is_not_replaced_by_a_table(folders, tmp_path, rsanet):
    ref, good, _ = folders
    os.mkfifo(tmp_path / "pipe")
    code, _, err = rsanet("evaluate", good, ref, "--csv", tmp_path / "pipe", "--overwrite")
    assert code == 1
    assert err == f"rsanet: {tmp_path / 'pipe'} is a device or a pipe: give the name of a file.\n"
    assert (tmp_path / "pipe").is_fifo()


def test_another_prediction_is_compared_and_written(folders, tmp_path, rsanet):
    ref, good, worse = folders
    code, out, err = rsanet("evaluate", good, ref, "--compare", worse, "--json", tmp_path / "scores.json")
    assert (code, err) == (0, "")
    assert f"Compared with {worse}" in out
    comparison = json.loads((tmp_path / "scores.json").read_text())["comparison"]
    assert comparison["tests"]["ltpr"]["mean_difference"] == 0.5
    assert comparison["other"] == str(worse)


def test_a_bad_case_of_the_other_prediction_is_named_and_fails(folders, rsanet):
    ref, good, worse = folders
    (worse / "sub-2.nii.gz").write_bytes(b"not an image")
    code, out, err = rsanet("evaluate", good, ref, "--compare", worse)
    assert code == 1
    assert err.startswith(f"rsanet: 1 case could not be compared: {worse / 'sub-2.nii.gz'} cannot be read")
    assert err.count("\n") == 1
    assert "1.000" in out


def test_no_table_is_written_where_no_case_could_be_compared(folders, tmp_path, rsanet):
    ref, good, _ = folders
    for file in good.iterdir():
        file.write_bytes(b"not an image")
    code, out, err = rsanet("evaluate", good, ref, "--csv", tmp_path / "scores.csv")
    assert code == 1
    assert "2 cases could not be compared: sub-1, sub-2" in err
    assert out.count("cannot be read") == 2
    assert not (tmp_path / "scores.csv").exists()


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("custom", "26-connected lesions, detected by any overlap, no minimum size"),
        ("isbi2015", "18-connected lesions, detected by any overlap, no minimum size"),
        ("msseg2016", "6-connected lesions, detected if more than 10 % is covered"),
        ("wmh2017", "26-connected lesions, detected by any overlap, no minimum size"),
        ("shifts", "6-connected lesions, detected by IoU of at least 0.25, no minimum size"),
    ],
)
def test_every_preset_prints_its_rules(folders, rsanet, name, rules):
    ref, good, _ = folders
    code, out, _ = rsanet("evaluate", good, ref, "--protocol", name)
    assert code == 0
    assert out.startswith(f"Protocol {name}: {rules}")
    assert name in rsanet("evaluate", "--help")[1]


def test_a_changed_rule_is_printed_as_custom(folders, rsanet):
    ref, good, _ = folders
    code, out, _ = rsanet("evaluate", good, ref, "--protocol", "msseg2016", "--minimum-mm3", "9")
    assert code == 0
    assert out.startswith("Protocol custom: 6-connected")
    assert "lesions up to 9 mm³ left out" in out


def test_a_split_leaves_the_cases_it_does_not_keep_for_the_end(tmp_path, rsanet, phantoms):
    cohort = phantoms.write_cohort(tmp_path / "cohort", 4)
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": ["sub-001"], "validation": ["sub-002"], "test": ["sub-003", "sub-004"]}))
    for number in (1, 3, 4):  # of the first nobody asks, although it has a mask
        mask = phantoms.mask_path(cohort, f"sub-00{number}")
        (tmp_path / "masks").mkdir(exist_ok=True)
        (tmp_path / "masks" / mask.name).write_bytes(mask.read_bytes())
    table = tmp_path / "scores.json"
    code, _, err = rsanet("evaluate", tmp_path / "masks", cohort, "--split", split, "--json", table)
    assert (code, err) == (0, "")
    assert [case["subject"] for case in json.loads(table.read_text())["cases"]] == ["sub-003", "sub-004"]
    (tmp_path / "masks" / phantoms.mask_path(cohort, "sub-004").name).unlink()
    code, _, err = rsanet("evaluate", tmp_path / "masks", cohort, "--split", split)
    assert code == 1
    assert "sub-004 has a reference but no prediction" in err


def test_a_split_is_of_a_data_set(folders, tmp_path, rsanet):
    ref, good, _ = folders
    code, out, err = rsanet("evaluate", good / "sub-1.nii.gz", ref / "sub-1.nii.gz", "--split", tmp_path / "split.json")
    assert (code, out) == (1, "")
    assert "--split is for a data set" in err
