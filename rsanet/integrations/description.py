"""What a model file says of itself, for the files of other formats that are made of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rsanet import __version__
from rsanet.network import RSANet
from rsanet.segment.data import ORIENTATION
from rsanet.segment.segmenter import Segmenter, model_file

CLASSES = ("background", "lesion")


@dataclass(frozen=True)
class Described:
    """A model to be written in another format.

    Attributes:
        network: in float32, on the CPU, contiguous, in evaluation mode.
        window: voxels along z, y, x that it is applied to.
        contrasts: its channels.
        spacing: voxel size in mm along z, y, x that it takes images at, or None for their own.
        words: what a program that applies it has to know, in JSON types.
    """

    network: RSANet
    window: tuple[int, int, int]
    contrasts: tuple[str, ...]
    spacing: tuple[float, float, float] | None
    words: dict[str, Any]


def describe(model: str | Path) -> Described:
    """Reads a run folder or a model file.

    Args:
        model: a run folder or a ``.safetensors`` file.

    Raises:
        ValueError: it is not a model of `rsanet train`.
        FileNotFoundError: there is no such model.
    """
    path = model_file(model)
    segmenter = Segmenter.load(path, device="cpu", precision="fp32")
    network = segmenter.network.to(memory_format=torch.contiguous_format).requires_grad_(False)
    words = {
        "contrasts": list(segmenter.contrasts),
        "classes": list(CLASSES),
        "window": list(segmenter.roi),
        "spacing": list(segmenter.spacing) if segmenter.spacing else None,
        "voxel_size": list(segmenter.voxel_size) if segmenter.voxel_size else None,
        "trained_on": segmenter.trained_on,
        "orientation": ORIENTATION,
        "intensities": "tissue of each channel at mean 0 and standard deviation 1, what is no tissue 0",
        "use": "research only",
        "network": network.config,
        "model": path.name,
        "model_sha256": segmenter.sha256,
        "versions": {"rsanet": __version__, "torch": torch.__version__},
    }
    return Described(network, segmenter.roi, segmenter.contrasts, segmenter.spacing, words)
