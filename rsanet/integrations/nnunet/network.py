"""nnU-Net's planned networks with RSA blocks behind encoder stages. Needs nnunetv2 when it builds."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from rsanet.insertion import insert_rsa
from rsanet.integrations.nnunet.plans import NETWORK, with_rsa


def build_network(
    architecture: Mapping[str, Any], input_channels: int, num_classes: int, deep_supervision: bool
) -> nn.Module:
    """Builds the network of a configuration of plans, with the RSA blocks it names or else with the default ones.

    Args:
        architecture: ``architecture`` of a configuration.
        input_channels: images of a case.
        num_classes: outputs.
        deep_supervision: whether it returns a list of outputs, highest resolution first.

    Returns:
        The network, initialized as nnU-Net does it.

    Raises:
        ValueError: If the architecture cannot have RSA blocks.
    """
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    if architecture["network_class_name"] != NETWORK:
        architecture = with_rsa(architecture)
    return get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        input_channels,
        num_classes,
        deep_supervision=deep_supervision,
    )


def unet_with_rsa(
    input_channels: int,
    num_classes: int,
    *,
    rsa_network: str,
    rsa_stages: list[int],
    rsa_scale: float,
    deep_supervision: bool = False,
    **arguments: Any,
) -> nn.Module:
    """The ``network_class_name`` of plans with RSA: a network of nnU-Net with RSA blocks behind encoder stages.

    An attended stage feeds the next one, and its skip connection too. The state_dict has the keys that the network
    has without the blocks, beside theirs.

    Args:
        input_channels: images of a case.
        num_classes: outputs.
        rsa_network: the class of the network itself, as in plans without RSA.
        rsa_stages: encoder stages with a block, counted from 0.
        rsa_scale: factor on the attention's logits.
        deep_supervision: see the network itself.
        **arguments: arguments of the network itself.

    Returns:
        The network, initialized.
    """
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    # Its arguments are imported already, and need no further import.
    network = get_network_from_plans(
        rsa_network, arguments, (), input_channels, num_classes, deep_supervision=deep_supervision
    )
    for stage in rsa_stages:
        insert_rsa(network, f"encoder.stages.{stage}", network.encoder.output_channels[stage], scale=rsa_scale)
    # nnU-Net is about to initialize what it takes for convolutions of its own: the blocks' have an initialization
    # with which attention starts gently, and the network's are done.
    network.initialize = _initialized
    return network


def _initialized(module: nn.Module) -> None:
    """Leaves a module as it is."""
