"""What became of lesions between sessions: on masks that are built for it, and against the simulator's truth."""

import json
import re
import shutil

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from rsanet.segment.html.cohort import write_report
from rsanet.segment.html.followup import Criteria, compare_lesions, follow
from rsanet.segment.html.lesions import list_lesions
from rsanet.segment.html.pictures import Frame
from rsanet.segment.html.scan import Scan
from rsanet.segment.metrics import PROTOCOLS
from rsanet.segment.scenario import Scenario
from rsanet.segment.simulation import simulate

CUSTOM = PROTOCOLS["custom"]
SHAPE = (40, 40, 30)


def scan(mask, affine=None, name="sub-1_ses-01"):
    affine = np.eye(4) if affine is None else affine
    image = np.full(mask.shape, 100, np.float32)
    image[0] = 0
    return Scan(name, "FLAIR", {"FLAIR": image}, mask, None, None, affine, affine, mask.shape)


def boxes(*spans):
    mask = np.zeros(SHAPE, bool)
    for x, y, z in spans:
        mask[x[0] : x[1], y[0] : y[1], z[0] : z[1]] = True
    return mask


def fates(before, now):
    """The fates of all lesions by where they are centred on the later scan's grid along x."""
    earlier, later = (list_lesions(one, CUSTOM) for one in (before, now))
    carry = np.linalg.inv(now.affine) @ before.affine
    changes = compare_lesions(earlier, later, carry, now.prediction.shape, before.prediction.shape)
    return [(change.fate, len(change.before), round(change.before_mm3), round(change.now_mm3)) for change in changes]


A, B = (4, 8), (10, 14)  # of 4 voxels

# The masks before and now, and the fate, number of lesions before, and volumes in mm³ of each change.
CASES = {
    "new": ([], [(A, A, A)], [("new", 0, 0, 64)]),
    "new of exactly the least volume": ([], [((4, 7), (4, 5), (4, 5))], [("new", 0, 0, 3)]),
    "too small to be new": ([], [((4, 6), (4, 5), (4, 5))], [("tiny", 0, 0, 2)]),
    "vanished": ([(A, A, A)], [], [("vanished", 1, 64, 0)]),
    "too small to have vanished": ([((4, 6), (4, 5), (4, 5))], [], []),
    "the same": ([(A, A, A)], [(A, A, A)], [("stable", 1, 64, 64)]),
    "half as large again": ([(A, A, A)], [(A, A, (4, 10))], [("enlarged", 1, 64, 96)]),
    "a quarter larger": ([(A, A, A)], [(A, A, (4, 9))], [("stable", 1, 64, 80)]),
    "twice as large, but by few voxels": (
        [((4, 7), (4, 5), (4, 5))],
        [((4, 7), (4, 6), (4, 5))],
        [("stable", 1, 3, 6)],
    ),
    "a third smaller": ([(A, A, (4, 10))], [(A, A, A)], [("shrunk", 1, 96, 64)]),
    "a quarter smaller": ([(A, A, (4, 8))], [(A, A, (4, 7))], [("stable", 1, 64, 48)]),
    "moved aside": ([(A, A, A)], [(B, A, A)], [("new", 0, 0, 64), ("vanished", 1, 64, 0)]),
    "merged": ([(A, A, A), (B, A, A)], [((4, 14), A, A)], [("stable", 2, 128, 160)]),
    "split": ([((4, 14), A, A)], [(A, A, A), (B, A, A)], [("stable", 1, 160, 128)] * 2),
    "nothing": ([], [], []),
}


@pytest.mark.parametrize(("before", "now", "expected"), CASES.values(), ids=CASES)
def test_each_lesion_has_the_fate_that_its_masks_show(before, now, expected):
    assert fates(scan(boxes(*before)), scan(boxes(*now))) == expected


def test_sessions_on_other_grids_are_compared_in_space():
    before, now = boxes((A, A, A), (B, B, B)), boxes((A, A, A), ((20, 24), A, A))
    expected = fates(scan(before), scan(now))
    assert [fate for fate, *_ in expected] == ["stable", "new", "vanished"]
    flipped = scan(before[::-1], nib.affines.from_matvec(np.diag([-1, 1, 1]), [SHAPE[0] - 1, 0, 0]))
    assert fates(flipped, scan(now)) == expected
    coarse = nib.affines.from_matvec(2 * np.eye(3), [0.5] * 3)
    halved = scan(now[::2, ::2, ::2], coarse)
    assert fates(scan(before), halved) == expected
    assert [fate for fate, *_ in fates(halved, scan(before))] == ["stable", "new", "vanished"]


def test_a_small_lesion_between_the_voxels_of_a_coarse_grid_is_found_there():
    small = boxes(((5, 6), (5, 6), (3, 7)))  # between the middles of voxels of 4 mm
    coarse = nib.affines.from_matvec(4 * np.eye(3), [1.5] * 3)
    thick = np.zeros((10, 10, 8), bool)
    thick[1, 1, 1] = True
    assert fates(scan(small), scan(thick, coarse))[0][0] == "enlarged"
    assert fates(scan(thick, coarse), scan(small))[0][0] == "shrunk"


def test_a_lesion_outside_the_later_field_of_view_has_not_vanished():
    before = scan(boxes((A, A, A), ((30, 34), A, A)))
    now = scan(boxes()[:20])
    assert [fate for fate, *_ in fates(before, now)] == ["vanished", "unseen"]


def test_the_criteria_are_printed_as_they_are_applied():
    words = Criteria(new_mm3=5, growth=1.0, change_mm3=20).describe()
    assert "at least 5 mm³" in words
    assert "at least 100 % and 20 mm³ more" in words
    assert "at least 50 % and 20 mm³ less" in words
    assert "no registration is done" in words


def test_slices_are_drawn_beside_each_other_where_something_changed():
    before, now = scan(boxes((A, A, A))), scan(boxes((A, A, A), (B, B, (20, 24))), name="sub-1_ses-02")
    frame = Frame.around(now.image, now.spacing)
    found = follow(before, now, list_lesions(now, CUSTOM), frame, CUSTOM)
    assert found.counts["new"] == 1
    assert found.counts["stable"] == 1
    (left, right), *others = found.pairs
    assert not others
    assert left.title == right.title
    assert [outline.layer for outline in right.outlines] == ["new"]
    assert left.outlines == []
    same = follow(before, before, list_lesions(before, CUSTOM), frame, CUSTOM)
    assert same.pairs == []


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
    """A simulated patient with two sessions, and the truth as if it were predicted."""
    pytest.importorskip("nilearn", reason="the simulator's anatomy is in nilearn")
    root = tmp_path_factory.mktemp("sessions")
    simulate(root / "data", 1, Scenario(spacing=(3, 3, 3), contrasts=("FLAIR",), load="heavy", sessions=2), seed=1)
    (root / "pred").mkdir()
    for path in (root / "data" / "derivatives").rglob("*label-lesion_mask.nii.gz"):
        shutil.copy(path, root / "pred")
    write_report(root / "out", root / "data", root / "pred")
    return root


def test_new_lesions_are_those_of_the_simulators_truth(sessions):
    page = (sessions / "out" / "sub-001_ses-02.html").read_text()
    folder = sessions / "data" / "derivatives" / "lesions" / "sub-001" / "ses-02" / "anat"
    truth = json.loads((folder / "sub-001_ses-02_label-lesion_mask.json").read_text())
    new = nib.load(folder / "sub-001_ses-02_label-newlesion_mask.nii.gz")
    labels, count = ndimage.label(np.asarray(new.dataobj), np.ones((3, 3, 3)))
    centres = [new.affine[:3, :3] @ np.argwhere(labels == n).mean(0) + new.affine[:3, 3] for n in range(1, count + 1)]
    assert count == truth["NewLesionCount"] > 3
    section = page.partition('id="change"')[2].partition("</section>")[0]
    rows = re.findall(r"<tr data-lesion.*?</tr>", section, re.DOTALL)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in rows]
    shown = sorted([float(cell) for cell in row[-3:]] for row in cells if row[0].endswith(" new"))
    np.testing.assert_allclose(shown, sorted(centre.round(1).tolist() for centre in centres), atol=0.051)
    fate = [lesion["fate"] for lesion in truth["Lesions"]]
    assert fate.count("growing") >= sum(row[0].endswith(" enlarged") for row in cells) > 0
    assert len(truth["Vanished"]) == sum(row[0].endswith(" vanished") for row in cells) > 0


def test_only_the_later_session_is_compared(sessions):
    first, second = ((sessions / "out" / f"sub-001_ses-0{n}.html").read_text() for n in (1, 2))
    assert 'id="change"' not in first
    assert "Change since sub-001_ses-01" in second
    assert 'href="./sub-001_ses-01.html"' in second
