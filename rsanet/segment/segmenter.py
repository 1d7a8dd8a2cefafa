"""A trained network with all it needs to know about images, and how it is applied to a prepared volume."""

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from monai.transforms import SpatialCrop, SpatialPad
from torch import Tensor, nn

from rsanet.attention import RSABlock
from rsanet.checkpoints import load_model
from rsanet.network import RSANet
from rsanet.segment.checks import is_summary
from rsanet.segment.data import preprocessing
from rsanet.segment.datasets import Case, canonical
from rsanet.segment.environment import (
    MEMORY_FORMAT,
    Precision,
    attention_backend,
    available_memory,
    pick_device,
    pick_precision,
)
from rsanet.segment.memory import SHARE, forward_bytes
from rsanet.segment.metrics import label_lesions
from rsanet.segment.processes import own_device
from rsanet.segment.provenance import digest
from rsanet.segment.recipe import triple
from rsanet.segment.runs import MODEL_NAME
from rsanet.segment.volumes import DataWarning, Volume, name_of
from rsanet.segment.words import sizes

PICKLES = (".pt", ".pth", ".ckpt", ".pkl", ".bin")  # PyTorch's, which may run code when they are opened
WINDOWS = 2  # per pass
OTHER_VOXELS = 1.5  # times as large or as small as those of the training are told of
FLIPS = [axes for count in range(4) for axes in itertools.combinations((2, 3, 4), count)]


class Window(NamedTuple):
    """What a network sees at once.

    Attributes:
        size: voxels along z, y, x.
        words: the size, and why it is not the one asked for, where it is not.
    """

    size: tuple[int, int, int]
    words: str


@torch.inference_mode()
def lesion_probability(
    network: nn.Module,
    image: Tensor,
    roi: Sequence[int],
    precision: Precision,
    *,
    flips: bool = False,
    progress: bool = False,
) -> Tensor:
    """Probability of lesion at each voxel of whole volumes, from overlapping windows with Gaussian blending.

    Slice-wise attention is global over its window, so the result depends on ``roi``.

    Args:
        network: a network with background and lesion logits, on the device to compute on.
        image: ``(N, C, D, H, W)``, normalized.
        roi: size of the window.
        precision: what to compute the network in.
        flips: whether each window is seen in all its eight mirror images, and the mean is taken.
        progress: whether to draw a bar over the windows on stderr.

    Returns:
        ``(N, 1, D, H, W)``, float32, on the device of ``image``.
    """
    device = next(network.parameters()).device

    def predict_windows(windows: Tensor) -> Tensor:
        mean: Tensor | None = None
        for axes in FLIPS if flips else FLIPS[:1]:
            with precision.autocast(device):
                logits = network(windows.flip(axes).contiguous(memory_format=MEMORY_FORMAT))
            probability = torch.softmax(logits.float(), dim=1)[:, 1:].flip(axes)
            mean = probability if mean is None else mean.add_(probability)
        return mean / len(FLIPS) if flips else mean

    # An outer region keeps the weights that it has cast, for all windows.
    with precision.autocast(device):
        return sliding_window_inference(
            image,
            roi,
            WINDOWS,
            predict_windows,
            overlap=0.25,
            mode="gaussian",
            sw_device=device,
            device=image.device,
            progress=progress,
        )


@dataclass(frozen=True)
class Segmenter:
    """A trained network with everything it needs to know about images: the model file alone predicts.

    Attributes:
        network: the network, on ``device``, in evaluation mode.
        contrasts: the images it takes, in channel order.
        roi: size of its window in voxels along z, y, x.
        spacing: voxel size in mm along z, y, x that it takes images at, or None for their own.
        device: where it computes.
        precision: what it computes in.
        name: for messages.
        flips: whether the mean over the eight mirror images of each window is taken.
        whole_brain: whether the window is the whole prepared volume where memory allows.
        sha256: of the model file, in hexadecimal.
        voxel_size: mm along z, y, x of what it was trained on, where its file says so.
        trained_on: what its training images looked like, where its file says so; see `rsanet.segment.checks`.
    """

    network: RSANet
    contrasts: tuple[str, ...]
    roi: tuple[int, int, int]
    spacing: tuple[float, float, float] | None
    device: torch.device
    precision: Precision
    name: str = "the model"
    flips: bool = False
    whole_brain: bool = False
    sha256: str = ""
    voxel_size: tuple[float, float, float] | None = None
    trained_on: Mapping[str, Any] | None = None

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        roi: Sequence[int] | None = None,
        device: str = "auto",
        precision: str = "auto",
        flips: bool = False,
        whole_brain: bool = False,
    ) -> "Segmenter":
        """Loads a model file, or that of a run folder.

        Args:
            model: a run folder or a ``.safetensors`` file.
            roi: size of the window, one or three numbers; None takes the size of the training patches.
            device: as in `Recipe`; among the processes of `torchrun`, ``auto`` is a GPU for each.
            precision: as in `Recipe`.
            flips: as in `Segmenter`; takes eight times as long.
            whole_brain: as in `Segmenter`; where memory does not allow it, the window is ``roi``.

        Raises:
            ValueError: it is not a model of `rsanet train`, or a setting is impossible.
            FileNotFoundError: there is no such model.
        """
        path = model_file(model)
        chosen = pick_device(own_device(device))
        network = load_model(path)
        extra = network.extra
        if not {"contrasts", "roi"} <= extra.keys():
            raise ValueError(f"{path} does not name its contrasts and window: give a model of `rsanet train`.")
        check_extra(path, network)
        window = triple(roi, "--roi") if roi else tuple(extra["roi"])
        if min(window) < 1:
            raise ValueError(f"--roi is {window}: give positive sizes in voxels.")
        return cls(
            network.float().to(chosen, memory_format=MEMORY_FORMAT).eval(),
            tuple(canonical(name) for name in extra["contrasts"]),
            window,
            tuple(extra["spacing"]) if extra.get("spacing") else None,
            chosen,
            pick_precision(precision, chosen),
            str(path),
            flips,
            whole_brain,
            digest(path),
            tuple(extra["voxel_size"]) if extra.get("voxel_size") else None,
            extra.get("trained_on"),
        )

    def backend(self, window: Sequence[int]) -> str:
        """Name of the attention backend that runs a window."""
        return attention_backend(self.network, window, self.device, self.precision)

    def window_for(self, size: Sequence[int]) -> Window:
        """The window for a prepared volume of ``size`` voxels along z, y, x."""
        if not self.whole_brain:
            return Window(self.roi, sizes(self.roi))
        # Halved on the way down and doubled on the way up, other sizes would not meet their own voxels again.
        step = 2 ** (len(self.network.config["channels"]) - 1)
        whole = tuple(math.ceil(length / step) * step for length in size)
        needed, free = forward_bytes(self.network, whole, self.precision), available_memory(self.device)
        if needed <= SHARE * free:
            return Window(whole, f"{sizes(whole)}, the whole brain")
        return Window(
            self.roi,
            f"{sizes(self.roi)}, as the whole brain of {sizes(whole)} takes about {needed / 2**30:.1f} GiB "
            f"and {free / 2**30:.1f} GiB are free",
        )

    def probability(self, image: Tensor, window: Sequence[int], *, progress: bool = False) -> Tensor:
        """Probability of lesion ``(1, D, H, W)`` of a prepared volume ``(C, D, H, W)``."""
        volumes = image[None]
        return lesion_probability(self.network, volumes, window, self.precision, flips=self.flips, progress=progress)[0]

    def check_voxels(self, image: Volume, size: Sequence[float]) -> None:
        """Warns where a model that takes images as they are was trained on voxels of quite other sizes.

        Args:
            image: for its name.
            size: of its voxels, in mm along z, y and x.
        """
        if self.spacing is not None or self.voxel_size is None:
            return
        ratios = np.asarray(size) / self.voxel_size
        if max(ratios.max(), 1 / ratios.min()) > OTHER_VOXELS:
            here, there = ("×".join(f"{length:.3g}" for length in sizes_) for sizes_ in (size, self.voxel_size))
            warnings.warn(
                f"{name_of(image)} has voxels of {here} mm along z, y, x, and {self.name} saw voxels of {there} mm: "
                "its masks may be poor; a model that is trained with --spacing brings every image to one size.",
                DataWarning,
                stacklevel=1,
            )

    def images_of(self, case: Case) -> dict[str, Any]:
        """The images of a case that the model wants, in its order."""
        return case.pick(self.contrasts)

    def attention_maps(self, case: Case) -> dict[str, np.ndarray]:
        """The ``(S, S)`` maps of the coarsest slice-wise attention, by axis, in the window of the largest lesion.

        Args:
            case: a case with a mask that says where the largest lesion is; without lesions it is the middle.
        """
        block = next((module for module in self.network.modules() if isinstance(module, RSABlock)), None)
        if block is None:
            raise ValueError("This model has no slice-wise attention to draw: train it with --attention rsa.")
        data = preprocessing(self.spacing)(Case(case.id, self.images_of(case), case.mask))
        labels, count = label_lesions(data["mask"][0].numpy())
        volume = data["image"].as_tensor()
        centre = [size // 2 for size in volume.shape[1:]]
        if count:
            largest = np.bincount(labels[labels > 0]).argmax()
            centre = np.argwhere(labels == largest).mean(0).round().astype(int).tolist()
        window = SpatialCrop(roi_center=centre, roi_size=self.roi)(SpatialPad(self.roi)(volume))
        maps = self.network.attention_maps(torch.as_tensor(window)[None].to(self.device))
        first = next(iter(maps.values()))
        return {axis: values[0].float().cpu().numpy() for axis, values in zip(block.axes, first, strict=True)}


def model_file(model: str | Path) -> Path:
    """The model file that a run folder or a path to the file itself means."""
    model = Path(model)
    path = model / MODEL_NAME if model.is_dir() else model
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the folder of a finished run, or a .safetensors file.")
    if path.suffix.lower() in PICKLES:
        raise ValueError(
            f"{path} is a PyTorch checkpoint, which can run code when it is opened and names no contrasts and window: "
            "give a run folder or a .safetensors file; rsanet.load_reference_checkpoint and rsanet.save_model, with "
            "contrasts, roi and spacing as extra, make one of a checkpoint of the published code."
        )
    return path


def check_extra(path: Path, network: RSANet) -> None:
    """Refuses a model file whose words on its use cannot be true."""
    contrasts, roi, spacing, size = (network.extra.get(key) for key in ("contrasts", "roi", "spacing", "voxel_size"))
    trained_on = network.extra.get("trained_on")
    channels, classes = network.config["in_channels"], network.config["out_channels"]

    def three(values: Any, kinds: type | tuple[type, ...]) -> bool:
        return (
            isinstance(values, list)
            and len(values) == 3
            and all(isinstance(value, kinds) and not isinstance(value, bool) for value in values)
            and all(0 < value < math.inf for value in values)
        )

    if classes != 2:
        problem = f"{classes} output channels, not background and lesion"
    elif not (isinstance(contrasts, list) and all(isinstance(name, str) for name in contrasts)):
        problem = f"the contrasts {contrasts!r}, not a list of names"
    elif len(contrasts) != channels or len(set(contrasts)) != channels:
        problem = f"the contrasts {contrasts!r}, but its network has {channels} input channels"
    elif not three(roi, int):
        problem = f"the window {roi!r}, not three sizes in voxels"
    elif spacing is not None and not three(spacing, (int, float)):
        problem = f"the spacing {spacing!r}, not three sizes in mm"
    elif size is not None and not three(size, (int, float)):
        problem = f"the voxel size {size!r}, not three sizes in mm"
    elif trained_on is not None and not is_summary(trained_on, channels):
        problem = "words on its training images that are not those of its contrasts"
    else:
        return
    raise ValueError(f"{path} has {problem}: give a model of `rsanet train`.")
