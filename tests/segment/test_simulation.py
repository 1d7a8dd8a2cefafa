"""Simulated patients: reproducible, with lesions where and as bright as the disease makes them."""

import csv
import dataclasses
import gzip
import hashlib
import json
import sys

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from rsanet.segment import simulation
from rsanet.segment.simulation import CONTRASTS, Settings, simulate_cohort, simulate_patient, subject_seed

SPACING = 3.0
SEED = 11


def digests(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def mask_path(cohort, name):
    return cohort / "derivatives" / "lesions" / name / "anat" / f"{name}_label-lesion_mask.nii.gz"


def sidecar(cohort, name):
    return json.loads(mask_path(cohort, name).with_name(f"{name}_label-lesion_mask.json").read_text())


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
    out = tmp_path_factory.mktemp("simulated") / "cohort"
    simulate_cohort(out, 3, spacing=SPACING, seed=SEED)
    return out


@pytest.fixture(scope="session")
def patient():
    return simulate_patient(subject_seed(SEED, 1), Settings(spacing=(2.0, 2.0, 2.0)))


# --- on disk ----------------------------------------------------------------------------------------------


def test_the_layout_is_bids_with_masks_in_derivatives(cohort):
    found = set(digests(cohort))
    expected = {"README", "dataset_description.json", "participants.tsv"}
    expected.add("derivatives/lesions/dataset_description.json")
    for name in ("sub-001", "sub-002", "sub-003"):
        expected |= {f"{name}/anat/{name}_{contrast}.nii.gz" for contrast in CONTRASTS}
        expected |= {f"derivatives/lesions/{name}/anat/{name}_label-lesion_mask{end}" for end in (".nii.gz", ".json")}
    assert found == expected
    readme = (cohort / "README").read_text()
    assert "no clinical meaning" in readme
    assert "Fonov" in readme
    assert json.loads((cohort / "dataset_description.json").read_text())["BIDSVersion"]


def test_headers_say_where_and_how_large_voxels_are(cohort):
    mask = nibabel.load(mask_path(cohort, "sub-001"))
    assert mask.get_data_dtype() == np.uint8
    for contrast in CONTRASTS:
        image = nibabel.load(cohort / "sub-001" / "anat" / f"sub-001_{contrast}.nii.gz")
        assert image.get_data_dtype() == np.int16
        assert image.shape == mask.shape
        assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
        for form, code in (image.get_sform(coded=True), image.get_qform(coded=True)):
            assert code == 1
            np.testing.assert_allclose(form, mask.affine, atol=1e-5)
        np.testing.assert_allclose(image.header.get_zooms(), SPACING)
        assert image.header.get_xyzt_units()[0] == "mm"


def test_the_same_seed_gives_the_same_bytes_whatever_the_number_of_subjects(cohort, tmp_path):
    simulate_cohort(tmp_path / "two", 2, spacing=SPACING, seed=SEED)
    small, large = digests(tmp_path / "two"), digests(cohort)
    images = {name for name in small if "sub-" in name}
    assert len(images) == 2 * 5
    assert all(small[name] == large[name] for name in images)


def test_images_carry_no_time_of_writing(cohort):
    with gzip.open(mask_path(cohort, "sub-001")) as file:
        file.read(1)
        assert file.mtime == 0


def test_subjects_and_seeds_differ(cohort, tmp_path):
    flair = [
        nibabel.load(cohort / name / "anat" / f"{name}_FLAIR.nii.gz").get_fdata() for name in ("sub-001", "sub-002")
    ]
    assert not np.array_equal(*flair)
    assert subject_seed(SEED, 1) != subject_seed(SEED + 1, 1)
    assert len({subject_seed(seed, number) for seed in range(20) for number in range(1, 50)}) == 20 * 49


@pytest.mark.parametrize("name", ["sub-001", "sub-002", "sub-003"])
def test_the_sidecar_agrees_with_the_mask(cohort, name):
    image = nibabel.load(mask_path(cohort, name))
    mask = np.asarray(image.dataobj)
    assert set(np.unique(mask)) == {0, 1}
    labels, count = ndimage.label(mask, np.ones((3, 3, 3)))
    content = sidecar(cohort, name)
    assert content["Simulated"] is True
    assert content["LesionCount"] == len(content["Lesions"]) == count > 0
    assert content["LesionLoad_mm3"] == pytest.approx(mask.sum() * SPACING**3)
    for lesion in content["Lesions"]:
        voxels = np.argwhere(labels == lesion["id"])
        assert lesion["voxels"] == len(voxels) >= simulation.SMALLEST_LESION
        assert lesion["volume_mm3"] == pytest.approx(len(voxels) * SPACING**3)
        centre = nibabel.affines.apply_affine(image.affine, voxels.mean(0))
        np.testing.assert_allclose(lesion["centre_mm"], centre, atol=0.01)
        assert lesion["kind"] in ("periventricular", "juxtacortical", "deep")


def test_participants_lists_what_the_sidecars_say(cohort):
    with (cohort / "participants.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [row["participant_id"] for row in rows] == ["sub-001", "sub-002", "sub-003"]
    for number, row in enumerate(rows, start=1):
        content = sidecar(cohort, row["participant_id"])
        assert int(row["seed"]) == content["Seed"] == subject_seed(SEED, number)
        assert int(row["lesion_count"]) == content["LesionCount"]
        assert float(row["lesion_load_mm3"]) == content["LesionLoad_mm3"]


def test_a_stopped_cohort_is_completed_and_subjects_on_disk_stay(tmp_path, monkeypatch):
    out = tmp_path / "cohort"
    write, calls = simulation._write_image, []

    def stop(file, volume, affine):
        calls.append(file)
        if len(calls) == 7:
            raise KeyboardInterrupt
        write(file, volume, affine)

    monkeypatch.setattr(simulation, "_write_image", stop)
    with pytest.raises(KeyboardInterrupt):
        simulate_cohort(out, 3, spacing=4, seed=1)
    assert [p.name for p in sorted(out.glob("sub-*"))] == ["sub-001"], "no half of the second subject"
    assert not list(out.glob(".sub-*"))
    first = (out / "sub-001" / "anat" / "sub-001_FLAIR.nii.gz").stat().st_mtime_ns
    monkeypatch.setattr(simulation, "_write_image", write)
    seen = []
    subjects = simulate_cohort(
        out, 3, spacing=4, seed=1, progress=lambda done, total, name: seen.append((done, total, name))
    )
    assert seen == [(1, 3, "sub-001"), (2, 3, "sub-002"), (3, 3, "sub-003")]
    assert [subject.participant_id for subject in subjects] == ["sub-001", "sub-002", "sub-003"]
    assert (out / "sub-001" / "anat" / "sub-001_FLAIR.nii.gz").stat().st_mtime_ns == first
    assert len((out / "participants.tsv").read_text().splitlines()) == 4


def test_a_kill_between_the_two_renames_leaves_a_subject_to_be_made_again(tmp_path):
    out = tmp_path / "cohort"
    simulate_cohort(out, 1, spacing=4, seed=1)
    before = digests(out)
    (out / "sub-001").rename(tmp_path / "gone")  # as if only the masks had been put in place
    (out / ".sub-001.half").mkdir()
    simulate_cohort(out, 1, spacing=4, seed=1)
    assert digests(out) == before


def test_another_cohort_and_foreign_folders_are_refused(cohort, tmp_path):
    before = digests(cohort)
    with pytest.raises(ValueError, match=r"other settings.*seed 11"):
        simulate_cohort(cohort, 3, spacing=SPACING, seed=SEED + 1)
    with pytest.raises(ValueError, match=r"spacing \[3\.0, 3\.0, 3\.0\]"):
        simulate_cohort(cohort, 3, spacing=2, seed=SEED)
    assert digests(cohort) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        simulate_cohort(tmp_path, 1, spacing=4)
    with pytest.raises(ValueError, match="is a file"):
        simulate_cohort(tmp_path / "notes.txt", 1, spacing=4)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "dataset_description.json").write_text('{"Name": "Real patients"}')
    with pytest.raises(ValueError, match="another data set"):
        simulate_cohort(tmp_path, 1, spacing=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"subjects": 0}, "subjects is 0"),
        ({"subjects": 1, "seed": -1}, "seed is -1"),
        ({"subjects": 1, "spacing": 0.1}, "spacing is 0.1"),
        ({"subjects": 1, "spacing": (1, 1)}, "three"),
        ({"subjects": 1, "spacing": float("nan")}, "spacing"),
    ],
)
def test_arguments_out_of_range_are_refused_before_anything_is_written(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        simulate_cohort(tmp_path / "cohort", **arguments)
    assert not (tmp_path / "cohort").exists()


def test_without_nilearn_one_sentence_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "nilearn", None)
    monkeypatch.setattr(simulation, "load_anatomy", simulation.load_anatomy.__wrapped__)  # past its cache
    with pytest.raises(RuntimeError, match=r'pip install "rsanet\[demo\]"'):
        simulate_cohort(tmp_path / "cohort", 1)
    assert not (tmp_path / "cohort").exists()


# --- in the images ----------------------------------------------------------------------------------------


def test_background_is_zero_and_the_brain_is_not(patient):
    brain = patient.images["FLAIR"] > 0
    for image in patient.images.values():
        np.testing.assert_array_equal(image > 0, brain)
    litres = brain.sum() * 8 / 1e6
    assert 1.4 < litres < 2.3
    edges = np.ones(brain.shape, bool)
    edges[1:-1, 1:-1, 1:-1] = False
    assert not (brain & edges).any(), "the head lies within the field of view"


def surroundings(patient, lesion_only):
    """Lesion voxels away from their soft edge, and the tissue around lesions that is bright on T1: white matter."""
    mask = patient.mask > 0
    near = ndimage.binary_dilation(mask, iterations=4) & ~ndimage.binary_dilation(mask, iterations=2)
    t1 = patient.images["T1w"]
    white = near & (t1 > np.percentile(t1[t1 > 0], 65))
    return mask & lesion_only, white


def test_lesions_are_bright_on_flair_and_t2_and_dark_on_t1(patient):
    core = ndimage.binary_erosion(patient.mask > 0)
    lesion, white = surroundings(patient, core)
    assert lesion.sum() > 20
    level = {name: (np.median(image[lesion]), np.median(image[white])) for name, image in patient.images.items()}
    assert level["FLAIR"][0] > 1.3 * level["FLAIR"][1]
    assert level["T2w"][0] > 1.2 * level["T2w"][1]
    assert level["T1w"][0] < 0.85 * level["T1w"][1]


def test_tissues_have_the_signal_of_each_contrast():
    anatomy = simulation.load_anatomy()
    settings = Settings(
        spacing=(2.0, 2.0, 2.0), noise=0.0, bias=0.0, texture=0.0, warp_mm=(0.0, 0.0), enlargement_mm=(0.0, 0.0)
    )
    patient = simulate_patient(3, settings, anatomy)
    healthy = ~ndimage.binary_dilation(patient.mask > 0, iterations=2)
    shape, origin, _ = simulation._grid(settings.spacing)
    points = simulation._grid_points(shape, origin, np.full(3, 2.0))
    streams = np.random.SeedSequence(3).spawn(4)
    warp = simulation._draw_warp(np.random.default_rng(streams[0]), anatomy, settings)
    grey, white, csf = simulation._sample(anatomy.maps[1:4], anatomy.origin, 1.0, warp(points)).numpy()
    mean = {
        name: {
            tissue: image[healthy & (share > 0.95) & (image > 0)].mean()
            for tissue, share in (("grey", grey), ("white", white), ("csf", csf))
        }
        for name, image in patient.images.items()
    }
    assert mean["FLAIR"]["csf"] < 0.6 * mean["FLAIR"]["white"] < 0.6 * mean["FLAIR"]["grey"]
    assert mean["T2w"]["csf"] > 1.3 * mean["T2w"]["grey"] > 1.3 * mean["T2w"]["white"]
    assert mean["T1w"]["white"] > mean["T1w"]["grey"] > mean["T1w"]["csf"]


def test_lesions_lie_inside_the_brain_and_off_the_csf(patient):
    mask = patient.mask > 0
    assert not (mask & (patient.images["FLAIR"] == 0)).any()
    outside = ndimage.distance_transform_edt(patient.images["FLAIR"] > 0, sampling=2.0)
    assert outside[mask].min() > 2
    t2 = patient.images["T2w"].astype(float)
    assert (t2[mask] > 0.95 * np.percentile(t2[t2 > 0], 99)).mean() < 0.05, "few labels on bright fluid"


def test_periventricular_lesions_lie_at_the_ventricles_and_juxtacortical_at_the_cortex():
    anatomy = simulation.load_anatomy()
    ventricles, cortex = anatomy.maps[5].numpy(), anatomy.cortex_distance
    near = {name: ventricles.ravel()[places] for name, places in anatomy.candidates.items()}
    assert near["periventricular"].max() < 4
    assert near["deep"].min() > 6
    assert cortex.ravel()[anatomy.candidates["juxtacortical"]].max() < 4
    kinds = [
        lesion["kind"]
        for seed in range(3)
        for lesion in simulate_patient(seed, Settings(spacing=(3.0, 3.0, 3.0), lesions_median=80.0)).lesions
    ]
    share = kinds.count("periventricular") / len(kinds)
    assert 0.3 < share < 0.85
    assert {"juxtacortical", "deep"} <= set(kinds)


def test_long_axes_of_periventricular_lesions_point_away_from_the_ventricle():
    anatomy = simulation.load_anatomy()
    settings = Settings(warp_mm=(0.0, 0.0), enlargement_mm=(0.0, 0.0), lesions_median=80.0)
    warp = simulation._draw_warp(np.random.default_rng(0), anatomy, settings)
    lesions = simulation._draw_lesions(np.random.default_rng(1), anatomy, warp, settings)
    angles = []
    for lesion in lesions:
        if lesion.kind != "periventricular":
            continue
        assert lesion.semi_axes[0] == lesion.semi_axes.max()
        ends = [lesion.centre + side * lesion.semi_axes[0] * lesion.axes[0] for side in (-1, 1)]
        near, far = (
            simulation._sample(anatomy.maps[5:6], anatomy.origin, 1.0, warp(simulation.torch.tensor(end).float()))
            for end in ends
        )
        angles.append(float((far - near) / (2 * lesion.semi_axes[0])))
    assert len(angles) > 10
    assert np.median(angles) > 0.7


def test_patients_are_not_symmetric_though_the_template_is(patient):
    template = simulation.load_anatomy().maps[0].numpy()
    np.testing.assert_allclose(template, template[::-1], atol=1e-6)
    t1 = patient.images["T1w"].astype(float)
    assert np.corrcoef(t1.ravel(), t1[::-1].ravel())[0, 1] < 0.97
    brain = t1 > 0
    assert (brain ^ brain[::-1]).sum() / brain.sum() > 0.02


def test_the_same_seed_is_the_same_patient_at_every_spacing(patient):
    coarse = simulate_patient(patient.seed, Settings(spacing=(2.0, 2.0, 4.0)))
    load = [sum(lesion["volume_mm3"] for lesion in one.lesions) for one in (patient, coarse)]
    assert load[1] == pytest.approx(load[0], rel=0.35)
    large = max(patient.lesions, key=lambda lesion: lesion["volume_mm3"])["centre_mm"]
    nearest = min(np.linalg.norm(np.subtract(lesion["centre_mm"], large)) for lesion in coarse.lesions)
    assert nearest < 6


def test_noise_leaves_anatomy_and_lesions_as_they_are(patient):
    quiet = simulate_patient(patient.seed, dataclasses.replace(patient.settings, noise=0.0))
    np.testing.assert_array_equal(quiet.mask, patient.mask)
    assert quiet.lesions == patient.lesions
    difference = quiet.images["T2w"].astype(float) - patient.images["T2w"]
    expected = patient.settings.noise * CONTRASTS["T2w"].gain
    bright = quiet.images["T2w"] > np.percentile(quiet.images["T2w"], 80)
    assert difference[bright].std() == pytest.approx(expected, rel=0.1)


def test_unlabelled_blobs_are_not_painted():
    settings = Settings(spacing=(3.0, 3.0, 3.0), noise=0.0)
    tiny = tuple(dataclasses.replace(kind, median_mm3=5.0, spread=0.0) for kind in settings.kinds)
    with_tiny = simulate_patient(5, dataclasses.replace(settings, kinds=tiny))
    none = tuple(dataclasses.replace(kind, median_mm3=0.001, spread=0.0) for kind in settings.kinds)
    assert with_tiny.mask.sum() == 0
    assert with_tiny.lesions == []
    np.testing.assert_array_equal(
        with_tiny.images["FLAIR"],
        simulate_patient(5, dataclasses.replace(settings, kinds=none)).images["FLAIR"],
    )


@pytest.mark.parametrize("subjects", [0, 1000])
def test_names_of_patients_have_three_digits_in_every_cohort(subjects, tmp_path):
    with pytest.raises(ValueError, match=f"subjects is {subjects}: ask for 1 to 999"):
        simulate_cohort(tmp_path / "cohort", subjects, spacing=4)
    assert not (tmp_path / "cohort").exists()
