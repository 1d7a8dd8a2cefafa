"""One head, stored in every way that NIfTI allows: the same lesions at the same places, and the same numbers."""

import itertools
import tempfile
import warnings
from dataclasses import astuple, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.distance import cdist
from segment.stored_heads import FORMS, FORMS_OF_RIGID, NONE, Storage, make_affine, make_head, places, segmenter

from rsanet.segment import evaluate, predict
from rsanet.segment.cases import Case
from rsanet.segment.data import preprocessing
from rsanet.segment.datasets import check_case
from rsanet.segment.html.scan import read_scan
from rsanet.segment.metrics import PROTOCOLS, dice
from rsanet.segment.report import View
from rsanet.segment.volumes import DataWarning

FORM_FIELDS = ["quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"]
KEPT = ["sform_code", "qform_code", "xyzt_units", "srow_x", "srow_y", "srow_z", *FORM_FIELDS]
ORDERS = list(itertools.permutations(range(3)))
FLIPS = list(itertools.product((False, True), repeat=3))
# Types with slopes and the largest value that may be stored for 0: what they hold is from 0 to 240.
TYPES = {
    "u1": ((1, 2, 4), 15),
    "i2": ((-1, 0.1, 1), 900),
    "u2": ((1, 0.5, 0.1, 4), 900),
    "i4": ((1, 0.01, 4), 900),
    "f4": ((1, 0.5, 2), 0),
    "f8": ((1, 0.5, 4), 0),
}

fixed = settings(
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


@st.composite
def affines(draw, sizes=(0.5, 0.9, 1.0, 1.2, 3.0)):
    """Affines, and whether they are rigid but for the voxel size."""
    zooms = draw(st.tuples(*[st.sampled_from(sizes)] * 3))
    turns = draw(st.tuples(*[st.sampled_from([0, 3, -11, 24])] * 3))
    shear = draw(st.sampled_from([(0, 0, 0), (0, 0, 0), (0.25, 0, 0), (-0.1, 0.2, 0.15)]))
    origin = draw(st.sampled_from([(0, 0, 0), (-90.3, 126.7, -72.1)]))
    return make_affine(turns, zooms, shear, origin), not any(shear)


@st.composite
def storages(draw, rigid, margin=None, values=240):
    kind = draw(st.sampled_from(list(TYPES)))
    slopes, offset = TYPES[kind]
    if values == 1:  # a mask; what stands for its 1 is larger where the slope is smaller
        slopes = [slope for slope in slopes if slope <= 1]
    return Storage(
        order=draw(st.sampled_from(ORDERS)),
        flips=draw(st.sampled_from(FLIPS)),
        margin=draw(st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * 3)) if margin is None else margin,
        dtype=draw(st.sampled_from("<>")) + kind,
        slope=draw(st.sampled_from(slopes)),
        offset=draw(st.sampled_from([0, offset])),
        version=draw(st.sampled_from([1, 2])),
        suffix=draw(st.sampled_from([".nii", ".nii.gz"])),
        forms=draw(st.sampled_from(FORMS_OF_RIGID if rigid else FORMS)),
        dimensions=draw(st.sampled_from([3, 3, 4])),
    )


def head_voxels(image, affine, shape):
    """The mask of a file on the head's own voxels, by its affine alone."""
    found = nib.affines.apply_affine(np.linalg.inv(affine), places(np.asarray(image.dataobj) > 0, image.affine))
    voxels = np.round(found).astype(int)
    assert np.abs(found - voxels).max(initial=0) < 0.01, "the voxels of the file are not those of the head"
    mask = np.zeros(shape, bool)
    mask[tuple(voxels.T)] = True
    assert mask.sum() == len(voxels)
    return mask


@pytest.mark.parametrize("air", [False, True])
@settings(fixed, max_examples=40)
@given(st.data(), affines(), st.integers(0, 5))
def test_lesions_lie_at_the_same_places_however_the_scans_are_stored(air, data, space, seed):
    affine, rigid = space
    head = make_head(seed, air)
    with tempfile.TemporaryDirectory() as folder:
        images = {}
        for name, voxels in head.images.items():
            storage = data.draw(storages(rigid), name)
            images[name] = storage.save(Path(folder) / name, voxels, affine)
        out = Path(folder) / "mask.nii.gz"
        with warnings.catch_warnings():
            warnings.simplefilter("error", DataWarning)  # there is nothing to tell of
            found = predict(segmenter(), images, out, min_lesion_mm3=0.01)
        mask, flair = nib.load(out), nib.load(images["FLAIR"])
        assert np.array_equal(head_voxels(mask, affine, head.lesions.shape), head.lesions)
        assert mask.shape == flair.shape[:3]
        for key in KEPT:  # the mask is NIfTI-1, whose numbers are of 32 bits
            assert np.array_equal(mask.header[key], flair.header[key].astype(mask.header[key].dtype)), key
    assert found.lesions == ndimage.label(head.lesions, np.ones((3, 3, 3)))[1]
    assert found.load_mm3 == pytest.approx(head.lesions.sum() * abs(np.linalg.det(affine[:3, :3])), rel=1e-5)


@settings(fixed, max_examples=40)
@given(st.data(), affines(), st.integers(0, 5), st.sampled_from(["custom", "isbi2015", "msseg2016"]))
def test_the_numbers_are_the_same_however_the_masks_are_stored(data, space, seed, protocol):
    affine, rigid = space
    head = make_head(seed)
    with tempfile.TemporaryDirectory() as folder:
        margin = data.draw(st.sampled_from([NONE, ((1, 2), (0, 3), (2, 0))]))
        masks = head.other, head.lesions
        files = [Path(folder) / name for name in ("base", "base-ref", "pred", "ref", "flair")]
        plain = Storage(dtype="<u1", version=2, forms="sform")
        base = [plain.save(path, mask, affine) for path, mask in zip(files[:2], masks, strict=True)]
        pred, ref = (
            data.draw(storages(rigid, margin, values=1), what).save(path, mask, affine)
            for path, mask, what in zip(files[2:4], masks, ("prediction", "reference"), strict=True)
        )
        flair = data.draw(storages(rigid, margin), "FLAIR").save(files[4], head.images["FLAIR"], affine)
        with warnings.catch_warnings():
            warnings.simplefilter("error", DataWarning)
            numbers, wanted = evaluate(pred, ref, protocol=protocol), evaluate(*base, protocol=protocol)
            view = View.of(flair, ref, pred, protocol=PROTOCOLS[protocol])
            scan = read_scan(Case("head", {"FLAIR": flair}, ref), ["FLAIR"], pred)
    assert not numbers.failures
    assert not wanted.failures
    agree(numbers.cases[0], wanted.cases[0], rel=1e-4)
    agree(view.metrics, numbers.cases[0], rel=1e-4)
    assert (scan.prediction.sum() * scan.voxel_mm3, scan.reference.sum() * scan.voxel_mm3) == pytest.approx(
        (numbers.cases[0].predicted_mm3, numbers.cases[0].reference_mm3), rel=1e-4
    )
    voxel_mm3 = abs(np.linalg.det(affine[:3, :3]))
    assert wanted.cases[0].reference_mm3 == pytest.approx(head.lesions.sum() * voxel_mm3, rel=1e-5)
    assert wanted.cases[0].predicted_mm3 == pytest.approx(head.other.sum() * voxel_mm3, rel=1e-5)
    both = np.count_nonzero(head.lesions & head.other)
    assert wanted.cases[0].dice == pytest.approx(2 * both / (head.lesions.sum() + head.other.sum()))
    assert (wanted.cases[0].hd95_mm, wanted.cases[0].assd_mm) == pytest.approx(distances(head, affine), rel=1e-4)


def agree(one, other, rel):
    """The same numbers of a case, but for its name."""
    for key, value in vars(other).items():
        if key == "size_classes":
            assert [astuple(entry) for entry in one.size_classes] == [astuple(entry) for entry in value]
        elif key != "subject":
            assert vars(one)[key] == pytest.approx(value, rel=rel, nan_ok=True), key


def distances(head, affine):
    """HD95 and ASSD of a head's two masks in world space, from every voxel of one surface to every one of the other."""
    surfaces = [places(mask & ~ndimage.binary_erosion(mask), affine) for mask in (head.other, head.lesions)]
    apart = cdist(*surfaces)
    there, back = apart.min(1), apart.min(0)
    return max(np.percentile(there, 95), np.percentile(back, 95)), np.concatenate([there, back]).mean()


@settings(fixed, max_examples=30)
@given(st.data(), affines(), st.integers(0, 5))
def test_training_takes_a_mask_on_the_images_voxels_however_it_is_stored(data, space, seed):
    affine, rigid = space
    head = make_head(seed)
    with tempfile.TemporaryDirectory() as folder:
        margin = data.draw(st.sampled_from([NONE, ((1, 2), (0, 3), (2, 0))]))
        images = {
            name: data.draw(storages(rigid, margin), name).save(Path(folder) / name, voxels, affine)
            for name, voxels in head.images.items()
        }
        mask = data.draw(storages(rigid, margin, values=1), "mask").save(Path(folder) / "mask", head.lesions, affine)
        case = Case("head", images, mask)
        check_case(case, list(images), require_mask=True)
        ready = preprocessing()(case)
    bright, dark = ready["image"].as_tensor()
    lesions = ((bright > 1) & (dark < -1)).numpy()
    assert lesions.sum() == head.lesions.sum()
    assert np.array_equal(ready["mask"][0].numpy() > 0, lesions)


@settings(fixed, max_examples=12)
@given(st.data(), affines(sizes=(0.9, 1.0, 1.2)), st.integers(0, 5))
def test_lesions_of_a_model_with_its_own_voxel_size_do_not_turn_with_the_axes(data, space, seed):
    affine, rigid = space
    head = make_head(seed)
    model = replace(segmenter(), spacing=(0.837, 0.719, 0.773))
    found = []
    for attempt in ("plain", "turned"):
        with tempfile.TemporaryDirectory() as folder:
            images = {}
            for name, voxels in head.images.items():
                storage = Storage(forms="sform") if attempt == "plain" else data.draw(storages(rigid, NONE), name)
                images[name] = storage.save(Path(folder) / name, voxels, affine)
            predict(model, images, Path(folder) / "mask.nii.gz")
            found.append(head_voxels(nib.load(Path(folder) / "mask.nii.gz"), affine, head.lesions.shape))
    plain, turned = found
    # The grid that MONAI resamples to moves by a fraction of a voxel with the rounding of an affine.
    assert dice(plain, turned) > 0.93
