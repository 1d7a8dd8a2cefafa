"""What the configuration of a MONAI bundle names beside MONAI's own: the ends of `rsanet predict`, step by step."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.transforms import Transform
from torch import Tensor, nn

from rsanet.segment.cases import Case
from rsanet.segment.data import LoadCase
from rsanet.segment.datasets import list_cases
from rsanet.segment.environment import pick_precision
from rsanet.segment.geometry import voxel_volume
from rsanet.segment.prediction import Options, lesion_mask, name_images
from rsanet.segment.recipe import triple
from rsanet.segment.segmenter import lesion_probability
from rsanet.segment.volumes import stem


def list_images(data: str | os.PathLike, contrasts: Sequence[str]) -> list[dict[str, Any]]:
    """The cases of a data set as MONAI lists them.

    Args:
        data: a data set in any layout that `rsanet predict --data` takes.
        contrasts: the wanted ones, in channel order.

    Returns:
        ``case`` and ``image``, its files in the order of the contrasts, of each case.

    Raises:
        ValueError: it is no such data set, or a case lacks an image.
    """
    cases, wanted = list_cases(data, contrasts)
    return [{"case": case.id, "image": list(map(str, case.pick(wanted).values()))} for case in cases]


class LoadContrasts(Transform):
    """Reads the files under ``image`` into one volume ``(C, ...)`` on the grid of the first; ``head`` is where it is.

    Args:
        contrasts: what the files are, in channel order; for messages.
    """

    def __init__(self, contrasts: Sequence[str]) -> None:
        self.contrasts = tuple(contrasts)

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        """Takes ``image`` and, where there is one, the name ``case``, by which a mask is named later."""
        case = name_images(self.contrasts, data["image"])
        name = data.get("case") or stem(Path(case.id))
        loaded = LoadCase(checked=True)(Case(name, case.images))
        del loaded["apart"]  # for `rsanet predict`, which tells of it
        loaded["image"].meta["filename_or_obj"] = f"{name}.nii.gz"
        return {**data, **loaded}


class LesionInferer(Inferer):
    """The probability of lesion from overlapping windows, blended, as `rsanet predict` computes it.

    Args:
        roi_size: voxels of the window, one number or three along z, y, x. Slice-wise attention is global over its
            window, so results depend on it.
        precision: ``auto``, ``fp32`` or ``bf16``.
        flips: whether each window is seen in all its eight mirror images, and the mean is taken.
    """

    def __init__(self, roi_size: int | Sequence[int], precision: str = "auto", flips: bool = False) -> None:
        super().__init__()
        self.roi_size = triple([roi_size] if isinstance(roi_size, int) else roi_size, "roi_size")
        self.precision = precision
        self.flips = flips

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """``(N, C, D, H, W)`` to ``(N, 1, D, H, W)``."""
        device = next(network.parameters()).device
        precision = pick_precision(self.precision, device)
        volumes = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        probability = lesion_probability(network, volumes, self.roi_size, precision, flips=self.flips)
        probability = probability.clone()  # what inference mode made, the steps after it cannot write to
        return MetaTensor(probability).copy_meta_from(inputs) if isinstance(inputs, MetaTensor) else probability


class LesionMask(Transform):
    """Makes the mask of the probability under ``pred``, after it is back in the space of the images; none is in air.

    Args:
        threshold: probability above which a voxel is lesion.
        min_lesion_mm3: 26-connected lesions of a smaller volume are removed.
    """

    def __init__(self, threshold: float = 0.5, min_lesion_mm3: float = 0.0) -> None:
        self.options = Options(threshold, min_lesion_mm3)

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        """Leaves every other entry as it is."""
        probability = data["pred"]
        voxel_mm3 = voxel_volume(np.asarray(probability.affine.cpu()))
        head = np.asarray(data["head"].cpu())[0] > 0 if "head" in data else None
        mask, _ = lesion_mask(np.asarray(probability[0].cpu()), self.options, voxel_mm3, head=head)
        return {**data, "pred": MetaTensor(torch.from_numpy(mask)[None], meta=probability.meta)}
