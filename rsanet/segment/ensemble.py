"""One model or several as one: from the images of a case to the mean probability on the first image's grid."""

import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd
from torch import Tensor

from rsanet.segment.checks import doubts, reordered
from rsanet.segment.data import preprocessing, voxel_size
from rsanet.segment.datasets import Case
from rsanet.segment.environment import describe_device
from rsanet.segment.memory import lack_told
from rsanet.segment.registration import register
from rsanet.segment.segmenter import Segmenter, Window
from rsanet.segment.volumes import DataWarning, load_grid
from rsanet.segment.words import noted, sizes

Model: TypeAlias = str | os.PathLike | Segmenter
Spacing: TypeAlias = tuple[float, float, float] | None


@dataclass(frozen=True)
class Prepared:
    """A case that was read, ready for the networks.

    Attributes:
        case: the images, in the order of the first model's contrasts.
        grid: the first image, for its grid and header; its voxels are not in memory.
        volumes: by the voxel size that models want, ``image`` ``(C, D, H, W)`` and the transform that made it.
        seconds: time that reading took.
        head: ``(X, Y, Z)``, where the first image shows the head.
        transforms: by contrast, the 4×4 matrix that registered it to the first, where that was asked for.
        warnings: what is doubtful, a sentence each.
    """

    case: Case
    grid: nib.Nifti1Image
    volumes: Mapping[Spacing, tuple[MetaTensor, Compose]]
    seconds: float
    head: np.ndarray
    transforms: Mapping[str, np.ndarray] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels of the first image."""
        return self.grid.shape[:3]


@dataclass(frozen=True)
class Ensemble:
    """Models whose probabilities are averaged; one alone is an ensemble, too.

    Args:
        members: models of the same contrasts, each in its own order, with its own window and voxel size.

    Raises:
        ValueError: there is no model, or the models take different contrasts.
    """

    members: tuple[Segmenter, ...]

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError("There is no model: give one or several.")
        for member in self.members[1:]:
            if set(member.contrasts) != set(self.contrasts):
                raise ValueError(
                    f"{member.name} takes {' '.join(member.contrasts)}, but {self.members[0].name} takes "
                    f"{' '.join(self.contrasts)}: give models of the same contrasts to --ensemble."
                )

    @classmethod
    def load(cls, models: Model | Sequence[Model], **inference: Any) -> "Ensemble":
        """Loads what is not loaded yet.

        Args:
            models: run folders, model files, or loaded models; one or several.
            inference: see `Segmenter.load`; for models that are to be loaded.
        """
        if isinstance(models, (str, os.PathLike, Segmenter)):
            models = [models]
        if inference and any(isinstance(model, Segmenter) for model in models):
            raise ValueError(f"{', '.join(inference)}: give these to Segmenter.load, which made the model.")
        return cls(
            tuple(model if isinstance(model, Segmenter) else Segmenter.load(model, **inference) for model in models)
        )

    @property
    def contrasts(self) -> tuple[str, ...]:
        """The images it takes, in the order they are to be given in."""
        return self.members[0].contrasts

    def describe(self, ready: Prepared | None = None, windows: Sequence[Window] | None = None) -> str:
        """The first line of a prediction.

        Args:
            ready: the case, where there is only one.
            windows: its windows.
        """
        first = self.members[0]
        words = [describe_device(first.device)]
        words.append(f"attention backend {self.backend([window.size for window in windows or ()])}")
        words.append(f"precision {first.precision}")
        if ready is not None:
            words.append(f"images {sizes(ready.shape)}")
        if len(self.members) > 1:
            words.append(f"mean of {len(self.members)} models")
        if first.flips:
            words.append("mean of 8 mirror images")
        if windows is None:
            whole = "the whole brain where it fits, else " if first.whole_brain else ""
            seen = [whole + sizes(member.roi) for member in self.members]
        else:
            seen = [window.words for window in windows]
        return f"{', '.join(words)}, window {' and '.join(dict.fromkeys(seen))}."

    def backend(self, windows: Sequence[Sequence[int]] = ()) -> str:
        """Names of the attention backends that run the models' windows."""
        windows = windows or [member.roi for member in self.members]
        pairs = zip(self.members, windows, strict=True)
        return "+".join(dict.fromkeys(member.backend(window) for member, window in pairs))

    def prepare(self, case: Case, *, registered: bool = False) -> Prepared:
        """Reads a case; contrasts on other grids are brought to the first one's.

        Args:
            case: the images.
            registered: whether each further contrast is registered to the first, rigidly.

        Raises:
            ValueError: an image is missing or cannot serve.
            OSError: an image cannot be read.
        """
        started = time.perf_counter()
        case = Case(case.id, self.members[0].images_of(case), case.mask)
        volumes = {}
        with noted() as said, lack_told(case.id, "leave fewer other programs running"):
            images, transforms = register(case) if registered else (case.images, {})
            seen: dict[str, Any] = {}
            for spacing in dict.fromkeys(member.spacing for member in self.members):
                transform = preprocessing(spacing, checked=not seen, looked=not seen)
                data = transform(Case(case.id, images))
                seen = seen or data
                volumes[spacing] = data["image"], transform
            first = case.images[self.contrasts[0]]
            grid = load_grid(first)
            self._check(case, seen, registered=registered)
            for member in self.members:
                member.check_voxels(first, voxel_size(grid))
        seconds = time.perf_counter() - started
        head = seen["head"][0].numpy() > 0
        return Prepared(case, grid, volumes, seconds, head, transforms, tuple(said))

    def _check(self, case: Case, seen: Mapping[str, Any], *, registered: bool) -> None:
        """Warns of contrasts that lie apart, and of what a model was not trained on."""
        first = self.contrasts[0]
        for name, found in seen["apart"].items():
            if found.is_apart():
                far = f"about {found.apart:.0f} mm off the {first}" if found.far() else f"beside the {first}"
                advice = "look at both" if registered else "give --register, or register it yourself"
                warnings.warn(
                    f"{case.id}: the {name} image lies {far} (the heads overlap by {100 * found.overlap:.0f} %), so "
                    f"that lesions may be missed or made up: {advice}.",
                    DataWarning,
                    stacklevel=1,
                )
        for member in self.members:
            if member.trained_on is None:
                continue
            order = [self.contrasts.index(name) for name in member.contrasts]
            for doubt in doubts(reordered(seen["look"], order), member.trained_on, member.contrasts, member.name):
                warnings.warn(f"{case.id}: {doubt}.", DataWarning, stacklevel=1)

    def windows(self, ready: Prepared) -> list[Window]:
        """The window of each model for a case."""
        return [member.window_for(ready.volumes[member.spacing][0].shape[1:]) for member in self.members]

    @torch.inference_mode()
    def probability(self, ready: Prepared, windows: Sequence[Window], *, progress: bool = False) -> np.ndarray:
        """Mean probability of lesion on the grid of the case's first image.

        Args:
            ready: the case.
            windows: the window of each model.
            progress: whether to draw a bar over the windows on stderr.

        Returns:
            ``(X, Y, Z)``, float32; zero where the models saw no tissue.

        Raises:
            ValueError: a model gives probabilities that are not numbers, or the memory does not suffice.
        """
        total: np.ndarray | None = None
        for spacing, (image, transform) in ready.volumes.items():
            mean: Tensor | None = None
            for member, window in zip(self.members, windows, strict=True):
                if member.spacing != spacing:
                    continue
                order = [self.contrasts.index(name) for name in member.contrasts]
                volume = image.as_tensor()
                volume = volume if order == sorted(order) else volume[order]
                with lack_told(f"{ready.case.id} ({sizes(ready.shape)})", "give a smaller --roi, no --whole-brain"):
                    found = member.probability(volume, window.size, progress=progress)
                if not torch.isfinite(found).all():
                    raise ValueError(
                        f"{member.name} gives {ready.case.id} probabilities that are NaN: its weights do not fit "
                        "these images, or are spoiled; try --precision fp32, or train again."
                    )
                mean = found if mean is None else mean.add_(found)
            restored = restore_grid(mean, image, transform)
            total = restored if total is None else total + restored
        return total / len(self.members) if len(self.members) > 1 else total


def restore_grid(volume: Tensor, image: MetaTensor, transform: Compose) -> np.ndarray:
    """Takes ``(1, D, H, W)`` from the prepared grid of ``image`` back to the grid of its file."""
    invert = Invertd("volume", transform, orig_keys="image", nearest_interp=False)
    return invert({"image": image, "volume": MetaTensor(volume)})["volume"][0].numpy()
