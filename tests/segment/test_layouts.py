import json
import warnings

import numpy as np
import pytest

from rsanet.segment.datasets import find_cases, is_simulated, list_cases
from rsanet.segment.pairs import find_references
from rsanet.segment.splits import subject_of


@pytest.fixture
def put(tmp_path, phantoms):
    """Writes small volumes at paths below a folder, and texts as they are."""

    def write(*names, content=None):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                phantoms.save(path, np.ones((2, 2, 2)))
            else:
                path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return tmp_path / names[0]

    return write


def found(path, root, contrasts=None):
    """The cases by name, with their files relative to a folder; a mask under ``mask``."""
    cases, _ = list_cases(path, contrasts)
    return {
        case.id: {name: file.relative_to(root).as_posix() for name, file in case.images.items()}
        | ({"mask": case.mask.relative_to(root).as_posix()} if case.mask else {})
        for case in cases
    }


def refused(path, match, kind=ValueError):
    with pytest.raises(kind, match=match) as error:
        list_cases(path)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- BIDS ---------------------------------------------------------------------------------------------------


def test_every_session_is_a_case_with_its_own_mask(tmp_path, phantoms):
    images, lesions = phantoms.make_subject(1)
    for name in ("sub-006/ses-01", "sub-006/ses-02", "sub-007"):
        key = name.replace("/", "_")
        phantoms.save(tmp_path / name / "anat" / f"{key}_FLAIR.nii.gz", images["FLAIR"])
        mask = tmp_path / "derivatives" / "lesions" / name / "anat" / f"{key}_label-lesion_mask.nii.gz"
        phantoms.save(mask, lesions)
    cases = find_cases(tmp_path, require_mask=True)
    assert [case.id for case in cases] == ["sub-006_ses-01", "sub-006_ses-02", "sub-007"]
    for case in cases:
        assert case.images["FLAIR"].name == f"{case.id}_FLAIR.nii.gz"
        assert case.mask.name == f"{case.id}_label-lesion_mask.nii.gz"


def test_two_images_of_one_contrast_are_a_bad_case(tmp_path, phantoms):
    root = phantoms.write_cohort(tmp_path, 2)
    first = phantoms.image_path(root, "sub-002")
    first.rename(first.with_name("sub-002_run-1_FLAIR.nii.gz"))
    phantoms.save(first.with_name("sub-002_run-2_FLAIR.nii.gz"), phantoms.make_subject(9)[0]["FLAIR"])
    with pytest.raises(ValueError, match=r"1 of 2 cases .*\n  sub-002 has several FLAIR images \(.*run-1.*run-2"):
        find_cases(root, require_mask=True)
    assert len(find_cases(root, ["T1w"], require_mask=True)) == 2


def test_one_file_is_not_two_contrasts(tmp_path, phantoms):
    root = phantoms.write_cohort(tmp_path, 2)
    path = phantoms.image_path(root, "sub-002", "T1w")
    path.unlink()
    path.symlink_to(phantoms.image_path(root, "sub-002"))
    with pytest.raises(ValueError, match=r"1 of 2 cases .*\n  sub-002 has \S*_T1w.nii.gz as FLAIR and as T1w: give"):
        find_cases(root, require_mask=True)
    assert len(find_cases(root, ["T1w"], require_mask=True)) == 2


def test_two_masks_of_one_subject_are_a_bad_case_where_masks_are_needed(tmp_path, phantoms):
    root = phantoms.write_cohort(tmp_path, 2)
    other = root / "derivatives" / "rater2" / "sub-002" / "anat" / "sub-002_label-lesion_mask.nii.gz"
    phantoms.save(other, phantoms.make_subject(2)[1])
    with pytest.raises(ValueError, match=r"1 of 2 cases .*\n  sub-002 has several lesion masks \(.*lesions.*rater2"):
        find_cases(root, require_mask=True)
    assert len(find_cases(root, require_mask=False)) == 2


def test_what_is_no_scan_in_a_bids_folder_is_no_contrast(tmp_path, put):
    anat = "sub-1/anat/sub-1"
    put(f"{anat}_T1w.nii.gz", f"{anat}_ce-gd_T1w.nii.gz", f"{anat}_label-brain_mask.nii.gz", f"{anat}_dseg.nii.gz")
    put("sub-1/anat/._sub-1_T1w.nii.gz", content="of a Mac")
    assert found(tmp_path, tmp_path) == {"sub-1": {"T1w": f"{anat}_T1w.nii.gz", "T1ce": f"{anat}_ce-gd_T1w.nii.gz"}}


# --- nnU-Net ------------------------------------------------------------------------------------------------

NNUNET = {
    "channel_names": {"0": "flair", "1": "T1"},
    "labels": {"background": 0, "lesion": 1},
    "file_ending": ".nii.gz",
}


@pytest.mark.parametrize("key", ["channel_names", "modality"])
def test_an_nnunet_folder_gives_its_training_set_and_imagests_the_other(tmp_path, put, key):
    put("D/dataset.json", content={key: NNUNET["channel_names"]})
    put("D/imagesTr/MS_1_0000.nii.gz", "D/imagesTr/MS_1_0001.nii.gz", "D/labelsTr/MS_1.nii.gz")
    put("D/imagesTs/MS_2_0000.nii.gz", "D/imagesTs/MS_2_0001.nii.gz")
    train = {"FLAIR": "imagesTr/MS_1_0000.nii.gz", "T1w": "imagesTr/MS_1_0001.nii.gz", "mask": "labelsTr/MS_1.nii.gz"}
    test = {"FLAIR": "imagesTs/MS_2_0000.nii.gz", "T1w": "imagesTs/MS_2_0001.nii.gz"}
    root = tmp_path / "D"
    assert found(root, root) == found(root / "imagesTr", root) == {"MS_1": train}
    assert found(root / "imagesTs", root) == {"MS_2": test}


def test_an_nnunet_case_without_an_image_stays_a_case(tmp_path, put):
    put("dataset.json", content=NNUNET)
    put("imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "imagesTr/b_0001.nii.gz", "labelsTr/c.nii.gz")
    assert list(found(tmp_path, tmp_path)) == ["a", "b", "c"]
    with pytest.raises(
        ValueError, match=r"3 of 3 cases.*\n.*a_0000.*\n  b has no FLAIR\.\n  c has no FLAIR and no T1w\."
    ):
        find_cases(tmp_path, require_mask=False)


def test_a_single_channel_needs_no_number(tmp_path, put):
    put("dataset.json", content={"modality": {"0": "FLAIR"}})
    put("imagesTr/a.nii.gz")
    assert found(tmp_path, tmp_path) == {"a": {"FLAIR": "imagesTr/a.nii.gz"}}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{}", "names no channels"),
        ('{"channel_names": {"0": "FLAIR"}}', r"a_0001\.nii\.gz is no channel .*: end its name in _0000\."),
        ('{"channel_names": {"0": "T1", "1": "t1w"}}', "several channels named T1w"),
        ('{"channel_names": {"a": "T1"}}', r"names its channels \{'a': 'T1'\}"),
        ('{"channel_names": {"0": 3}}', "names its channels"),
        ('{"channel', "not JSON: .* in line 1"),
        ("[]", "names no channels"),
    ],
)
def test_a_description_that_does_not_fit_the_images_is_refused(tmp_path, put, content, reason):
    put("dataset.json", content=content)
    put("imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz")
    assert "dataset.json" in refused(tmp_path, reason)


# --- plain folders ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["mask", "lesions", "Lesion_Mask", "label", "consensus_gt", "manual", "seg", "P1_seg"])
def test_a_folder_per_subject_is_read_by_the_words_of_its_file_names(tmp_path, put, mask):
    put("P1/FLAIR.nii.gz", "P1/P1_t1.nii", "P1/T2W.nii.gz", "P1/pd.nii.gz", "P1/T1GD.nii.gz", f"P1/{mask}.nii.gz")
    put("P1/brain_mask.nii.gz", "P1/wm_seg.nii.gz", "P1/lesion_prob.nii.gz", "P1/other.nii.gz")
    put("docs/read.me", content="")
    assert found(tmp_path, tmp_path) == {
        "P1": {
            "FLAIR": "P1/FLAIR.nii.gz",
            "T1w": "P1/P1_t1.nii",
            "T2w": "P1/T2W.nii.gz",
            "PDw": "P1/pd.nii.gz",
            "T1ce": "P1/T1GD.nii.gz",
            "mask": f"P1/{mask}.nii.gz",
        }
    }


def test_a_flat_folder_is_grouped_by_what_stands_before_the_contrast(tmp_path, put):
    put("Müller 1_FLAIR.nii.gz", "Müller 1_T1w.nii", "Müller 1_FLAIR_mask.nii.gz")
    put("P2_T1_FLAIR_pp.nii.gz", "P2_T1_T1.nii.gz", "P2_T1_MASK.nii.gz")  # T1 is a time point
    assert found(tmp_path, tmp_path) == {
        "Müller 1": {"FLAIR": "Müller 1_FLAIR.nii.gz", "T1w": "Müller 1_T1w.nii", "mask": "Müller 1_FLAIR_mask.nii.gz"},
        "P2_T1": {"FLAIR": "P2_T1_FLAIR_pp.nii.gz", "T1w": "P2_T1_T1.nii.gz", "mask": "P2_T1_MASK.nii.gz"},
    }


def test_a_flat_folder_of_bids_names_is_grouped_by_subject_and_session(tmp_path, put):
    first, second = "sub-1_ses-2_FLAIR.nii.gz", "sub-1_ses-2_space-FLAIR_T1w.nii.gz"
    put(first, second)
    assert found(tmp_path, tmp_path) == {"sub-1_ses-2": {"FLAIR": first, "T1w": second}}


def test_the_folder_of_one_subject_is_a_case_of_its_name(tmp_path, put):
    put("P7/FLAIR.nii.gz", "P7/mask.nii.gz")
    assert found(tmp_path / "P7", tmp_path) == {"P7": {"FLAIR": "P7/FLAIR.nii.gz", "mask": "P7/mask.nii.gz"}}


def test_the_name_of_a_subject_says_nothing_of_what_a_file_holds(tmp_path, put):
    put("manual_1/manual_1_FLAIR.nii.gz", "T2/T2_flair.nii.gz")
    assert [list(images) for images in found(tmp_path, tmp_path).values()] == [["FLAIR"], ["FLAIR"]]


def test_a_folder_of_masks_alone_is_refused(tmp_path, put):
    put("a_mask.nii.gz", "b_mask.nii.gz")
    refused(tmp_path, "has no images of its 2 cases")


def test_an_image_registered_to_another_is_not_that_other(tmp_path, put):
    put("P1/FLAIR.nii.gz", "P1/T1_to_FLAIR.nii.gz", "P1/T2_in_FLAIR.nii.gz")
    assert list(found(tmp_path, tmp_path)["P1"]) == ["FLAIR", "T1w", "T2w"]


@pytest.mark.parametrize("name", ["T1_Gd", "ce-gd_T1w", "T1-CE_pp", "3DT1GADO", "GADO_preprocessed", "t1c", "T1WKS"])
def test_a_t1_with_contrast_agent_is_another_contrast(tmp_path, put, name):
    put("folders/P1/T1.nii.gz", f"folders/P1/{name}.nii.gz", "flat/P1_T1.nii.gz", f"flat/P1_{name}.nii.gz")
    root = tmp_path / "folders"
    assert found(root, root) == {"P1": {"T1w": "P1/T1.nii.gz", "T1ce": f"P1/{name}.nii.gz"}}
    root = tmp_path / "flat"
    assert found(root, root) == {"P1": {"T1w": "P1_T1.nii.gz", "T1ce": f"P1_{name}.nii.gz"}}


def test_of_the_masks_of_several_raters_only_a_consensus_is_clear(tmp_path, put):
    put("P1/FLAIR.nii.gz", "P1/mask1.nii.gz", "P1/mask2.nii.gz", "P1/Consensus.nii.gz")
    put("P2/FLAIR.nii.gz", "P2/mask1.nii.gz", "P2/mask2.nii.gz")
    cases, _ = list_cases(tmp_path)
    assert cases[0].pick_mask().name == "Consensus.nii.gz"
    with pytest.raises(ValueError, match=r"P2 has several lesion masks \(.*mask1.*mask2"):
        cases[1].pick_mask()


def test_a_subject_whose_images_have_strange_names_stays_a_case(tmp_path, put):
    put("P1/FLAIR.nii.gz", "P2/scan.nii.gz")
    assert found(tmp_path, tmp_path)["P2"] == {}


def test_what_is_no_data_set_is_refused_with_what_is_understood(tmp_path, put):
    put("a_0000.nii.gz")
    put("b.txt", "sub-1/notes.txt", content="")
    for path in (tmp_path, tmp_path / "b.txt", tmp_path / "a_0000.nii.gz"):
        message = refused(path, "no cases in a layout that is understood")
        assert all(word in message for word in ("BIDS", "nnU-Net", "SUBJECT_FLAIR", ".csv", ".json"))
    assert "BIDS" in refused(tmp_path / "nowhere", "nowhere does not exist", FileNotFoundError)
    put("sub-1/anat/notes.txt", content="")
    refused(tmp_path, "has no images of its 1 case")


# --- lists of files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table_names_its_cases_contrasts_and_masks(tmp_path, put, start, delimiter):
    rows = [
        ["Subject", "flair", "t1", "MP2RAGE", "age", "Mask", "brain_mask"],
        ["ä", "Öl 1/f.nii.gz", "../t.nii", "m.nii", "33", "m.nii.gz", "b.nii.gz"],
        [],
        ["b", str(tmp_path / "f.nii"), "", "", "", "", ""],
    ]
    path = put("lists/list.csv", content=start + "\r\n".join(delimiter.join(row) for row in rows))
    cases, contrasts = list_cases(path)
    assert contrasts == ["FLAIR", "T1w", "MP2RAGE"]
    here = path.parent
    assert cases[0].id == "ä"
    assert cases[0].images == {"FLAIR": here / "Öl 1/f.nii.gz", "T1w": here / "../t.nii", "MP2RAGE": here / "m.nii"}
    assert cases[0].mask == here / "m.nii.gz"
    assert (cases[1].images, cases[1].mask) == ({"FLAIR": tmp_path / "f.nii"}, None)


def test_a_table_without_names_takes_them_from_the_files(put):
    path = put("list.csv", content='FLAIR\n"a,b_FLAIR.nii.gz"\nP2/FLAIR.nii\n')
    assert [case.id for case in list_cases(path)[0]] == ["a,b", "P2"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "has no rows: give a header"),
        ("id,FLAIR\n", "has no rows"),
        ("id,FLAIR\na,b.nii,c\n", "line 2, has 3 cells, but the header has 2"),
        ("id,FLAIR\n\na\n", "line 3, has 1 cell, but"),
        ('id,FLAIR\n"a,b.nii\n', "cannot be read as CSV"),
        ("id,FLAIR\na,b.nii\nb,b.nii\na,c.nii\n", "names a more than once"),
        ("site,age\nx,3\n", "line 2, has no image"),
        ("a,a_FLAIR.nii\nb,b_FLAIR.nii\n", "line 1, names no columns, but a_FLAIR.nii: put a header"),
        ("id,age\nx,3\n", "has no images of its 1 case"),
    ],
)
def test_a_broken_table_is_refused_in_one_sentence(put, content, reason):
    assert "list.csv" in refused(put("list.csv", content=content), reason)


def test_a_text_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "list.csv").write_bytes("id,FLAIR\nä,x.nii\n".encode("latin-1"))
    refused(tmp_path / "list.csv", "not a text in UTF-8")


@pytest.mark.parametrize(
    "name", ["../../a", "a/b", "a\\\\b", "/a", "..", "a..b", ".hidden", "a\\u0000", "a\\nb", "a" * 200]
)
def test_a_name_that_would_lead_a_mask_astray_is_refused(put, name):
    path = put("list.json", content=f'[{{"id": "{name}", "FLAIR": "x.nii"}}]')
    refused(path, "has a case named .*, and files are named by it")


def test_a_json_list_is_read_as_a_table_is(tmp_path, put):
    entries = [{"id": 1, "FLAIR": "a.nii", "T1": "b.nii", "mask": "m.nii", "fold": 0}, {"id": "2", "flair": "c.nii"}]
    path = put("list.json", content=entries)
    assert found(path, tmp_path) == {
        "1": {"FLAIR": "a.nii", "T1w": "b.nii", "mask": "m.nii"},
        "2": {"FLAIR": "c.nii"},
    }


DATALIST = {
    "modality": {"0": "FLAIR", "1": "T1"},
    "training": [{"image": ["a_0.nii", "a_1.nii"], "label": "a.nii"}],
    "validation": [{"id": "b", "image": ["b_0.nii", "b_1.nii"], "label": ["b.nii"]}],
    "test": [{"image": ["c_FLAIR.nii", "c_T1.nii"]}],
}


def test_a_datalist_gives_training_and_validation_unless_a_list_is_named(tmp_path, put):
    (tmp_path / "x").mkdir()
    path = put("x/datalist.json", content=DATALIST)
    cases = found(path, tmp_path / "x")
    assert list(cases.values()) == [
        {"FLAIR": "a_0.nii", "T1w": "a_1.nii", "mask": "a.nii"},
        {"FLAIR": "b_0.nii", "T1w": "b_1.nii", "mask": "b.nii"},
    ]
    assert found(path / "test", tmp_path / "x") == {"c": {"FLAIR": "c_FLAIR.nii", "T1w": "c_T1.nii"}}
    assert list(found(path / "validation", tmp_path / "x")) == ["b"]


def test_a_datalist_without_channels_takes_the_contrast_from_the_file(tmp_path, put):
    path = put("datalist.json", content={"test": ["./imagesTs/p1_flair.nii.gz"]})
    assert found(path, tmp_path) == {"p1": {"FLAIR": "imagesTs/p1_flair.nii.gz"}}


@pytest.mark.parametrize(
    ("content", "part", "reason"),
    [
        ('[{"id": ', "", "not JSON: .* in line 1"),
        ("3", "", "lists no cases"),
        ("[]", "", "lists no cases"),
        (NNUNET, "", "lists no cases: .*of an nnU-Net data set its folder"),
        ("[3]", "", "entry 1, is 3: give"),
        ('[{"FLAIR": 3}]', "", "entry 1, has 3 as FLAIR: give the path"),
        ('[{"age": 3}]', "", "entry 1, has no image"),
        (DATALIST, "other", "has no list 'other': give one of training, validation, test"),
        ('[{"FLAIR": "a.nii"}]', "test", "has no list 'test'"),
        ({"one": [{"image": "a.nii"}], "two": [{"image": "a.nii"}]}, "", r"the lists one, two: name one, as in .*/one"),
        ({"test": [{"image": "a.nii"}]}, "", "whose contrast nothing names"),
        ({**DATALIST, "training": [{"image": "4d.nii"}]}, "", r"has 1 image, but there are 2 channels \(FLAIR, T1w\)"),
        pytest.param("[" * 100_000, "", "nested too deeply", id="deep"),
    ],
)
def test_a_broken_json_list_is_refused_in_one_sentence(put, content, part, reason):
    assert "list.json" in refused(put("list.json", content=content) / part, reason)


def test_a_list_of_simulated_images_is_simulated(cohort, put, phantoms):
    image = phantoms.image_path(cohort, "sub-001")
    assert is_simulated(put("list.csv", content=f"FLAIR\n{image}\n"))
    assert not is_simulated(put("list.csv", content="FLAIR\nx.nii\n"))


NAMES = [
    "patient_id",
    "Patient ID",
    "PatientID",
    "patient-id",
    "Subject ID",
    "subject",
    "SUBJECT",
    "Subj.",
    "ID",
    "#ID",
]
NAMES += [
    "participant_id",
    "Participant",
    "case",
    "Case-ID",
    "scan_id",
    "Scan ID",
    "image id",
    "study_id",
    "Name",
    "MRN",
]


@pytest.mark.parametrize("name", NAMES)
def test_many_headers_name_the_cases(put, name):
    table = f"site,age,{name},FLAIR,T1 file,lesion_mask,brain_mask,lesion volume\n"
    path = put("list.csv", content=table + "A,30,x,a.nii,b.nii,m.nii,n.nii,3.5\nA,31,y,c.nii,d.nii,o.nii,n.nii,0\n")
    cases, contrasts = list_cases(path)
    assert [case.id for case in cases] == ["x", "y"]
    assert contrasts == ["FLAIR", "T1w"]
    assert cases[0].mask == path.parent / "m.nii"
    assert left_out(path) == []
    entries = [{name: "x", "FLAIR": "a.nii", "age": 30}, {name: "y", "FLAIR": "b.nii", "age": 31}]
    assert [case.id for case in list_cases(put("list.json", content=entries))[0]] == ["x", "y"]


def test_a_table_whose_cases_no_column_names_says_so(put):
    path = put("list.csv", content="Hospital;age;FLAIR\nx;30;a_FLAIR.nii\ny;31;b_FLAIR.nii\n")
    assert [case.id for case in list_cases(path)[0]] == ["a", "b"]
    (said,) = left_out(path)
    assert said == (
        f"{path} has no column that is called subject or id, so that its cases are named by their files (a, b); left "
        "out: Hospital, age."
    )


def test_of_a_subject_with_several_scans_the_scan_is_the_case(put):
    path = put("a.csv", content="patient_id,scan_id,FLAIR\nP1,s1,a.nii\nP1,s2,b.nii\nP2,s3,c.nii\n")
    cases = list_cases(path)[0]
    assert [(case.id, case.subject) for case in cases] == [("s1", "P1"), ("s2", "P1"), ("s3", "P2")]
    path = put("b.tsv", content="participant_id\tsession_id\tFLAIR\nsub-1\tses-1\ta.nii\nsub-1\tses-2\tb.nii\n")
    cases = list_cases(path)[0]
    assert [(case.id, subject_of(case)) for case in cases] == [("sub-1_ses-1", "sub-1"), ("sub-1_ses-2", "sub-1")]
    path = put("d.tsv", content="session_id\tFLAIR\tparticipant_id\nses-1\ta.nii\tsub-1\nses-2\tb.nii\tsub-1\n")
    cases = list_cases(path)[0]
    assert [(case.id, subject_of(case)) for case in cases] == [("sub-1_ses-1", "sub-1"), ("sub-1_ses-2", "sub-1")]
    path = put("c.csv", content="Subject,Visit,FLAIR\nP1,1,a.nii\nP1,1,b.nii\n")
    refused(path, "names P1 more than once")


MISSING = ["n/a", "N/A", "NA", "NaN", "nan", "none", "None", "", "  ", "null", "#N/A", "-", ".", "?"]


@pytest.mark.parametrize("missing", MISSING)
def test_missing_values_are_no_files(put, missing):
    for name, delimiter in (("list.tsv", "\t"), ("list.csv", ",")):
        rows = [
            ["participant_id", "FLAIR", "T1w", "mask"],
            ["a", "a.nii", missing, missing],
            ["b", "b.nii", "c.nii", "m.nii"],
        ]
        path = put(name, content="\n".join(delimiter.join(row) for row in rows))
        first, second = list_cases(path)[0]
        assert (list(first.images), first.mask) == (["FLAIR"], None)
        assert list(second.images) == ["FLAIR", "T1w"]
        path = put(name, content="\n".join(delimiter.join(row) for row in [rows[0], [missing, "a.nii", "b.nii", ""]]))
        refused(path, "line 2, has nothing as participant_id: give each case its name there")
    path = put("list.json", content=[{"id": "a", "FLAIR": "a.nii", "T1": missing, "mask": float("nan")}])
    assert list(list_cases(path)[0][0].images) == ["FLAIR"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    "start", ["", "\ufeff", "sep={}\n", "\ufeffsep={}\n", "SEP={}\r\n", '"sep={}"\n', "\n\n", "# of us, all\n"]
)
@pytest.mark.parametrize("delimiter", [";", ",", "\t"])
def test_what_excel_and_people_put_into_tables_is_read(put, start, delimiter, end):
    rows = [
        ["Subject ID", "FLAIR", '"T1 3D; 1, 1, 1"', "mask", "", ""],
        ["# scanned, again"],
        ["1", '"a; b, c.nii"', "t.nii", "NA", "", ""],
        [],
        ["  # it's a remark"],
        [" 2 ", "d.nii", "u.nii", "m.nii", "", "", "", ""],
        [""] * 6,
    ]
    text = start.format(delimiter) + end.join(delimiter.join(row) for row in rows)
    cases, contrasts = list_cases(put("list.csv", content=text))
    assert contrasts == ["FLAIR", "T1w"]
    assert [(case.id, case.images["FLAIR"].name) for case in cases] == [("1", "a; b, c.nii"), ("2", "d.nii")]
    assert (cases[0].mask, cases[1].mask.name) == (None, "m.nii")


def test_cases_behind_a_hash_are_named(put):
    path = put("list.csv", content="id,FLAIR\n#1,a.nii\n# a remark\n2,b.nii\n")
    assert [case.id for case in list_cases(path)[0]] == ["2"]
    (said,) = left_out(path)
    assert said.endswith("1 line with files left out, the # in front making it a comment: #1,a.nii.")
    path = put("list.tsv", content="#Subject ID\tFLAIR\n# of the first year\n2\tb.nii\n")
    assert [case.id for case in list_cases(path)[0]] == ["2"]


# --- what is no case, and what is left out ------------------------------------------------------------------


def left_out(path, *args, **options):
    """What the warnings of listing a data set say."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        list_cases(path, *args, **options)
    return [str(each.message) for each in said]


def test_places_of_bids_without_anat_are_no_cases(tmp_path, put):
    put("sub-1/ses-1/anat/sub-1_ses-1_FLAIR.nii.gz", "sub-1/ses-2/dwi/sub-1_ses-2_dwi.nii.gz")
    put("sub-2/anat/sub-2_FLAIR.nii.gz", "sub-2/ses-1/func/sub-2_ses-1_bold.nii.gz", "sub-3/func/sub-3_bold.nii.gz")
    put("sub-emptyroom/ses-1/meg/notes.txt", "sub-5/ses-1/notes.txt", content="")
    put("sub-4/anat/sub-4_T2w.nii.gz")  # has anat, but lacks a contrast
    assert list(found(tmp_path, tmp_path)) == ["sub-1_ses-1", "sub-2", "sub-4"]
    assert left_out(tmp_path) == []
    with pytest.raises(ValueError, match="sub-4 has no FLAIR") as error:
        find_cases(tmp_path, ["FLAIR"], require_mask=False)
    assert not any(name in str(error.value) for name in ("sub-3", "sub-5", "emptyroom", "ses-2"))


def test_a_mask_without_its_images_is_never_lost(tmp_path, put):
    lesions = "derivatives/manual/{}/anat/{}_label-lesion_mask.nii.gz"
    put("sub-1/anat/sub-1_FLAIR.nii.gz", "sub-2/dwi/sub-2_dwi.nii.gz")
    put(*(lesions.format(place, place.replace("/", "_")) for place in ("sub-1", "sub-2", "sub-3", "sub-4/ses-1")))
    cases = found(tmp_path, tmp_path)
    assert list(cases) == ["sub-1", "sub-2"]
    assert list(cases["sub-2"]) == ["mask"]  # a place of the data set: whoever drew it saw an image
    assert left_out(tmp_path) == [
        f"{tmp_path} has lesion masks in derivatives, but no folder, of sub-3, sub-4_ses-1: left out."
    ]
    references, _ = find_references(tmp_path)
    assert list(references) == ["sub-1", "sub-2", "sub-3", "sub-4_ses-1"]


def test_a_session_without_anat_stops_no_command(tmp_path, phantoms, trained, rsanet, tiny):
    root = phantoms.write_cohort(tmp_path / "data", 4)
    phantoms.save(root / "sub-001" / "ses-02" / "dwi" / "sub-001_ses-02_dwi.nii.gz", np.ones((2, 2, 2)))
    phantoms.save(root / "sub-emptyroom" / "dwi" / "sub-emptyroom_dwi.nii.gz", np.ones((2, 2, 2)))
    for args in (
        ("train", root, "-o", tmp_path / "run", "--steps", "1", *tiny),
        ("predict", trained, "--data", root, "-o", tmp_path / "masks"),
        ("evaluate", tmp_path / "masks", root),
        ("report", tmp_path / "pages", "--data", root, "--pred", tmp_path / "masks"),
    ):
        code, out, err = rsanet(*args)
        assert code == 0, (args, out, err)
        assert not any("emptyroom" in said or "ses-02" in said for said in (out, err))


@pytest.mark.parametrize("end", ["NII.GZ", "Nii.gz", "NII"])
def test_endings_in_other_letters_are_read_in_every_layout(tmp_path, phantoms, end):
    images, mask = phantoms.make_subject(1)
    for name in (
        *(f"bids/sub-1/anat/sub-1_FLAIR.{end}", f"bids/derivatives/d/sub-1/anat/sub-1_label-lesion_mask.{end}"),
        *(f"nnunet/imagesTr/sub-1_0000.{end}", f"nnunet/labelsTr/sub-1.{end}"),
        *(f"folders/sub-1/FLAIR.{end}", f"folders/sub-1/mask.{end}"),
        *(f"flat/sub-1_FLAIR.{end}", f"flat/sub-1_mask.{end}"),
        *(f"mslesseg/sub-1/P1_FLAIR.{end}", f"mslesseg/sub-1/P1_MASK.{end}"),
    ):
        lower = phantoms.save(
            tmp_path / name.lower(), mask if "abel" in name or "ask" in name.lower() else images["FLAIR"]
        )
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        lower.rename(tmp_path / name)
    (tmp_path / "nnunet/dataset.json").write_text(json.dumps({"channel_names": {"0": "FLAIR"}}))
    (tmp_path / "list.csv").write_text(f"id,FLAIR,mask\nsub-1,flat/sub-1_FLAIR.{end},flat/sub-1_mask.{end}\n")
    for name in ("bids", "nnunet", "folders", "flat", "list.csv", "mslesseg"):
        layout = name if name == "mslesseg" else "auto"
        (case,) = find_cases(tmp_path / name, require_mask=True, layout=layout)
        assert case.id == ("P1" if name == "mslesseg" else "sub-1")
        assert list(case.images) == ["FLAIR"]


def test_a_file_beside_its_compressed_copy_makes_a_bad_case_in_every_layout(tmp_path, put):
    for end in ("nii", "nii.gz"):
        put(f"bids/sub-1/anat/sub-1_FLAIR.{end}", f"folders/P1/FLAIR.{end}", f"flat/P1_FLAIR.{end}")
        put(f"nnunet/imagesTr/P1_0000.{end}", f"mslesseg/P1/P1_FLAIR.{end}", f"mslesseg/P1/P1_MASK.{end}")
    put("nnunet/dataset.json", content={"channel_names": {"0": "FLAIR"}})
    for name in ("bids", "folders", "flat", "nnunet", "mslesseg"):
        (case,) = list_cases(tmp_path / name, layout=name)[0]
        with pytest.raises(ValueError, match=r"has several FLAIR images \(.*FLAIR\.nii.*FLAIR\.nii\.gz|P1_0000"):
            case.pick(["FLAIR"])
    with pytest.raises(ValueError, match="several lesion masks"):
        case.pick_mask()


def test_volumes_of_no_case_are_named_in_one_line(tmp_path, put):
    put("folders/P1/FLAIR.nii.gz", "folders/P1/SWI.nii.gz", "folders/P1/brain_mask.nii.gz", "folders/P1/prob.nii.gz")
    put("folders/P2/ses-1/FLAIR.nii.gz", "folders/._P1_FLAIR.nii.gz")
    said = left_out(tmp_path / "folders")
    assert len(said) == 2
    assert "1 file is left out, being named as neither a contrast nor a lesion mask" in said[0]
    assert said[0].endswith("P1/SWI.nii.gz.")
    assert "lying deeper than SUBJECT/FLAIR.nii.gz: P2/ses-1/FLAIR.nii.gz." in said[1]
    put("flat/P1_FLAIR.nii.gz", "flat/P2.nii.gz")
    put("flat/P3_FLAIR.mgz", "flat/P4_FLAIR.nrrd", "flat/P1_FLAIR.mgz", content="in a format of its own")
    (said,) = left_out(tmp_path / "flat")
    assert said.endswith("not in NIfTI as others are: P2.nii.gz, P4_FLAIR.nrrd, P3_FLAIR.mgz.")


def test_masks_in_strange_places_of_bids_are_named(tmp_path, put):
    put("sub-1/anat/sub-1_FLAIR.nii.gz", "sub-1/anat/sub-1_label-lesion_mask.nii.gz", "P2/FLAIR.nii.gz")
    put("derivatives/manual/sub-1/anat/sub-1_FLAIR_lesion-manual.nii.gz")
    put("derivatives/lesions/sub-1/anat/sub-1_label-newlesion_mask.nii.gz", "sourcedata/x.nii.gz")
    masks, strange = left_out(tmp_path)
    assert "2 files are left out, being no derivatives/*/sub-*/anat/*label-lesion*_mask.nii.gz: " in masks
    assert "sub-1/anat/sub-1_label-lesion_mask.nii.gz, derivatives/manual" in masks
    assert strange.endswith("lying in no sub-*/anat: P2/FLAIR.nii.gz.")


def test_images_in_strange_places_of_bids_are_named(tmp_path, put):
    put("sub-1/anat/sub-1_FLAIR.nii.gz", "sub-1/dwi/sub-1_dwi.nii.gz", "sub-1/ses-1/perf/sub-1_ses-1_asl.nii.gz")
    strange = ["Sub-2/anat/Sub-2_FLAIR.nii.gz", "site/sub-3/anat/sub-3_FLAIR.nii.gz", "sub-4/ses-1/ANAT/FLAIR.nii.gz"]
    strange += ["sub-5/FLAIR.nii.gz", "sub-6/anat/raw/sub-6_FLAIR.nii.gz"]
    put(*strange)
    assert "sub-1" in found(tmp_path, tmp_path)
    assert left_out(tmp_path) == [
        f"{tmp_path}: 5 files are left out, lying in no sub-*/anat: {', '.join(sorted(strange))}."
    ]


@pytest.mark.parametrize("folder", ["manual/sub-1", "sub-1/anat", "manual/sub-1/FLAIR", "manual"])
def test_a_lesion_mask_anywhere_in_derivatives_is_named(tmp_path, put, folder):
    mask = f"derivatives/{folder}/sub-1_label-lesion_mask.nii.gz"
    put("sub-1/anat/sub-1_FLAIR.nii.gz", mask)
    (said,) = left_out(tmp_path)
    assert said.endswith(f"being no derivatives/*/sub-*/anat/*label-lesion*_mask.nii.gz: {mask}.")


@pytest.mark.parametrize("name", ["label-lesion_roi", "roi", "lesions", "FLAIR_lesion", "consensus", "label-lesion"])
def test_a_mask_among_the_images_of_bids_is_no_contrast(tmp_path, put, name):
    put("sub-1/anat/sub-1_FLAIR.nii.gz", f"sub-1/anat/sub-1_{name}.nii.gz", "sub-1/anat/sub-1_desc-brain_mask.nii.gz")
    assert found(tmp_path, tmp_path) == {"sub-1": {"FLAIR": "sub-1/anat/sub-1_FLAIR.nii.gz"}}
    (said,) = left_out(tmp_path)
    assert said.endswith(f"_mask.nii.gz: sub-1/anat/sub-1_{name}.nii.gz.")


def test_files_of_nnunet_in_other_formats_are_named(tmp_path, put):
    put("imagesTr/A_0000.nii.gz", "imagesTr/deep/D_0000.nii.gz", "labelsTr/A.nii.gz")
    put("imagesTr/A_0000.nrrd", "imagesTr/B_0000.nrrd", "imagesTr/C_0000.mgz", content="in a format of its own")
    put("dataset.json", content={"channel_names": {"0": "FLAIR"}})
    (said,) = left_out(tmp_path)
    assert "3 files are left out, not in NIfTI as others are, or lying in a folder of their own: " in said
    assert said.endswith(": imagesTr/B_0000.nrrd, imagesTr/deep/D_0000.nii.gz, imagesTr/C_0000.mgz.")


def test_a_white_matter_lesion_mask_is_one_and_a_mask_of_bet_is_none(tmp_path, put):
    put("P1/FLAIR.nii.gz", "P1/wm_lesion_mask.nii.gz", "P1/T1_bet_mask.nii.gz")
    assert found(tmp_path, tmp_path)["P1"]["mask"] == "P1/wm_lesion_mask.nii.gz"
