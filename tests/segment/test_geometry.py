"""One place for volumes, distances and grids: sheared voxels, and masks that are stored otherwise than their image."""

import csv
import json
import re
import warnings
from dataclasses import replace
from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel import orientations
from support import shared_data

from rsanet import RSANet
from rsanet.integrations.monai import LesionMask
from rsanet.segment import evaluate, geometry, predict
from rsanet.segment.cases import Case
from rsanet.segment.data import LoadCase
from rsanet.segment.datasets import check_case, find_cases
from rsanet.segment.environment import Precision
from rsanet.segment.evaluation import write_csv, write_json
from rsanet.segment.html.page import make_page
from rsanet.segment.html.scan import read_scan
from rsanet.segment.metrics import PROTOCOLS, Protocol, evaluate_case
from rsanet.segment.raters import LabelledMask, RatersMask
from rsanet.segment.report import View
from rsanet.segment.segmenter import Segmenter
from rsanet.segment.simulation.truth import describe_lesions
from rsanet.segment.volumes import DataWarning, read_mask, same_grid

SHAPE = (11, 14, 12)
TURNS = [
    np.array([(axis, sign) for axis, sign in zip(order, signs, strict=True)])
    for order, signs in product(permutations(range(3)), product((1, -1), repeat=3))
]


def sheared(shear=1.6, zooms=(2.0, 2.0, 2.0)):
    affine = np.diag([*zooms, 1.0])
    affine[1, 2] = shear
    affine[:3, 3] = (-20.5, 13.25, 7)
    return affine


def oblique(zooms=(0.8, 0.47, 0.47), degrees=(11, -7, 3), origin=(-80.1, -101.3, -72.6)):
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        one, two = (other for other in range(3) if other != axis)
        turn = np.eye(3)
        turn[one, one] = turn[two, two] = np.cos(angle)
        turn[one, two], turn[two, one] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = matrix @ np.diag(zooms), origin
    return affine


def image_of(voxels, affine, *, sform=1, qform=0, kind=nib.Nifti1Image):
    image = kind(voxels.astype(np.uint8) if voxels.dtype == bool else voxels, affine)
    image.set_sform(affine if sform else None, sform)
    image.set_qform(affine if qform else None, qform)
    return image


def save(path, voxels, affine, **forms):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image_of(voxels, affine, **forms), path)
    return path


def pair(seed=0, shape=SHAPE):
    """A prediction and a reference of several lesions, at no place that a mirror image has, too."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((2, *shape), bool)
    for mask in masks:
        for _ in range(4):
            start, size = rng.integers(0, np.array(shape) - 3), rng.integers(1, 4, 3)
            mask[tuple(slice(a, a + b) for a, b in zip(start, size, strict=True))] = True
    masks[0] |= masks[1] & (rng.random(shape) < 0.7)
    return masks[0], masks[1]


def turned(voxels, affine, turn):
    """The same volume in space, its axes flipped and swapped."""
    return orientations.apply_orientation(voxels, turn), affine @ orientations.inv_ornt_aff(turn, voxels.shape)


def told(call, *given):
    """What a call returns, and the warnings on data that it gave."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = call(*given)
    return result, [str(warning.message) for warning in seen if issubclass(warning.category, DataWarning)]


# --- volumes and distances --------------------------------------------------------------------------------


def test_the_volume_of_a_sheared_mask_is_that_of_the_determinant(tmp_path):
    mask = np.zeros((20, 22, 24), bool)
    mask[3:7, 4:9, 5:9] = True
    path = save(tmp_path / "m.nii.gz", mask, sheared())
    case = evaluate(path, path, protocol=Protocol(minimum_mm3=640)).cases[0]
    assert (case.reference_mm3, case.reference_lesions) == (640, 1)
    assert evaluate(path, path, protocol=Protocol(minimum_mm3=641)).cases[0].reference_lesions == 0


@pytest.mark.parametrize("affine", [sheared(), sheared(0.8), sheared(-3, (1, 1, 5)), oblique(), sheared(0)])
def test_distances_are_those_between_places_in_the_world(tmp_path, affine):
    pred, ref = pair(3)
    paths = [save(tmp_path / f"{n}.nii", mask, affine) for n, mask in enumerate((pred, ref))]
    ones, others = (
        nib.affines.apply_affine(affine, [at for at in np.argwhere(mask) if on_surface(mask, at)])
        for mask in (pred, ref)
    )
    apart = np.linalg.norm(ones[:, None] - others[None], axis=-1)
    there, back = apart.min(1), apart.min(0)
    case = evaluate(*paths).cases[0]
    hd95 = max(np.percentile(there, 95), np.percentile(back, 95))
    assert (case.hd95_mm, case.assd_mm) == pytest.approx((hd95, np.concatenate((there, back)).mean()), rel=1e-6)


def on_surface(mask, at):
    padded = np.pad(mask, 1)
    steps = np.concatenate((np.eye(3, dtype=int), -np.eye(3, dtype=int)))
    return not all(padded[tuple(at + 1 + step)] for step in steps)


def test_on_straight_voxels_a_spacing_and_its_affine_give_the_same_numbers_to_the_last_digit():
    pred, ref = pair(1)
    spacing = (0.9, 1.1, 3.0)
    straight = evaluate_case(pred, ref, spacing)
    assert evaluate_case(pred, ref, np.diag([*spacing, 1])) == straight
    assert evaluate(pred, ref, spacing=np.diag([*spacing, 1])).cases[0] == replace(straight, subject="case")
    assert straight.reference_mm3 == pytest.approx(ref.sum() * 2.97, rel=1e-15)
    for bad in ((1, 1), (1, 1, 0), (1, 1, np.nan), np.zeros((4, 4)), np.eye(3)):
        with pytest.raises(ValueError, match="give three voxel sizes in mm, or an affine"):
            evaluate_case(pred, ref, bad)


@pytest.mark.parametrize("affine", [sheared(), oblique(), np.diag([0.9, 1.1, 3, 1])])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_order_of_axes_gives_the_same_numbers_to_the_last_digit(tmp_path, affine, protocol):
    pred, ref = pair(2)
    wanted = evaluate_case(pred, ref, affine, PROTOCOLS[protocol])
    for turn in TURNS:
        volumes = [turned(mask, affine, turn) for mask in (pred, ref)]
        assert evaluate_case(volumes[0][0], volumes[1][0], volumes[0][1], PROTOCOLS[protocol]) == wanted


def test_predict_evaluate_and_report_agree_on_a_sheared_mask(tmp_path, phantoms):
    images, lesions = phantoms.make_subject(2)
    affine = sheared(0.8)
    flair = save(tmp_path / "FLAIR.nii.gz", images["FLAIR"].astype(np.float32), affine, sform=1)
    reference = save(tmp_path / "ref.nii.gz", lesions, affine)
    torch.manual_seed(0)
    network = RSANet(1, 2, channels=(8, 16), dropout=0.0).eval()
    model = Segmenter(network, ("FLAIR",), (16, 16, 16), None, torch.device("cpu"), Precision("fp32", "32-true"))
    level = float(np.quantile(predict(model, flair).probability, 0.95))
    out = tmp_path / "pred_mask.nii.gz"
    found = predict(model, flair, out, threshold=level, min_lesion_mm3=16, probability_map=True)
    assert 0 < found.load_mm3 == found.mask.sum() * 8
    scores = evaluate(out, reference)
    write_csv(scores, tmp_path / "s.csv")
    write_json(scores, tmp_path / "s.json")
    with (tmp_path / "s.csv").open() as file:
        row = next(csv.DictReader(file))
    content = json.loads((tmp_path / "s.json").read_text())["cases"][0]
    view = View.of(flair, reference, out)
    page = make_page(read_scan(Case("a", {"FLAIR": flair}, reference), ["FLAIR"], out), PROTOCOLS["custom"])
    assert float(row["predicted_mm3"]) == content["predicted_mm3"] == found.load_mm3 == page.load_mm3
    assert json.loads((tmp_path / "pred_mask.json").read_text())["LesionLoad"] == found.load_mm3
    for numbers in (view.metrics, page.metrics):
        assert replace(numbers, subject="") == replace(scores.cases[0], subject="")
    predicted = [lesion for lesion in page.lesions if not lesion.id.startswith("R")]
    assert sum(lesion.volume_mm3 for lesion in predicted) == found.load_mm3
    assert min(lesion.volume_mm3 for lesion in predicted) >= 16
    assert "The voxels of this scan are sheared" in page.html
    truth = describe_lesions(found.mask, affine, np.zeros(found.mask.shape, int), ["lesion"])
    assert sum(lesion["volume_mm3"] for lesion in truth) == found.load_mm3


def test_the_bundle_removes_small_lesions_by_the_determinant():
    from monai.data import MetaTensor

    probability = torch.zeros(1, 6, 6, 6)
    probability[0, 1, 1, :3] = 1
    probability[0, 4, 4, 4] = 1
    data = {"pred": MetaTensor(probability, affine=torch.from_numpy(sheared()))}
    assert LesionMask(min_lesion_mm3=20)(data)["pred"].sum() == 3
    assert LesionMask(min_lesion_mm3=24.1)(data)["pred"].sum() == 0


def test_an_exact_volume_does_not_depend_on_the_order_of_axes():
    affine = oblique()
    volumes = {geometry.voxel_volume(turned(np.zeros(SHAPE), affine, turn)[1]) for turn in TURNS}
    assert len(volumes) == 1
    assert volumes.pop() == pytest.approx(0.8 * 0.47**2, rel=1e-14)


# --- masks that are stored otherwise ----------------------------------------------------------------------


@pytest.mark.parametrize("affine", [np.diag([1.0, 2, 3, 1]), oblique(), oblique(degrees=(45, 45, 0)), sheared()])
def test_a_mask_is_turned_to_its_image_whatever_the_order_of_either(affine):
    mask, _ = pair(4)
    like = image_of(np.zeros(SHAPE, np.uint8), affine)
    for turn in TURNS:
        moved, own = turned(mask, affine, turn)
        back, words = told(geometry.align, moved, image_of(moved, own), like, "m", "i", "resample it")
        assert np.array_equal(back, mask)
        assert words == []
        back.astype(np.uint8).tobytes()  # torch takes no views that run backwards
        assert all(step > 0 for step in back.strides)


def headers(kind, affine):
    """Headers of one grid as other tools write them."""
    if kind == "rounded":
        rounded = affine.copy()
        rounded[:3, 3] += 0.0011
        return {"affine": rounded}
    if kind == "qform":
        return {"affine": affine, "sform": 0, "qform": 1}
    if kind == "decimals":
        return {"affine": np.round(affine, 6)}
    if kind == "NIfTI-2":
        return {"affine": affine, "kind": nib.Nifti2Image}
    return {"affine": affine.astype(np.float32).astype(float)}


@pytest.mark.parametrize("kind", ["rounded", "qform", "decimals", "NIfTI-2", "float32"])
@pytest.mark.parametrize("zooms", [(0.8, 0.8, 0.8), (0.46875, 0.46875, 3.3)])
def test_the_rounding_of_a_header_is_no_other_grid(kind, zooms):
    shape = (512, 512, 320)  # of a large scan, whose far corner a rounding moves most
    affine = oblique(zooms, origin=(-121.2345, 90.111, -200.7))
    space = np.broadcast_to(np.uint8(0), shape)
    like = image_of(space, affine, qform=1)
    options = headers(kind, affine)
    image = image_of(space, options.pop("affine"), **options)
    image = image.from_bytes(image.slicer[:2, :2, :2].to_bytes())  # the header as a file keeps it
    other = type(image)(space, image.affine, image.header)
    assert same_grid(like, other)
    assert told(geometry.align, space, other, like, "m", "i", "resample it")[1] == []


@pytest.mark.parametrize("turn", [TURNS[5], TURNS[6]])
def test_the_rounding_of_a_qform_about_half_a_turn_is_no_other_grid(turn):
    shape, apart = (512, 512, 320), []
    space = np.broadcast_to(np.uint8(0), shape)
    for seed in range(8):
        degrees = np.random.default_rng(seed).uniform(-0.1, 0.1, 3)
        affine = turned(space, oblique((0.8, 0.8, 0.8), degrees), turn)[1]
        header = nib.Nifti1Header()
        header.set_qform(affine, 1)
        rounded = nib.Nifti1Header(header.binaryblock).get_qform()
        apart.append(np.abs(geometry.offsets(shape, rounded, affine)).max())
        mask, like = image_of(space, rounded, sform=0, qform=1), image_of(space, affine)
        found, words = told(geometry.align, space, mask, like, "m", "i", "resample it")
        assert found.shape == shape
        assert bool(words) == (apart[-1] >= geometry.ALIKE)
    assert max(apart) > 0.2, "32 bits of a quaternion say little there"


def test_a_header_half_a_voxel_off_is_taken_with_a_warning_that_names_the_offset(tmp_path):
    affine, mask = np.diag([0.8, 0.5, 0.5, 1.0]), pair(4)[0]
    off = affine.copy()
    off[:3, 3] = (0.4, 0.25, -0.25)
    one = save(tmp_path / "one.nii.gz", mask, affine)
    two = save(tmp_path / "two.nii.gz", *turned(mask, off, TURNS[13]))
    for pred, ref in ((one, two), (two, one)):
        found, words = told(evaluate, pred, ref)
        assert found.cases[0].dice == 1
        assert len(words) == 1
        assert str(pred) in words[0]
        assert str(ref) in words[0]
        assert "0.534 mm" in words[0]
        assert "0.5" in words[0].split("(")[1]


@pytest.mark.parametrize(("steps", "taken"), [(0.005, "quietly"), (0.3, "told"), (0.95, "told"), (1.0, ""), (1.5, "")])
def test_less_than_a_voxel_is_taken_and_a_whole_one_refused(tmp_path, steps, taken):
    affine, mask = oblique((2, 1, 1)), pair(4)[0]
    off = affine.copy()
    off[:3, 3] += affine[:3, 1] * steps
    paths = [save(tmp_path / f"{name}.nii", mask, own) for name, own in (("pred", off), ("ref", affine))]
    found, words = told(evaluate, *paths)
    if not taken:
        (reason,) = found.failures.values()
        assert f"its origin is {steps:g} mm (0, {steps:g}, 0 voxels) off; bring the prediction to the ref" in reason
        return
    assert found.cases[0].dice == 1
    assert bool(words) == (taken == "told")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("sizes", "it has 10×14×12 voxels, not 11×14×12"),
        ("zooms", "its voxels have 1.0×1.0×1.5 mm by its affine, not 1.0×1.0×1.0"),
        ("turned", "its axes are turned by 8.0°"),
        ("slightly turned", "its axes are turned by 2.0°"),
        ("mirrored", "its orientation is LAS, not RAS; its origin is 10 mm (-10, 0, 0 voxels) off"),
        ("moved", "its origin is 30 mm (0, 0, 30 voxels) off"),
        ("neither", "its header has neither qform nor sform"),
        ("qform", "its qform lies on that grid, its sform does not"),
        ("qform of the image", "it lies on the grid of the other's qform, not on that of its sform"),
        ("qforms", "the two agree by their qforms, not by their sforms"),
    ],
)
def test_a_mask_that_lies_elsewhere_is_refused_with_what_differs(tmp_path, change, words):
    affine = np.eye(4)
    mask, own = pair(4)[0], np.eye(4)
    moved = np.eye(4)
    moved[2, 3] = 30
    image, like = image_of(mask, own, qform=1), image_of(mask, affine, qform=1)
    if change == "sizes":
        image = image_of(mask[1:], own)
    elif change in ("zooms", "mirrored"):
        image = image_of(mask, np.diag([1, 1, 1.5, 1]) if change == "zooms" else np.diag([-1.0, 1, 1, 1]))
    elif change in ("turned", "slightly turned"):
        image = image_of(mask, oblique((1, 1, 1), (0, 0, 8 if change == "turned" else 2), (0, 0, 0)))
    elif change == "moved":
        image = image_of(mask, moved)
    elif change == "neither":
        image = image_of(mask, moved, sform=0)
    elif change == "qform":
        image.set_sform(moved, 1)
    elif change == "qform of the image":
        like.set_sform(moved, 4)
    else:
        image.set_sform(moved, 4)
        moved[0, 3] = -20
        like.set_sform(moved, 4)
    nib.save(image, tmp_path / "mask.nii.gz")
    nib.save(like, tmp_path / "image.nii.gz")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # of forms that contradict each other
        (reason,) = evaluate(tmp_path / "mask.nii.gz", tmp_path / "image.nii.gz").failures.values()
    assert reason.startswith(f"{tmp_path / 'mask.nii.gz'} (")
    assert words in reason
    assert "\n" not in reason


@pytest.mark.parametrize("turn", [3, 22, 47])
def test_training_learns_from_a_mask_that_is_stored_in_another_order(tmp_path, phantoms, turn):
    root = phantoms.write_cohort(tmp_path / "data", 2)
    path = phantoms.mask_path(root, "sub-002")
    mask = np.asarray(nib.load(path).dataobj)
    save(path, *turned(mask, np.eye(4), TURNS[turn]))
    case = find_cases(root, require_mask=True)[1]
    loaded = LoadCase()(case)
    assert np.array_equal(loaded["mask"][0].numpy(), mask)
    bright = np.asarray(nib.load(case.images["FLAIR"]).dataobj)
    assert bright[loaded["mask"][0].numpy() > 0].mean() > 150, "the lesions of the phantoms are bright"


def test_an_offset_is_told_once_by_the_check_and_the_reading(tmp_path, phantoms):
    root = phantoms.write_cohort(tmp_path / "data", 1)
    path = phantoms.mask_path(root, "sub-001")
    moved = np.eye(4)
    moved[0, 3] = 0.5
    mask = np.asarray(nib.load(path).dataobj)
    save(path, mask, moved)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        loaded = LoadCase()(find_cases(root, require_mask=True)[0])
    assert np.array_equal(loaded["mask"][0].numpy(), mask)
    assert [str(one.message) for one in seen if one.category is DataWarning] == [
        f"{path} has the voxels of the FLAIR image, but by its header they lie 0.5 mm (0.5, 0, 0 voxels) off: it is "
        "taken voxel by voxel."
    ]


def test_training_refuses_a_mask_elsewhere_in_its_check_and_where_it_is_read(tmp_path, phantoms):
    root = phantoms.write_cohort(tmp_path / "data", 1)
    path = phantoms.mask_path(root, "sub-001")
    moved = np.eye(4)
    moved[0, 3] = 3
    save(path, np.asarray(nib.load(path).dataobj), moved)
    with pytest.raises(ValueError, match=r"another grid than the FLAIR .* its origin is 3 mm \(3, 0, 0 voxels\) off"):
        find_cases(root, require_mask=True)
    with pytest.raises(ValueError, match="its origin is 3 mm"):
        LoadCase()(find_cases(root, require_mask=False)[0])
    with pytest.raises(ValueError, match=r"off; resample it to that image, or repair its header\.$"):
        check_case(find_cases(root, ["FLAIR"], require_mask=False)[0], ["FLAIR"], require_mask=True)


def test_the_contrast_that_a_mask_was_drawn_on_is_named(tmp_path, phantoms):
    root = phantoms.write_cohort(tmp_path / "data", 1)
    other = oblique((1, 1, 1), (2, 0, 0), (0, 0, 0))
    save(phantoms.image_path(root, "sub-001", "T2w"), phantoms.make_subject(1)[0]["T2w"].astype(np.float32), other)
    save(phantoms.mask_path(root, "sub-001"), *turned(phantoms.make_subject(1)[1], other, TURNS[7]))
    with pytest.raises(ValueError, match=r"turned by 2\.0°; put T2w first in --contrasts\.$"):
        find_cases(root, require_mask=True)


def test_raters_may_store_their_masks_in_any_order(tmp_path):
    masks = [pair(seed)[0] for seed in range(3)]
    affine = oblique((1, 1, 2))
    labels = [mask + 2 * (pair(seed + 7)[1] & ~mask) for seed, mask in enumerate(masks)]
    files = [
        save(tmp_path / f"{n}.nii.gz", *turned(label.astype(np.uint8), affine, TURNS[5 * n]))
        for n, label in enumerate(labels)
    ]
    voted = RatersMask("majority", {str(n): LabelledMask(file, "other pathology") for n, file in enumerate(files)})
    mask, grid = voted.read()
    assert same_grid(grid, nib.load(files[0]))
    assert np.array_equal(mask, sum(mask.astype(int) for mask in masks) >= 2)
    assert np.array_equal(voted.ignored(), np.logical_or.reduce([label == 2 for label in labels]))


def test_the_report_turns_reference_probability_and_what_does_not_count(tmp_path, phantoms):
    images, lesions = phantoms.make_subject(1)
    affine = oblique((1, 1, 1.2), (4, 2, -3))
    flair = save(tmp_path / "FLAIR.nii.gz", images["FLAIR"].astype(np.float32), affine)
    labels = lesions.astype(np.uint8)
    labels[:6] = 2
    predicted = np.roll(lesions, 1, 0)
    predicted[3, 3, 3] = True
    plain = LabelledMask(save(tmp_path / "plain.nii.gz", labels, affine), "other pathology")
    wanted = evaluate_files(save(tmp_path / "p_mask.nii.gz", predicted, affine), plain)
    out = save(tmp_path / "b_mask.nii.gz", *turned(predicted, affine, TURNS[29]))
    save(tmp_path / "b_probseg.nii.gz", *turned(predicted.astype(np.float32) * 0.75, affine, TURNS[10]))
    other = LabelledMask(save(tmp_path / "r.nii.gz", *turned(labels, affine, TURNS[44])), "other pathology")
    scan = read_scan(Case("a", {"FLAIR": flair}, other), ["FLAIR"], out)
    page = make_page(scan, PROTOCOLS["custom"])
    view = View.of(flair, other, out)
    for numbers in (page.metrics, view.metrics, evaluate_files(out, other)):
        assert replace(numbers, subject="") == wanted
    assert np.array_equal(scan.probability > 0.5, geometry.to_canonical(predicted, affine)[0])
    np.testing.assert_array_equal(scan.image, geometry.to_canonical(images["FLAIR"].astype(np.float32), affine)[0])


def evaluate_files(pred, ref):
    from rsanet.segment.evaluation import _evaluate_files

    return _evaluate_files(pred, ref, PROTOCOLS["custom"], "")[0]


def test_sessions_half_a_voxel_apart_keep_their_lesions(tmp_path, phantoms):
    images, _ = phantoms.make_subject(1)
    mask = np.zeros(images["FLAIR"].shape, bool)
    mask[[10, 13, 15], 12, 12] = True  # of single voxels
    scans = []
    for number, shift in enumerate((0, 0.5)):
        affine = np.eye(4)
        affine[:3, 3] = shift
        flair = save(tmp_path / f"s{number}_FLAIR.nii.gz", images["FLAIR"].astype(np.float32), affine)
        out = save(tmp_path / f"s{number}_mask.nii.gz", mask, affine)
        scans.append(read_scan(Case(f"s_ses-{number}", {"FLAIR": flair}), ["FLAIR"], out))
    for before, now in (scans, scans[::-1]):
        counts = make_page(now, PROTOCOLS["custom"], before=before).follow_up.counts
        assert {fate: count for fate, count in counts.items() if count} == {"stable": 3}


# --- what counts as a mask --------------------------------------------------------------------------------


def scaled(path, voxels, dtype):
    """Saves numbers as integers with the slope that nibabel finds for them."""
    image = nib.Nifti1Image(voxels.astype(np.float64), np.eye(4))
    image.set_data_dtype(dtype)
    nib.save(image, path)
    assert nib.load(path).dataobj.slope != 1
    return path


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.int32, np.uint16])
def test_labels_that_a_slope_left_beside_whole_numbers_are_read_as_such(tmp_path, dtype):
    one, two = pair(5)
    labels = np.where(two, 2, one)
    path = scaled(tmp_path / "labels.nii.gz", labels, dtype)
    mask = LabelledMask(path, "other pathology")
    assert np.array_equal(mask.read()[0], labels == 1)
    assert np.array_equal(mask.ignored(), labels == 2)
    for value in (1, 255):
        if value == 1 or dtype != np.uint8:
            assert np.array_equal(read_mask(scaled(tmp_path / "m.nii.gz", one * value, dtype))[0], one)
    with pytest.raises(ValueError, match="besides 0 it has 1, 2"):
        read_mask(path)


@pytest.mark.parametrize("dtype", [np.int16, np.uint8])
@pytest.mark.parametrize("values", [(0.3,), (0.3, 0.9), (0.004, 0.5, 1), (0.05, 1)])
def test_a_probability_map_stays_one_whatever_its_slope(tmp_path, dtype, values):
    voxels = np.zeros(SHAPE)
    voxels[0, 0, : len(values)] = values
    with pytest.raises(ValueError, match=r"is not a binary mask: besides 0 it has .*cut a probability map"):
        read_mask(scaled(tmp_path / "p.nii.gz", voxels, dtype))
    with pytest.raises(ValueError, match=r"has the label 0\.\d+: give a mask of 0, 1"):
        LabelledMask(scaled(tmp_path / "p.nii.gz", voxels, dtype), "other pathology").read()


@pytest.mark.parametrize("make", [lambda m: m, lambda m: m * 255, lambda m: m.astype(np.float32) * 7, torch.from_numpy])
def test_arrays_of_zero_and_one_other_number_are_masks_like_files(tmp_path, make):
    pred, ref = pair(6)
    wanted = evaluate(pred, ref, spacing=(1, 1, 2)).cases
    assert evaluate(make(pred), make(ref), spacing=(1, 1, 2)).cases == wanted
    compared = evaluate(pred, ref, spacing=(1, 1, 2), compare=make(ref)).comparison
    assert compared.other.cases[0].dice == 1
    flair = np.full(SHAPE, 100.0)
    assert View.of(flair, make(ref), make(pred), affine=np.diag([1, 1, 2, 1])).metrics.dice == wanted[0].dice


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ([[[0, 1], [1, 0]]], "is a list: give an array"),
        (None, "is a NoneType: give an array"),
        (np.full((2, 2, 2), None), "is an array of object: give one of 0 and 1"),
        (np.full((2, 2, 2), "1"), "is an array of <U1"),
        (np.full((2, 2, 2), 1j), "is an array of complex128"),
        (np.array([np.nan, 0] * 4).reshape(2, 2, 2), "4 voxels are NaN or infinite"),
        (np.array([np.inf, 0, 0, 0] * 2).reshape(2, 2, 2), "2 voxels are NaN or infinite"),
        (np.array([2, 1, 0, 0] * 2).reshape(2, 2, 2), "besides 0 it has 1, 2; cut"),
        (np.array([-1, 0, 0, 0] * 2).reshape(2, 2, 2), "besides 0 it has -1; cut"),
        (nib.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)), "is a Nifti1Image: give an array"),
        (np.zeros((2, 2)), "has shape"),
    ],
)
def test_what_is_no_mask_is_refused_in_one_sentence(mask, words):
    good = np.zeros((2, 2, 2), bool)
    for masks, name in (((mask, good), "The prediction"), ((good, mask), "The reference")):
        with pytest.raises(ValueError, match=rf"^{name} .*{words}") as error:
            evaluate(*masks, spacing=(1, 1, 1))
        assert "\n" not in str(error.value)
    if isinstance(mask, np.ndarray):
        with pytest.raises(ValueError, match=rf"^The reference .*{words}"):
            View.of(np.ones((2, 2, 2)), mask, affine=np.eye(4))


# --- real scans -------------------------------------------------------------------------------------------

REAL = shared_data()
real = pytest.mark.skipif(REAL is None, reason="needs shared/data beside the checkout")


@real
def test_real_masks_whose_headers_are_half_a_voxel_apart_are_taken():
    offsets = {}
    for folder in sorted((REAL / "ljubljana" / "native").iterdir()):
        lesions, brain = (nib.load(folder / name) for name in ("lesions.nii.gz", "brainmask.nii.gz"))
        voxels = np.broadcast_to(np.True_, lesions.shape)
        _, words = told(geometry.align, voxels, lesions, brain, "the lesions", "the brain", "resample it")
        offsets[folder.name] = [part for word in words for part in re.findall(r"they lie (.*) off", word)]
    assert offsets.pop("patient12") == []
    assert len(offsets) == 14
    assert set(map(tuple, offsets.values())) == {("0.519 mm (0.5, 0.5, 0.5 voxels)",)}


@real
def test_a_real_mask_that_carries_only_a_qform_is_turned(tmp_path):
    path = REAL / "ljubljana" / "mni" / "patient01" / "lesions.nii.gz"
    image = nib.load(path)
    nib.save(image.as_reoriented(orientations.axcodes2ornt("PIR")), tmp_path / "turned.nii.gz")
    (case,) = evaluate(tmp_path / "turned.nii.gz", path).cases
    assert (case.dice, case.hd95_mm) == (1, 0)
    assert case.reference_mm3 == np.count_nonzero(np.asarray(image.dataobj))


@real
def test_a_real_mask_in_another_space_is_refused_with_what_differs():
    folder = REAL / "ljubljana" / "longitudinal" / "patient01"
    case = Case("patient01", {"FLAIR": folder / "study1_FLAIR.nii.gz"}, folder / "gt.nii.gz")
    with pytest.raises(
        ValueError, match=r"it has 325×334×53 voxels, not 320×320×36; .* mm by its affine, .* turned by"
    ):
        check_case(case, ["FLAIR"], require_mask=True)
