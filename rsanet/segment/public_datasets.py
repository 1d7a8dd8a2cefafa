"""The public data sets of lesion segmentation as their makers publish them: each has a tree of its own.

A reader takes the folder that was unpacked, or one inside it, and finds its cases by the names that the tree always
has. It opens no file. Time points are cases of one subject.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rsanet.segment.cases import Case, make_case
from rsanet.segment.raters import LabelledMask
from rsanet.segment.volumes import is_nifti, stem

DEEP = 5  # folders between the one that is given and what a data set is known by, at most


@dataclass(frozen=True)
class PublicDataset:
    """A data set by its name.

    Attributes:
        wanted: what its tree is known by, for messages.
        read: the cases in a folder, none where it is not this data set.
    """

    wanted: str
    read: Callable[[Path], list[Case]]


def read_isbi2015(root: Path) -> list[Case]:
    """The longitudinal challenge of ISBI 2015: two raters, several time points a subject, no masks of the test set.

    training/training01/
        orig/training01_01_flair.nii.gz, ...          before registration: not read
        preprocessed/training01_01_flair_pp.nii, training01_01_mprage_pp.nii, _pd_pp.nii, _t2_pp.nii
        masks/training01_01_mask1.nii, training01_01_mask2.nii
    testdata_website/test01/preprocessed/test01_01_flair_pp.nii, ...
    """
    contrasts = {"flair": "FLAIR", "mprage": "T1w", "t2": "T2w", "pd": "PDw"}
    cases = []
    for file in a_file_of_each(root, "preprocessed/*_{}_pp", contrasts):
        name = stem(file).removesuffix("_pp").rpartition("_")[0]
        images = {contrast: volume(file.parent / f"{name}_{word}_pp") for word, contrast in contrasts.items()}
        raters = {f"mask{n}": volume(file.parents[1] / "masks" / f"{name}_mask{n}") for n in (1, 2)}
        cases.append(several(name, images, raters, subject=name.rpartition("_")[0]))
    return cases


def read_mslesseg(root: Path) -> list[Case]:
    """MSLesSeg, of ICPR 2024. Its time points are T1, T2, ..., and so are two of its contrasts.

    train/P1/T1/P1_T1_FLAIR.nii.gz, P1_T1_T1.nii.gz, P1_T1_T2.nii.gz, P1_T1_MASK.nii.gz
    test/P54/P54_FLAIR.nii.gz, P54_T1.nii.gz, P54_T2.nii.gz, P54_MASK.nii.gz
    """
    contrasts = {"FLAIR": "FLAIR", "T1": "T1w", "T2": "T2w"}
    cases = []
    for file in a_file_of_each(root, "P*_{}", ("FLAIR", "MASK")):
        name = stem(file).rpartition("_")[0]
        if not (match := re.fullmatch(r"(P\d+)(_T\d+)?", name)):
            continue
        images = {contrast: volume(file.parent / f"{name}_{word}") for word, contrast in contrasts.items()}
        mask = {"MASK": volume(file.parent / f"{name}_MASK")}
        cases.append(several(name, images, mask, subject=match[1]))
    return cases


def read_msseg2016(root: Path) -> list[Case]:
    """MSSEG, of MICCAI 2016: seven raters, and a consensus that is the reference unless raters are asked for.

    Training/Center_01/Patient_01/                    and Testing, whose patients are numbered anew
        Preprocessed_Data/FLAIR_preprocessed.nii.gz, T1_..., T2_..., DP_..., GADO_...
        Raw_Data/FLAIR.nii.gz, ...                    before registration: not read
        Masks/Consensus.nii.gz, ManualSegmentation_1.nii.gz to _7, Brain_Mask.nii.gz
    """
    contrasts = {"FLAIR": "FLAIR", "T1": "T1w", "T2": "T2w", "DP": "PDw", "GADO": "T1ce"}
    cases = []
    for file in a_file_of_each(root, "Preprocessed_Data/{}_preprocessed", contrasts):
        patient = file.parents[1]
        images = {contrast: volume(file.parent / f"{word}_preprocessed") for word, contrast in contrasts.items()}
        raters = {"Consensus": volume(patient / "Masks" / "Consensus")}
        raters |= {
            f"ManualSegmentation_{n}": volume(patient / "Masks" / f"ManualSegmentation_{n}") for n in range(1, 8)
        }
        name = "_".join(parts_from(patient, ("training", "testing", patient.parent.name.lower())))
        cases.append(several(name, images, raters, consensus=True))
    return cases


def read_wmh2017(root: Path) -> list[Case]:
    """The white matter hyperintensities challenge of MICCAI 2017, and what was released of it in 2022.

    training/Utrecht/0/, training/Amsterdam/GE3T/100/, test/Amsterdam/Philips_VU .PETMR_01./161/, ...
        pre/FLAIR.nii.gz, pre/T1.nii.gz               corrected for bias; 3DT1.nii.gz is on another grid: not read
        orig/FLAIR.nii.gz, ...                        before that: not read
        wmh.nii.gz                                    1 hyperintensity, 2 other pathology
    additional_annotations/observer_o3/training/Utrecht/0/result.nii.gz, and observer_o4
    """
    cases = []
    for file in a_file_of_each(root, "pre/{}", ("FLAIR", "T1")):
        folder = file.parents[1].absolute()
        parts = parts_from(folder, ("utrecht", "singapore", "amsterdam"))
        images = {"FLAIR": volume(file.parent / "FLAIR"), "T1w": volume(file.parent / "T1")}
        raters = {"wmh": volume(file.parents[1] / "wmh")}
        release = folder.parents[len(parts)] if len(parts) < len(folder.parents) else folder  # above training, test
        for observer in sorted((release / "additional_annotations").glob("observer_*")):
            raters[observer.name] = volume(observer / folder.relative_to(release) / "result")
        masks = {
            rater: [LabelledMask(mask, "other pathology") for mask in files] for rater, files in raters.items() if files
        }
        name = "_".join(re.sub(r"[^\w-]+", "", part) for part in parts)
        cases.append(several(name, images, masks, consensus=True))
    return cases


def read_shifts(root: Path) -> list[Case]:
    """The lesions of Shifts 2.0, in two archives.

    shifts_ms_pt1/msseg/, shifts_ms_pt2/best/, shifts_ms_pt2/ljubljana/
        train/, dev_in/, eval_in/, dev_out/           numbered anew in each
            flair/1_FLAIR_isovox.nii.gz, t1/1_T1_isovox.nii.gz, t2, pd, t1ce
            gt/1_gt_isovox.nii.gz, fg_mask/1_isovox_fg_mask.nii.gz
    """
    contrasts = {"FLAIR": "FLAIR", "T1": "T1w", "T2": "T2w", "PD": "PDw", "T1CE": "T1ce"}
    cases = []
    for file in a_file_of_each(root, "*/*_{}_isovox", contrasts):
        number, part = stem(file).removesuffix("_isovox").rpartition("_")[0], file.parents[1]
        images = {
            contrast: volume(part / word.lower() / f"{number}_{word}_isovox") for word, contrast in contrasts.items()
        }
        part = part.absolute()
        name = f"{part.parent.name}_{part.name}_{number}"
        cases.append(several(name, images, {"gt": volume(file.parents[1] / "gt" / f"{number}_gt_isovox")}))
    return cases


PUBLIC = {
    "isbi2015": PublicDataset("training01/preprocessed/training01_01_flair_pp.nii", read_isbi2015),
    "mslesseg": PublicDataset("train/P1/T1/P1_T1_FLAIR.nii.gz", read_mslesseg),
    "msseg2016": PublicDataset("Center_01/Patient_01/Preprocessed_Data/FLAIR_preprocessed.nii.gz", read_msseg2016),
    "wmh2017": PublicDataset("training/Utrecht/0/pre/FLAIR.nii.gz", read_wmh2017),
    "shifts": PublicDataset("best/train/flair/1_FLAIR_isovox.nii.gz", read_shifts),
}


def below(root: Path, pattern: str) -> Iterator[Path]:
    """The files of a pattern in a folder and the next few levels below it, in the order of their numbers."""
    found = {path for level in range(DEEP + 1) for path in root.glob("*/" * level + pattern)}
    shown = (path for path in found if not any(part.startswith(".") for part in path.relative_to(root).parts))

    def numbers_as_such(path: Path) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path))]

    seen = set()
    for path in sorted(filter(is_nifti, shown), key=numbers_as_such):
        if (name := path.with_name(stem(path))) not in seen:  # of .nii and .nii.gz the one stands for both
            yield path
        seen.add(name)


def a_file_of_each(root: Path, pattern: str, words: Iterable[str]) -> Iterator[Path]:
    """A file of each case, where there is a FLAIR: that, or another, so that a case without one is not left out.

    Args:
        root: the folder.
        pattern: as for `below`, without the end of the name, and with ``{}`` for the word of a contrast.
        words: of the contrasts; that of the FLAIR comes first.
    """
    found: dict[tuple[Path, str], Path] = {}
    for word in words:
        for path in below(root, f"{pattern.format(word)}.[nN][iI][iI]*"):
            before, _, after = stem(path).rpartition(word)
            found.setdefault((path.parents[1], before + after), path)
        if not found:
            return
    yield from found.values()


def volume(path: Path) -> list[Path]:
    """The files of a name, compressed or not; both where there are both."""
    there = sorted(path.parent.iterdir()) if path.parent.is_dir() else ()
    return [file for file in there if is_nifti(file) and stem(file) == path.name and not file.name.startswith(".")]


def parts_from(folder: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    """The last parts of a folder's path, from the first of some names in lower case on."""
    parts = folder.absolute().parts
    starts = [place for place, part in enumerate(parts) if part.lower() in names]
    near = [place for place in starts if place >= len(parts) - 4]
    return parts[near[0] if near else -1 :]


def several(
    name: str,
    images: Mapping[str, Sequence[Path]],
    masks: Mapping[str, Sequence[Path | LabelledMask]],
    *,
    subject: str = "",
    consensus: bool = False,
) -> Case:
    """A case of the files that there are; with a consensus, the first mask is the one that is meant."""
    there = {
        rater if len(files) == 1 else f"{rater}{file.suffix if isinstance(file, Path) else file.path.suffix}": file
        for rater, files in masks.items()
        for file in files
    }
    found = [(contrast, path) for contrast, files in images.items() for path in files]
    agreed = consensus and len(next(iter(masks.values()), ())) == 1 and next(iter(masks)) in there
    return make_case(name, found, there, consensus=agreed, subject=subject)
