"""The trainers that nnU-Net finds by name: ``-tr nnUNetTrainerRSANet`` and ``-tr nnUNetTrainerRSANetPublished``.

nnU-Net imports this file on its own, as a module without a package, for training and again for prediction.
"""

from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from rsanet import RSANet
from rsanet.integrations.nnunet.network import build_network
from rsanet.integrations.nnunet.plans import check_3d


class nnUNetTrainerRSANet(nnUNetTrainer):  # noqa: N801 - nnU-Net names trainers so
    """Trains nnU-Net's planned network with RSA blocks, deep supervision included.

    The blocks are those of ``rsanet nnunet-plans`` where the plans have some, and its defaults otherwise.
    """

    @staticmethod
    def build_network_architecture(
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The network, for training and for prediction."""
        architecture = configuration_manager.configuration["architecture"]
        return build_network(architecture, num_input_channels, num_output_channels, enable_deep_supervision)


class nnUNetTrainerRSANetPublished(nnUNetTrainer):  # noqa: N801 - nnU-Net names trainers so
    """Trains the network of the paper, ``rsanet.RSANet()``, on nnU-Net's data and patches.

    Only the patch is nnU-Net's plan: the network halves every axis four times. It is trained on its one output, as
    published: without deep supervision its weights are those of ``RSANet``, key for key.
    """

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net reads this signature
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = False

    @staticmethod
    def build_network_architecture(
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = False,
    ) -> nn.Module:
        """The network, for training and for prediction."""
        check_3d(configuration_manager.configuration["architecture"])
        return RSANet(num_input_channels, num_output_channels)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Does nothing: the network has no deep supervision to switch, and no ``decoder`` to switch it in."""
