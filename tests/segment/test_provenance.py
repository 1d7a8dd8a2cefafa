"""What stands beside predicted masks, and where they lie."""

import hashlib
import json
import os
import socket

import nibabel as nib
import numpy as np
import pytest
from segment.bright import segmenter

from rsanet.segment import provenance
from rsanet.segment.cohort import predict_cohort
from rsanet.segment.datasets import list_cases
from rsanet.segment.ensemble import Ensemble
from rsanet.segment.evaluation import evaluate, find_masks
from rsanet.segment.prediction import predict


def write_sessions(root, phantoms):
    """A BIDS data set of a subject with two sessions and one without any."""
    for seed, place in enumerate(("sub-1/ses-a", "sub-1/ses-b", "sub-2")):
        images, lesions = phantoms.make_subject(seed)
        name = place.replace("/", "_")
        for contrast, image in images.items():
            phantoms.save(root / place / "anat" / f"{name}_{contrast}.nii.gz", image)
        mask = root / "derivatives" / "manual" / place / "anat" / f"{name}_label-lesion_mask.nii.gz"
        phantoms.save(mask, lesions, dtype=np.uint8)
    (root / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.10.0"}')
    return root


def test_a_mask_says_how_it_came_about(trained, tmp_path, phantoms, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spacing = np.diag([1.0, 1.5, 2.0, 1.0])
    for name, image in phantoms.make_subject(3)[0].items():
        phantoms.save(tmp_path / f"{name}.nii.gz", image, spacing)
    images = ["FLAIR.nii.gz", "T1w.nii.gz", "T2w.nii.gz"]
    options = {"threshold": 0.4, "min_lesion_mm3": 6, "device": "cpu", "precision": "fp32", "roi": [24, 16, 16]}
    found = predict([trained, trained / "last.safetensors"], images, "m.nii.gz", **options)
    said = json.loads((tmp_path / "m.json").read_text())
    versions = said.pop("Versions")
    assert {"python", "torch", "monai", "rsanet"} <= versions.keys()
    assert said.pop("GeneratedBy") == [{"Name": "rsanet", "Version": versions["rsanet"]}]
    assert said.pop("Backend") == found.backend
    assert 0 < said.pop("Seconds") <= round(found.seconds, 2)
    model_files = [trained / "model.safetensors", trained / "last.safetensors"]
    assert said == {
        "Type": "Lesion",
        "Sources": images,
        "SpatialReference": "FLAIR.nii.gz",
        "Models": [
            {"Path": str(file), "SHA256": hashlib.sha256(file.read_bytes()).hexdigest()} for file in model_files
        ],
        "Contrasts": ["FLAIR", "T1w", "T2w"],
        "Threshold": 0.4,
        "MinimumLesionVolume": 6,
        "Device": "cpu",
        "Precision": "fp32",
        "Window": [[24, 16, 16], [24, 16, 16]],
        "MirrorImages": False,
        "VoxelSize": [1.0, 1.5, 2.0],
        "Lesions": found.lesions,
        "LesionLoad": round(found.load_mm3, 3),
        "Warnings": list(found.warnings),
    }


def test_images_in_memory_are_no_sources(tmp_path, phantoms):
    images = {name: nib.Nifti1Image(image, np.eye(4)) for name, image in phantoms.make_subject(3)[0].items()}
    predict(segmenter(), images, tmp_path / "m.nii.gz")
    said = json.loads((tmp_path / "m.json").read_text())
    assert (said["Sources"], said["SpatialReference"]) == ([], None)
    assert said["Models"] == [{"Path": "the model", "SHA256": None}]


def test_a_mask_without_its_words_is_not_left_alone(tmp_path, phantoms, monkeypatch):
    images = {name: nib.Nifti1Image(image, np.eye(4)) for name, image in phantoms.make_subject(3)[0].items()}
    (tmp_path / "m.json").write_text("precious")
    with pytest.raises(ValueError, match=r"m\.json exists: give another name, or --overwrite"):
        predict(segmenter(), images, tmp_path / "m.nii.gz")
    assert [path.name for path in tmp_path.iterdir()] == ["m.json"]
    (tmp_path / "m.json").unlink()

    def disk_full(path, text):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(provenance, "write_text", disk_full)
    with pytest.raises(OSError, match="No space left"):
        predict(segmenter(), images, tmp_path / "m.nii.gz")
    assert list(tmp_path.iterdir()) == []


def test_masks_of_a_bids_data_set_are_derivatives_in_its_tree(tmp_path, phantoms):
    root, out = write_sessions(tmp_path / "bids", phantoms), tmp_path / "out"
    rows, failures = predict_cohort(segmenter(), root, out, probability_map=True)
    assert failures == {}
    first = "sub-1/ses-a/anat/sub-1_ses-a_label-lesion"
    assert rows[0].mask == f"{first}_mask.nii.gz"
    for end in ("_mask.nii.gz", "_mask.json", "_probseg.nii.gz"):
        assert (out / f"{first}{end}").is_file()
        assert (out / f"sub-2/anat/sub-2_label-lesion{end}").is_file()
    description = json.loads((out / "dataset_description.json").read_text())
    assert (description["DatasetType"], description["GeneratedBy"][0]["Name"]) == ("derivative", "rsanet")
    assert {case: [path.name for path in paths] for case, paths in find_masks(out).items()} == {
        case: [f"{case}_label-lesion_mask.nii.gz"] for case in ("sub-1_ses-a", "sub-1_ses-b", "sub-2")
    }
    scores = evaluate(out, root)
    assert [case.subject for case in scores.cases] == ["sub-1_ses-a", "sub-1_ses-b", "sub-2"]
    assert scores.failures == {}


def test_derivatives_within_the_data_set_leave_it_as_it_was(tmp_path, phantoms):
    root = write_sessions(tmp_path / "bids", phantoms)
    before = list_cases(root)
    predict_cohort(segmenter(), root, root / "derivatives" / "rsanet")
    assert list_cases(root) == before
    with pytest.raises(ValueError, match=r"bids is another data set, by its .*example .*derivatives/rsanet"):
        predict_cohort(segmenter(), root, root)
    assert not list((root / "sub-2").rglob("*mask*"))


def test_masks_of_other_layouts_lie_side_by_side(tmp_path, phantoms):
    for name, image in phantoms.make_subject(3)[0].items():
        phantoms.save(tmp_path / "data" / "P1" / f"{name}.nii.gz", image)
    predict_cohort(segmenter(), tmp_path / "data", tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == [
        "P1_label-lesion_mask.json",
        "P1_label-lesion_mask.nii.gz",
        "predictions.csv",
    ]


def test_a_resumed_cohort_makes_what_is_missing_beside_a_mask(tmp_path, phantoms):
    root, out = write_sessions(tmp_path / "bids", phantoms), tmp_path / "out"
    predict_cohort(segmenter(), root, out)
    words = out / "sub-2/anat/sub-2_label-lesion_mask.json"
    words.unlink()
    stale = words.with_name(f".partial-{socket.gethostname()}-{2**22 + 1}-x.nii.gz")  # of no process, by its number
    stale.write_text("half")
    done = []
    predict_cohort(segmenter(), root, out, resume=True, progress=lambda *args: done.append(args[2].case))
    assert done == ["sub-2"]
    assert words.is_file()
    assert not stale.exists()


def test_masks_of_a_model_that_was_trained_again_are_not_mixed(tmp_path, trained, phantoms):
    root, out = write_sessions(tmp_path / "bids", phantoms), tmp_path / "out"
    first, second = ((trained / f"{name}.safetensors").read_bytes() for name in ("ema", "last"))
    model = tmp_path / "model.safetensors"
    model.write_bytes(first)
    predict_cohort(model, root, out)
    model.write_bytes(second)
    assert first != second
    with pytest.raises(ValueError, match=r"has masks of .*\(sha256 \w{12}\).*would add some of .*\(sha256 \w{12}\)"):
        predict_cohort(model, root, out, resume=True)


def test_a_flair_only_model_takes_one_image_of_a_cohort_with_more(cohort, tiny, tmp_path, phantoms, rsanet):
    run = tmp_path / "run"
    assert rsanet("train", cohort, "-o", run, "--contrasts", "FLAIR", "--steps", "2", *tiny)[0] == 0
    assert Ensemble.load(run).contrasts == ("FLAIR",)
    flair = phantoms.image_path(cohort, "sub-001")
    code, _, err = rsanet("predict", run, "-i", flair, "-o", tmp_path / "m.nii.gz")
    assert (code, err) == (0, "")
    assert json.loads((tmp_path / "m.json").read_text())["Contrasts"] == ["FLAIR"]
    code, _, err = rsanet("predict", run, "--data", cohort, "-o", tmp_path / "masks")
    assert (code, err) == (0, "")
    alone = np.asarray(nib.load(tmp_path / "m.nii.gz").dataobj)
    in_cohort = tmp_path / "masks/sub-001/anat/sub-001_label-lesion_mask.nii.gz"
    assert np.array_equal(alone, np.asarray(nib.load(in_cohort).dataobj))
