"""The numbers of `rsanet evaluate`, case by case: those of MONAI, and of the protocols written a second time."""

import csv
import json
import math
from fractions import Fraction

import nibabel
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from segment.independent_metrics import RULES, case, isbi_score, voxels

from rsanet.segment.metrics import PROTOCOLS, Protocol, evaluate_case

SPACINGS = [(1.0, 1.0, 1.0), (0.9, 0.9, 3.0), (2.0, 0.5, 1.25), (0.75, 1.0, 4.0)]
# Sheared along one axis, and along all of them with an axis that runs backwards.
SHEARED = [
    [[2.0, 0.0, 0.0, 5.0], [0.0, 2.0, 1.6, -3.0], [0.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 1.0]],
    [[0.25, -1.0, 0.5, 0.0], [1.5, 0.25, 0.0, 0.0], [0.5, 0.75, 2.5, 9.0], [0.0, 0.0, 0.0, 1.0]],
]
CONNECTIVITY = {6: 1, 18: 2, 26: 3}


def agree(pred, ref, spacing, protocol, expected):
    numbers = vars(evaluate_case(pred, ref, spacing, protocol))
    for name, value in expected.items():
        assert numbers[name] == pytest.approx(value, rel=1e-12, abs=1e-12, nan_ok=True), name


@st.composite
def masks(draw):
    """Two masks that have to do with each other: blocks, some shared and some moved, and single voxels."""
    shape = draw(st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(1, 6)))
    pair = np.zeros((2, *shape), bool)

    def box():
        starts = [draw(st.integers(0, size - 1)) for size in shape]
        return tuple(
            slice(start, draw(st.integers(start + 1, min(size, start + 5))))
            for start, size in zip(starts, shape, strict=True)
        )

    for _ in range(draw(st.integers(0, 4))):
        place = box()
        pair[draw(st.sampled_from([0, 1, slice(0, 2)]))][(..., *place)] = True
    for _ in range(draw(st.integers(0, 3))):
        pair[draw(st.integers(0, 1))][box()] = False
    density = draw(st.sampled_from([0, 0, 0.05, 0.3]))
    pair ^= np.random.default_rng(draw(st.integers(0, 2**32))).random(pair.shape) < density
    return pair[0], pair[1]


def corners():
    """Voxels that touch along an edge, then at a corner, beside one of them."""
    mask = np.zeros((5, 5, 4), bool)
    mask[1, 1, 1] = mask[2, 2, 1] = mask[3, 3, 2] = True
    other = mask.copy()
    other[2, 2, 1] = False
    return mask, other


def bars(*lengths):
    """Bars of some lengths, in rows of their own, against one long bar across the first of each."""
    mask, other = np.zeros((2, 24, 2 * len(lengths), 1), bool)
    for row, (start, stop, first, last) in enumerate(lengths):
        mask[start:stop, 2 * row] = True
        other[first:last, 2 * row] = True
    return mask, other


def accounted():
    """A lesion that is covered to 65 % by what lies inside it, exactly, and to 35 % by what lies outside."""
    pred, ref = np.zeros((2, 40, 5, 1), bool)
    ref[:, 0] = True
    pred[:13, 0] = pred[20:27] = True
    return pred, ref


EMPTY = np.zeros((3, 4, 2), bool)
FULL = np.ones((3, 4, 2), bool)


@pytest.mark.parametrize("name", PROTOCOLS)
@settings(max_examples=60, deadline=None)
@given(pair=masks(), spacing=st.sampled_from(SPACINGS + SHEARED))
@example((EMPTY, EMPTY), SPACINGS[1])
@example((FULL, EMPTY), SPACINGS[1])
@example((EMPTY, FULL), SPACINGS[1])
@example((FULL, FULL), SPACINGS[1])
@example((np.ones((1, 1, 1), bool),) * 2, SPACINGS[0])
@example(corners(), SPACINGS[0])
@example(corners()[::-1], SPACINGS[0])
# A tenth and 70 % exactly, a quarter's overlap, lesions of 3 mm³.
@example(bars((0, 20, 18, 24), (0, 20, 0, 2), (0, 10, 7, 17), (0, 4, 3, 4), (0, 3, 0, 3)), SPACINGS[0])
@example(accounted(), SPACINGS[0])
@example(bars((0, 10, 9, 12), (0, 10, 7, 17), (0, 8, 0, 2), (0, 2, 0, 3)), SPACINGS[0])
def test_every_protocol_agrees_with_its_words(name, pair, spacing):
    pred, ref = pair
    expected = case(voxels(pred), voxels(ref), spacing, name)
    agree(pred, ref, spacing, PROTOCOLS[name], expected)


@settings(max_examples=60, deadline=None)
@given(
    pair=masks(),
    spacing=st.sampled_from(SPACINGS + SHEARED),
    connectivity=st.sampled_from(list(CONNECTIVITY)),
    overlap=st.sampled_from([0, 0.1, 0.25, 1 / 3, 0.5, 1]),
    minimum=st.sampled_from([0, 1, 2.43, 5, 12]),
)
def test_every_custom_protocol_agrees_with_its_words(pair, spacing, connectivity, overlap, minimum):
    pred, ref = pair
    share = Fraction(overlap).limit_denominator(100)
    options = {"axes": CONNECTIVITY[connectivity], "least_iou": share, "least_mm3": minimum}
    expected = case(voxels(pred), voxels(ref), spacing, **options)
    protocol = Protocol(connectivity=connectivity, overlap=overlap, minimum_mm3=minimum)
    agree(pred, ref, spacing, protocol, expected)


@settings(max_examples=40, deadline=None)
@given(pair=masks(), spacing=st.sampled_from(SPACINGS), name=st.sampled_from(list(PROTOCOLS)))
def test_size_classes_part_the_lesions_and_lose_none(pair, spacing, name):
    numbers = evaluate_case(*pair, spacing, PROTOCOLS[name])
    for count in ("reference_lesions", "detected_lesions", "predicted_lesions", "false_lesions"):
        assert sum(getattr(entry, count) for entry in numbers.size_classes) == getattr(numbers, count)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Folders of predictions and references of several cases, one with nothing predicted and one with no lesion."""
    root = tmp_path_factory.mktemp("cohort")
    rng = np.random.default_rng(3)
    pairs = {}
    for number in range(6):
        pair = np.zeros((2, 14, 12, 9), bool)
        for _ in range(5):
            start, size = rng.integers(0, (10, 8, 5)), rng.integers(1, 5, 3)
            shift = rng.integers(-1, 2, 3)
            for mask, offset in zip(pair, (0, shift), strict=True):
                if rng.random() < 0.8:
                    mask[tuple(slice(max(0, a), a + b) for a, b in zip(start + offset, size, strict=True))] = True
        pair[0] &= number != 4
        pair[1] &= number != 5
        spacing = SPACINGS[number % len(SPACINGS)]
        name = f"sub-{number}"
        pairs[name] = (*pair, spacing)
        for folder, mask in zip(("pred", "ref"), pair, strict=True):
            (root / folder).mkdir(exist_ok=True)
            image = nibabel.Nifti1Image(mask.astype(np.uint8), np.diag([*spacing, 1]))
            nibabel.save(image, root / folder / f"{name}.nii.gz")
    return root, pairs


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_command_agrees_with_the_words_of_each_protocol(cohort, rsanet, tmp_path, name):
    root, pairs = cohort
    options = ("--protocol", name, "--csv", tmp_path / "scores.csv", "--json", tmp_path / "scores.json")
    code, _, err = rsanet("evaluate", root / "pred", root / "ref", *options)
    assert (code, err) == (0, "")
    with open(tmp_path / "scores.csv") as file:
        rows = {row["subject"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(pairs)
    cases = [case(voxels(pred), voxels(ref), spacing, name) for pred, ref, spacing in pairs.values()]
    for row, expected in zip(rows.values(), cases, strict=True):
        # The header keeps voxel sizes in float32.
        assert {key: float(row[key]) for key in expected} == pytest.approx(expected, rel=1e-6, nan_ok=True)
    if name == "isbi2015":
        means = json.loads((tmp_path / "scores.json").read_text())["means"]
        assert means["isbi_score"] == pytest.approx(isbi_score(cases), rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")
def test_the_command_agrees_with_monai(cohort, rsanet, tmp_path):
    import torch
    from monai import metrics

    root, pairs = cohort
    assert rsanet("evaluate", root / "pred", root / "ref", "--csv", tmp_path / "scores.csv")[0] == 0
    with open(tmp_path / "scores.csv") as file:
        rows = {row["subject"]: row for row in csv.DictReader(file)}
    compared = 0
    for name, (*pair, spacing) in pairs.items():
        pred, ref = (torch.from_numpy(mask)[None, None].int() for mask in pair)
        confusion = metrics.get_confusion_matrix(pred, ref)
        expected = {
            "dice": metrics.compute_dice(pred, ref, ignore_empty=False),
            "ppv": metrics.compute_confusion_matrix_metric("precision", confusion),
            "tpr": metrics.compute_confusion_matrix_metric("sensitivity", confusion),
        }
        if pred.any() and ref.any():
            options = {"include_background": True, "spacing": spacing}
            expected["hd95_mm"] = metrics.compute_hausdorff_distance(pred, ref, percentile=95, **options)
            expected["assd_mm"] = metrics.compute_average_surface_distance(pred, ref, symmetric=True, **options)
            compared += 1
        numbers = {key: float(rows[name][key]) for key in expected}
        assert numbers == pytest.approx({key: value.item() for key, value in expected.items()}, rel=1e-5, nan_ok=True)
    assert compared == 4
    # Where one mask is empty MONAI puts distances at infinity or leaves them out; here they have no definition.
    assert all(math.isnan(float(rows[name][key])) for name in ("sub-4", "sub-5") for key in ("hd95_mm", "assd_mm"))


def test_the_words_cover_every_protocol():
    assert RULES.keys() == PROTOCOLS.keys()
