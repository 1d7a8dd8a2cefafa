"""Which files of folders are compared: none is left out by its name without a word."""

import csv
import os

import numpy as np
import pytest

AFFINE = np.eye(4)


def cubes(*starts):
    mask = np.zeros((12, 12, 12), np.uint8)
    for start in starts or (3,):
        mask[start : start + 2, 2:4, 2:4] = 1
    return mask


def image(seed=0):
    return np.random.default_rng(seed).normal(100, 10, (12, 12, 12)).astype(np.float32)


@pytest.fixture
def put(tmp_path, phantoms):
    """Writes masks, or other voxels, at paths below a folder."""

    def write(*names, voxels=None):
        for name in names:
            voxels = cubes() if voxels is None else voxels
            phantoms.save(tmp_path / name, voxels, dtype=voxels.dtype)
        return tmp_path

    return write


@pytest.fixture
def compared(tmp_path, rsanet):
    """The cases that `rsanet evaluate` compares, the exit status, and what it says on stderr."""

    def run(pred="p", ref="r", *options):
        table = tmp_path / "scores.csv"
        table.unlink(missing_ok=True)
        code, _, err = rsanet("evaluate", tmp_path / pred, tmp_path / ref, "--csv", table, *options)
        with table.open() if table.is_file() else open(os.devnull) as file:
            return code, [row["subject"] for row in csv.DictReader(file)], err

    return run


@pytest.mark.parametrize(
    "names",
    [
        ("P1_T1", "P1_T2", "P1_T3", "P1_T4"),
        ("P1_T1", "P1_T2"),
        ("a_T1w", "b_T2w", "c_PDw", "d_FLAIR", "e_flair", "f_T1seg", "g_T1ce"),
        ("P1T1", "P1T2"),
        ("a_prob", "b_FLAIRseg", "c_prob"),  # masks all the same, by their voxels
        ("patient.T1", "patient.T2"),
        ("T1", "T2"),
    ],
)
def test_masks_whose_names_end_as_those_of_images_are_all_compared(put, compared, names):
    put(*(f"{side}/{name}.nii.gz" for side in "pr" for name in names))
    assert compared() == (0, sorted(names), "")


@pytest.mark.parametrize("names", [("mask", "mask"), ("lesions", "consensus"), ("mask", "FLAIR")])
def test_masks_that_only_their_folders_tell_apart_are_compared(put, compared, names):
    put(*(f"{side}/{subject}/{name}.nii.gz" for side, name in zip("pr", names, strict=True) for subject in "AB"))
    assert compared() == (0, ["A", "B"], "")
    put("q/A/mask.nii.gz")
    code, cases, err = compared("q")
    assert (code, cases) == (1, ["A"])
    assert "B" in err


def test_subjects_that_are_called_as_contrasts_are_compared(put, compared):
    names = ["FLAIR", "PD", "T1", "mask"]
    put(*(f"{side}/{name}.nii.gz" for side in "pr" for name in names))
    assert compared() == (0, names, "")


@pytest.mark.parametrize("name", ["B.mgz", "sub/B.mnc"])
def test_a_mask_in_a_format_that_is_not_read_is_named(put, compared, tmp_path, name):
    put("p/A.nii.gz", "r/A.nii.gz", "p/sub/C.nii.gz", "r/C.nii.gz")
    (tmp_path / "p" / name).write_text("")
    code, cases, err = compared()
    assert (code, cases) == (0, ["A", "C"])
    assert f"1 file is left out, being in a format that is not read: convert it to .nii.gz: {name}." in err


def test_masks_are_paired_with_the_labels_of_nnunet(put, compared, tmp_path):
    put("p/P1_T1.nii.gz", "p/P1_T2.nii.gz", "D/labelsTr/P1_T1.nii.gz", "D/labelsTr/P1_T2.nii.gz")
    put("D/imagesTr/P1_T1_0000.nii.gz", "D/imagesTr/P1_T2_0000.nii.gz", voxels=image())
    (tmp_path / "D/dataset.json").write_text('{"channel_names": {"0": "FLAIR"}}')
    for ref in ("D", "D/labelsTr"):
        assert compared("p", ref) == (0, ["P1_T1", "P1_T2"], "")


def test_a_mask_may_be_named_as_its_image_is(put, compared, phantoms, tmp_path):
    put("p/sub-1_FLAIR.nii.gz", "p/sub-2_T1w.nii.gz", "r/sub-1.nii.gz", "r/sub-2_label-lesion_mask.nii.gz")
    assert compared() == (0, ["sub-1", "sub-2"], "")
    put("q/P1_FLAIR.nii.gz", "q/P2_T2_FLAIR_seg.nii.gz", "s/P1_mask.nii.gz", "s/P2_T2_MASK.nii.gz")
    assert compared("q", "s")[:2] == (0, ["P1", "P2_T2_MASK"])
    put("t/P1/FLAIR.nii.gz", "t/P2_T2/FLAIR.nii.gz", voxels=image())
    put("t/P1/mask.nii.gz", "t/P2_T2/mask.nii.gz")
    assert compared("q", "t") == (0, ["P1", "P2_T2"], "")


def test_a_time_point_is_not_taken_for_another(put, compared):
    put("p/P1_T2.nii.gz", "p/P2.nii.gz", "r/P1.nii.gz", "r/P2.nii.gz", "s/P1_T1_mask.nii.gz", "s/P2.nii.gz")
    for ref, missing in (("r", "P1"), ("s", "P1_T1")):
        code, cases, err = compared("p", ref)
        assert (code, cases) == (1, ["P2"])
        assert f"compared: {missing}, P1_T2;" in err


def test_names_that_two_masks_share_are_not_guessed(put, compared):
    put("p/P1_FLAIR.nii.gz", "p/P2.nii.gz", "r/P1_mask.nii.gz", "r/P1_lesions.nii.gz", "r/P2.nii.gz")
    code, cases, err = compared()
    assert (code, cases) == (1, ["P2"])
    assert "P1" in err


def test_folders_of_images_and_masks_compare_the_masks_and_say_so(put, compared):
    for side in "pr":
        put(f"{side}/P1_FLAIR.nii.gz", f"{side}/P1_T1.nii.gz", f"{side}/P1_prob.nii.gz", voxels=image())
        put(f"{side}/P1_brain_mask.nii.gz", voxels=np.ones((12, 12, 12), np.uint8))
        put(f"{side}/P1_mask.nii.gz", f"{side}/P2_mask.nii.gz")
    code, cases, err = compared()
    assert (code, cases) == (0, ["P1", "P2"])
    assert err.count("\n") == 2  # of the predictions; the references are a data set, whose images are no candidates
    assert "3 files are left out, being named as images or probabilities and having more values than a mask has" in err
    assert "P1_FLAIR.nii.gz" in err
    assert "P1_brain_mask.nii.gz" in err


def test_what_predict_writes_beside_its_masks_needs_no_word(put, compared):
    put("p/P1_label-lesion_mask.nii.gz", "p/P2_label-lesion_mask.nii.gz", "r/P1.nii.gz", "r/P2.nii.gz")
    put("p/P1_label-lesion_probseg.nii.gz", "p/P2_label-lesion_probseg.nii.gz", voxels=image())
    assert compared() == (0, ["P1", "P2"], "")


def test_of_a_subject_of_bids_the_lesion_mask_is_meant_and_other_masks_are_named(put, compared):
    put("p/sub-1_label-lesion_mask.nii.gz", "p/sub-1_label-newlesion_mask.nii.gz", "r/sub-1.nii.gz")
    put("p/sub-1_FLAIR.nii.gz", voxels=image())
    assert compared() == (0, ["sub-1"], "")
    put("p/sub-1_seg.nii.gz")
    code, cases, err = compared()
    assert (code, cases) == (0, ["sub-1"])
    assert "1 file is left out, lying beside masks that are named label-lesion: sub-1_seg.nii.gz." in err


@pytest.mark.parametrize("end", [".NII.GZ", ".Nii.gz", ".NII", ".nii"])
def test_names_in_other_letters_and_ends_are_masks(put, compared, tmp_path, end):
    put("p/P1.nii.gz", "p/P2.nii.gz", f"r/P1_T1{'.nii' if end.lower() == '.nii' else '.nii.gz'}", "r/P2.nii.gz")
    path = next((tmp_path / "r").glob("P1_T1.*"))
    path.rename(path.with_name(f"P1{end}"))
    assert compared() == (0, ["P1", "P2"], "")
    assert compared(f"r/P1{end}", f"r/P1{end}") == (0, ["P1"], "")


def test_links_to_folders_are_followed_and_circles_end(put, compared, tmp_path):
    put("far/P1_mask.nii.gz", "p/P2_mask.nii.gz", "r/P1.nii.gz", "r/P2.nii.gz")
    (tmp_path / "p/linked").symlink_to(tmp_path / "far")
    (tmp_path / "far/back").symlink_to(tmp_path / "p")
    (tmp_path / "p/._P1_mask.nii.gz").write_text("of a Mac")
    assert compared() == (0, ["P1", "P2"], "")
    (tmp_path / "p/P3.nii.gz").symlink_to(tmp_path / "nowhere.nii.gz")
    (tmp_path / "r/P3.nii.gz").symlink_to(tmp_path / "nowhere.nii.gz")
    code, cases, err = compared()
    assert (code, cases) == (1, ["P1", "P2"])
    assert "P3.nii.gz does not exist" in err


def test_one_mask_in_two_files_is_named(put, compared):
    put("p/P1.nii.gz", "p/P1.nii", "p/P2.nii.gz", "r/P1.nii.gz", "r/P2.nii.gz")
    code, cases, err = compared()
    assert (code, cases) == (1, ["P2"])
    assert "P1 has several masks" in err


def test_masks_in_another_format_are_compared_too(put, compared, tmp_path):
    itk = pytest.importorskip("SimpleITK")
    put("p/P1.nii.gz", "r/P1.nii.gz")
    for side in "pr":
        itk.WriteImage(itk.GetImageFromArray(cubes()), tmp_path / side / "P2.nrrd")
    assert compared() == (0, ["P1", "P2"], "")


def test_both_sides_say_what_has_no_partner(put, compared):
    put("p/P1_T1.nii.gz", "p/P1_T2.nii.gz", "r/P1_T2.nii.gz", "r/P1_T3.nii.gz")
    code, cases, err = compared()
    assert (code, cases) == (1, ["P1_T2"])
    assert "2 cases could not be compared: P1_T1, P1_T3" in err


def test_masks_of_a_folder_are_not_read_as_images_of_a_data_set(put, compared):
    # By its names the first is an image of P1 and the second the mask of P2: both are masks.
    put("p/P1_T1.nii.gz", "p/P2.nii.gz", "r/P1_T1.nii.gz", "r/P2_mask.nii.gz")
    assert compared() == (0, ["P1_T1", "P2"], "")


def test_of_a_split_every_test_case_and_every_strange_mask_is_told(tmp_path, phantoms, compared, put):
    root = phantoms.write_cohort(tmp_path / "cohort", 3)
    (tmp_path / "split.json").write_text('{"train": ["sub-001"], "test": ["sub-002", "sub-003"]}')
    for name in ("sub-001", "sub-002"):
        phantoms.save(tmp_path / "p" / f"{name}.nii.gz", phantoms.make_subject(int(name[-1]))[1], dtype=np.uint8)
    put("p/sub-009.nii.gz")
    phantoms.mask_path(root, "sub-003").unlink()
    code, cases, err = compared("p", "cohort", "--split", tmp_path / "split.json")
    assert (code, cases) == (1, ["sub-002"])
    assert "2 cases could not be compared: sub-003, sub-009" in err


def test_a_report_finds_masks_named_as_images_and_tells_of_strange_ones(cohort, phantoms, tmp_path, rsanet):
    for number in (1, 2):
        mask = phantoms.make_subject(number)[1]
        phantoms.save(tmp_path / "p" / f"sub-00{number}_FLAIR.nii.gz", mask, dtype=np.uint8)
    phantoms.save(tmp_path / "p" / "sub-099.nii.gz", mask, dtype=np.uint8)
    code, _, err = rsanet("report", tmp_path / "r.png", "--data", cohort, "--pred", tmp_path / "p")
    assert code == 0
    assert err.startswith(f"rsanet: warning: {tmp_path / 'p'} has a mask of sub-099, which the data set has not")
    assert err.count("\n") == 1
    phantoms.save(tmp_path / "p" / "sub-001_T1w.nii.gz", mask, dtype=np.uint8)
    code, _, err = rsanet("report", tmp_path / "s.png", "--data", cohort, "--pred", tmp_path / "p")
    assert code == 1
    assert "sub-001 has several predicted masks (sub-001_FLAIR.nii.gz, sub-001_T1w.nii.gz): leave one." in err
