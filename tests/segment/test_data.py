import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from rsanet.segment.cases import Case
from rsanet.segment.data import LoadCase, NormalizeForeground, foreground, preprocessing
from rsanet.segment.datasets import find_cases


def normalized(image):
    return NormalizeForeground()({"case": "x", "image": MetaTensor(image)})["image"].as_tensor()


def test_tissue_gets_mean_zero_and_deviation_one_and_the_background_stays_zero():
    generator = torch.Generator().manual_seed(0)
    image = 300 + 40 * torch.randn(1, 16, 16, 16, generator=generator)
    image[:, :, :, :6] = 0
    result = normalized(image)
    assert torch.all(result[image == 0] == 0)
    assert result[image > 0].mean().abs() < 1e-4
    assert (result[image > 0].std(correction=0) - 1).abs() < 1e-4


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**-30, 2.0**20])
def test_how_large_the_numbers_are_changes_nothing(scale):
    image = 300 + 40 * torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    image[:, :, :, :6] = 0
    prepare = NormalizeForeground(looked=True)
    one, other = (prepare({"case": "x", "image": MetaTensor(numbers)}) for numbers in (image, image * scale))
    torch.testing.assert_close(other["image"].as_tensor(), one["image"].as_tensor(), rtol=1e-5, atol=1e-5)
    assert other["look"]["quantiles"] == one["look"]["quantiles"]


def test_tissue_of_one_value_is_zero_but_for_rounding():
    image = torch.zeros(1, 8, 8, 8)
    image[:, 2:6, 2:6, 2:6] = 0.1
    assert normalized(image).abs().max() < 0.1


def test_noise_in_air_is_no_tissue():
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 16, 16, 16, generator=generator) * 10 + 0.1
    image[:, 4:12, 4:12, 4:12] += 500
    assert torch.equal(foreground(image)[0], image[0] > 400)


def test_exact_zeros_within_the_tissue_are_normalized_like_their_neighbours():
    generator = torch.Generator().manual_seed(0)
    image = torch.zeros(1, 20, 20, 20)
    image[:, 4:16, 4:16, 4:16] = 300 + 40 * torch.randn(1, 12, 12, 12, generator=generator)
    image[:, 9, 9, 7:12] = 0
    image[:, 11, 8, 8] = -6
    result = normalized(image)
    assert (result[:, 9, 9, 7:12] < -3).all()
    assert result[0, 11, 8, 8] == result.min()
    assert (result[:, :4] == 0).all()


@pytest.mark.parametrize("poke", ["clean", "one negative voxel", "integers", "splines"])
def test_noise_in_air_becomes_zero_and_leaves_the_head_as_it_is(phantoms, poke):
    images, _ = phantoms.make_subject(3)
    head = images["T1w"] != 0
    rng = np.random.default_rng(0)
    noise = [3 * rng.standard_normal(head.shape) for _ in range(2)]
    noisy = np.where(head, images["T1w"], np.hypot(*noise))
    if poke == "one negative voxel":
        noisy[0, 0, 0] = -0.5
    elif poke == "integers":
        noisy = np.round(noisy)
    elif poke == "splines":
        noisy[~head] -= 3
    clean, result = (
        normalized(torch.from_numpy(i.astype(np.float32))[None])[0].numpy() for i in (images["T1w"], noisy)
    )
    assert np.count_nonzero((result != 0) != head) < 0.02 * head.sum()
    assert np.abs(result - clean)[head & (result != 0)].max() < 0.2


@pytest.mark.parametrize("background", [-1024, 100])
def test_the_tissue_of_a_contrast_does_not_depend_on_the_grid_it_is_brought_to(tmp_path, phantoms, background):
    images, _ = phantoms.make_subject(5)
    turned = nib.affines.from_matvec(np.eye(3), [3, 0, 0])  # its first slices lie outside the other
    for name in ("FLAIR", "T1w"):
        images[name] = images[name] + background  # zeros that a resampling pads with would be as bright as tissue
    first = phantoms.save(tmp_path / "f.nii.gz", images["FLAIR"])
    other = phantoms.save(tmp_path / "t.nii.gz", images["T1w"], turned)
    loaded = LoadCase()(Case("x", {"FLAIR": first, "T1w": other}))
    tissue = loaded["tissue"].numpy() > 0
    head = images["FLAIR"] != background
    assert np.array_equal(tissue[0], head)
    assert np.array_equal(tissue[1, 3:], head[:-3])
    assert not tissue[1, :3].any()
    for spacing in (None, (1.5, 1.5, 1.5)):
        data = preprocessing(spacing)(Case("x", {"FLAIR": first, "T1w": other}))
        assert "tissue" not in data
        for channel in data["image"].as_tensor():
            assert (channel == 0).float().mean() > 0.3  # the corners of the box around the heads
            assert channel[channel != 0].mean().abs() < 1e-3


def test_channels_are_normalized_each_on_its_own():
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 8, 8, 8, generator=generator) + 1
    both = normalized(torch.cat([image, 1000 * image]))
    assert torch.allclose(both[0], both[1], atol=1e-4)


def test_a_contrast_on_another_grid_is_resampled_by_its_header(tmp_path, phantoms):
    def ramp(shape, affine):
        world = np.einsum("ij,jxyz->ixyz", affine[:3, :3], np.indices(shape)) + affine[:3, 3].reshape(3, 1, 1, 1)
        return 1000 + world[0] + 2 * world[1] - 3 * world[2]

    fine, coarse = np.diag([1.0, 1, 1, 1]), np.diag([-2.0, 2.5, 3, 1])
    coarse[:3, 3] = [30, -4, -5]
    first = phantoms.save(tmp_path / "first.nii.gz", ramp((20, 20, 20), fine), fine)
    second = phantoms.save(tmp_path / "second.nii.gz", ramp((20, 14, 12), coarse), coarse)
    image = LoadCase()(Case("x", {"FLAIR": first, "T1w": second}))["image"]
    assert image.shape == (2, 20, 20, 20)
    assert torch.allclose(image[0], image[1], atol=1e-2)


def test_volumes_are_stored_from_inferior_to_superior_whatever_the_file(tmp_path, phantoms):
    images, _ = phantoms.make_subject(5)
    flair = nib.Nifti1Image(images["FLAIR"].astype(np.float32), np.diag([1.0, 1, 1, 1]))
    stored = []
    for name, codes in (("ras", "RAS"), ("las", "LAS"), ("psr", "PSR")):
        wanted = nib.orientations.axcodes2ornt(codes)
        turned = flair.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(flair.affine), wanted))
        nib.save(turned, tmp_path / f"{name}.nii.gz")
        stored.append(preprocessing()(Case(name, {"FLAIR": tmp_path / f"{name}.nii.gz"}))["image"].as_tensor())
    assert torch.equal(stored[0], stored[1])
    assert torch.equal(stored[0], stored[2])
    head = images["FLAIR"] != 0
    box = tuple(slice(where.min(), where.max() + 1) for where in np.where(head))
    tissue = images["FLAIR"][head]
    expected = np.where(head, (images["FLAIR"] - tissue.mean()) / tissue.std(), 0)[box].transpose(2, 1, 0)
    assert np.allclose(stored[0][0], expected, atol=1e-4)


def test_spacing_resamples_image_and_mask(cohort):
    case = find_cases(cohort, require_mask=True)[0]
    own, coarse = preprocessing()(case), preprocessing((2.0, 2.0, 2.0))(case)
    assert all(abs(2 * c - o) <= 3 for c, o in zip(coarse["image"].shape[1:], own["image"].shape[1:], strict=True))
    assert coarse["mask"].shape[1:] == coarse["image"].shape[1:]
    assert set(coarse["mask"].unique().tolist()) == {0, 1}


def test_a_contrast_stored_in_another_orientation_is_the_same_volume(tmp_path, phantoms):
    images, _ = phantoms.make_subject(1)
    affine = np.array([[0.0, 0, -3, 87], [-3, 0, 0, 86.5], [0, 3, 0, -82], [0, 0, 0, 1]])
    turned = nib.as_closest_canonical(nib.Nifti1Image(images["T1w"].astype(np.float32), affine))
    first = phantoms.save(tmp_path / "f.nii.gz", images["FLAIR"], affine)
    other = phantoms.save(tmp_path / "t.nii.gz", np.asarray(turned.dataobj), turned.affine)
    loaded = LoadCase()(Case("x", {"FLAIR": first, "T1w": other}))["image"][1].numpy()
    assert np.allclose(loaded, images["T1w"], rtol=1e-6)
    assert np.array_equal(loaded == 0, images["T1w"] == 0)  # the background is known by exact zeros


def test_contrasts_that_lie_apart_are_refused_before_anything_is_resampled(tmp_path, phantoms):
    images, _ = phantoms.make_subject(1)
    apart = np.eye(4)
    apart[1, 3] = 25
    first = phantoms.save(tmp_path / "f.nii.gz", images["FLAIR"])
    second = phantoms.save(tmp_path / "t.nii.gz", images["T1w"], apart)
    with pytest.raises(ValueError, match=r"t\.nii\.gz covers 1\d % of the field of view of .*f\.nii\.gz by"):
        preprocessing()(Case("x", {"FLAIR": first, "T1w": second}))


def test_a_case_may_hold_images_in_memory(tmp_path, phantoms):
    images, lesions = phantoms.make_subject(1)
    paths = {name: phantoms.save(tmp_path / f"{name}.nii.gz", voxels) for name, voxels in images.items()}
    mask = phantoms.save(tmp_path / "mask.nii.gz", lesions)
    read = LoadCase()(Case("x", paths, mask))
    loaded = LoadCase()(Case("x", {name: nib.load(path) for name, path in paths.items()}, nib.load(mask)))
    assert torch.equal(read["image"].as_tensor(), loaded["image"].as_tensor())
    assert torch.equal(read["mask"].as_tensor(), loaded["mask"].as_tensor())
    assert np.array_equal(loaded["mask"][0].numpy() > 0, lesions)
