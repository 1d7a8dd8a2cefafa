"""The picture: orientation, slices, colours and words, checked on what is drawn."""

import matplotlib.colors
import matplotlib.image
import nibabel
import numpy as np
import pytest

from rsanet.segment import report
from rsanet.segment.report import COLOURS, View, draw_overlay, draw_report

AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])
SHAPE = (40, 50, 30)


@pytest.fixture
def volumes():
    """An ellipsoid head with one lesion on the patient's left that is half found, and a false one on the right."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij"))
    flair = np.where((grid**2).sum(0) < 0.9, 300.0, 0.0).astype(np.float32)
    reference, prediction = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    reference[8:14, 20:26, 14:17] = 1
    prediction[11:14, 20:26, 14:17] = 1
    prediction[26:29, 20:26, 14:17] = 1
    return flair, reference, prediction


@pytest.fixture
def maps():
    rng = np.random.default_rng(0)
    weights = {name: rng.random((size, size)) for name, size in (("coronal", 9), ("sagittal", 7), ("axial", 8))}
    return {name: weight / weight.sum(1, keepdims=True) for name, weight in weights.items()}


def words(tmp_path, draw):
    """The words in a picture, from its SVG text."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "none"}):
        draw(tmp_path / "picture.svg")
    return (tmp_path / "picture.svg").read_text()


def share(picture, colour):
    """The share of pixels with about this colour."""
    return (np.abs(picture[..., :3] - np.array(matplotlib.colors.to_rgb(colour))) < 0.04).all(-1).mean()


def test_overlay_shows_hits_misses_and_false_lesions_in_their_colours(volumes, maps, tmp_path):
    out = draw_overlay(*volumes, maps, tmp_path / "picture.png", affine=AFFINE)
    picture = matplotlib.image.imread(out)
    assert picture.shape[1] > 1500
    for name in ("reference", "hit", "missed", "false"):
        assert share(picture, COLOURS[name]) > 1e-4, name


def test_a_perfect_prediction_shows_no_misses_beyond_the_legend(volumes, tmp_path):
    flair, reference, prediction = volumes
    draw_overlay(flair, reference, prediction, None, tmp_path / "part.png", affine=AFFINE)
    draw_overlay(flair, reference, reference, None, tmp_path / "perfect.png", affine=AFFINE)
    part, perfect = (matplotlib.image.imread(tmp_path / f"{name}.png") for name in ("part", "perfect"))
    for name in ("missed", "false"):
        assert share(part, COLOURS[name]) > 1.2 * share(perfect, COLOURS[name])


def test_words_give_the_scores_the_protocol_and_the_warning(volumes, maps, tmp_path):
    def draw(out):
        draw_overlay(*volumes, maps, out, affine=AFFINE, name="sub-007", simulated=True)

    text = words(tmp_path, draw)
    assert "sub-007" in text
    assert "Dice 0.50" in text
    assert "1 of 1 lesions found" in text
    assert "1 false" in text
    assert "simulated data: no clinical meaning" in text
    assert "26-connected" in text
    assert "patient's right (R) is on the left" in text
    for name in ("Coronal", "Sagittal", "Axial"):
        assert f"{name} attention" in text
    assert "slice (from)" in text
    assert "slice (to)" in text


def test_real_data_carry_no_word_of_simulation(volumes, tmp_path):
    text = words(tmp_path, lambda out: draw_overlay(*volumes, None, out, affine=AFFINE))
    assert "simulated" not in text


def test_the_patients_right_is_on_the_left(volumes, tmp_path):
    flair, reference, _ = volumes
    half = flair.copy()
    half[: SHAPE[0] // 2] = 0  # small x is the patient's left; only the right half of the head is left
    half[0, 0] = half[-1, -1] = 300  # corners keep the crop as it is
    draw_overlay(half, reference, None, None, tmp_path / "half.png", affine=AFFINE, slices=1)
    picture = matplotlib.image.imread(tmp_path / "half.png")
    # The first panel, without its letters.
    x0, x1 = int(150 * 0.5), int(150 * (0.5 + report.PANEL - 0.1))
    panel = picture[170:-150, x0:x1, 0]
    middle = panel.shape[1] // 2
    assert panel[:, :middle].mean() > 2 * panel[:, middle:].mean()


def test_any_orientation_gives_the_same_view(volumes):
    flair, reference, _ = volumes
    straight = View.of(flair, reference, affine=AFFINE)
    lps = np.diag([-1, -1, 1, 1])
    turned = [nibabel.Nifti1Image(np.ascontiguousarray(v[::-1, ::-1]), AFFINE @ lps) for v in (flair, reference)]
    swapped = [image.as_reoriented(np.array([[2, 1], [0, 1], [1, -1]])) for image in turned]
    for images in (turned, swapped):
        view = View.of(*images)
        np.testing.assert_array_equal(view.flair, straight.flair)
        np.testing.assert_array_equal(view.reference, straight.reference)
        np.testing.assert_allclose(view.spacing, [2, 2, 3])


def test_slices_are_those_with_most_lesion_and_10_mm_apart(volumes):
    flair, reference, _ = volumes
    reference = np.zeros_like(reference)
    reference[10:20, 10:20, 12] = 1
    reference[10:19, 10:20, 13] = 1  # 3 mm from the largest
    reference[10:12, 10:12, 20] = 1
    view = View.of(flair, reference, affine=AFFINE)
    assert view.slices(2) == [20, 12]
    assert view.height(20) == 60
    assert View.of(flair, affine=AFFINE).slices(1)[0] in range(10, 20)


def test_without_reference_masks_or_lesions_a_picture_still_appears(volumes, maps, tmp_path):
    flair, _, prediction = volumes
    empty = np.zeros_like(prediction)
    for reference, predicted in ((None, prediction), (None, None), (empty, empty), (prediction, None)):
        out = tmp_path / "picture.png"
        out.unlink(missing_ok=True)
        draw_overlay(flair, reference, predicted, maps, out, affine=AFFINE)
        assert matplotlib.image.imread(out).std() > 0.1


def test_report_has_a_row_for_each_subject(volumes, tmp_path):
    views = [View.of(*volumes, affine=AFFINE, name=f"sub-00{n}") for n in (1, 2, 3)]
    text = words(tmp_path, lambda out: draw_report(views, None, out, title="Three patients", simulated=True))
    for part in ("sub-001", "sub-002", "sub-003", "Three patients", "no clinical meaning"):
        assert part in text


def test_files_can_be_given_and_only_the_picture_is_left(volumes, tmp_path):
    for name, data in zip(("f", "r", "p"), volumes, strict=True):
        nibabel.save(nibabel.Nifti1Image(data, AFFINE), tmp_path / f"{name}.nii.gz")
    draw_overlay(*[tmp_path / f"{name}.nii.gz" for name in "frp"], None, tmp_path / "picture.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.nii.gz", "p.nii.gz", "picture.png", "r.nii.gz"]


def test_what_cannot_be_drawn_is_said_in_one_sentence(volumes, maps, tmp_path):
    flair, reference, prediction = volumes
    out = tmp_path / "picture.png"
    with pytest.raises(ValueError, match="affine"):
        draw_overlay(flair, reference, prediction, None, out)
    with pytest.raises(ValueError, match="prediction has shape"):
        draw_overlay(flair, reference, prediction[1:], None, out, affine=AFFINE)
    with pytest.raises(ValueError, match=r"\(S, S\)"):
        draw_overlay(flair, reference, prediction, {"axial": np.ones((3, 4))}, out, affine=AFFINE)
    with pytest.raises(ValueError, match=r"\.png"):
        draw_overlay(flair, reference, prediction, None, tmp_path / "picture.nii.gz", affine=AFFINE)
    with pytest.raises(ValueError, match="at least one subject"):
        draw_report([], None, out)
    assert not list(tmp_path.iterdir())


def test_colours_stay_apart_in_every_common_colour_blindness():
    # Full deuteranopia and protanopia on linear RGB (Machado et al., 2009).
    blindness = (
        np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]),
        np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]),
    )
    colours = np.array([matplotlib.colors.to_rgb(COLOURS[key]) for key in ("hit", "missed", "false")])
    for matrix in blindness:
        seen = np.clip(colours**2.2 @ matrix.T, 0, 1) ** (1 / 2.2)
        for a in range(3):
            for b in range(a):
                assert np.abs(seen[a] - seen[b]).max() > 0.3


def test_the_slice_shown_is_the_slice_named(volumes, tmp_path):
    flair, reference, _ = volumes
    slab = np.zeros_like(flair)
    slab[:, :, 14:17] = flair[:, :, 14:17]  # the head is seen in the lesion's slices alone
    draw_overlay(slab, reference, None, None, tmp_path / "slab.png", affine=AFFINE, slices=1)
    picture = matplotlib.image.imread(tmp_path / "slab.png")
    panel = picture[170:-150, 75 : int(150 * (0.4 + report.PANEL)), 0]
    assert panel.mean() > 0.3
