"""Real scans, masks and label maps, where they lie beside the checkout: each opens, and keeps its grid and header."""

import warnings

import nibabel as nib
import numpy as np
import pytest
from segment.bright import CPU, FP32, BrightOnFirst
from support import shared_data

from rsanet.segment import evaluate, predict
from rsanet.segment.cases import Case
from rsanet.segment.data import preprocessing
from rsanet.segment.datasets import check_case
from rsanet.segment.segmenter import Segmenter
from rsanet.segment.volumes import DataWarning, load_grid, read_image, read_mask, read_volume, tissue_mask

ROOT = shared_data()
CONTRASTS = ("FLAIR", "T1w", "T2w")
pytestmark = pytest.mark.skipif(ROOT is None, reason="the folder shared/data of real scans is not beside the checkout")

FORMS = ["sform_code", "srow_x", "srow_y", "srow_z", "qform_code", "quatern_b", "quatern_c", "quatern_d"]
KEPT = [*FORMS, "qoffset_x", "qoffset_y", "qoffset_z", "pixdim", "xyzt_units"]


def files(*patterns):
    """Files below the folder, for a test each; without the folder one that says why it is skipped."""
    if ROOT is None:
        return [""]
    return [path.relative_to(ROOT).as_posix() for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def model(*contrasts):
    """Lesions are what is bright on the first contrast, wherever the window lies."""
    return Segmenter(BrightOnFirst(1.2), contrasts, (64, 64, 64), None, CPU, FP32)


def check_mask(path, image, found):
    """A predicted mask has the grid and the header of its image, and marks what is bright there."""
    mask, image = nib.load(path), nib.load(image)
    assert mask.shape == image.shape
    assert mask.affine.tobytes() == image.affine.tobytes()
    for key in KEPT:
        assert mask.header[key].tobytes() == image.header[key].tobytes(), key
    lesions, values = np.asarray(mask.dataobj) > 0, np.asarray(image.dataobj, np.float32)
    assert lesions.any()
    tissue = values[tissue_mask(values)]
    assert values[lesions].min() > tissue.mean() + 1.1 * tissue.std()
    assert found.load_mm3 == pytest.approx(lesions.sum() * abs(np.linalg.det(image.affine[:3, :3])))


@pytest.mark.parametrize("name", files("ljubljana/mni/*/[FT]*.nii.gz", "ljubljana/longitudinal/*/study*.nii.gz"))
def test_every_image_opens(name):
    voxels, image = read_image(ROOT / name)
    assert voxels.shape == image.shape
    assert np.isfinite(voxels).all()
    assert image.affine.tobytes() == nib.load(ROOT / name).affine.tobytes()
    assert 0.05 < tissue_mask(voxels).mean() < 0.9


# Reading the large ones takes seconds each; of them, the headers of all and the voxels of two are read.
@pytest.mark.parametrize(
    "name",
    files(
        "ljubljana/mni/*/lesions.nii.gz",
        "ljubljana/longitudinal/*/[gb]*.nii.gz",
        "ljubljana/native/patient01/*.nii.gz",
    ),
)
def test_every_mask_reads_as_a_mask(name):
    mask, image = read_mask(ROOT / name)
    assert mask.dtype == bool
    assert np.count_nonzero(mask) == np.count_nonzero(np.asarray(nib.load(ROOT / name).dataobj))
    assert image.shape == mask.shape


@pytest.mark.parametrize("name", files("ljubljana/native/*/*.nii.gz", "label-maps/*.nii.gz"))
def test_every_large_volume_has_a_grid(name):
    grid, image = load_grid(ROOT / name), nib.load(ROOT / name)
    assert (grid.shape, grid.affine.tobytes()) == (image.shape, image.affine.tobytes())


@pytest.mark.parametrize("name", files("label-maps/*_0[16].nii.gz"))
def test_a_label_map_opens_and_is_no_mask(name):
    voxels, _ = read_volume(ROOT / name)
    assert voxels.dtype == np.float32
    assert np.array_equal(voxels, np.asarray(nib.load(ROOT / name).dataobj))
    assert np.array_equal(voxels, np.round(voxels))
    with pytest.raises(ValueError, match="is not a binary mask: besides 0 it has 2, 3"):
        read_mask(ROOT / name)


@pytest.mark.filterwarnings("ignore::rsanet.segment.volumes.DataWarning")
@pytest.mark.parametrize(
    "name",
    [
        "mni/patient26/FLAIR",
        "mni/patient26/T1POST",
        "longitudinal/patient01/study1_FLAIR",
        "longitudinal/patient20/study2_T1W",
        "longitudinal/patient03/study1_T2W",
    ],
)
def test_an_image_alone_is_predicted_on_its_own_grid_under_its_own_header(tmp_path, name):
    path = ROOT / "ljubljana" / f"{name}.nii.gz"
    found = predict(model("FLAIR"), path, tmp_path / "mask.nii.gz")
    check_mask(tmp_path / "mask.nii.gz", path, found)


@pytest.mark.filterwarnings("ignore::rsanet.segment.volumes.DataWarning")
def test_the_contrasts_of_a_session_are_predicted_together_each_from_its_own_grid(tmp_path):
    folder = ROOT / "ljubljana" / "longitudinal" / "patient01"
    images = {
        name: folder / f"study1_{file}.nii.gz" for name, file in zip(CONTRASTS, ("FLAIR", "T1W", "T2W"), strict=True)
    }
    assert len({nib.load(path).shape for path in images.values()}) == 3
    found = predict(model(*CONTRASTS), images, tmp_path / "mask.nii.gz")
    check_mask(tmp_path / "mask.nii.gz", images["FLAIR"], found)
    # The reference of the pair is on a grid of its own.
    (reason,) = evaluate(tmp_path / "mask.nii.gz", folder / "gt.nii.gz").failures.values()
    assert reason.count(". ") == 0
    assert "gt.nii.gz" in reason


@pytest.mark.parametrize(
    "name", files("ljubljana/mni/patient0[12]/lesions.nii.gz", "ljubljana/longitudinal/patient0[13]/gt.nii.gz")
)
def test_a_mask_agrees_with_itself_and_has_the_volume_of_its_voxels(name):
    (numbers,) = evaluate(ROOT / name, ROOT / name).cases
    mask = nib.load(ROOT / name)
    assert (numbers.dice, numbers.hd95_mm, numbers.assd_mm, numbers.false_lesions) == (1, 0, 0, 0)
    volume = np.count_nonzero(np.asarray(mask.dataobj)) * abs(np.linalg.det(mask.affine[:3, :3]))
    assert numbers.reference_mm3 == pytest.approx(volume, rel=1e-6)
    assert numbers.predicted_mm3 == numbers.reference_mm3


@pytest.mark.parametrize(("patient", "off"), [("patient01", True), ("patient12", False)])
def test_masks_that_lie_half_a_voxel_apart_by_their_headers_are_compared_with_a_warning(tmp_path, patient, off):
    files = [ROOT / "ljubljana" / "native" / patient / f"{name}.nii.gz" for name in ("lesions", "brainmask")]
    parts = [tmp_path / path.name for path in files]
    for path, part in zip(files, parts, strict=True):  # the whole brain takes a minute
        nib.save(nib.load(path).slicer[80:110, 240:300, 260:320], part)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        evaluation = evaluate(*parts)
    assert not evaluation.failures
    assert [entry.category for entry in told] == [DataWarning] * off
    lesions, brain = (np.asarray(nib.load(part).dataobj) > 0 for part in parts)
    assert lesions.any()
    assert evaluation.cases[0].tpr == pytest.approx(np.count_nonzero(lesions & brain) / np.count_nonzero(brain))


@pytest.mark.filterwarnings("ignore::rsanet.segment.volumes.DataWarning")
def test_a_patient_in_the_space_of_mni_with_a_qform_alone_can_be_trained_on():
    folder = ROOT / "ljubljana" / "mni" / "patient26"
    images = {"FLAIR": folder / "FLAIR.nii.gz", "T1w": folder / "T1.nii.gz"}
    case = Case("patient26", images, folder / "lesions.nii.gz")
    check_case(case, list(images), require_mask=True)
    ready = preprocessing()(case)
    lesions = ready["mask"][0].numpy() > 0
    assert lesions.sum() == np.count_nonzero(np.asarray(nib.load(case.mask).dataobj))
    flair = ready["image"][0].numpy()
    assert flair[lesions].mean() > flair[~lesions].mean() + 1
