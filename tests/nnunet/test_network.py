"""The network of nnU-Net's plans with RSA blocks, beside the one that nnU-Net builds from the same plans."""

import copy
import inspect
import json

import pytest
import torch

pytest.importorskip("nnunetv2", reason="nnU-Net has an environment of its own: make test-nnunet")

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from rsanet import RSANet
from rsanet.insertion import WithRSA
from rsanet.integrations.nnunet.network import build_network
from rsanet.integrations.nnunet.plans import seen_by_blocks, with_rsa
from rsanet.integrations.nnunet.trainers.rsanet_trainers import nnUNetTrainerRSANet, nnUNetTrainerRSANetPublished


def architecture(residual=False, dims=3):
    """An architecture as nnU-Net plans it, narrow."""
    network = "ResidualEncoderUNet" if residual else "PlainConvUNet"
    arguments = {
        "n_stages": 4,
        "features_per_stage": [4, 8, 12, 16],
        "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
        "kernel_sizes": [[1, 3, 3][3 - dims :]] + [[3] * dims] * 3,
        "strides": [[1] * dims, [1, 2, 2][3 - dims :], [2] * dims, [2] * dims],
        "n_blocks_per_stage" if residual else "n_conv_per_stage": [1, 2, 2, 2],
        "n_conv_per_stage_decoder": [1, 1, 1],
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{network}",
        "arch_kwargs": arguments,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def plans(architecture, patch_size=(8, 16, 16)):
    """Plans of one configuration."""
    configuration = {"patch_size": list(patch_size), "architecture": architecture, "batch_size": 2}
    return PlansManager({"plans_name": "nnUNetPlans", "configurations": {"3d_fullres": configuration}})


def build(trainer, architecture, deep_supervision=True):
    """The network that a trainer builds from an architecture, for two images and three outputs."""
    manager = plans(architecture)
    configuration = manager.get_configuration("3d_fullres")
    return trainer.build_network_architecture(manager, configuration, 2, 3, deep_supervision)


def open_betas(network):
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".betas." in name:
                parameter.fill_(0.5)


@pytest.fixture
def patch():
    return torch.randn(2, 2, 8, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_outputs_are_those_of_nnunet_until_the_betas_move(residual, patch):
    plain = build(nnUNetTrainer, architecture(residual))
    network = build(nnUNetTrainerRSANet, architecture(residual))
    report = network.load_state_dict(plain.state_dict(), strict=False)
    assert report.unexpected_keys == []
    assert all(".rsa_block." in key for key in report.missing_keys)
    assert [key for key in network.state_dict() if ".rsa_block." not in key] == list(plain.state_dict())
    expected = plain(patch)
    assert all(torch.equal(*pair) for pair in zip(network(patch), expected, strict=True))
    open_betas(network)
    assert not any(torch.allclose(*pair) for pair in zip(network(patch), expected, strict=True))


def test_blocks_follow_the_bottleneck_and_the_stage_above_it():
    network = build(nnUNetTrainerRSANet, architecture())
    attended = [stage for stage, module in enumerate(network.encoder.stages) if isinstance(module, WithRSA)]
    assert attended == [2, 3]
    assert [network.encoder.stages[stage].rsa_block.channels for stage in attended] == [12, 16]
    assert sum(isinstance(module, WithRSA) for module in network.modules()) == 2


@pytest.mark.parametrize("trainer", [nnUNetTrainer, nnUNetTrainerRSANet])
def test_plans_with_rsa_give_any_trainer_the_chosen_blocks(trainer):
    network = build(trainer, with_rsa(architecture(), stages=[0, -1], scale=0.01))
    assert [isinstance(stage, WithRSA) for stage in network.encoder.stages] == [True, False, False, True]
    assert [network.encoder.stages[stage].rsa_block.scale for stage in (0, 3)] == [0.01, 0.01]


@pytest.mark.parametrize("patch_size", [(8, 16, 16), (7, 20, 13)])
def test_blocks_see_the_sizes_that_plans_announce(patch_size):
    chosen = with_rsa(architecture(), stages=[0, 1, 2, 3])
    network = build(nnUNetTrainer, chosen)
    seen = []
    for stage in network.encoder.stages:
        stage.rsa_block.register_forward_pre_hook(lambda block, inputs: seen.append(tuple(inputs[0].shape[1:])))
    network.encoder(torch.zeros(1, 2, *patch_size))
    assert [(block.channels, *block.size) for block in seen_by_blocks(chosen, patch_size)] == seen


def test_deep_supervision_is_that_of_nnunet(patch):
    for deep in (True, False):
        network = build(nnUNetTrainerRSANet, architecture(), deep)
        expected = build(nnUNetTrainer, architecture(), deep)(patch)
        found = network(patch)
        if not deep:
            found, expected = [found], [expected]
        assert [output.shape for output in found] == [output.shape for output in expected]
    network.decoder.deep_supervision = True  # as nnU-Net switches it
    assert len(network(patch)) == 3


@pytest.mark.parametrize("trainer", [nnUNetTrainer, nnUNetTrainerRSANet])
def test_initialization_is_that_of_nnunet_and_the_blocks_keep_theirs(trainer):
    torch.manual_seed(0)
    network = build(trainer, with_rsa(architecture()))
    bottleneck = network.encoder.stages[3]
    # He's normal weights and zero biases in nnU-Net's convolutions; in the blocks those of a fresh Conv3d.
    kernel = bottleneck[0].convs[1].conv
    assert kernel.bias.abs().max() == 0
    assert kernel.weight.std().item() == pytest.approx((2 / (16 * 27)) ** 0.5, rel=0.05)
    block = bottleneck.rsa_block
    assert block.theta_conv.bias.abs().max() > 0
    assert block.theta_conv.weight.abs().max() <= 16**-0.5


def test_the_network_survives_copies_and_its_own_state_dict(patch):
    network = build(nnUNetTrainerRSANet, architecture())
    open_betas(network)
    # Prediction builds it without deep supervision, and loads the weights that it was trained to.
    other = build(nnUNetTrainerRSANet, architecture(), deep_supervision=False)
    other.load_state_dict(network.state_dict(), strict=True)
    assert torch.equal(other(patch), network(patch)[0])
    assert torch.equal(copy.deepcopy(other)(patch), other(patch))


def test_the_network_compiles_whole(patch):
    network = build(nnUNetTrainerRSANet, architecture())
    open_betas(network)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(patch), network(patch), strict=True):
        torch.testing.assert_close(found, expected)


def test_the_published_trainer_builds_the_network_of_the_paper():
    network = build(nnUNetTrainerRSANetPublished, architecture(), deep_supervision=False)
    assert isinstance(network, RSANet)
    assert network.config == RSANet(2, 3).config


@pytest.mark.parametrize("trainer", [nnUNetTrainerRSANet, nnUNetTrainerRSANetPublished])
def test_two_dimensions_are_refused(trainer):
    with pytest.raises(ValueError, match="not three-dimensional, and RSA attends along three axes: train 3d_fullres"):
        build(trainer, architecture(dims=2))


def test_networks_without_stages_are_refused():
    transformer = {**architecture(), "network_class_name": "Primus", "arch_kwargs": {"conv_op": "Conv3d"}}
    with pytest.raises(ValueError, match="Primus has no stages that a block could follow"):
        build_network(transformer, 1, 2, deep_supervision=False)


@pytest.mark.parametrize("trainer", [nnUNetTrainerRSANet, nnUNetTrainerRSANetPublished])
def test_trainers_are_made_as_nnunet_makes_them(trainer):
    for name in ("__init__", "build_network_architecture"):
        ours, theirs = (list(inspect.signature(getattr(kind, name)).parameters) for kind in (trainer, nnUNetTrainer))
        assert ours == theirs


@pytest.mark.parametrize("trainer", [nnUNetTrainerRSANet, nnUNetTrainerRSANetPublished])
def test_targets_fit_the_outputs_and_the_betas_move_in_one_step(trainer, planned, workshop, monkeypatch):
    monkeypatch.setenv("nnUNet_preprocessed", str(planned.parent))
    monkeypatch.setenv("nnUNet_results", str(workshop / "scratch"))
    content = json.loads((planned / "nnUNetPlans.json").read_text()) | {"continue_training": False}
    dataset = json.loads((planned / "dataset.json").read_text())
    made = trainer(content, "3d_fullres", 0, dataset, torch.device("cpu"))
    made.initialize()
    size = made.configuration_manager.patch_size
    scales = made._get_deep_supervision_scales()
    labels = torch.zeros(2, 1, *size)
    labels[..., 4:12, 10:20, 10:20] = 1
    target = labels
    if trainer is nnUNetTrainerRSANet:
        from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform

        halved = [DownsampleSegForDSTransform(scales)(segmentation=case)["segmentation"] for case in labels]
        target = [torch.stack(level) for level in zip(*halved, strict=True)]
        made.network.train()
        outputs = made.network(torch.randn(2, 1, *size))
        assert [output.shape[2:] for output in outputs] == [level.shape[2:] for level in target]
        assert len(outputs) == 3
    else:
        assert scales is None
    made.train_step({"data": torch.randn(2, 1, *size) + 3 * labels, "target": target})
    made.set_deep_supervision_enabled(True)
    betas = [value.item() for name, value in made.network.named_parameters() if "betas" in name]
    assert len(betas) == (6 if trainer is nnUNetTrainerRSANet else 3)
    assert all(beta != 0 for beta in betas)
