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


def test_noise_in_air_is_no_tissue():
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 16, 16, 16, generator=generator) * 10 + 0.1
    image[:, 4:12, 4:12, 4:12] += 500
    assert torch.equal(foreground(image)[0], image[0] > 400)


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
