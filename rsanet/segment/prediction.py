"""Lesion masks from a trained model, in the space of the images they were asked for."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import sliding_window_inference
from monai.transforms import Compose, Invertd, SpatialCrop, SpatialPad
from torch import Tensor, nn

from rsanet.attention import RSABlock
from rsanet.checkpoints import load_model
from rsanet.network import RSANet
from rsanet.segment.data import preprocessing
from rsanet.segment.datasets import Case, list_cases
from rsanet.segment.environment import (
    MEMORY_FORMAT,
    Precision,
    attention_backend,
    describe_device,
    pick_device,
    pick_precision,
)
from rsanet.segment.files import check_writable, write_csv, written_beside
from rsanet.segment.metrics import label_lesions
from rsanet.segment.recipe import triple
from rsanet.segment.volumes import SUFFIXES, read_volume

MODEL_NAME = "model.safetensors"
WINDOWS = 2  # per pass; see below why not one
MASK_NAME = "{case}_label-lesion_mask.nii.gz"


@torch.inference_mode()
def lesion_probability(network: nn.Module, image: Tensor, roi: Sequence[int], precision: Precision) -> Tensor:
    """Probability of lesion at each voxel of whole volumes, from overlapping windows with Gaussian blending.

    Slice-wise attention is global over its window, so the result depends on ``roi``.

    Args:
        network: a network with background and lesion logits, on the device to compute on.
        image: ``(N, C, D, H, W)``, normalized.
        roi: size of the window.
        precision: what to compute the network in.

    Returns:
        ``(N, 1, D, H, W)``, float32, on the device of ``image``.
    """
    device = next(network.parameters()).device

    def predict_windows(windows: Tensor) -> Tensor:
        if device.type == "cpu" and len(windows) == 1:
            # torch leaves narrow convolutions of a single volume to a kernel that is ten times slower.
            return predict_windows(windows.repeat(2, 1, 1, 1, 1))[:1]
        with precision.autocast(device):
            logits = network(windows.contiguous(memory_format=MEMORY_FORMAT))
        return torch.softmax(logits.float(), dim=1)[:, 1:]

    return sliding_window_inference(
        image,
        roi,
        WINDOWS,
        predict_windows,
        overlap=0.25,
        mode="gaussian",
        sw_device=device,
        device=image.device,
    )


@dataclass(frozen=True)
class Segmenter:
    """A trained network with everything it needs to know about images: the model file alone predicts."""

    network: RSANet
    contrasts: tuple[str, ...]
    roi: tuple[int, int, int]
    spacing: tuple[float, float, float] | None
    device: torch.device
    precision: Precision
    name: str = "the model"  # for messages

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        roi: Sequence[int] | None = None,
        device: str = "auto",
        precision: str = "auto",
    ) -> "Segmenter":
        """Loads a model file, or that of a run folder.

        Args:
            model: a run folder or a ``.safetensors`` file.
            roi: size of the window, one or three numbers; None takes the size of the training patches.
            device: as in `Recipe`.
            precision: as in `Recipe`.
        """
        path = model_file(model)
        chosen = pick_device(device)
        network = load_model(path)
        extra = network.extra
        if not {"contrasts", "roi"} <= extra.keys():
            raise ValueError(f"{path} does not name its contrasts and window: give a model of `rsanet train`.")
        check_extra(path, network)
        window = triple(roi, "--roi") if roi else tuple(extra["roi"])
        if min(window) < 1:
            raise ValueError(f"--roi is {window}: give positive sizes in voxels.")
        spacing = tuple(extra["spacing"]) if extra.get("spacing") else None
        network = network.float().to(chosen, memory_format=MEMORY_FORMAT).eval()
        return cls(
            network, tuple(extra["contrasts"]), window, spacing, chosen, pick_precision(precision, chosen), str(path)
        )

    @property
    def backend(self) -> str:
        """Name of the attention backend that runs a window."""
        return attention_backend(self.network, self.roi, self.device, self.precision)

    def describe(self) -> str:
        """The first line of a prediction."""
        return (
            f"{describe_device(self.device)}, attention backend {self.backend}, precision {self.precision}, "
            f"window {'×'.join(map(str, self.roi))}."
        )

    def images_of(self, case: Case) -> dict[str, Path]:
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

    def probability(self, case: Case) -> np.ndarray:
        """Probability of lesion on the grid of the case's first image."""
        transform = preprocessing(self.spacing)
        data = transform(Case(case.id, self.images_of(case)))
        image = data["image"]
        probability = lesion_probability(self.network, image.as_tensor()[None], self.roi, self.precision)
        if not torch.isfinite(probability).all():
            raise ValueError(
                f"{self.name} gives {case.id} probabilities that are NaN: its weights do not fit these images, or "
                "are spoiled; try --precision fp32, or train again."
            )
        return restore_grid(probability[0], image, transform)


def restore_grid(volume: Tensor, image: MetaTensor, transform: Compose) -> np.ndarray:
    """Takes ``(1, D, H, W)`` from the preprocessed grid of ``image`` back to the grid of its file."""
    invert = Invertd("volume", transform, orig_keys="image", nearest_interp=False)
    return invert({"image": image, "volume": MetaTensor(volume)})["volume"][0].numpy()


def model_file(model: str | Path) -> Path:
    """The model file that a run folder or a path to the file itself means."""
    model = Path(model)
    path = model / MODEL_NAME if model.is_dir() else model
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the folder of a finished run, or a .safetensors file.")
    return path


def check_extra(path: Path, network: RSANet) -> None:
    """Refuses a model file whose words on its use cannot be true."""
    contrasts, roi, spacing = (network.extra.get(key) for key in ("contrasts", "roi", "spacing"))
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
    else:
        return
    raise ValueError(f"{path} has {problem}: give a model of `rsanet train`.")


def write_mask(mask: np.ndarray, like: nib.Nifti1Image, path: Path) -> None:
    """Saves a binary mask as uint8 with the grid and header of ``like``."""
    header = like.header.copy()
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    header["cal_min"], header["cal_max"] = 0, 1
    with written_beside(path) as partial:
        nib.save(nib.Nifti1Image(mask.astype(np.uint8), like.affine, header), partial)


@dataclass(frozen=True)
class Prediction:
    """What a mask holds: a row of ``predictions.csv``."""

    case: str
    mask: Path
    lesions: int
    load_mm3: float
    seconds: float
    backend: str


def predict_case(segmenter: Segmenter, case: Case, out: str | Path, *, threshold: float = 0.5) -> Prediction:
    """Writes the lesion mask of a case on the grid of its first image.

    Args:
        segmenter: the model.
        case: images by contrast; contrasts beyond the model's are left out.
        out: file to write, ``.nii`` or ``.nii.gz``.
        threshold: probability above which a voxel is lesion.

    Returns:
        The number of 26-connected lesions, their volume by the header, and the time it took.
    """
    started = time.perf_counter()
    out = Path(out)
    if not out.name.endswith(SUFFIXES):
        raise ValueError(f"{out} is not a name for a mask: end it in .nii.gz.")
    check_writable(out)
    for path in (*case.images.values(), case.mask):
        if path and path.exists() and out.exists() and out.samefile(path):
            raise ValueError(f"{out} is an input of {case.id}, and would be lost: give another name to the mask.")
    mask = segmenter.probability(case) > threshold
    like = read_volume(case.images[segmenter.contrasts[0]])[1]
    write_mask(mask, like, out)
    voxel_mm3 = abs(float(np.linalg.det(like.affine[:3, :3])))
    return Prediction(
        case.id,
        out,
        label_lesions(mask)[1],
        round(float(mask.sum()) * voxel_mm3, 1),
        round(time.perf_counter() - started, 2),
        segmenter.backend,
    )


def name_images(segmenter: Segmenter, images: Sequence[str | Path]) -> Case:
    """Files in the order of the model's contrasts, as a case."""
    if len(images) != len(segmenter.contrasts):
        wanted = " ".join(segmenter.contrasts)
        raise ValueError(
            f"-i has {len(images)} image{'s' if len(images) != 1 else ''}, but this model wants "
            f"{len(segmenter.contrasts)}: give {wanted}, in this order."
        )
    paths = [Path(image) for image in images]
    return Case(paths[0].name, dict(zip(segmenter.contrasts, paths, strict=True)))


def predict_cohort(
    segmenter: Segmenter,
    data: str | Path,
    out: str | Path,
    *,
    threshold: float = 0.5,
    progress: Callable[[int, int, Prediction | str], None] | None = None,
) -> tuple[list[Prediction], dict[str, str]]:
    """Writes a mask for every case of a data set, and ``predictions.csv``. A bad case does not stop the others.

    Args:
        segmenter: the model.
        data: the data set.
        out: folder for the masks, created where needed.
        threshold: probability above which a voxel is lesion.
        progress: called after each case with its number, the number of cases, and its prediction or what is wrong.

    Returns:
        The predictions, and the reason for each case without one.
    """
    out = Path(out)
    cases, _ = list_cases(data, segmenter.contrasts)
    out.mkdir(parents=True, exist_ok=True)
    check_writable(out / "predictions.csv")
    predictions: list[Prediction] = []
    failures: dict[str, str] = {}
    for number, case in enumerate(cases, start=1):
        try:
            prediction = predict_case(segmenter, case, out / MASK_NAME.format(case=case.id), threshold=threshold)
        except (ValueError, OSError) as error:
            failures[case.id] = str(error)
        else:
            predictions.append(prediction)
        if progress:
            progress(number, len(cases), failures.get(case.id) or predictions[-1])
    if predictions:
        write_csv(out / "predictions.csv", [{**vars(row), "mask": row.mask.name} for row in predictions])
    return predictions, failures
