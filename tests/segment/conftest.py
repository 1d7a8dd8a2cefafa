import json
import signal

import nibabel as nib
import numpy as np
import pytest
import torch

from rsanet import cli

SHAPE = (26, 30, 24)
CONTRASTS = ("FLAIR", "T1w", "T2w")
torch.set_num_threads(1)


def save(path, voxels, affine=None, dtype=np.float32):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels.astype(dtype), np.eye(4) if affine is None else affine), path)
    return path


def make_subject(seed, shape=SHAPE):
    """A head with zero background and a few lesions that are bright on FLAIR: images by contrast, and the mask."""
    rng = np.random.default_rng(seed)
    axes = np.indices(shape)
    centre, radius = (np.array(shape) - 1) / 2, np.array(shape) / 2 - 1
    head = sum(((axes[i] - centre[i]) / radius[i]) ** 2 for i in range(3)) < 1
    mask = np.zeros(shape, bool)
    for _ in range(4):
        spot = centre + rng.uniform(-0.5, 0.5, 3) * radius
        mask |= sum((axes[i] - spot[i]) ** 2 for i in range(3)) < rng.uniform(4, 9)
    mask &= head
    tissue = {"FLAIR": (100, 90), "T1w": (200, -60), "T2w": (150, 70)}
    images = {
        name: head * (base + lesion * mask + 8 * rng.standard_normal(shape)) for name, (base, lesion) in tissue.items()
    }
    return images, mask


def write_subject(root, name, seed, affine=None, mask=True):
    images, lesions = make_subject(seed)
    for contrast, image in images.items():
        save(root / name / "anat" / f"{name}_{contrast}.nii.gz", image, affine)
    if mask:
        save(mask_path(root, name), lesions, affine, np.uint8)


def mask_path(root, name):
    return root / "derivatives" / "lesions" / name / "anat" / f"{name}_label-lesion_mask.nii.gz"


def image_path(root, name, contrast="FLAIR"):
    return root / name / "anat" / f"{name}_{contrast}.nii.gz"


def write_cohort(root, subjects, seed=0):
    for number in range(1, subjects + 1):
        write_subject(root, f"sub-{number:03d}", seed + number)
    description = {"Name": "phantoms", "GeneratedBy": [{"Name": "rsanet simulate"}]}
    (root / "dataset_description.json").write_text(json.dumps(description))
    return root


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """Ctrl-C reaches the tests that send it, although a shell's background job ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def phantoms():
    """The makers of phantom data, for tests that need broken variants."""
    import types

    return types.SimpleNamespace(
        save=save,
        make_subject=make_subject,
        write_subject=write_subject,
        write_cohort=write_cohort,
        mask_path=mask_path,
        image_path=image_path,
    )


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
    """Four good subjects; tests only read it."""
    return write_cohort(tmp_path_factory.mktemp("cohort"), 4)


@pytest.fixture(scope="session")
def tiny():
    """Options of the smallest training that means anything."""
    return ["--channels", "8", "16", "--patch", "16", "--lr", "1e-2", "--dropout", "0", "--val-fraction", "0.25"]


@pytest.fixture(scope="session")
def trained(cohort, tiny, tmp_path_factory):
    """A run folder whose model finds the phantoms' lesions."""
    run = tmp_path_factory.mktemp("runs") / "run"
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", str(cohort), "-o", str(run), "--steps", "80", "--validate-every", "40", *tiny])
    assert stop.value.code == 0
    return run
