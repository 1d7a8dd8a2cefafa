import csv
import signal

import nibabel as nib
import numpy as np
import pytest

from rsanet.segment import cohort as cohorts
from rsanet.segment import segmenter as segmenters


@pytest.fixture
def images(cohort, phantoms):
    return [phantoms.image_path(cohort, "sub-001", contrast) for contrast in ("FLAIR", "T1w", "T2w")]


def test_the_first_line_says_how_and_the_last_one_where(trained, images, tmp_path, rsanet):
    out = tmp_path / "mask.nii.gz"
    code, said, err = rsanet("predict", trained, "-i", *images, "-o", out, "--flips", "--precision", "fp32")
    assert (code, err) == (0, "")
    first, numbers, last = said.splitlines()
    assert first.startswith("cpu (1 thread), attention backend ")
    assert first.endswith("fp32 (as asked), images 26×30×24, mean of 8 mirror images, window 16×16×16.")
    assert "lesion" in numbers
    assert "mm³" in numbers
    assert last == f"The mask is {out}."


def test_every_option_reaches_the_files(trained, images, tmp_path, rsanet):
    out = tmp_path / "mask.nii.gz"
    options = ["--threshold", "0.3", "--probability-map", "--preview", "--ensemble", trained, "--roi", "24"]
    code, said, _ = rsanet("predict", trained, "-i", *images, "-o", out, *options)
    assert code == 0
    assert "mean of 2 models, window 24×24×24" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "mask.json",
        "mask.nii.gz",
        "mask.png",
        "mask_probseg.nii.gz",
    ]
    probability = np.asarray(nib.load(tmp_path / "mask_probseg.nii.gz").dataobj)
    assert np.array_equal(np.asarray(nib.load(out).dataobj), probability > 0.3)
    code, _, err = rsanet("predict", trained, "-i", *images, "-o", out)
    assert (code, err) == (1, f"rsanet: {out} exists: give another name, or --overwrite to replace it.\n")
    code, said, _ = rsanet("predict", trained, "-i", *images, "-o", out, "--overwrite", "--min-lesion-mm3", "1e6")
    assert code == 0
    assert "0 lesions, 0.0 mm³" in said
    assert not np.asarray(nib.load(out).dataobj).any()


def test_a_whole_brain_that_does_not_fit_is_said_of_each_case(trained, cohort, tmp_path, rsanet, monkeypatch):
    monkeypatch.setattr(segmenters, "available_memory", lambda device: 2**20)
    code, said, _ = rsanet("predict", trained, "--data", cohort, "-o", tmp_path / "out", "--whole-brain")
    assert code == 0
    lines = said.splitlines()
    assert "window the whole brain where it fits, else 16×16×16." in lines[0]
    assert all("window 16×16×16, as the whole brain of 2" in line for line in lines[1:5])
    monkeypatch.setattr(segmenters, "available_memory", lambda device: 2**30)
    code, said, _ = rsanet("predict", trained, "--data", cohort, "-o", tmp_path / "out", "--whole-brain", "--overwrite")
    assert all(", the whole brain" in line for line in said.splitlines()[1:5])
    with (tmp_path / "out" / "predictions.csv").open() as file:
        assert {row["window"] for row in csv.DictReader(file)} == {"22×28×24"}


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["-i", "a.nii.gz", "-o", "m.nii.gz", "--resume"], "for a cohort"),
        (["-i", "a.nii.gz", "-o", "m.nii.gz", "--split", "s.json"], "for a cohort"),
        (["--data", "d", "-o", "out", "--resume", "--overwrite"], "the one keeps what the other replaces"),
        (["--data", "d", "-i", "a.nii.gz", "-o", "out"], "either"),
        (["--data", "d", "-o", "out", "--min-lesion-mm3", "-1"], "--min-lesion-mm3"),
    ],
)
def test_options_that_contradict_each_other_are_wrong_usage(rsanet, args, reason):
    code, _, err = rsanet("predict", "model", *args)
    assert code == 2
    assert reason in err


def test_a_checkpoint_of_the_published_code_is_told_what_to_become(images, tmp_path, rsanet):
    (tmp_path / "weights.pth").write_bytes(b"PK\x03\x04")
    code, _, err = rsanet("predict", tmp_path / "weights.pth", "-i", *images, "-o", tmp_path / "m.nii.gz")
    assert code == 1
    assert len(err.splitlines()) == 1
    assert "weights.pth is a PyTorch checkpoint" in err
    assert "rsanet.load_reference_checkpoint" in err


def test_a_stopped_cohort_says_what_it_leaves(trained, cohort, tmp_path, rsanet, monkeypatch):
    monkeypatch.setattr(cohorts, "predict_case", lambda *args, **options: signal.raise_signal(signal.SIGTERM))
    code, _, err = rsanet("predict", trained, "--data", cohort, "-o", tmp_path / "out")
    assert code == 143
    kept = f"{tmp_path / 'out'} keeps the masks that were done: give --resume to go on."
    assert err == f"rsanet: terminated. {kept}\n"


def test_a_cohort_ends_with_the_cases_that_came_with_warnings(trained, tmp_path, phantoms, rsanet):
    root, out = phantoms.write_cohort(tmp_path / "data", 2), tmp_path / "out"
    image = phantoms.image_path(root, "sub-002")
    voxels = nib.load(image).get_fdata(dtype=np.float32)
    voxels[0, 0, 0] = np.nan
    phantoms.save(image, voxels)
    code, said, err = rsanet("predict", trained, "--data", root, "-o", out)
    assert code == 0
    assert err.count("outside the head was NaN or infinite") == 1
    assert "1 of 2 masks came with warnings (sub-002): see predictions.csv." in said
    with (out / "predictions.csv").open() as file:
        assert [row["warnings"] != "" for row in csv.DictReader(file)] == [False, True]


def test_a_mask_that_could_not_be_replaced_is_said_to_be_of_before(trained, tmp_path, phantoms, rsanet):
    data = phantoms.write_cohort(tmp_path / "data", 2)
    masks = tmp_path / "masks"
    assert rsanet("predict", trained, "--data", data, "-o", masks)[0] == 0
    phantoms.image_path(data, "sub-002", "T1w").write_text("no image")
    code, out, err = rsanet("predict", trained, "--data", data, "-o", masks, "--overwrite")
    (old,) = masks.rglob("sub-002*_mask.nii.gz")
    assert f"{old} is still that of an earlier run." in out
    assert (code, err) == (
        1,
        f"rsanet: 1 of 2 cases has no new mask: sub-002. What {masks} has of sub-002 is of an earlier run. The other "
        f"masks are in {masks}.\n",
    )


def test_register_writes_the_transforms(trained, images, tmp_path, rsanet):
    pytest.importorskip("SimpleITK", reason="registration needs SimpleITK, of the extra formats")
    code, _, err = rsanet("predict", trained, "-i", *images, "-o", tmp_path / "mask.nii.gz", "--register")
    assert code == 0
    assert "Error" not in err  # of heads this small it may say that nothing fits better
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "mask.json",
        "mask.nii.gz",
        "mask_from-T1w_to-FLAIR_xfm.tfm",
        "mask_from-T2w_to-FLAIR_xfm.tfm",
    ]
