"""What the pages of the report are made of: lesions with their status, slices, outlines, projections and charts."""

import re

import nibabel as nib
import numpy as np
import pytest
from segment.pages import SHAPE, Elements, masks, pixels, scan

from rsanet.segment.html.charts import draw_attention, histogram, nice_step, spread_loads
from rsanet.segment.html.lesions import list_lesions
from rsanet.segment.html.mosaics import MOST_SLICES, choose_slices, draw_mosaics
from rsanet.segment.html.page import make_page
from rsanet.segment.html.pictures import PLANES, Frame, edges
from rsanet.segment.metrics import PROTOCOLS, evaluate_case


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=lambda protocol: protocol.name)
def test_true_missed_and_false_lesions_are_those_of_evaluate(protocol):
    prediction, reference = masks()
    reference[15:18, 20:23, 4:7] = True  # around the prediction's lesion of one voxel
    found = list_lesions(scan(prediction, reference), protocol)
    numbers = evaluate_case(prediction, reference, (2, 1.5, 4), protocol)
    status = [lesion.status for lesion in found]
    assert status.count("missed") == numbers.reference_lesions - numbers.detected_lesions
    assert status.count("reference") == numbers.detected_lesions
    assert status.count("false") == numbers.false_lesions
    assert status.count("hit") == numbers.predicted_lesions - numbers.false_lesions
    assert len(status) == numbers.predicted_lesions + numbers.reference_lesions + status.count("uncounted")


def test_each_lesion_has_the_status_that_its_own_voxels_show():
    found = list_lesions(scan(*masks()), PROTOCOLS["custom"])
    status = {lesion.id: lesion.status for lesion in found}
    assert status == {"1": "hit", "2": "false", "3": "false", "R1": "reference", "R2": "missed"}
    assert {lesion.id: len(lesion.voxels) for lesion in found} == {"1": 32, "2": 6, "3": 1, "R1": 30, "R2": 4}


def test_lesions_below_the_protocols_minimum_are_listed_and_not_counted():
    prediction, reference = masks()
    found = list_lesions(scan(prediction, reference, np.eye(4)), PROTOCOLS["msseg2016"])
    assert {lesion.id: lesion.status for lesion in found}["3"] == "uncounted"  # of 1 mm³


def test_outlines_enclose_the_voxels_and_leave_holes_open():
    mask = np.zeros((9, 9), bool)
    mask[2:7, 1:6] = True
    mask[4, 3] = False
    mask[0, 8] = True
    areas = []
    for line in edges(*np.nonzero(mask)):
        assert np.array_equal(line[0], line[-1])
        x, y = line.T
        areas.append(abs((x[:-1] * y[1:] - x[1:] * y[:-1]).sum()) / 2)
    corner = 4 * 0.25**2 / 2
    np.testing.assert_allclose(sorted(areas), [1 - corner, 1 - corner, 25 - corner])


def test_pictures_have_true_proportions_and_the_patients_right_on_the_left():
    prediction = np.zeros(SHAPE, bool)
    prediction[24:26, 30:34, 15:17] = True  # right, anterior and superior
    view = scan(prediction, image=100 * prediction.astype(np.float32))
    frame = Frame(np.array([(0, n) for n in SHAPE]), view.spacing, 100.0)
    size = {"axial": (60, 60), "coronal": (60, 80), "sagittal": (60, 80)}
    box = {"axial": (8, 12, 9, 15), "coronal": (8, 12, 12, 20), "sagittal": (9, 15, 12, 20)}
    for mosaic in draw_mosaics(view, list_lesions(view, PROTOCOLS["custom"]), frame):
        picture = mosaic.pictures[0]
        assert (picture.width, picture.height) == size[mosaic.plane.name]
        points = np.array([part.split(",") for part in re.findall(r"[\d.]+,[\d.]+", picture.outlines[0].path)], float)
        left, top, right, bottom = *points.min(0), *points.max(0)
        assert (left, right, top, bottom) == box[mosaic.plane.name]
        rows, columns = np.nonzero(pixels(picture.image) > 127)  # the lesion alone is bright
        scale = picture.width / pixels(picture.image).shape[1]
        middle = [(columns.mean() + 0.5) * scale, (rows.mean() + 0.5) * scale]
        np.testing.assert_allclose(middle, [(left + right) / 2, (top + bottom) / 2], atol=0.7)
    assert [plane.letters for plane in PLANES] == [tuple("RLAP"), tuple("RLSI"), tuple("APSI")]


def test_a_picture_shows_the_slice_that_it_names():
    prediction = np.zeros(SHAPE, bool)
    prediction[10:12, 10:12, 7] = True
    view = scan(prediction, affine=nib.affines.from_matvec(np.diag([2.0, 1.5, 4.0]), [0, 0, -40]))
    bright = np.zeros(SHAPE, np.float32)
    bright[:, :, 7] = 100
    view.images["FLAIR"] = bright
    frame = Frame(np.array([(0, n) for n in SHAPE]), view.spacing, 100.0)
    (picture,) = draw_mosaics(view, list_lesions(view, PROTOCOLS["custom"]), frame)[0].pictures
    assert picture.title == "z = −12 mm"
    assert picture.alt == "Axial slice at z = −12 mm, with lesion 1"
    assert pixels(picture.image).mean() > 250


def test_few_slices_show_every_lesion_and_never_more_than_the_limit():
    rng = np.random.default_rng(0)
    lesions = [rng.integers(0, 60, (1, 3)) + np.argwhere(np.ones((3, 3, n))) for n in rng.integers(1, 6, 20)]
    chosen = choose_slices(lesions, 2)
    assert chosen == sorted(chosen, reverse=True)
    assert len(chosen) < 16
    assert all(np.isin(voxels[:, 2], chosen).any() for voxels in lesions)
    specks = [np.array([[0, 0, 30]]), np.array([[9, 9, 30]])]
    assert choose_slices([*specks, np.argwhere(np.ones((4, 4, 1))) + 41], 2, most=1) == [41]
    apart = [np.array([[0, 0, 2 * n]]) for n in range(2 * MOST_SLICES)]
    assert len(choose_slices(apart, 2)) == MOST_SLICES


def test_lesions_without_a_slice_are_named():
    prediction = np.zeros((30, 40, 70), bool)
    prediction[15, 20, ::2] = True
    page = make_page(scan(prediction), PROTOCOLS["custom"])
    assert f"{35 - MOST_SLICES} of 35 lesions lie in none of these axial slices" in Elements(page.html).text


def test_the_sentence_on_a_map_says_what_the_map_shows():
    diagonal = draw_attention("axial", 0.9 * np.eye(10) + 0.01)
    assert diagonal.words.startswith("A slice gives 93 % of its attention to itself and its neighbours, where looking "
                                     "everywhere alike would give 28 %")  # fmt: skip
    column = np.full((10, 10), 0.05)
    column[:, 3] = 0.55
    assert "slice 3 is looked at most, 5.50 times as much" in draw_attention("coronal", column).words
    drawn = pixels(draw_attention("axial", np.eye(4)[::-1]).image).sum(-1)
    assert drawn.argmax(1).tolist() == [0, 1, 2, 3]  # slice 0, which looks at slice 3, is the lowest row


def test_histogram_counts_each_lesion_once_and_a_bound_in_the_class_above():
    bars = histogram([("hit", 10.0), ("hit", 9.99), ("false", 30.0 * (1 - 1e-12)), ("hit", 5000)], ["hit", "false"])
    assert [bar.total for bar in bars] == [1, 1, 1, 0, 0, 0, 1]
    assert bars[2].parts == (("hit", 0), ("false", 1))


def test_loads_lie_on_their_scale():
    loads = spread_loads([("a", 0.0), ("b", 5.0), ("c", 5.01), ("d", 9.2)])
    assert [(dot.name, dot.row) for dot in loads.dots] == [("a", 0), ("b", 0), ("c", 1), ("d", 0)]
    assert loads.ticks[0] == ("0", 0.0)
    assert loads.ticks[-1] == ("10", 1.0)
    assert abs(loads.dots[1].place - 0.5) < 0.01
    assert spread_loads([("a", 0.0)]).ticks == [("0", 0.0), ("1", 1.0)]
    assert [nice_step(x) for x in (0.3, 1, 1.1, 4.9, 7)] == [0.5, 1, 2, 5, 10]
