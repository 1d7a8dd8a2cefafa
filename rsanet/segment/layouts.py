"""The layouts of data sets on disk: what a folder or a list of files holds, as cases.

A reader returns `Case` objects, complete or not, with contrasts by one name each; nothing after it knows a layout.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from rsanet.segment.cases import Case, make_case, name_raters
from rsanet.segment.lists import channels_of, read_datalist, read_json, read_table
from rsanet.segment.names import (
    canonical,
    is_other_mask,
    is_probability,
    kind_of,
    subfolders,
    subject_of_name,
    tell_left_out,
    unread_in,
    volumes_below,
    volumes_in,
)
from rsanet.segment.provenance import is_predicted
from rsanet.segment.public_datasets import PUBLIC
from rsanet.segment.recipe import LAYOUTS
from rsanet.segment.volumes import is_nifti, stem

UNDERSTOOD = (
    "give a BIDS folder (sub-001/anat/sub-001_FLAIR.nii.gz), an nnU-Net folder (dataset.json, imagesTr), a folder with "
    "SUBJECT/FLAIR.nii.gz or SUBJECT_FLAIR.nii.gz inside, or a list of files, .csv or .json"
)


DATA_TYPES = [  # of BIDS: the folders of a subject
    "anat",
    "beh",
    "dwi",
    "eeg",
    "emg",
    "fmap",
    "func",
    "ieeg",
    "meg",
    "micr",
    "motion",
    "mrs",
    "nirs",
    "perf",
    "pet",
]
BIDS_FOLDERS = ("derivatives", "sourcedata", "rawdata", "code", "stimuli", "phenotype")  # beside the subjects'


def read_cases(path: Path, layout: str = "auto") -> list[Case]:
    """The cases of a data set.

    Args:
        path: a folder, a ``.csv``, ``.tsv`` or ``.json`` file, or the latter and the name of a list in it.
        layout: one of `LAYOUTS`; ``auto`` takes the one that the path looks like, of those that are no single data
            set's, and finds no cases where it looks like none.

    Raises:
        ValueError: the path does not have the layout that was named.
    """
    if layout == "auto":
        return read_any(path)
    if layout not in LAYOUTS:
        raise ValueError(f"--layout is {layout!r}: give one of {', '.join(LAYOUTS)}.")
    cases = (READERS[layout] if layout in READERS else PUBLIC[layout].read)(path)
    if not cases and path.exists():
        wanted = WANTED[layout] if layout in WANTED else PUBLIC[layout].wanted
        raise ValueError(f"{path} does not look like {layout}: wanted {wanted}, found {found_in(path)}.")
    return cases


def read_any(path: Path) -> list[Case]:
    """The cases of a data set in any layout that is understood, none where it is another."""
    if cases := read_list(path):
        return cases
    if not path.is_dir():
        return []
    if any(path.glob("sub-*/anat")) or any(path.glob("sub-*/ses-*/anat")):
        return read_bids(path)
    if images := nnunet_images(path):
        return read_nnunet(images)
    return read_folders(path) + read_flat(path)


def tell_unused(path: Path, cases: Sequence[Case]) -> None:
    """Warns of the volumes in a folder that are of no case, unless a layout has a place of its own for them.

    Maps of probabilities and masks of the brain never count, and neither do volumes in another format beside NIfTI
    files of the same subject.
    """
    used = {file for case in cases for file in case.files()}
    if not path.is_dir():
        return
    if images := nnunet_images(path):
        made_of = {(file.parent, stem(file)) for file in used}
        files = [file for folder in (images, _nnunet_labels(images)) for file in _volumes_of_any_format(folder)]
        unused = [file for file in files if file not in used and (file.parent, stem(file)) not in made_of]
        tell_left_out(unused, path, "not in NIfTI as others are, or lying in a folder of their own")
        return
    if any(case.place for case in cases):
        masks = [
            file
            for place in _bids_places([path])
            for file in volumes_in(path / place / "anat")
            if _is_mask(file) and not is_other_mask(stem(file))
        ]
        masks += [file for pipeline in bids_pipelines(path) for file in volumes_below(pipeline) if _is_lesion(file)]
        masks = [file for file in masks if file not in used and not _is_labelled(file)]
        tell_left_out(masks, path, "being no derivatives/*/sub-*/anat/*label-lesion*_mask.nii.gz")
        folders = [each for each in subfolders(path) if not each.name.startswith(BIDS_FOLDERS)]
        strange = [file for each in folders for file in volumes_below(each) if _is_out_of_place(file.relative_to(path))]
        strange += [file for each in folders for file in volumes_in(each) if file not in strange]
        tell_left_out([*volumes_in(path), *strange], path, "lying in no sub-*/anat")
        return
    deep, unknown = [], []
    subjects = {(file.parent, subject_of_name(file) if file.parent == path else "") for file in used}
    for file in [*volumes_below(path), *(file for each in (path, *subfolders(path)) for file in unread_in(each))]:
        named = stem(file) if file.parent == path else stem(file).removeprefix(file.parent.name)
        subject = (file.parent, subject_of_name(file) if file.parent == path else "")
        if (
            file in used
            or is_probability(named)
            or is_other_mask(named)
            or (not is_nifti(file) and subject in subjects)
        ):
            continue
        (deep if len(file.relative_to(path).parts) > 2 else unknown).append(file)
    tell_left_out(unknown, path, "being named as neither a contrast nor a lesion mask, or not in NIfTI as others are")
    tell_left_out(deep, path, "lying deeper than SUBJECT/FLAIR.nii.gz")


def _is_mask(file: Path) -> bool:
    """Whether a file in a folder ``anat`` is by its name a mask or a segmentation, and no image."""
    suffix = stem(file).rpartition("_")[2].lower()
    return "_label-" in file.name or suffix.endswith(("mask", "seg", "roi")) or kind_of(suffix) == "mask"


def _is_lesion(file: Path) -> bool:
    return re.search("lesion|wmh", file.name, re.IGNORECASE) is not None


def _is_out_of_place(file: Path) -> bool:
    """Whether a file, by its path in a data set of BIDS, lies neither in ``anat`` nor where other data types do."""
    subject, *folders = file.parts[:-1]
    folders = folders[1:] if folders and folders[0].startswith("ses-") else folders
    return not subject.startswith("sub-") or folders[:1] == [] or folders[0] not in DATA_TYPES or folders[1:] != []


def _volumes_of_any_format(folder: Path) -> list[Path]:
    return [*volumes_below(folder), *volumes_below(folder, unread=True)]


def _is_labelled(file: Path) -> bool:
    """Whether a file is by its name a probability, or the mask of something else than all lesions."""
    return is_probability(stem(file)) or re.search(r"_label-(?!lesion[_.])", file.name) is not None


def resembled(path: Path) -> str:
    """The public data set that a folder looks like, or nothing."""
    return next((name for name, dataset in PUBLIC.items() if path.is_dir() and dataset.read(path)), "")


def found_in(path: Path, most: int = 5) -> str:
    """What a path holds, in a few words."""
    if path.is_file():
        return "a file"
    names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    return ", ".join(names[:most] + ["..."] * (len(names) > most)) or "nothing"


def read_list(path: Path) -> list[Case]:
    """The cases of a list of files, none where the path is no list."""
    if path.is_file() and path.suffix.lower() in (".csv", ".tsv"):
        return read_table(path)
    if path.is_file() and path.suffix.lower() == ".json":
        return read_datalist(path)
    if path.parent.suffix.lower() == ".json" and path.parent.is_file():
        return read_datalist(path.parent, path.name)
    return []


def read_bids(folder: Path) -> list[Case]:
    """Cases of ``sub-*/anat/*_CONTRAST.nii.gz``, masks in ``derivatives/*/sub-*/anat/*label-lesion*_mask.nii.gz``.

    With sessions, each ``sub-*/ses-*`` is a case, likewise; one without ``anat``, as of diffusion alone, is none,
    unless it has a mask. A T1w with contrast agent (``ce-``) is a T1ce. What `rsanet predict` wrote into
    ``derivatives`` is no reference.
    """
    pipelines = bids_pipelines(folder)
    cases = []
    for where in _bids_places([folder, *pipelines]):
        name = "_".join(where.parts)
        images: list[tuple[str, Path]] = []
        masks: dict[str, Path] = {}
        for path in volumes_in(folder / where / "anat"):
            contrast = canonical(stem(path).rpartition("_")[2])
            if not _is_mask(path):
                images.append(("T1ce" if contrast == "T1w" and "_ce-" in path.name else contrast, path))
        for pipeline in pipelines:
            drawn = [
                path
                for path in volumes_in(pipeline / where / "anat")
                if "label-lesion" in path.name and stem(path).endswith("_mask")
            ]
            if len(drawn) == 1:
                masks[pipeline.name] = drawn[0]
            else:
                named = name_raters(name, drawn)
                masks |= {f"{pipeline.name}/{rater}": path for rater, path in named.items()}
        if masks or (folder / where / "anat").is_dir():
            cases.append(make_case(name, images, masks, place=(where / "anat").as_posix()))
    return cases


def bids_pipelines(folder: Path) -> list[Path]:
    """The derivatives of a data set of BIDS whose masks are references."""
    return [path for path in subfolders(folder / "derivatives") if not is_predicted(path)]


def _bids_places(roots: Sequence[Path]) -> list[Path]:
    """The subjects and sessions with a folder ``anat`` in a data set of BIDS or in its derivatives, in order."""
    found = set()
    for root in roots:
        for subject in (path for path in subfolders(root) if path.name.startswith("sub-")):
            sessions = [path for path in subfolders(subject) if path.name.startswith("ses-")]
            found |= {place.relative_to(root) for place in (subject, *sessions) if (place / "anat").is_dir()}
    return sorted(found)


def nnunet_images(path: Path) -> Path | None:
    """The folder of images that a path to an nnU-Net data set, or to a part of one, means; None where it is none."""
    if (path / "dataset.json").is_file() and (path / "imagesTr").is_dir():
        return path / "imagesTr"
    return path if path.name.startswith("images") and (path.parent / "dataset.json").is_file() else None


def _nnunet_labels(images: Path) -> Path:
    return images.parent / images.name.replace("images", "labels")


def read_nnunet(images: Path) -> list[Case]:
    """Cases of nnU-Net's ``imagesTr/CASE_0000.nii.gz``, or ``imagesTs``, with ``labelsTr/CASE.nii.gz``.

    ``dataset.json`` beside the folder names the channels. With a single one, files may lack the number.
    """
    description = images.parent / "dataset.json"
    channels = channels_of(read_json(description), description)
    if not channels:
        raise ValueError(f'{description} names no channels: add "channel_names", for example {{"0": "FLAIR"}}.')
    found: dict[str, list[tuple[str, Path]]] = {}
    for path in volumes_in(images):
        match = re.fullmatch(r"(.+)_(\d{4})", stem(path))
        case, channel = (match[1], int(match[2])) if match else (stem(path), 0)
        if channel >= len(channels) or (not match and len(channels) > 1):
            last = f" to _{len(channels) - 1:04d}" if len(channels) > 1 else ""
            raise ValueError(f"{path} is no channel that {description} names: end its name in _0000{last}.")
        found.setdefault(case, []).append((channels[channel], path))
    if not found:
        raise ValueError(f"{images} has no images: put them there as CASE_0000.nii.gz.")
    labels: dict[str, list[Path]] = {}
    for path in volumes_in(_nnunet_labels(images)):
        labels.setdefault(stem(path), []).append(path)
    return [make_case(case, found.get(case, []), labels.get(case, [])) for case in sorted(found.keys() | labels.keys())]


def read_folders(folder: Path) -> list[Case]:
    """Cases of ``SUBJECT/FLAIR.nii.gz`` and ``SUBJECT/SUBJECT_FLAIR.nii.gz``, masks beside.

    The words of a file name say what it holds, a contrast or a lesion mask; other files are left out.
    """
    cases = []
    found = {subject: volumes_in(subject) for subject in subfolders(folder)}
    converted = any(is_nifti(path) for paths in found.values() for path in paths)  # elsewhere, then, to NIfTI
    for subject, paths in found.items():
        kinds = [(kind_of(stem(path).removeprefix(subject.name)), path) for path in paths]
        if files := [(kind, path) for kind, path in kinds if is_nifti(path) or not converted]:
            images = [(kind, path) for kind, path in files if kind not in ("", "mask")]
            cases.append(make_case(subject.name, images, [path for kind, path in files if kind == "mask"]))
    return cases


def read_flat(folder: Path) -> list[Case]:
    """Cases of ``SUBJECT_FLAIR.nii.gz``, masks beside; names are read as in `read_folders`."""
    flat: dict[str, list[tuple[str, Path]]] = {}
    masks: dict[str, list[Path]] = {}
    for path in volumes_in(folder):
        if (kind := kind_of(stem(path))) == "mask":
            masks.setdefault(subject_of_name(path), []).append(path)
        elif kind:
            flat.setdefault(subject_of_name(path), []).append((kind, path))
    for subject in [name for name in masks if name not in flat]:
        if (shorter := subject_of_name(Path(subject))) in flat:  # SUBJECT_FLAIR_mask
            masks.setdefault(shorter, []).extend(masks.pop(subject))
    return [make_case(name, flat.get(name, []), masks.get(name, [])) for name in sorted(flat.keys() | masks.keys())]


# The layouts that are no single data set's, and what each is known by.
READERS: dict[str, Callable[[Path], list[Case]]] = {
    "bids": read_bids,
    "nnunet": lambda path: read_nnunet(images) if (images := nnunet_images(path)) else [],
    "folders": read_folders,
    "flat": read_flat,
    "list": read_list,
}
WANTED = {
    "bids": "sub-001/anat/sub-001_FLAIR.nii.gz, with or without ses-*",
    "nnunet": "dataset.json and imagesTr/CASE_0000.nii.gz",
    "folders": "SUBJECT/FLAIR.nii.gz",
    "flat": "SUBJECT_FLAIR.nii.gz",
    "list": "a .csv, .tsv or .json file",
}
