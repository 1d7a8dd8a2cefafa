"""The lesion mask of one subject, in the space of the images it was asked for."""

import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import SpatialImage

from rsanet.segment.datasets import Case, canonical, is_simulated
from rsanet.segment.ensemble import Ensemble, Model, Prepared
from rsanet.segment.files import check_new, remove_stale, written_beside
from rsanet.segment.geometry import voxel_volume
from rsanet.segment.metrics import label_lesions
from rsanet.segment.provenance import is_ours, write_sidecar
from rsanet.segment.raters import files_of
from rsanet.segment.registration import check_registration, transform_name, write_transform
from rsanet.segment.report import draw_overlay
from rsanet.segment.segmenter import Window
from rsanet.segment.volumes import DataWarning, is_nifti, read_image, stem
from rsanet.segment.words import counted, noted


@dataclass(frozen=True)
class Options:
    """What is made of a probability.

    Args:
        threshold: probability above which a voxel is lesion.
        min_lesion_mm3: 26-connected lesions of a smaller volume, by the header, are removed.
        probability_map: whether the probability is written, too, as float32.
        preview: whether a picture of the slices with the most lesion is written, too.
        register: whether each further contrast is registered to the first, and its transform written, too.

    Raises:
        ValueError: a number is out of its range.
    """

    threshold: float = 0.5
    min_lesion_mm3: float = 0.0
    probability_map: bool = False
    preview: bool = False
    register: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"--threshold is {self.threshold}: give a probability, from 0 to 1.")
        if not 0 <= self.min_lesion_mm3 < math.inf:
            raise ValueError(
                f"--min-lesion-mm3 is {self.min_lesion_mm3}: give a volume in mm³, 0 to keep every lesion."
            )

    def check_contrasts(self, contrasts: Sequence[str]) -> None:
        """Refuses to register where there is nothing to register, or nothing to do it with."""
        if self.register:
            if len(contrasts) < 2:
                raise ValueError(f"--register has nothing to do: the model takes {contrasts[0]} alone; leave it out.")
            check_registration()

    def files(self, mask: Path, contrasts: Sequence[str]) -> dict[str, Path]:
        """The files of a case by what they hold: ``mask``, ``sidecar``, ``probability``, ``preview``, a transform.

        Args:
            mask: the mask.
            contrasts: of the model; the transform of each is by its name.
        """
        if not is_nifti(mask):  # which may have no name at all, as "."
            raise ValueError(f"{mask} is not a name for a mask: end it in .nii.gz.")
        found = {"mask": mask, "sidecar": mask.with_name(stem(mask) + ".json")}
        if self.probability_map:
            # The ending of BIDS, by which a folder's masks are told from its probability maps.
            name = stem(mask).removesuffix("_mask") + "_probseg"
            found["probability"] = mask.with_name(name + mask.name[len(stem(mask)) :])
        if self.preview:
            found["preview"] = mask.with_name(stem(mask) + ".png")
        if self.register:
            for name in contrasts[1:]:
                found[f"transform of {name}"] = mask.with_name(transform_name(mask, name, contrasts[0]))
        return found


@dataclass(frozen=True, eq=False)
class Prediction:
    """The lesions of one subject.

    Attributes:
        case: name of the subject.
        mask: ``(X, Y, Z)``, uint8, on the first image's grid.
        probability: likewise, float32.
        affine: ``(4, 4)``, from voxels to mm.
        lesions: number of 26-connected lesions in the mask.
        load_mm3: their volume by the header.
        seconds: time from the files to the mask.
        backend: what ran the attention.
        windows: what each network saw at once.
        path: the mask's file, if it was written.
        warnings: what is doubtful in the images and the mask, a sentence each.
        transforms: by contrast, the 4×4 matrix that brought it to the first one, where that was asked for: from a
            point of the first image to the same place in its own, in mm of NIfTI's world.
    """

    case: str
    mask: np.ndarray
    probability: np.ndarray
    affine: np.ndarray
    lesions: int
    load_mm3: float
    seconds: float
    backend: str
    windows: tuple[Window, ...]
    path: Path | None
    warnings: tuple[str, ...] = ()
    transforms: Mapping[str, np.ndarray] = field(default_factory=dict)


def predict(
    model: Model | Sequence[Model],
    images: Any,
    out: str | os.PathLike | None = None,
    *,
    affine: np.ndarray | None = None,
    threshold: float = 0.5,
    min_lesion_mm3: float = 0.0,
    probability_map: bool = False,
    preview: bool = False,
    register: bool = False,
    overwrite: bool = False,
    progress: bool = False,
    say: Callable[[str], None] | None = None,
    **inference: Any,
) -> Prediction:
    """Predicts the lesion mask of one subject.

    Args:
        model: a run folder, a model file or a `Segmenter`, or several whose probabilities are averaged.
        images: files, images of nibabel, or arrays with ``affine``, in the order of the model's contrasts or by
            contrast. Those on other grids are brought to the first one's by their headers.
        out: file for the mask, ``.nii`` or ``.nii.gz``, with a ``.json`` beside it that says how the mask came about;
            None writes nothing.
        affine: from voxels to mm; needed with arrays only.
        threshold: see `Options`.
        min_lesion_mm3: see `Options`.
        probability_map: see `Options`; the file is beside the mask and ends in ``_probseg``.
        preview: see `Options`; the file is beside the mask and ends in ``.png``.
        register: see `Options`; it needs the extra ``formats``. The files are beside the mask and end in ``_xfm.tfm``.
        overwrite: whether files that exist are replaced.
        progress: whether to draw a bar over the windows on stderr.
        say: called with one line on device, backend, precision and shapes before the network runs.
        inference: ``roi``, ``device``, ``precision``, ``flips`` and ``whole_brain`` of `Segmenter.load`.

    Returns:
        Mask and probability on the first image's grid, and what they hold.

    Raises:
        ValueError: an argument, the model or an image cannot serve, or the memory does not suffice.
        OSError: a file cannot be read or written.
    """
    options = Options(threshold, min_lesion_mm3, probability_map, preview, register)
    path = None if out is None else Path(out)
    if path is not None:
        check_outputs(options.files(path, ()), overwrite=overwrite)
        remove_stale(path.parent)
    elif probability_map or preview:
        raise ValueError("There is no out, beside which the probability map and the preview are written: give one.")
    ensemble = Ensemble.load(model, **inference)
    options.check_contrasts(ensemble.contrasts)
    if path is not None:
        check_outputs(options.files(path, ensemble.contrasts), overwrite=overwrite)
    case = name_images(ensemble.contrasts, images, affine)
    ready = ensemble.prepare(case, registered=register)
    return predict_case(ensemble, ready, path, options, progress=progress, say=say)


def predict_case(
    ensemble: Ensemble,
    ready: Prepared,
    out: Path | None,
    options: Options,
    *,
    progress: bool = False,
    say: Callable[[str], None] | None = None,
) -> Prediction:
    """Segments a case that was read, and writes its files; the mask comes last.

    Args:
        ensemble: the models.
        ready: the case.
        out: file for the mask, or None.
        options: what to make of the probability.
        progress: see `predict`.
        say: see `predict`.

    Raises:
        ValueError: an output is an input, a probability is not a number, or the memory does not suffice.
        OSError: a file cannot be written.
    """
    with noted() as said:
        return _predict_case(ensemble, ready, out, options, said, progress=progress, say=say)


def _predict_case(
    ensemble: Ensemble,
    ready: Prepared,
    out: Path | None,
    options: Options,
    said: Mapping[str, None],
    *,
    progress: bool,
    say: Callable[[str], None] | None,
) -> Prediction:
    """As `predict_case`, within what notes the warnings."""
    started = time.perf_counter()
    case, grid = ready.case, ready.grid
    files = options.files(out, ensemble.contrasts) if out else {}
    for path in files.values():
        check_no_input(path, case)
    windows = ensemble.windows(ready)
    if say:
        say(ensemble.describe(ready, windows))
    probability = ensemble.probability(ready, windows, progress=progress)
    voxel_mm3 = voxel_volume(grid.affine)
    mask, lesions = lesion_mask(probability, options, voxel_mm3, head=ready.head, case=case.id)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)  # in a tree of BIDS, whose folders come with the masks
    if "probability" in files:
        write_volume(probability, grid, files["probability"])
    if out:
        for name, matrix in ready.transforms.items():
            write_transform(matrix, files[f"transform of {name}"])
    if "preview" in files:
        contrast = ensemble.contrasts[0]
        image = nib.Nifti1Image(read_image(case.images[contrast])[0], grid.affine)
        overlay = nib.Nifti1Image(mask, grid.affine)
        simulated = any(is_simulated(file) for file in paths_of(case))
        words = {"name": Path(case.id).name, "simulated": simulated, "contrast": contrast}
        draw_overlay(image, None, overlay, None, files["preview"], **words)

    def found() -> Prediction:
        return Prediction(
            Path(case.id).name,
            mask,
            probability,
            grid.affine,
            lesions,
            int(np.count_nonzero(mask)) * voxel_mm3,
            ready.seconds + time.perf_counter() - started,
            ensemble.backend([window.size for window in windows]),
            tuple(windows),
            out,
            tuple(dict.fromkeys([*ready.warnings, *said])),
            ready.transforms,
        )

    if out is None:
        return found()
    if is_ours(files["sidecar"]):  # what stood beside the mask that is replaced would be taken for this one's
        everything = replace(options, probability_map=True, preview=True, register=True)
        for name, path in everything.files(out, ensemble.contrasts).items():
            if name not in files:
                check_no_input(path, case)
                path.unlink(missing_ok=True)
    with written_beside(files["mask"]) as partial:
        save_volume(mask, grid, partial)
        result = found()
        write_sidecar(files["sidecar"], result, ensemble, ready, options)
    return result


def lesion_mask(
    probability: np.ndarray,
    options: Options,
    voxel_mm3: float,
    *,
    head: np.ndarray | None = None,
    case: str = "the mask",
) -> tuple[np.ndarray, int]:
    """The mask ``(X, Y, Z)`` as uint8 of a probability, and the number of its 26-connected lesions.

    Args:
        probability: of lesion.
        options: what is made of it.
        voxel_mm3: volume of a voxel.
        head: where the image shows the head; what would be lesion in the air around it is none, with a `DataWarning`.
        case: for its words.
    """
    mask = probability > options.threshold
    if head is not None:
        in_air = int(np.count_nonzero(mask & ~head))
        if in_air:
            was = "was" if in_air == 1 else "were"
            warnings.warn(
                f"{case}: {counted(in_air, 'voxel')} outside the head {was} found to be lesion, and left out.",
                DataWarning,
                stacklevel=1,
            )
        mask &= head
    labels, count = label_lesions(mask)
    if options.min_lesion_mm3 and count:
        # A lesion of exactly the minimum stays, whatever the rounding of the voxel volume.
        large = np.bincount(labels.ravel()) * voxel_mm3 >= options.min_lesion_mm3 * (1 - 1e-6)
        large[0] = False
        mask, count = large[labels], int(large.sum())
    return mask.astype(np.uint8), count


def name_images(contrasts: Sequence[str], images: Any, affine: np.ndarray | None = None) -> Case:
    """Images as a case.

    Args:
        contrasts: the wanted ones.
        images: see `predict`.
        affine: see `predict`.

    Raises:
        ValueError: there are too few or too many, or an array has no affine.
    """
    alone = isinstance(images, (str, os.PathLike, SpatialImage)) or getattr(images, "ndim", 0) == 3
    if isinstance(images, Mapping):
        known = {canonical(name): image for name, image in images.items()}
        if missing := [name for name in contrasts if name not in known]:
            raise ValueError(f"The images have no {' and no '.join(missing)}: give {' '.join(contrasts)}.")
        named = {name: known[name] for name in contrasts}
    else:
        given = [images] if alone else list(images)
        if len(given) != len(contrasts):
            raise ValueError(
                f"-i has {counted(len(given), 'image')}, but this model wants {len(contrasts)}: "
                f"give {' '.join(contrasts)}, in this order."
            )
        named = dict(zip(contrasts, given, strict=True))
    named = {name: _as_volume(image, name, affine) for name, image in named.items()}
    first = named[contrasts[0]]
    file = first.get_filename() if isinstance(first, SpatialImage) else first
    return Case(str(file) if file else "the subject", named)  # as messages name a file


def _as_volume(image: Any, name: str, affine: np.ndarray | None) -> Path | SpatialImage:
    if isinstance(image, (str, os.PathLike)):
        return Path(image)
    if isinstance(image, SpatialImage):
        return image
    voxels = np.asarray(image)
    if voxels.dtype.kind not in "biuf":
        raise ValueError(
            f"{name} is a {type(image).__name__}: give a file, an image of nibabel, or an array of numbers."
        )
    if affine is None:
        raise ValueError(f"{name} is an array without an affine: give affine=, or an image of nibabel.")
    matrix = np.asarray(affine, np.float64)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or np.linalg.det(matrix[:3, :3]) == 0:
        raise ValueError(f"The affine of {name} maps voxels to no place: give the 4×4 matrix from voxels to mm.")
    return nib.Nifti1Image(voxels.astype(np.float32), matrix)


def paths_of(case: Case) -> list[Path]:
    """The files of a case."""
    return [*(path for path in case.images.values() if isinstance(path, Path)), *files_of(case.mask)]


def check_outputs(files: Mapping[str, Path], *, overwrite: bool) -> None:
    """Refuses names that cannot be written, or are taken where nothing may be lost."""
    for path in files.values():
        check_new(path, overwrite=overwrite)


def check_no_input(path: Path, case: Case) -> None:
    """Refuses to write over a file of the case itself."""
    if path.exists() and any(file.exists() and path.samefile(file) for file in paths_of(case)):
        raise ValueError(f"{path} is an input of {case.id}, and would be lost: give another name to the mask.")


def write_volume(voxels: np.ndarray, like: nib.Nifti1Image, path: Path) -> None:
    """Saves values from 0 to 1 as `save_volume` does, whole or not at all."""
    with written_beside(path) as partial:
        save_volume(voxels, like, partial)


def save_volume(voxels: np.ndarray, like: nib.Nifti1Image, path: Path) -> None:
    """Saves values from 0 to 1 in their own dtype with the grid and header of ``like``."""
    # The affine of NIfTI-2 has more digits than a NIfTI-1 header, and nibabel would write both forms anew for those.
    header = nib.Nifti1Header.from_header(like.header)
    header.set_data_dtype(voxels.dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"], header["cal_max"] = 0, 1
    nib.save(nib.Nifti1Image(voxels, None, header), path)
