"""What stands beside predicted masks: how each came about, and what their folder is, in the words of BIDS."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nibabel.affines import voxel_sizes
from nibabel.spatialimages import SpatialImage

from rsanet.segment.environment import package_versions
from rsanet.segment.files import write_text

if TYPE_CHECKING:
    from rsanet.segment.ensemble import Ensemble, Prepared
    from rsanet.segment.prediction import Options, Prediction

DESCRIPTION = "dataset_description.json"
BIDS_VERSION = "1.10.0"
NAMED = ("python", "torch", "monai", "nibabel", "rsanet")  # the versions that decide a mask


def write_sidecar(path: Path, found: "Prediction", ensemble: "Ensemble", ready: "Prepared", options: "Options") -> None:
    """Writes how a mask came about: from which images, by which models, with what options.

    Args:
        path: the file.
        found: what was predicted.
        ensemble: the models.
        ready: the case, as it was read.
        options: what was made of the probability.
    """
    first, versions = ensemble.members[0], package_versions()
    sources = [
        str(file)
        for image in ready.case.images.values()
        if (file := image.get_filename() if isinstance(image, SpatialImage) else image)
    ]
    content = {
        "Type": "Lesion",
        "Sources": sources,
        "SpatialReference": sources[0] if sources else None,
        "GeneratedBy": [{"Name": "rsanet", "Version": versions["rsanet"]}],
        "Models": [{"Path": member.name, "SHA256": member.sha256 or None} for member in ensemble.members],
        "Contrasts": list(ensemble.contrasts),
        "Threshold": options.threshold,
        "MinimumLesionVolume": options.min_lesion_mm3,
        "Backend": found.backend,
        "Device": str(first.device),
        "Precision": first.precision.name,
        "Window": [list(window.size) for window in found.windows],
        "MirrorImages": first.flips,
        "VoxelSize": [round(float(size), 6) for size in voxel_sizes(found.affine)],
        "Lesions": found.lesions,
        "LesionLoad": round(found.load_mm3, 3),
        "Seconds": round(found.seconds, 2),
        "Warnings": list(found.warnings),
        "Versions": {name: versions[name] for name in NAMED},
    }
    if options.register:
        files = options.files(found.path, ensemble.contrasts)
        content["Transforms"] = {name: files[f"transform of {name}"].name for name in found.transforms}
    write_json(path, content)


def describe_derivatives(folder: Path, data: Path) -> None:
    """Writes what a folder of masks of a BIDS data set is: derivatives, with a description of their own.

    Args:
        folder: of the masks.
        data: the data set that they were predicted from.
    """
    version = package_versions()["rsanet"]
    content = {
        "Name": f"Lesion masks of {data.resolve().name}",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "rsanet", "Version": version, "Description": "rsanet predict; research use only"}],
    }
    write_json(folder / DESCRIPTION, content)


def is_predicted(folder: Path) -> bool:
    """Whether a folder holds masks of `rsanet predict`, by its description."""
    return is_ours(folder / DESCRIPTION)


def is_ours(path: Path) -> bool:
    """Whether a JSON file says that `rsanet predict` made what it describes."""
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        return "rsanet" in [entry["Name"] for entry in description["GeneratedBy"]]
    except (OSError, ValueError, LookupError, TypeError):
        return False  # no description, or one that names no maker


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a mapping as JSON that people can read."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            total.update(part)
    return total.hexdigest()
