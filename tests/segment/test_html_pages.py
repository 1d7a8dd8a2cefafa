"""The HTML report: what its pages say and show, read as a browser reads them, without one."""

import json
import re
import shutil
from types import SimpleNamespace
from urllib.parse import unquote

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage
from segment.bright import CPU, FP32
from segment.pages import SHAPE, Elements, masks, read, scan

from rsanet import RSANet
from rsanet.segment.cases import Case
from rsanet.segment.html.cohort import _check_folder, write_report
from rsanet.segment.html.page import RESEARCH, SIMULATED, make_page
from rsanet.segment.html.scan import read_scan
from rsanet.segment.metrics import PROTOCOLS, evaluate_case
from rsanet.segment.segmenter import Segmenter

OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.1, 0.2, -0.15) @ np.diag([2.0, 1.5, 4.0]), [-30, -25, -40]
)


@pytest.fixture(scope="module")
def cohort(phantoms, tmp_path_factory):
    """Three simulated subjects with predictions that are not quite right; the third has no reference."""
    root = tmp_path_factory.mktemp("report")
    data, pred = phantoms.write_cohort(root / "data", 3), root / "pred"
    pred.mkdir()
    for number, name in enumerate(("sub-001", "sub-002", "sub-003")):
        path = phantoms.mask_path(data, name)
        image = nib.load(path)
        mask = np.roll(np.asarray(image.dataobj), number, axis=0)
        phantoms.save(pred / f"{name}_label-lesion_mask.nii.gz", mask, image.affine, np.uint8)
    phantoms.save(
        pred / "sub-001_label-lesion_probseg.nii.gz",
        0.75 * np.asarray(nib.load(pred / "sub-001_label-lesion_mask.nii.gz").dataobj),
        np.eye(4),
    )
    shutil.rmtree(phantoms.mask_path(data, "sub-003").parents[1])
    return SimpleNamespace(data=data, pred=pred, root=root)


@pytest.fixture(scope="module")
def report(cohort):
    """The pages of that cohort, made once; tests only read them."""
    out = cohort.root / "out"
    write_report(out, cohort.data, cohort.pred)
    return out


def test_the_command_writes_a_page_for_each_case_and_an_index_that_leads_to_them(cohort, rsanet, tmp_path):
    out = tmp_path / "pages"
    code, words, err = rsanet("report", out, "--data", cohort.data, "--pred", cohort.pred)
    assert (code, err) == (0, "")
    assert [line.partition(":")[0] for line in words.splitlines()] == [
        "1/3  sub-001", "2/3  sub-002", "3/3  sub-003", f"The report is {out / 'index.html'}.",
    ]  # fmt: skip
    assert sorted(path.name for path in out.iterdir()) == ["index.html", *(f"sub-00{n}.html" for n in (1, 2, 3))]
    links = [a["href"] for a in read(out / "index.html").all("a") if not a["href"].startswith("#")]
    assert links == ["./sub-001.html", "./sub-002.html", "./sub-003.html"]


def test_a_page_is_complete_in_itself_and_may_load_nothing(report):
    for path in report.iterdir():
        text, page = path.read_text(encoding="utf-8"), read(path)
        assert len(text) < 3e6
        policies = [meta for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
        assert policies[0]["content"].startswith("default-src 'none'; img-src data:;")
        for tag, attrs in page.found:
            assert tag not in ("link", "iframe", "object", "embed", "form", "base", "img"), path
            assert "src" not in attrs, path
            address = attrs.get("href") or attrs.get("xlink:href") or "#"
            local = address.startswith("#") or (tag == "image" and address.startswith("data:image/"))
            assert local or (tag == "a" and address.startswith("./")), address[:80]
        rest = re.sub(r"data:image/[a-z]+;base64,[A-Za-z0-9+/=]+", "", text)
        assert not re.search(r"https?:|//[a-z]|url\(|@import|fetch\(|XMLHttp|import\(", rest), path


def test_the_warnings_are_on_every_page_and_real_data_are_not_called_simulated(report, cohort, tmp_path, phantoms):
    for path in report.iterdir():
        first = read(path).all("p")[0]
        assert first["class"] == "warning"
        assert f"{RESEARCH} {SIMULATED}" in read(path).text
    assert "no clinical meaning" in (report / "sub-001.html").read_text().rpartition("@page")[2]  # in print, too
    real = tmp_path / "real"
    shutil.copytree(cohort.data / "sub-001", real / "sub-001")
    written = write_report(tmp_path / "out", real, cohort.pred)
    for path in (written.index, *written.pages.values()):
        assert RESEARCH in read(path).text
        assert "imulated" not in read(path).text


def test_words_of_file_names_and_json_are_shown_and_never_run(cohort, tmp_path):
    name = "<script>alert(1)<&\"'#?%41"
    table = tmp_path / "list.csv"
    image = cohort.data / "sub-001" / "anat" / "sub-001_FLAIR.nii.gz"
    table.write_text(f'id,FLAIR\n"{name.replace(chr(34), chr(34) * 2)}",{image}\n')
    pred = tmp_path / "pred"
    pred.mkdir()
    shutil.copy(cohort.pred / "sub-001_label-lesion_mask.nii.gz", pred / f"{name}_label-lesion_mask.nii.gz")
    spoilt = {
        "Backend": "<img src=x onerror=alert(2)>",
        "Models": [{"Path": "</script><b>", "SHA256": "0a"}],
        "Lesions": [],
    }
    (pred / f"{name}_label-lesion_mask.json").write_text(json.dumps(spoilt))
    written = write_report(tmp_path / "out", table, pred)
    page, index = read(written.pages[name]), read(written.index)
    for shown in (page, index):
        assert len(shown.all("script")) == 1
        assert not shown.all("img")
        assert not shown.all("b") or "SHA256" not in str(shown.all("b"))
        assert not [key for _, attrs in shown.found for key in attrs if key.startswith("on")]
        assert name in "".join(shown.words)
    assert "<img src=x onerror=alert(2)>" in page.text
    assert "Path </script><b>, SHA256 0a" in page.text
    address = next(a["href"] for a in index.all("a") if a["href"].startswith("./"))
    assert unquote(address) == f"./{name}.html"
    assert (tmp_path / "out" / unquote(address)).is_file()


@pytest.mark.parametrize("turned", [False, True])
def test_the_lesion_table_equals_an_independent_computation(turned, tmp_path, phantoms):
    prediction, _ = masks()
    rng = np.random.default_rng(0)
    image = rng.uniform(50, 100, SHAPE)
    probability = rng.uniform(0.5, 1, SHAPE) * prediction
    files = {}
    for key, volume in (("FLAIR", image), ("a_mask", prediction), ("a_probseg", probability)):
        dtype = np.uint8 if key == "a_mask" else np.float32
        nifti = nib.Nifti1Image(volume.astype(dtype), OBLIQUE)
        if turned:  # axes stored as a sagittal scan's
            nifti = nifti.as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
        files[key] = tmp_path / f"{key}.nii.gz"
        nib.save(nifti, files[key])
    page = make_page(read_scan(Case("a", {"FLAIR": files["FLAIR"]}), ["FLAIR"], files["a_mask"]), PROTOCOLS["custom"])
    stored = nib.load(files["a_mask"])
    labels, count = ndimage.label(np.asarray(stored.dataobj), np.ones((3, 3, 3)))
    likely = np.asarray(nib.load(files["a_probseg"]).dataobj)
    expected = []
    for number in range(1, count + 1):
        inside = labels == number
        voxel = np.argwhere(inside).mean(0)
        world = stored.affine[:3, :3] @ voxel + stored.affine[:3, 3]
        volume = inside.sum() * 2.0 * 1.5 * 4.0
        values = [f"{volume:.1f}", *(f"{x:.1f}" for x in world), ", ".join(f"{v:.1f}" for v in voxel)]
        expected.append([*values, f"{likely[inside].mean():.2f}", f"{likely[inside].max():.2f}", "–"])
    expected.sort(key=lambda row: -float(row[0]))
    rows = [row for row in Elements(page.html).rows if row and row[0].isdigit()]
    assert [row[1:] for row in rows] == expected
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert "turned by" in Elements(page.html).text


def test_every_picture_says_what_it_shows_to_those_who_cannot_see_it(report):
    for path in report.iterdir():
        page = read(path)
        assert page.all("html")[0]["lang"] == "en"
        hidden = [attrs for attrs in page.all("svg") if attrs.get("aria-hidden") != "true"]
        assert all(attrs["role"] == "img" and len(attrs["aria-label"]) > 8 for attrs in hidden)
        assert all(attrs["scope"] in ("col", "row") for attrs in page.all("th"))


def test_a_page_without_lesions_reference_or_flair_reads_well():
    empty = np.zeros(SHAPE, bool)
    one = empty.copy()
    one[10:12, 10:12, 7] = True
    text = Elements(make_page(scan(empty), PROTOCOLS["custom"]).html).text
    assert "The predicted mask is empty. The slices run through the middle of the head." in text
    assert "0 predicted lesions" in text
    for prediction, reference, words in (
        (one, None, "1 predicted lesion "),
        (empty, one, "0 of 1 reference lesions found"),
        (one, empty, "1 false lesion "),
        (empty, empty, "Dice with the reference"),
    ):
        page = Elements(make_page(scan(prediction, reference), PROTOCOLS["custom"]).html)
        assert words in page.text
        assert "nan" not in page.text
        assert ("true positive" in page.text) == bool(prediction.any() and reference is not None and reference.any())


def test_the_first_contrast_is_shown_where_there_is_no_flair(cohort, phantoms):
    mask = cohort.pred / "sub-001_label-lesion_mask.nii.gz"
    images = {name: phantoms.image_path(cohort.data, "sub-001", name) for name in ("T1w", "T2w")}
    read_one = read_scan(Case("a", images), ["T1w", "T2w"], mask)
    assert read_one.contrast == "T1w"
    assert read_one.notes == ("There is no FLAIR image: T1w is shown.",)


def test_an_image_on_another_grid_is_brought_to_that_of_the_mask(tmp_path, phantoms):
    images, lesions = phantoms.make_subject(0)
    phantoms.save(tmp_path / "FLAIR.nii.gz", images["FLAIR"])
    coarse = np.diag([2.0, 2.0, 2.0, 1.0])
    phantoms.save(tmp_path / "a_mask.nii.gz", lesions[::2, ::2, ::2], coarse, np.uint8)
    seen = read_scan(Case("a", {"FLAIR": tmp_path / "FLAIR.nii.gz"}), ["FLAIR"], tmp_path / "a_mask.nii.gz")
    np.testing.assert_allclose(seen.image, images["FLAIR"][::2, ::2, ::2].astype(np.float32), rtol=1e-5, atol=0.01)
    assert seen.notes == ("FLAIR is shown on the grid of the mask, by the headers.",)


def test_a_reference_on_another_grid_is_a_bad_case(tmp_path, phantoms, cohort):
    mask = cohort.pred / "sub-001_label-lesion_mask.nii.gz"
    reference = phantoms.save(tmp_path / "r.nii.gz", np.ones((8, 8, 8)), dtype=np.uint8)
    case = Case("a", {"FLAIR": phantoms.image_path(cohort.data, "sub-001")}, reference)
    with pytest.raises(ValueError, match=r"different grids: bring one to the other's\.$"):
        read_scan(case, ["FLAIR"], mask)


def test_a_bad_case_does_not_stop_the_others_and_is_named(cohort, rsanet, tmp_path):
    pred = shutil.copytree(cohort.pred, tmp_path / "pred")
    (pred / "sub-002_label-lesion_mask.nii.gz").write_bytes(b"nonsense")
    out = tmp_path / "out"
    code, words, err = rsanet("report", out, "--data", cohort.data, "--pred", pred)
    assert code == 1
    assert err == f"rsanet: 1 of 3 cases has no page: sub-002. The others are in {out / 'index.html'}.\n"
    assert "2/3  sub-002: no page: " in words
    assert sorted(path.name for path in out.iterdir()) == ["index.html", "sub-001.html", "sub-003.html"]
    assert f"{pred / 'sub-002_label-lesion_mask.nii.gz'} cannot be read" in read(out / "index.html").text


def test_where_every_case_is_bad_nothing_is_written(cohort, rsanet, tmp_path):
    (tmp_path / "pred").mkdir()
    (tmp_path / "pred" / "sub-001_label-lesion_mask.nii.gz").write_bytes(b"nonsense")
    code, _, err = rsanet("report", tmp_path / "out", "--data", cohort.data, "--pred", tmp_path / "pred")
    assert code == 1
    assert err.startswith("rsanet: No case has a page: ")
    assert not (tmp_path / "out").exists()


def test_pages_are_kept_unless_overwrite_is_given(cohort, rsanet, tmp_path):
    (tmp_path / "sub-002.html").write_text("precious")
    options = ["report", tmp_path, "--data", cohort.data, "--pred", cohort.pred, "--subjects", "sub-002"]
    code, _, err = rsanet(*options)
    assert code == 1
    assert err == f"rsanet: {tmp_path} already has sub-002.html: give another folder, or --overwrite to replace them.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["sub-002.html"]
    assert rsanet(*options, "--overwrite")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "sub-002.html"]
    assert "precious" not in (tmp_path / "sub-002.html").read_text()


@pytest.mark.parametrize("name", ["report.html", "report.jpeg", "report.nii.gz"])
def test_a_name_that_is_neither_a_folder_nor_a_picture_is_refused(name, cohort, rsanet, tmp_path):
    code, _, err = rsanet("report", tmp_path / name, "--data", cohort.data, "--pred", cohort.pred)
    assert code == 1
    assert err.startswith(f"rsanet: {tmp_path / name} is neither a picture nor a folder: ")
    assert not list(tmp_path.iterdir())


def test_a_case_named_index_does_not_take_the_cohorts_page(cohort, tmp_path):
    image = cohort.data / "sub-001" / "anat" / "sub-001_FLAIR.nii.gz"
    (tmp_path / "list.csv").write_text(f"id,FLAIR\nindex,{image}\n")
    (tmp_path / "pred").mkdir()
    shutil.copy(cohort.pred / "sub-001_label-lesion_mask.nii.gz", tmp_path / "pred" / "index_mask.nii.gz")
    written = write_report(tmp_path / "out", tmp_path / "list.csv", tmp_path / "pred")
    assert written.pages["index"].name == "case-index.html"
    assert "./case-index.html" in written.index.read_text()


def test_how_a_mask_was_made_is_said_by_its_json_or_else_by_the_table(cohort, tmp_path):
    pred = shutil.copytree(cohort.pred, tmp_path / "pred")
    sidecar = {"Models": [{"Path": "run/model.safetensors", "SHA256": "abc"}], "Threshold": 0.5, "MirrorImages": True,
               "Window": [[48, 48, 48]], "VoxelSize": [1.0, 1.0, 1.0], "Versions": {"torch": "2.13.0"},
               "GeneratedBy": [{"Name": "rsanet", "Version": "0.1.0"}]}  # fmt: skip
    (pred / "sub-001_label-lesion_mask.json").write_text(json.dumps(sidecar))
    (pred / "sub-002_label-lesion_mask.json").write_text("{")
    (pred / "predictions.csv").write_text(
        "case,mask,lesions,load_mm3,seconds,backend,window,made_by\nsub-002,m,1,2,3.5,cpp,64×64×64,a model\n"
    )
    out = tmp_path / "out"
    write_report(out, cohort.data, pred)
    text = read(out / "sub-001.html").text
    for words in (
        "Path run/model.safetensors, SHA256 abc",
        "48, 48, 48",
        "Mirror images averaged yes",
        "torch 2.13.0",
        "Made by rsanet 0.1.0",
    ):
        assert words in text
    text = read(out / "sub-002.html").text
    assert "a model" in text
    assert "64×64×64" in text
    assert "sub-002_label-lesion_mask.json beside the mask cannot be read." in text


def test_what_the_prediction_warned_of_is_on_its_page_and_named_on_the_index(cohort, tmp_path):
    pred = shutil.copytree(cohort.pred, tmp_path / "pred")
    told = ["sub-001: the images show a head with its skull.", "sub-001: <b>3</b> voxels."]
    (pred / "sub-001_label-lesion_mask.json").write_text(json.dumps({"Warnings": told}))
    (pred / "predictions.csv").write_text(
        "case,mask,lesions,load_mm3,seconds,backend,window,made_by,warnings\n"
        "sub-001,m,1,2,3,cpp,64,a,what the JSON says better\nsub-002,m,1,2,3,cpp,64,a,sub-002: of the table.\n"
    )
    out = tmp_path / "out"
    write_report(out, cohort.data, pred)
    texts = [read(out / f"sub-00{number}.html").text for number in (1, 2, 3)]
    assert all(f"Warning of the prediction: {words}" in texts[0] for words in told)
    assert "says better" not in texts[0]
    assert "Warning of the prediction: sub-002: of the table." in texts[1]
    assert "Warning of" not in texts[2]
    index = read(out / "index.html").text
    assert "2 masks with warnings, which the pages show: sub-001, sub-002." in index


def test_the_index_has_the_scores_of_evaluate_and_dashes_without_a_reference(report, cohort, phantoms):
    rows = {row[1]: row for row in read(report / "index.html").rows if len(row) > 5}
    for name in ("sub-001", "sub-002"):
        pair = [np.asarray(nib.load(path).dataobj) for path in
                (cohort.pred / f"{name}_label-lesion_mask.nii.gz", phantoms.mask_path(cohort.data, name))]  # fmt: skip
        numbers = evaluate_case(*pair, (1, 1, 1))
        assert rows[name][2:] == [
            str(numbers.predicted_lesions),
            *(f"{load / 1000:.2f}" for load in (numbers.predicted_mm3, numbers.reference_mm3)),
            f"{numbers.dice:.3f}", str(numbers.detected_lesions), str(numbers.reference_lesions),
            str(numbers.false_lesions), f"{numbers.lesion_f1:.3f}",
        ]  # fmt: skip
    assert rows["sub-003"][4:] == ["–"] * 6


def test_attention_maps_are_drawn_and_a_model_that_does_not_fit_costs_a_remark(cohort, tmp_path):
    torch.manual_seed(0)
    network = RSANet(3, 2, channels=(8, 16), dropout=0.0).eval()
    fits = Segmenter(network, ("FLAIR", "T1w", "T2w"), (16, 16, 16), None, CPU, FP32)
    write_report(tmp_path / "one", cohort.data, cohort.pred, fits, subjects=["sub-001"])
    page = read(tmp_path / "one" / "sub-001.html")
    labels = [attrs["aria-label"] for attrs in page.all("svg") if "attention map" in attrs.get("aria-label", "")]
    assert [label.split()[0] for label in labels] == ["coronal", "sagittal", "axial"]
    assert "A map shows how information flows, not where lesions are." in page.text
    other = Segmenter(network, ("FLAIR", "T1w", "PDw"), (16, 16, 16), None, CPU, FP32)
    write_report(tmp_path / "two", cohort.data, cohort.pred, other, subjects=["sub-001"])
    assert "No attention maps: sub-001 has no PDw." in read(tmp_path / "two" / "sub-001.html").text


def test_raters_and_other_pathology_are_said_and_not_counted(tmp_path, phantoms):
    images, lesions = phantoms.make_subject(1)
    labels = lesions.astype(np.uint8)
    labels[:4] = 2
    case = tmp_path / "wmh" / "Utrecht" / "0"
    for name in ("FLAIR", "T1"):
        phantoms.save(case / "pre" / f"{name}.nii.gz", images[{"T1": "T1w"}.get(name, name)])
    phantoms.save(case / "wmh.nii.gz", labels, dtype=np.uint8)
    predicted = lesions.copy()
    predicted[:2, :2, :2] = True  # 8 voxels of other pathology
    phantoms.save(tmp_path / "masks" / "Utrecht_0_label-lesion_mask.nii.gz", predicted, dtype=np.uint8)
    report = write_report(tmp_path / "pages", tmp_path / "wmh", tmp_path / "masks", layout="wmh2017")
    (page,) = report.pages.values()
    assert "8 predicted voxels of other pathology: not shown, and neither right nor wrong." in read(page).text
    assert "1.00 Dice" in read(page).text

    several = tmp_path / "raters"
    phantoms.write_subject(several, "sub-001", 1, mask=False)
    for rater, mask in (("a", lesions), ("b", lesions & False)):
        name = f"sub-001_desc-{rater}_label-lesion_mask.nii.gz"
        phantoms.save(several / "derivatives" / f"rater-{rater}" / "sub-001" / "anat" / name, mask, dtype=np.uint8)
    phantoms.save(tmp_path / "again" / "sub-001_label-lesion_mask.nii.gz", lesions, dtype=np.uint8)
    report = write_report(tmp_path / "union", several, tmp_path / "again", raters="union")
    for file in (report.index, *report.pages.values()):
        assert "Reference: union of" in read(file).text


def test_a_folder_that_cannot_be_made_is_refused_before_the_first_page(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file: give a folder for index"):
        _check_folder(tmp_path / "file" / "pages", [], overwrite=False)
