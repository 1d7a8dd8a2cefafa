import gzip

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from rsanet.segment.data import LoadCase, NormalizeForeground, foreground, preprocessing, training_transforms
from rsanet.segment.datasets import Case, find_cases, is_simulated, list_cases
from rsanet.segment.volumes import read_mask, read_volume


def normalized(image):
    return NormalizeForeground()({"case": "x", "image": MetaTensor(image)})["image"].as_tensor()


def test_a_cohort_is_read_with_its_contrasts_in_channel_order(cohort, phantoms):
    cases = find_cases(cohort, require_mask=True)
    assert [case.id for case in cases] == ["sub-001", "sub-002", "sub-003", "sub-004"]
    assert list(cases[0].images) == ["FLAIR", "T1w", "T2w"]
    assert cases[2].mask == phantoms.mask_path(cohort, "sub-003")
    assert list(find_cases(cohort, ["T2w", "FLAIR"], require_mask=True)[0].images) == ["T2w", "FLAIR"]


def test_all_bad_cases_are_named_at_once(tmp_path, phantoms):
    root = phantoms.write_cohort(tmp_path, 6)
    phantoms.image_path(root, "sub-001", "T1w").unlink()
    phantoms.mask_path(root, "sub-002").unlink()
    broken = phantoms.image_path(root, "sub-003", "T2w")
    broken.write_bytes(broken.read_bytes()[:2000])
    phantoms.save(phantoms.mask_path(root, "sub-004"), np.ones((26, 30, 23)))
    shifted = np.eye(4)
    shifted[0, 3] = 1
    phantoms.save(phantoms.mask_path(root, "sub-005"), np.ones((26, 30, 24)), shifted)
    with pytest.raises(ValueError, match="5 of 6 cases") as error:
        find_cases(root, require_mask=True)
    lines = str(error.value).splitlines()[1:]
    for line, name, reason in zip(
        lines,
        ["sub-001", "sub-002", "sub-003", "sub-004", "sub-005"],
        ["no T1w", "no lesion mask", "cannot be read", "another grid", "another grid"],
        strict=True,
    ):
        assert name in line
        assert reason in line


def test_a_missing_contrast_is_named_although_no_case_has_it(cohort):
    with pytest.raises(ValueError, match="sub-001 has no PDw"):
        find_cases(cohort, ["FLAIR", "PDw"], require_mask=False)


def test_masks_are_not_asked_for_where_none_are_needed(tmp_path, phantoms):
    phantoms.write_subject(tmp_path, "sub-001", 1, mask=False)
    assert find_cases(tmp_path, require_mask=False)[0].mask is None


def test_a_folder_without_cases_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no cases"):
        list_cases(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        list_cases(tmp_path / "nowhere")


def broken_volume(kind, folder):
    path = folder / f"{kind}.nii.gz"
    voxels = np.random.default_rng(0).standard_normal((8, 8, 8)).astype(np.float32)
    if kind == "missing":
        return path
    if kind == "text":
        path.write_text("not an image")
    elif kind == "gzipped text":
        path.write_bytes(gzip.compress(b"not an image"))
    elif kind == "truncated":
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
        path.write_bytes(path.read_bytes()[:-600])
    elif kind == "other name":
        path = folder / "image.mha"
        path.write_bytes(b"")
    elif kind == "singular":
        image = nib.Nifti1Image(voxels, None)
        image.header["sform_code"] = 1
        image.header["srow_x"] = image.header["srow_y"] = image.header["srow_z"] = (1, 0, 0, 0)
        nib.save(image, path)
    else:
        if kind == "NaN":
            voxels[1, 2, 3] = np.nan
        shaped = {"4-D": voxels.reshape(8, 8, 4, 2), "2-D": voxels[0], "no voxels": voxels[:0]}.get(kind, voxels)
        nib.save(nib.Nifti1Image(shaped.astype(np.complex64) if kind == "complex" else shaped, np.eye(4)), path)
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "does not exist"),
        ("text", "cannot be read"),
        ("gzipped text", "cannot be read"),
        ("truncated", "cannot be read"),
        ("other name", "not a NIfTI file"),
        ("singular", "affine"),
        ("NaN", "1 voxels that are NaN"),
        ("4-D", "4 dimensions"),
        ("2-D", "2 dimensions"),
        ("no voxels", "no voxels"),
        ("complex", "complex64"),
    ],
)
def test_a_file_that_cannot_serve_is_refused_in_one_sentence(tmp_path, kind, reason):
    path = broken_volume(kind, tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=reason) as error:
        read_volume(path)
    assert path.name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_trailing_dimension_of_one_is_dropped(tmp_path, phantoms):
    path = phantoms.save(tmp_path / "x.nii.gz", np.arange(24.0).reshape(2, 3, 4, 1))
    assert np.array_equal(read_volume(path)[0], np.arange(24.0).reshape(2, 3, 4))


def test_scaled_integers_are_read_as_what_they_mean(tmp_path):
    values = np.linspace(-1, 1, 27).reshape(3, 3, 3)
    image = nib.Nifti1Image(values, np.eye(4))
    image.set_data_dtype(np.int16)
    nib.save(image, tmp_path / "x.nii.gz")
    assert nib.load(tmp_path / "x.nii.gz").dataobj.slope < 1e-3
    assert np.allclose(read_volume(tmp_path / "x.nii.gz")[0], values, atol=1e-4)


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


def test_half_of_the_patches_are_centred_on_lesions_and_follow_the_seed(cohort):
    case = find_cases(cohort, require_mask=True)[0]

    def patches(seed):
        transform = training_transforms((8, 8, 8))
        transform.set_random_state(seed)
        return [transform(case)[0] for _ in range(30)]

    first, again, other = patches(1), patches(1), patches(2)
    assert all(patch["image"].shape == (3, 8, 8, 8) for patch in first)
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a["image"], b["image"]) for a, b in zip(first, other, strict=True))
    assert sum(bool(patch["mask"].any()) for patch in first) >= 15


def test_a_volume_smaller_than_the_patch_is_padded(cohort):
    case = find_cases(cohort, require_mask=True)[0]
    assert training_transforms((40, 32, 48))(case)[0]["image"].shape == (3, 40, 32, 48)


def test_simulated_cohorts_are_known_by_their_description(cohort, tmp_path, phantoms):
    assert is_simulated(cohort)
    assert is_simulated(phantoms.mask_path(cohort, "sub-001"))
    assert not is_simulated(tmp_path)
    for description in ("no json", "[]", '{"GeneratedBy": [{"Name": "fMRIPrep"}]}', '{"GeneratedBy": null}'):
        (tmp_path / "dataset_description.json").write_text(description)
        assert not is_simulated(tmp_path)


@pytest.mark.parametrize("value", [1, 255])
def test_a_mask_is_zero_and_one_other_number(tmp_path, phantoms, value):
    images, lesions = phantoms.make_subject(1)
    flair = phantoms.save(tmp_path / "flair.nii.gz", images["FLAIR"])
    path = phantoms.save(tmp_path / "mask.nii.gz", value * lesions.astype(float), dtype=np.uint8)
    assert np.array_equal(read_mask(path)[0], lesions)
    assert np.array_equal(LoadCase()(Case("x", {"FLAIR": flair}, path))["mask"][0].numpy() > 0, lesions)


@pytest.mark.parametrize("values", [[1, 2], [0.25, 0.5, 0.75, 0.8], [-1]])
def test_labels_and_probabilities_are_no_mask(tmp_path, phantoms, values):
    root = phantoms.write_cohort(tmp_path, 2)
    voxels = np.zeros((26, 30, 24))
    voxels[0, 0, : len(values)] = values
    path = phantoms.save(phantoms.mask_path(root, "sub-002"), voxels)
    with pytest.raises(ValueError, match=r"1 of 2 cases .*\n.*is not a binary mask: besides 0 it has ") as error:
        find_cases(root, require_mask=True)
    assert str(path) in str(error.value)


def test_every_session_is_a_case_with_its_own_mask(tmp_path, phantoms):
    images, lesions = phantoms.make_subject(1)
    for name in ("sub-006/ses-01", "sub-006/ses-02", "sub-007"):
        key = name.replace("/", "_")
        phantoms.save(tmp_path / name / "anat" / f"{key}_FLAIR.nii.gz", images["FLAIR"])
        mask = tmp_path / "derivatives" / "lesions" / name / "anat" / f"{key}_label-lesion_mask.nii.gz"
        phantoms.save(mask, lesions)
    cases = find_cases(tmp_path, require_mask=True)
    assert [case.id for case in cases] == ["sub-006_ses-01", "sub-006_ses-02", "sub-007"]
    for case in cases:
        assert case.images["FLAIR"].name == f"{case.id}_FLAIR.nii.gz"
        assert case.mask.name == f"{case.id}_label-lesion_mask.nii.gz"


def test_two_images_of_one_contrast_are_a_bad_case(tmp_path, phantoms):
    root = phantoms.write_cohort(tmp_path, 2)
    first = phantoms.image_path(root, "sub-002")
    first.rename(first.with_name("sub-002_run-1_FLAIR.nii.gz"))
    phantoms.save(first.with_name("sub-002_run-2_FLAIR.nii.gz"), phantoms.make_subject(9)[0]["FLAIR"])
    with pytest.raises(ValueError, match=r"1 of 2 cases .*\n  sub-002 has several FLAIR images \(.*run-1.*run-2"):
        find_cases(root, require_mask=True)
    assert len(find_cases(root, ["T1w"], require_mask=True)) == 2


def test_a_contrast_is_named_once(cohort):
    with pytest.raises(ValueError, match="--contrasts has FLAIR more than once"):
        find_cases(cohort, ["FLAIR", "T1w", "FLAIR"], require_mask=True)
