"""The trees of the public data sets, each built small as its makers publish it."""

import nibabel as nib
import numpy as np
import pytest

from rsanet.segment.datasets import find_cases, list_cases
from rsanet.segment.evaluation import evaluate
from rsanet.segment.raters import RatersMask
from rsanet.segment.splits import subject_of
from rsanet.segment.volumes import read_mask

TREES = {
    "isbi2015": [
        f"training/training0{subject}/{file}"
        for subject, times in ((1, (1, 2)), (2, (1,)))
        for time in times
        for name in [f"training0{subject}_0{time}"]
        for file in (
            f"orig/{name}_flair.nii.gz",
            *(f"preprocessed/{name}_{contrast}_pp.nii" for contrast in ("flair", "mprage", "pd", "t2")),
            f"masks/{name}_mask1.nii",
            f"masks/{name}_mask2.nii",
        )
    ]
    + ["testdata_website/test01/preprocessed/test01_01_flair_pp.nii"],
    "mslesseg": [
        *(f"train/P1/{t}/P1_{t}_{kind}.nii.gz" for t in ("T1", "T2") for kind in ("FLAIR", "T1", "T2", "MASK")),
        *(f"train/P10/T1/P10_T1_{kind}.nii.gz" for kind in ("FLAIR", "T1", "T2", "MASK")),
        *(f"test/P54/P54_{kind}.nii.gz" for kind in ("FLAIR", "T1", "T2", "MASK")),
    ],
    "msseg2016": [
        f"{part}/Center_01/Patient_01/{file}"
        for part in ("Training", "Testing")
        for file in (
            *(f"Preprocessed_Data/{name}_preprocessed.nii.gz" for name in ("FLAIR", "T1", "T2", "DP", "GADO")),
            *(f"Raw_Data/{name}.nii.gz" for name in ("FLAIR", "T1", "T2", "DP", "GADO")),
            *(f"Masks/ManualSegmentation_{number}.nii.gz" for number in range(1, 8)),
            "Masks/Consensus.nii.gz",
            "Masks/Brain_Mask.nii.gz",
        )
    ],
    "wmh2017": [
        f"{folder}/{file}"
        for folder in (
            "training/Utrecht/0",
            "training/Amsterdam/GE3T/100",
            "test/Amsterdam/Philips_VU .PETMR_01./161",
        )
        for file in (
            *(f"pre/{name}.nii.gz" for name in ("FLAIR", "T1", "3DT1", "3DT1_mask")),
            *(f"orig/{name}.nii.gz" for name in ("FLAIR", "T1", "3DT1")),
            "wmh.nii.gz",
        )
    ]
    + ["additional_annotations/observer_o3/training/Utrecht/0/result.nii.gz"],
    "shifts": [
        f"{centre}/{kind}"
        for centre in ("shifts_ms_pt1/msseg/train", "shifts_ms_pt2/best/train", "shifts_ms_pt2/ljubljana/dev_out")
        for kind in (
            *(f"{name.lower()}/1_{name}_isovox.nii.gz" for name in ("FLAIR", "T1", "T2", "PD")),
            "gt/1_gt_isovox.nii.gz",
            "fg_mask/1_isovox_fg_mask.nii.gz",
        )
    ],
}

# The cases of each, with the number of contrasts and of raters.
CASES = {
    "isbi2015": {"test01_01": (1, 0), "training01_01": (4, 2), "training01_02": (4, 2), "training02_01": (4, 2)},
    "mslesseg": {"P54": (3, 1), "P1_T1": (3, 1), "P1_T2": (3, 1), "P10_T1": (3, 1)},
    "msseg2016": {"Testing_Center_01_Patient_01": (5, 8), "Training_Center_01_Patient_01": (5, 8)},
    "wmh2017": {"Amsterdam_Philips_VUPETMR_01_161": (2, 1), "Amsterdam_GE3T_100": (2, 1), "Utrecht_0": (2, 2)},
    "shifts": {"msseg_train_1": (4, 1), "best_train_1": (4, 1), "ljubljana_dev_out_1": (4, 1)},
}


def save(path, voxels=None, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.ones((2, 2, 2), np.uint8) if voxels is None else np.asarray(voxels)
    nib.save(nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)
    return path


@pytest.fixture
def tree(tmp_path):
    """Writes the tree of a data set and returns its root."""

    def write(name):
        for file in TREES[name]:
            save(tmp_path / "unpacked" / file)
        return tmp_path / "unpacked"

    return write


@pytest.mark.parametrize("name", TREES)
def test_the_tree_of_a_public_data_set_gives_its_cases(tree, name):
    root = tree(name)
    cases, contrasts = list_cases(root, layout=name)
    assert {case.id: (len(case.images), len(case.raters)) for case in cases} == CASES[name]
    assert contrasts[0] == "FLAIR"
    for case in cases:
        assert not [path for path in case.images.values() if {"orig", "Raw_Data"} & set(path.parts)]
    assert list_cases(root.parent, layout=name)[0] == cases, "the folder above is as good"


@pytest.mark.parametrize("name", TREES)
def test_a_case_without_its_flair_is_not_left_out(tree, name):
    root = tree(name)
    flair = next(case.images["FLAIR"] for case in list_cases(root, layout=name)[0] if len(case.images) > 1)
    flair.rename(flair.with_name("renamed"))
    cases, _ = list_cases(root, layout=name)
    assert {case.id: len(case.raters) for case in cases} == {key: raters for key, (_, raters) in CASES[name].items()}
    assert len([case for case in cases if "FLAIR" not in case.images]) == 1


@pytest.mark.parametrize("name", TREES)
def test_a_folder_that_is_another_data_set_is_refused_with_what_was_wanted(tree, cohort, name):
    with pytest.raises(ValueError, match=rf"{cohort} does not look like {name}: wanted \S.*, found data") as error:
        list_cases(cohort, layout=name)
    assert "\n" not in str(error.value)
    root, other = tree(name), next(key for key in TREES if key != name)
    first = min(file.partition("/")[0] for file in TREES[name])
    with pytest.raises(ValueError, match=f"does not look like {other}: wanted .*, found {first}"):
        list_cases(root, layout=other)


@pytest.mark.parametrize("name", ["isbi2015", "msseg2016", "wmh2017"])
def test_a_public_data_set_that_no_layout_reads_is_recognized(tree, name):
    with pytest.raises(ValueError, match=f"it looks like the data set {name}, so give --layout {name}"):
        list_cases(tree(name) / TREES[name][0].split("/")[0])


def test_a_public_data_set_that_reads_as_nonsense_is_recognized(tree):
    part = tree("shifts") / "shifts_ms_pt2" / "best" / "train"
    with pytest.raises(
        ValueError, match=r"cannot be used \(it looks like the data set shifts: give --layout shifts\):\n"
    ):
        find_cases(part, require_mask=True)


def test_time_points_of_mslesseg_are_no_contrasts(tree):
    root = tree("mslesseg")
    cases = {case.id: case for case in list_cases(root, layout="mslesseg")[0]}
    images = {name: path.relative_to(root).as_posix() for name, path in cases["P1_T2"].images.items()}
    assert images == {
        "FLAIR": "train/P1/T2/P1_T2_FLAIR.nii.gz",
        "T1w": "train/P1/T2/P1_T2_T1.nii.gz",
        "T2w": "train/P1/T2/P1_T2_T2.nii.gz",
    }
    assert cases["P1_T2"].mask.name == "P1_T2_MASK.nii.gz"


def test_time_points_stay_on_one_side_of_a_split(tree):
    by_name = {case.id: subject_of(case) for name in ("isbi2015",) for case in list_cases(tree(name), layout=name)[0]}
    assert by_name["training01_01"] == by_name["training01_02"] != by_name["training02_01"]
    by_name = {case.id: subject_of(case) for case in list_cases(tree("mslesseg"), layout="mslesseg")[0]}
    assert by_name["P1_T1"] == by_name["P1_T2"] != by_name["P10_T1"]


def test_the_consensus_of_msseg_is_meant_and_has_no_vote(tree):
    root = tree("msseg2016")
    assert {case.mask.name for case in list_cases(root, layout="msseg2016")[0]} == {"Consensus.nii.gz"}
    voted = list_cases(root, layout="msseg2016", raters="majority")[0][0].mask
    assert isinstance(voted, RatersMask)
    assert list(voted.masks) == [f"ManualSegmentation_{number}" for number in range(1, 8)]
    assert list_cases(root, layout="msseg2016", raters="3")[0][0].mask.name == "ManualSegmentation_3.nii.gz"


def test_other_pathology_of_wmh_counts_neither_for_nor_against(tree, tmp_path):
    root = tree("wmh2017")
    labels = np.zeros((6, 6, 6), np.uint8)
    labels[1:3, 1:3, 1:3], labels[4:6, 4:6, 4:6] = 1, 2
    predicted = (labels > 0).astype(np.uint8)
    for name in ("pre/FLAIR", "pre/T1"):
        save(root / "training/Utrecht/0" / f"{name}.nii.gz", 1 + np.arange(216, dtype=np.int16).reshape(6, 6, 6))
    save(root / "training/Utrecht/0/wmh.nii.gz", labels.astype(np.float32))
    save(tmp_path / "masks/Utrecht_0_label-lesion_mask.nii.gz", predicted)
    (case,) = find_cases(root / "training/Utrecht", require_mask=True, layout="wmh2017")
    assert np.array_equal(read_mask(case.mask)[0], labels == 1)
    result = evaluate(tmp_path / "masks", root / "training/Utrecht", layout="wmh2017")
    assert [(found.subject, found.dice, found.false_lesions) for found in result.cases] == [("Utrecht_0", 1.0, 0)]
    assert "voxels of other pathology count neither for nor against" in str(result)
    assert evaluate(tmp_path / "masks", tmp_path / "masks").reference == ""
    save(root / "training/Utrecht/0/wmh.nii.gz", labels + 1)
    with pytest.raises(ValueError, match=r"has the label 3: give a mask of 0, 1 for lesion and 2 for other pathology"):
        find_cases(root / "training/Utrecht", require_mask=True, layout="wmh2017")


def test_an_unknown_layout_is_refused_with_the_names(tmp_path):
    with pytest.raises(ValueError, match=r"--layout is 'brats': give one of auto, bids, .*shifts"):
        list_cases(tmp_path, layout="brats")


@pytest.mark.parametrize("layout", ["bids", "nnunet", "folders", "flat", "list"])
def test_a_layout_by_name_reads_nothing_else(tmp_path, layout):
    trees = {
        "bids": ["sub-1/anat/sub-1_FLAIR.nii.gz"],
        "nnunet": ["imagesTr/a_0000.nii.gz"],
        "folders": ["P1/FLAIR.nii.gz"],
        "flat": ["P1_FLAIR.nii.gz"],
        "list": [],
    }
    for name, files in trees.items():
        (tmp_path / name).mkdir()
        for file in files:
            save(tmp_path / name / file)
    (tmp_path / "nnunet" / "dataset.json").write_text('{"channel_names": {"0": "FLAIR"}}')
    (tmp_path / "list" / "cases.csv").write_text("id,FLAIR\na,a.nii\n")
    for name in trees:
        path = tmp_path / name / ("cases.csv" if name == "list" else "")
        if name == layout:
            assert len(list_cases(path, layout=layout)[0]) == 1
        else:
            with pytest.raises(ValueError, match=f"does not look like {layout}: wanted .*, found|has no images"):
                list_cases(path, layout=layout)


def test_a_public_data_set_is_predicted_and_compared_by_its_name(trained, phantoms, tmp_path, rsanet):
    root = tmp_path / "MSLesSeg Dataset"
    for number, (folder, name) in enumerate([("train/P1/T1", "P1_T1"), ("train/P1/T2", "P1_T2"), ("test/P54", "P54")]):
        images, lesions = phantoms.make_subject(number)
        for word, contrast in (("FLAIR", "FLAIR"), ("T1", "T1w"), ("T2", "T2w")):
            phantoms.save(root / folder / f"{name}_{word}.nii.gz", images[contrast])
        phantoms.save(root / folder / f"{name}_MASK.nii.gz", lesions, dtype=np.uint8)
    options = ["--layout", "mslesseg"]
    code, out, err = rsanet("predict", trained, "--data", root, "-o", tmp_path / "masks", *options)
    assert (code, err) == (0, "")
    assert sorted(path.name for path in (tmp_path / "masks").glob("*.nii.gz")) == [
        f"{name}_label-lesion_mask.nii.gz" for name in ("P1_T1", "P1_T2", "P54")
    ]
    code, out, err = rsanet("evaluate", tmp_path / "masks", root, *options)
    assert (code, err) == (0, "")
    dices = [float(line.split()[1]) for line in out.splitlines() if line.startswith(("P1_", "P54"))]
    assert len(dices) == 3
    assert min(dices) > 0.3, "each mask is compared with its own reference"
    code, _, err = rsanet("predict", trained, "-i", "a.nii.gz", "-o", "b.nii.gz", *options)
    assert code == 2
    assert "this is for a cohort" in err
