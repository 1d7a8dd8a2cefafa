"""The tutorial, as a reader would run it: nnU-Net's own commands train, and other processes predict."""

import nibabel as nib
import numpy as np
import pytest
import torch

pytest.importorskip("nnunetv2", reason="nnU-Net has an environment of its own: make test-nnunet")

from rsanet import RSANet

DATASET = "Dataset501_Lesions"


def checkpoint(workshop, trained, fold=0):
    """A checkpoint that nnU-Net wrote here."""
    path = workshop / "results" / DATASET / f"{trained}__3d_fullres" / f"fold_{fold}" / "checkpoint_final.pth"
    return torch.load(path, weights_only=False)


def check_mask(workshop, folder):
    """Checks the one mask of a folder against its image and its label."""
    (path,) = (workshop / folder).glob("*.nii.gz")
    mask, data = nib.load(path), workshop / "raw" / DATASET
    image = nib.load(data / "imagesTs" / "case_9_0000.nii.gz")
    truth = nib.load(data / "labelsTs" / "case_9.nii.gz").get_fdata() > 0
    assert mask.shape == image.shape
    np.testing.assert_allclose(mask.affine, image.affine, atol=1e-4)
    voxels = mask.get_fdata()
    assert set(np.unique(voxels)) <= {0, 1}
    dice = 2 * (voxels * truth).sum() / (voxels.sum() + truth.sum())
    assert dice > 0.5, dice


def check_blocks(weights, stages):
    """Checks that there are RSA blocks behind these encoder stages alone, and that they have learned."""
    found = {key.split(".rsa_block.")[0] for key in weights if key.startswith("encoder.") and ".rsa_block." in key}
    assert found == {f"encoder.stages.{stage}" for stage in stages}
    betas = [weights[f"{stage}.rsa_block.betas.{axis}"].item() for stage in found for axis in range(3)]
    assert all(beta != 0 for beta in betas), betas


def test_the_trainer_trains_and_another_process_predicts(tutorial, planned, workshop):
    tutorial("By a trainer")
    check_blocks(checkpoint(workshop, "nnUNetTrainerRSANet__nnUNetPlans")["network_weights"], (2, 3))
    check_mask(workshop, "masks")


def test_plans_with_rsa_need_no_variable_and_no_preprocessing(tutorial, planned, workshop):
    def files():
        return {path: path.stat().st_mtime_ns for path in (planned / "nnUNetPlans_3d_fullres").iterdir()}

    before = files()
    output = tutorial("By plans")
    assert "after encoder stage 3 of 0 to 3: 256 channels" in output
    assert files().keys() >= before.keys()
    assert all(files()[path] == before[path] for path in before)
    assert [path.name for path in planned.iterdir() if path.is_dir() and "RSA" in path.name] == []
    trained = checkpoint(workshop, "nnUNetTrainer__nnUNetPlansRSA")
    assert trained["trainer_name"] == "nnUNetTrainer"
    check_blocks(trained["network_weights"], (2, 3))
    check_mask(workshop, "masks-by-plans")


def test_the_network_of_the_paper_trains_and_its_weights_are_those_of_rsanet(tutorial, planned, workshop):
    tutorial("The network of the paper")
    weights = checkpoint(workshop, "nnUNetTrainerRSANetPublished__nnUNetPlans")["network_weights"]
    RSANet(1, 2).load_state_dict(weights, strict=True)
    assert all(weights[f"rsa_block.betas.{axis}"] != 0 for axis in range(3))
    assert len(list((workshop / "masks-published").glob("*.nii.gz"))) == 1


def test_weights_of_plain_nnunet_are_where_training_with_rsa_starts(tutorial, planned, workshop):
    output = tutorial("From weights of plain nnU-Net")
    assert "with-rsa.pth has the weights and an RSA block after the encoder stages 2, 3." in output
    assert "Loading pretrained weights from file" in output
    plain = checkpoint(workshop, "nnUNetTrainer__nnUNetPlans", fold=1)["network_weights"]
    start = torch.load(workshop / "with-rsa.pth", weights_only=True)["network_weights"]
    assert all(torch.equal(start[key], plain[key]) for key in plain)
    check_blocks(checkpoint(workshop, "nnUNetTrainerRSANet__nnUNetPlans", fold=1)["network_weights"], (2, 3))
