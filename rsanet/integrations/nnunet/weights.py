"""Checkpoints of plain nnU-Net for networks with RSA blocks, as ``nnUNetv2_train -pretrained_weights`` wants them."""

import os
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsanet.attention import RSABlock
from rsanet.integrations.nnunet.plans import STAGES, choose_stages
from rsanet.segment.files import check_new, written_beside

KEY = "network_weights"  # nnU-Net's name for the state_dict in its checkpoints
ENCODERS = ("encoder.", "decoder.encoder.")  # the decoder keeps the encoder, and the state_dict names it twice


def add_rsa_blocks(
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    stages: Sequence[int] = STAGES,
    *,
    overwrite: bool = False,
) -> list[int]:
    """Writes the weights of a network of nnU-Net with those of fresh RSA blocks beside them.

    nnU-Net takes pretrained weights only if they have every key of the network. Fresh blocks are the identity, so the
    network computes what it did. Nothing but weights is written.

    Args:
        checkpoint: a checkpoint of nnU-Net, such as ``fold_0/checkpoint_final.pth``.
        out: the file to write.
        stages: encoder stages that get a block, as in the plans; see ``choose_stages``.
        overwrite: whether a file that exists is replaced.

    Returns:
        The stages with a block, counted from 0.

    Raises:
        ValueError: If it is no such checkpoint, one of two dimensions, or one with RSA blocks; or if ``out`` exists.
        OSError: If a file cannot be read or written.
    """
    check_new(Path(out), overwrite=overwrite)
    weights = _read_weights(checkpoint)
    if any(".rsa_block." in key for key in weights):
        raise ValueError(f"{checkpoint} has RSA blocks already: give it to -pretrained_weights as it is.")
    kernels = {key: tensor for key, tensor in weights.items() if re.match(r"encoder\.stages\.\d+\.", key)}
    widths = {int(key.split(".")[2]): len(tensor) for key, tensor in kernels.items() if tensor.dim() == 5}
    if not widths:
        raise ValueError(f"{checkpoint} has no three-dimensional encoder stages: give one of nnU-Net's 3-D U-Nets.")
    chosen = choose_stages(stages, max(widths) + 1)
    for stage in chosen:
        block = RSABlock(widths[stage]).state_dict()
        for encoder in ENCODERS:
            if any(key.startswith(f"{encoder}stages.") for key in weights):
                weights |= {f"{encoder}stages.{stage}.rsa_block.{key}": tensor for key, tensor in block.items()}
    with written_beside(Path(out)) as partial:
        torch.save({KEY: weights}, partial)
    return chosen


def _read_weights(checkpoint: str | os.PathLike) -> dict[str, Tensor]:
    """The network's weights in a checkpoint of nnU-Net, of which nothing is unpickled that could run code."""
    # Beside weights it holds numbers of NumPy, which torch does not read unasked.
    numbers: list[Any] = [np.float64(0).__reduce__()[0], np.dtype]
    numbers += [type(np.dtype(kind)) for kind in ("float32", "float64", "int64", "bool")]
    try:
        with torch.serialization.safe_globals(numbers):
            content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{checkpoint} holds more than weights and numbers, or is no checkpoint, and is not unpickled because that "
            "could run code of its own: give a checkpoint that nnU-Net wrote."
        ) from error
    except Exception as error:  # the unpickler raises a dozen types for bytes that are none of its own
        raise ValueError(f"{checkpoint} cannot be read as a checkpoint of PyTorch: copy it again.") from error
    weights = content.get(KEY) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise ValueError(f"{checkpoint} has no {KEY}: give a checkpoint that nnU-Net wrote.")
    return dict(weights)
