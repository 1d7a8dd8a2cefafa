"""One rule for where an image shows tissue, on heads that are built: with skull and without, in every kind of air."""

import time

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from support import shared_data

from rsanet.segment.volumes import tissue_mask

SHAPE = (56, 64, 52)
AXES = np.stack(np.meshgrid(*(np.linspace(-1, 1, size) for size in SHAPE), indexing="ij"))
AT_MOST = 0.05  # by which the share of tissue moves


def ellipsoid(*radii, centre=(0, 0, 0)):
    return sum(((axis - at) / radius) ** 2 for axis, at, radius in zip(AXES, centre, radii, strict=True)) < 1


def made(skull):
    """An image without noise in its air, and where its tissue is."""
    brain = ellipsoid(0.6, 0.65, 0.6)
    labels = brain.astype(int) + ellipsoid(0.5, 0.55, 0.5)
    labels[ellipsoid(0.08, 0.3, 0.12, centre=(0.1, 0, 0.1)) | ellipsoid(0.08, 0.3, 0.12, centre=(-0.1, 0, 0.1))] = 3
    image = np.array([0.0, 350, 290, 40])[labels]
    head = brain
    if skull:
        head, bone = ellipsoid(0.78, 0.83, 0.78), ellipsoid(0.7, 0.75, 0.7)
        image = np.where(brain, image, np.where(bone, 20, np.where(head, 480, 0)))
    texture = 1 + 0.04 * np.random.default_rng(0).standard_normal(SHAPE)
    return (image * texture).astype(np.float32), head


HEADS = {"stripped": made(False), "skull": made(True)}


def in_air(image, sigma, seed=1):
    """With the noise of a magnitude image."""
    rng = np.random.default_rng(seed)
    real, imaginary = (sigma * rng.standard_normal(image.shape) for _ in range(2))
    return np.hypot(image + real, imaginary).astype(np.float32)


def poked(image, head, value, every=1):
    result = image.copy()
    result[0, 0, 0] = result[28, 32, 26] = result[-1, -1, -1] = value
    if every > 1:
        result.ravel()[::every] = value
    return result


def scored(image, where=None):
    values = image if where is None else image[where]
    result = (image - values.mean()) / values.std()
    return result if where is None else np.where(where, result, 0)


def slanted(image, shift=0.4):
    """Air whose noise grows along an axis."""
    return image * (1 + np.linspace(-shift, shift, SHAPE[1], dtype=np.float32))[:, None]


# Each gives the image to look at, of the image without noise and of its tissue.
KINDS = {
    "clean": lambda image, head: image,
    "one negative voxel": lambda image, head: poked(image, head, -0.5),
    "hot voxels": lambda image, head: poked(image, head, 1e6),
    "many negative voxels": lambda image, head: poked(image, head, -30, every=997),
    "exact zeros in the head": lambda image, head: poked(image, head, 0, every=23),
    "offset": lambda image, head: image + 100,
    "below zero": lambda image, head: 0.3 * image - 1024,
    "from 0 to 1": lambda image, head: image / image.max(),
    "bytes": lambda image, head: np.round(255 * image / image.max()),
    "scored over the view": lambda image, head: scored(image),
    "scored over the head": lambda image, head: scored(image, head),
    "scored over the head, padded": lambda image, head: np.pad(scored(image, head), 9),
    "centred over the head": lambda image, head: np.where(head, image - np.median(image[head]), 0),
    "air": lambda image, head: in_air(image, 12),
    "air, one negative voxel": lambda image, head: poked(in_air(image, 12), head, -0.5),
    "air, many negative voxels": lambda image, head: poked(in_air(image, 12), head, -30, every=997),
    "air, hot voxels": lambda image, head: poked(in_air(image, 12), head, 1e6),
    "air, exact zeros": lambda image, head: poked(in_air(image, 12), head, 0, every=23),
    "air, offset": lambda image, head: in_air(image, 12) + 100,
    "air, below zero": lambda image, head: 0.3 * in_air(image, 12) - 1024,
    "air, scored": lambda image, head: scored(in_air(image, 12)),
    "air, from 0 to 1": lambda image, head: in_air(image, 12) / in_air(image, 12).max(),
    "air of both signs": lambda image, head: image + 12 * np.random.default_rng(2).standard_normal(SHAPE),
    "air, smoothed": lambda image, head: np.where(head, image, 4 * ndimage.gaussian_filter(in_air(0 * image, 12), 1)),
    "air that grows": lambda image, head: slanted(in_air(image, 12)),
    "air with a slope": lambda image, head: in_air(image, 4) + np.linspace(0, 30, SHAPE[2], dtype=np.float32),
    "air with a ghost": lambda image, head: in_air(image + 0.04 * np.roll(image, 26, 1), 6),
    "quiet air in integers": lambda image, head: np.round(in_air(image, 0.6)),
    "loud air in integers": lambda image, head: np.round(in_air(image, 12)),
    "quiet air in bytes": lambda image, head: np.round(in_air(image, 2) / 3),
    "air, padded": lambda image, head: np.pad(in_air(image, 12), 9),
    "loud air, padded": lambda image, head: np.pad(in_air(image, 20), 9),
    "air, scored and padded": lambda image, head: np.pad(scored(in_air(image, 12)), 9),
    "air, half of it set to zero": lambda image, head: np.where(AXES[1] < -0.9, 0, in_air(image, 12)),
    "air that a scanner set to zero": lambda image, head: np.where(in_air(image, 6) < 15, 0, in_air(image, 6)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", HEADS)
def test_the_tissue_is_the_head_whatever_is_around_it_and_however_it_is_stored(name, kind):
    image, head = HEADS[name]
    voxels = KINDS[kind](image, head).astype(np.float32)
    margin = (voxels.shape[0] - SHAPE[0]) // 2
    tissue = tissue_mask(voxels)
    assert tissue.dtype == bool
    assert tissue.sum() == pytest.approx(head.sum(), rel=AT_MOST)
    inside = tissue[tuple(slice(margin, margin + size) for size in SHAPE)]
    assert inside[ndimage.binary_erosion(head, iterations=3)].all()  # neither fluid nor a voxel of any value is a hole
    assert not tissue[np.pad(~ndimage.binary_dilation(head, iterations=3), margin)].any()


@pytest.mark.parametrize("way", ["turned", "finer"])
@pytest.mark.parametrize("name", HEADS)
def test_resampling_moves_the_share_of_tissue_by_little(name, way):
    def resampled(voxels, order):
        if way == "turned":  # zeros come in at the corners
            return ndimage.rotate(voxels, 9, axes=(0, 2), reshape=False, order=order)
        return ndimage.zoom(voxels, 1.15, order=order)

    image, head = HEADS[name]
    tissue = tissue_mask(resampled(image, 1)).sum()
    # What is partly tissue beside an edge is tissue.
    assert 1 < tissue / (resampled(head.astype(np.float32), 1) > 0.5).sum() < 1.15
    for order in (1, 3):  # splines swing below zero beside an edge
        for sigma in (0, 3, 12):
            assert tissue_mask(resampled(in_air(image, sigma), order)).sum() == pytest.approx(tissue, rel=AT_MOST)


@pytest.mark.parametrize("store", [np.float32, np.int16, "bytes"])
@pytest.mark.parametrize("name", HEADS)
def test_as_noise_rises_the_share_of_tissue_moves_smoothly(name, store):
    image, head = HEADS[name]
    shares = []
    for sigma in (0, 0.15, 0.3, 0.45, 0.6, 0.9, 1.3, 1.8, 2.0, 2.3, 3, 4, 6, 9, 13, 18):
        voxels = in_air(image, sigma)
        voxels = np.round(voxels / 3) if store == "bytes" else np.round(voxels) if store == np.int16 else voxels
        shares.append(tissue_mask(voxels).sum() / head.sum())
    assert max(shares) < min(shares) * (1 + AT_MOST)
    assert np.abs(np.diff(shares)).max() < 0.02
    assert shares[0] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("kind", ["clean", "air", "scored over the head", "air, scored and padded"])
def test_mirrored_or_permuted_axes_change_nothing(kind):
    voxels = KINDS[kind](*HEADS["skull"]).astype(np.float32)
    tissue = tissue_mask(voxels)
    assert np.array_equal(tissue_mask(voxels[::-1, :, ::-1]), tissue[::-1, :, ::-1])
    assert np.array_equal(tissue_mask(voxels.transpose(2, 0, 1)), tissue.transpose(2, 0, 1))
    assert np.array_equal(tissue_mask(np.asfortranarray(voxels)), tissue)


# Across which axis, and how many slices.
SLABS = {"slab": (2, 6), "sagittal slab": (0, 6), "slice": (2, 1), "two slices": (2, 2), "two sagittal slices": (0, 2)}


@pytest.mark.parametrize("kind", ["clean", "air", "air, offset", "scored over the head"])
@pytest.mark.parametrize("view", ["tight", "cut on every side", *SLABS])
@pytest.mark.parametrize("name", HEADS)
def test_a_narrow_view_shows_what_the_whole_one_does(name, view, kind):
    image, head = HEADS[name]
    edges = [(np.flatnonzero(head.any(axis=tuple({0, 1, 2} - {a}))).take([0, -1])) for a in range(3)]
    cut = [slice(low, high + 1) for low, high in edges]
    if view == "cut on every side":
        cut = [slice(low + 4, high - 3) for low, high in edges]
    elif view != "tight":
        axis, length = SLABS[view]
        cut = [slice(None)] * 3
        cut[axis] = slice(26, 26 + length)
    voxels = KINDS[kind](image, head).astype(np.float32)[tuple(cut)]
    expected = head[tuple(cut)]
    tissue = tissue_mask(voxels)
    assert (tissue & expected).sum() > (1 - AT_MOST) * (tissue | expected).sum()


@pytest.mark.parametrize("kind", ["clean", "air", "air, offset", "air of both signs", "air, scored", "air, below zero"])
@pytest.mark.parametrize("size", [5, 4])
def test_a_view_without_background_is_tissue_everywhere(kind, size):
    image, head = HEADS["stripped"]
    voxels = KINDS[kind](image, head).astype(np.float32)
    middle = tuple(slice(at - size, at + size) for at in (28, 32, 17))
    assert tissue_mask(voxels[middle]).mean() > 1 - AT_MOST
    homogeneous = 100 + 8 * np.random.default_rng(0).standard_normal((16, 16, 16)).astype(np.float32)
    homogeneous[5:8, 5:8, 5:8] = 190
    assert tissue_mask(homogeneous).all()


@pytest.mark.parametrize("sigma", [0, 0.5, 12])
@pytest.mark.parametrize("margin", [9, 20])
def test_a_small_head_in_a_large_view_is_found(margin, sigma):
    image, head = (np.pad(volume[::2, ::2, ::2], margin) for volume in HEADS["stripped"])
    assert head.mean() < 0.1
    tissue = tissue_mask(np.round(in_air(image, sigma)))
    assert (tissue & head).sum() > (1 - AT_MOST) * (tissue | head).sum()


@pytest.mark.parametrize("value", [3000, 1e7])
def test_a_bright_lesion_or_vessel_changes_nothing(value):
    image, head = HEADS["stripped"]
    voxels = in_air(image, 6)
    voxels[27:29, 31:33, 10:40] = value
    assert tissue_mask(voxels).sum() == pytest.approx(head.sum(), rel=0.02)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(26, 30, 24), (16, 16, 16), (40, 12, 33)])
def test_small_volumes_are_told_as_well(phantoms, shape, seed):
    images, _ = phantoms.make_subject(seed, shape)
    for voxels in images.values():
        head = voxels != 0
        for kind in ("clean", "air", "offset", "scored over the head", "quiet air in integers"):
            other = KINDS[kind](voxels, head).astype(np.float32) if kind != "air" else in_air(voxels, 3)
            tissue = tissue_mask(other)
            assert (tissue & head).sum() > (1 - AT_MOST) * (tissue | head).sum(), kind


def test_finite_voxels_decide():
    image, head = HEADS["skull"]
    voxels = in_air(image, 12)
    tissue = tissue_mask(voxels)
    voxels[:3] = np.nan
    voxels[28, 32, 26] = np.inf
    seen = tissue_mask(voxels)
    assert not seen[~np.isfinite(voxels)].any()
    assert np.count_nonzero(seen != tissue) < 0.01 * tissue.sum()
    assert np.array_equal(tissue_mask(np.where(head, image, np.nan)), head)


@pytest.mark.parametrize("value", [0, 7, -3])
def test_a_constant_image_shows_nothing(value):
    assert not tissue_mask(np.full((12, 13, 14), value, np.float32)).any()


def test_a_whole_brain_at_one_millimetre_takes_about_a_second():
    image, head = (np.pad(ndimage.zoom(v.astype(np.float32), 2.5, order=0), 20) for v in HEADS["stripped"])
    voxels = in_air(image, 12)
    start = time.process_time()
    tissue = tissue_mask(voxels)
    assert time.process_time() - start < 5  # of the processor; a busy machine is slower
    assert tissue.sum() == pytest.approx(head.sum(), rel=AT_MOST)


@pytest.fixture(scope="module")
def real():
    """Reads a real scan."""
    folder = shared_data()
    if folder is None:
        pytest.skip("the real scans are not beside this checkout")

    def read(name):
        return np.asarray(nib.load(folder / "ljubljana" / name).dataobj, dtype=np.float32)

    return read


@pytest.mark.parametrize("contrast", ["FLAIR", "T1", "T2", "T1POST"])
def test_the_brain_of_a_real_patient_has_no_holes(real, contrast):
    voxels = real(f"mni/patient26/{contrast}.nii.gz")[::2, ::2, ::2]
    brain = ndimage.binary_fill_holes(voxels != 0)
    tissue = tissue_mask(voxels)
    assert (voxels[brain] < 0).sum() > 100  # of the splines that resampled it
    assert tissue.sum() == pytest.approx(brain.sum(), rel=0.02)
    assert tissue[ndimage.binary_erosion(brain, iterations=3)].mean() > 0.998
    assert np.count_nonzero(tissue & ~brain) < 0.001 * brain.sum()


@pytest.mark.parametrize("name", ["patient01/study1_T1W", "patient03/study1_FLAIR", "patient20/study2_FLAIR"])
def test_a_real_head_is_the_same_in_other_air(real, name):
    voxels = real(f"longitudinal/{name}.nii.gz")[::3, ::3]
    tissue = tissue_mask(voxels)
    typical = np.median(voxels[tissue])
    for other in (
        in_air(voxels, 0.01 * typical),
        np.round(in_air(voxels, 0.02 * typical)),
        scored(in_air(voxels, 0.02 * typical)),
        np.pad(in_air(voxels, 0.02 * typical), 7),
        voxels - 1024,
        poked(voxels, None, -5, every=997),
    ):
        assert tissue_mask(other.astype(np.float32)).sum() == pytest.approx(tissue.sum(), rel=AT_MOST)
