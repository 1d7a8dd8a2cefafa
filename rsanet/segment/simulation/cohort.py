"""A simulated cohort on disk: a BIDS-style folder that a killed run leaves sound, and the same command completes."""

import gzip
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from rsanet import __version__
from rsanet.segment import files
from rsanet.segment.scenario import PARTS, Scenario
from rsanet.segment.simulation.anatomy import load_anatomy
from rsanet.segment.simulation.painting import LABEL_THRESHOLD
from rsanet.segment.simulation.patient import Patient, Session, check_seed, simulate_patient
from rsanet.segment.simulation.split import check_kept, divide
from rsanet.segment.simulation.streams import subject_seed

MOST_SUBJECTS = 999  # have names of three digits
LESION_CONNECTIVITY = 26
SPLIT_NAME = "split.json"
COHORT_NAME = "Simulated multiple-sclerosis patients"

README = """\
Simulated patients with multiple-sclerosis lesions, made by `rsanet simulate`.

For research and software testing only. Nobody was scanned: the images have no clinical meaning, and scores on
them say nothing about accuracy on patients.

    sub-NNN/anat/                      the images: skull-stripped, background 0, one grid
    derivatives/lesions/sub-NNN/anat/  the lesion mask (1 = lesion); its .json lists every lesion and setting
    split.json                         train, validation and test, where they were asked for

Patients with several sessions have the folders sub-NNN/ses-NN/anat/, all on one grid. From the second session on
the mask's .json says what became of every lesion (new, growing, shrinking, stable; and those that vanished), and
*_label-newlesion_mask.nii.gz holds the new ones alone.

The anatomy under the lesions is a warp of the ICBM 2009a nonlinear symmetric template. Cite:
Fonov VS, Evans AC, McKinstry RC, Almli CR, Collins DL. Unbiased nonlinear average age-appropriate brain
templates from birth to adulthood. NeuroImage 47 (2009), Supplement 1, S102.
"""


@dataclass(frozen=True)
class Subject:
    """A simulated patient on disk: a row of ``participants.tsv``.

    Attributes:
        participant_id: such as sub-001.
        seed: the patient's seed.
        lesion_count: lesions of the first session.
        lesion_load_mm3: their volume.
        new_lesion_count: lesions that are new in any later session.
        cases: ids of the sessions as `rsanet train` knows them: sub-001, or sub-001_ses-01.
        folder: of the images.
    """

    participant_id: str
    seed: int
    lesion_count: int
    lesion_load_mm3: float
    new_lesion_count: int
    cases: tuple[str, ...]
    folder: Path = field(compare=False)


def simulate(
    out: str | os.PathLike,
    subjects: int,
    scenario: Scenario | None = None,
    *,
    seed: int = 0,
    split: Sequence[float] | None = None,
    progress: Callable[[int, int, Subject], None] | None = None,
) -> list[Subject]:
    """Simulate patients into a BIDS-style folder.

    A cohort that an earlier call with the same seed and scenario began is completed: subjects on disk stay as
    they are. A subject is written beside its place and renamed into it, so there is never half of one.

    Args:
        out: folder of the cohort; new, empty, or begun with the same seed and scenario.
        subjects: number of patients, up to 999.
        scenario: everything about them; the defaults if None.
        seed: seed of the cohort. A patient follows from it and from the patient's number alone.
        split: shares of train, validation and test. ``out/split.json`` then has the case ids of each, all the
            sessions of a patient in one part; a patient stays in their part when the cohort grows.
        progress: called as ``progress(number, subjects, subject)`` after each subject.

    Returns:
        One :class:`Subject` per patient, as in ``participants.tsv``.

    Raises:
        ValueError: an argument is out of range, or ``out`` holds something else.
        OSError: ``out`` cannot be written.
        RuntimeError: nilearn is not installed.
    """
    scenario = scenario or Scenario()
    if not 1 <= subjects <= MOST_SUBJECTS:
        raise ValueError(f"--subjects is {subjects}: ask for 1 to {MOST_SUBJECTS}, which have names of three digits.")
    check_seed(seed)
    out = Path(out)
    names = [_name(number) for number in range(1, subjects + 1)]
    description = _description(seed, scenario)
    _check_folder(out, description)
    known = {folder.name: _read_subject(out, folder.name, scenario) for folder in out.glob("sub-[0-9][0-9][0-9]")}
    parts = None if split is None else _split_cases({*names, *known}, scenario, split)
    if parts is not None:
        check_kept(out / SPLIT_NAME, parts)
    anatomy = load_anatomy()  # before anything is written: nilearn may be missing
    _begin(out, description)
    for number, name in enumerate(names, start=1):
        if name not in known:
            _write_subject(out, name, simulate_patient(subject_seed(seed, number), scenario, anatomy), seed)
            known[name] = _read_subject(out, name, scenario)
        _write_participants(out, [known[key] for key in sorted(known)], scenario)
        if progress is not None:
            progress(number, subjects, known[name])
    if parts is not None:
        files.write_text(out / SPLIT_NAME, _json(parts))
    return [known[name] for name in names]


def _name(number: int) -> str:
    return f"sub-{number:03d}"


def _sessions(scenario: Scenario) -> list[str]:
    """The labels of the sessions; a single one needs none."""
    return [f"ses-{number:02d}" for number in range(1, scenario.sessions + 1)] if scenario.sessions > 1 else [""]


def _case(name: str, session: str) -> str:
    """The id of a session: the start of its files' names, too."""
    return f"{name}_{session}" if session else name


def _split_cases(names: set[str], scenario: Scenario, shares: Sequence[float]) -> dict[str, list[str]]:
    """The cases of each part of the split, in their order."""
    last = max(int(name.removeprefix("sub-")) for name in names)
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    for number, part in enumerate(divide(last, shares), start=1):
        if _name(number) in names:
            parts[part] += [_case(_name(number), session) for session in _sessions(scenario)]
    return parts


def _description(seed: int, scenario: Scenario) -> dict[str, Any]:
    made_by = {
        "Name": "rsanet simulate",
        "Version": __version__,
        "Description": "Simulated data: no clinical meaning.",
        "Seed": seed,
        "Settings": asdict(scenario),
    }
    description = {
        "Name": COHORT_NAME,
        "BIDSVersion": "1.9.0",
        "DatasetType": "raw",
        "License": "See README: the anatomy is nilearn's copy of the ICBM 2009a template.",
        "ReferencesAndLinks": ["Fonov et al., NeuroImage 47 (2009), Supplement 1, S102"],
        "GeneratedBy": [made_by],
    }
    return json.loads(json.dumps(description))  # tuples become lists, as they will read back


def _check_folder(out: Path, description: dict[str, Any]) -> None:
    """Refuse a folder that holds anything but this very cohort."""
    file = out / "dataset_description.json"
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder for the cohort.")
    if not file.exists():
        if out.is_dir() and any(not there.name.startswith(".") for there in out.iterdir()):
            raise ValueError(f"{out} is not empty and holds no simulated cohort: give a new or an empty folder.")
        return
    try:
        there = json.loads(file.read_text())
        made, wanted = _flat(there["GeneratedBy"][0]), _flat(description["GeneratedBy"][0])
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{out} holds another data set: give a new or an empty folder.") from None
    if there != description:
        others = [f"{key} {made.get(key)}" for key in wanted if made.get(key) != wanted[key]]
        raise ValueError(
            f"{out} holds a cohort made with {', '.join(others) or 'other settings'}: "
            "give a new folder, or the same settings to complete it."
        )


def _flat(made_by: dict[str, Any]) -> dict[str, Any]:
    """What a cohort was made from, by the names of the settings."""
    return {"seed": made_by["Seed"], "version": made_by["Version"], **made_by["Settings"]}


def _begin(out: Path, description: dict[str, Any]) -> None:
    """Write what belongs to the cohort and not to a subject; the description comes first, for it marks the folder."""
    lesions = out / "derivatives" / "lesions"
    out.mkdir(parents=True, exist_ok=True)
    files.write_text(out / "dataset_description.json", _json(description))
    lesions.mkdir(parents=True, exist_ok=True)
    files.write_text(out / "README", README)
    masks = description | {"Name": "Lesion masks: " + COHORT_NAME.lower(), "DatasetType": "derivative"}
    files.write_text(lesions / "dataset_description.json", _json(masks))


def _masks_of(out: Path, name: str) -> Path:
    return out / "derivatives" / "lesions" / name


def _write_subject(out: Path, name: str, patient: Patient, seed: int) -> None:
    """Write a subject beside its place; the rename of its images is the last act and makes it complete."""
    for left in out.glob(f".{name}.*"):  # by a run that was killed
        shutil.rmtree(left)
    beside = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=out))
    try:
        images, masks = beside / "images", beside / "masks"
        for label, session in zip(_sessions(patient.scenario), patient.sessions, strict=True):
            case = _case(name, label)
            for folder in (images, masks):
                (folder / label / "anat").mkdir(parents=True)
            for contrast, image in session.images.items():
                _write_image(images / label / "anat" / f"{case}_{contrast}.nii.gz", image, patient.affine)
            stem = masks / label / "anat" / f"{case}_label-"
            _write_image(Path(f"{stem}lesion_mask.nii.gz"), session.mask, patient.affine)
            Path(f"{stem}lesion_mask.json").write_text(_json(_sidecar(patient, session, seed)))
            if session.new_mask is not None:
                _write_image(Path(f"{stem}newlesion_mask.nii.gz"), session.new_mask, patient.affine)
        derived = _masks_of(out, name)
        if derived.exists():  # left by a run that was stopped between the two renames
            shutil.rmtree(derived)
        masks.rename(derived)
        images.rename(out / name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _sidecar(patient: Patient, session: Session, seed: int) -> dict[str, Any]:
    """What is true of a mask, and what it was made from."""
    sidecar = {
        "Description": "Lesion mask of a simulated patient: no clinical meaning.",
        "Simulated": True,
        "SoftwareName": "rsanet",
        "SoftwareVersion": __version__,
        "CohortSeed": seed,
        "Seed": patient.seed,
        "VoxelSize_mm": list(patient.scenario.voxel_size),
        "Settings": asdict(patient.scenario),
        "LabelThreshold": LABEL_THRESHOLD,
        "Connectivity": LESION_CONNECTIVITY,
        "LesionCount": len(session.lesions),
        "LesionLoad_mm3": _load_mm3(session.lesions),
    }
    if session.new_mask is not None:
        new = [lesion for lesion in session.lesions if lesion["fate"] == "new"]
        sidecar |= {"NewLesionCount": len(new), "NewLesionLoad_mm3": _load_mm3(new), "Vanished": session.vanished}
    return sidecar | {"Lesions": session.lesions}


def _load_mm3(lesions: Sequence[dict[str, Any]]) -> float:
    return round(sum(lesion["volume_mm3"] for lesion in lesions), 3)


def _write_image(file: Path, volume: np.ndarray, affine: np.ndarray) -> None:
    image = nibabel.Nifti1Image(volume, affine)
    image.set_qform(affine, code="scanner")
    image.set_sform(affine, code="scanner")
    image.header.set_xyzt_units("mm", "sec")
    # gzip stores the time of writing unless told otherwise, and equal images would differ on disk.
    file.write_bytes(gzip.compress(image.to_bytes(), compresslevel=4, mtime=0))


def _read_subject(out: Path, name: str, scenario: Scenario) -> Subject:
    """A subject on disk, from the sidecars of their masks."""
    labels = _sessions(scenario)
    cases = tuple(_case(name, label) for label in labels)
    first, *later = (
        json.loads((_masks_of(out, name) / label / "anat" / f"{case}_label-lesion_mask.json").read_text())
        for label, case in zip(labels, cases, strict=True)
    )
    new = sum(sidecar["NewLesionCount"] for sidecar in later)
    return Subject(name, first["Seed"], first["LesionCount"], first["LesionLoad_mm3"], new, cases, out / name)


def _write_participants(out: Path, subjects: Sequence[Subject], scenario: Scenario) -> None:
    columns = ["participant_id", "seed", "lesion_count", "lesion_load_mm3"]
    columns += ["new_lesion_count"] if scenario.sessions > 1 else []
    rows = ["\t".join(columns)]
    rows += ["\t".join(str(getattr(subject, column)) for column in columns) for subject in subjects]
    files.write_text(out / "participants.tsv", "\n".join(rows) + "\n")


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"
