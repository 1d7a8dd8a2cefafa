"""Small untrained models, which take about half of the voxels for lesion, and images to try them on."""

import nibabel as nib
import numpy as np
import torch

from rsanet import RSANet, save_model

CONTRASTS = ("FLAIR", "T1w")


def write_model(path, roi=(16, 12, 20), spacing=None, **choice):
    torch.manual_seed(0)
    network = RSANet(in_channels=len(CONTRASTS), **{"channels": (8, 16), **choice})
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "betas" in name:
                parameter.fill_(0.5)
    save_model(network, path, {"contrasts": list(CONTRASTS), "roi": list(roi), "spacing": spacing})
    return path


def write_images(folder, seed, shape=(21, 30, 24), affine=None):
    """A head with noise, on an oblique grid unless told otherwise; the second contrast is on another grid."""
    rng = np.random.default_rng(seed)
    if affine is None:
        tilt = np.array([[0, 1.1, 0.1], [-1, 0, 0], [0, 0.1, -1.3]])
        affine = nib.affines.from_matvec(tilt, (-11, 17, 9))
    files = {}
    for name, shift in zip(CONTRASTS, (0, 2), strict=True):
        axes = np.indices(shape)
        centre, radius = (np.array(shape) - 1) / 2, np.array(shape) / 2 - 1 - shift
        head = sum(((axes[axis] - centre[axis]) / radius[axis]) ** 2 for axis in range(3)) < 1
        voxels = head * (100 + 20 * rng.standard_normal(shape))
        grid = affine @ nib.affines.from_matvec(np.eye(3), (shift / 4,) * 3)
        files[name] = folder / f"{name}.nii.gz"
        folder.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(voxels.astype(np.float32), grid), files[name])
    return files


def read_voxels(path):
    return np.asarray(nib.load(path).dataobj)
