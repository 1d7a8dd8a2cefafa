"""A MONAI bundle of a model: what `python -m monai.bundle` runs, verifies and hands on."""

import json
import os
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rsanet.integrations.description import CLASSES, Described, describe
from rsanet.segment.data import ORIENTATION
from rsanet.segment.files import check_writable, folder_beside

METADATA, INFERENCE = "configs/metadata.json", "configs/inference.json"
SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
# What a run needs beside MONAI, with the least version where it is not installed here.
PACKAGES = {"nibabel": "5.2", "pytorch-ignite": "0.5.0", "scipy": "1.12"}

LOGGING = """\
[loggers]
keys=root

[handlers]
keys=console

[formatters]
keys=line

[logger_root]
level=INFO
handlers=console

[handler_console]
class=StreamHandler
level=INFO
formatter=line
args=(sys.stdout,)

[formatter_line]
format=%(asctime)s %(levelname)s %(name)s: %(message)s
"""

README = """\
# Lesion segmentation with recurrent slice-wise attention

Research use only: no medical device. Nothing here says how well the model does; evaluate it on data of your own.

A bundle of `{model}`, written by rsanet {version}; SHA-256 of that file:
`{model_sha256}`.

It takes {contrasts}, in this order, as NIfTI, prepared as the training images were, and gives a mask on the grid of the
first. The window is {window} voxels along z, y, x; slice-wise attention is global over its window, so results depend on
it.

It needs `pip install "rsanet[export]"`, whose transforms and network it names. In this folder:

```sh
python -m monai.bundle run --config_file configs/inference.json --dataset_dir DATA --output_dir masks
```

`DATA` is a data set in any layout that `rsanet predict --data` takes. One subject alone:

```sh
python -m monai.bundle run --config_file configs/inference.json --output_dir masks \\
    --datalist "[{{'case': 'sub-01', 'image': [{files}]}}]"
```

From another folder, add `--bundle_root` with the path of this one. Masks are named `CASE_label-lesion_mask.nii.gz`.
On a CPU they are those of `rsanet predict`, voxel by voxel. `threshold`, `min_lesion_mm3`, `precision` and `roi_size`
can be overridden like any other entry of the configuration. A configuration is code: run only bundles that you trust.
"""

LICENSE = """\
The configuration and the texts of this bundle were written by rsanet, under the Apache License 2.0:
https://www.apache.org/licenses/LICENSE-2.0

The weights in models/ belong to whoever trained them; rsanet grants no licence for them. State yours here before you
hand this bundle on.
"""


def export_bundle(model: str | Path, out: str | Path, *, overwrite: bool = False) -> Path:
    """Writes a MONAI bundle, which appears whole or not at all.

    Args:
        model: a run folder or a ``.safetensors`` file.
        out: the folder to make.
        overwrite: whether the files of a bundle that is there are replaced; others in its folder stay.

    Returns:
        The folder.

    Raises:
        ValueError: the model or the folder cannot serve.
        OSError: the model cannot be read or the folder written.
    """
    out = Path(out)
    check_folder(out, overwrite=overwrite)
    described = describe(model)
    texts = {
        "LICENSE": LICENSE,
        "docs/README.md": readme(described),
        "configs/logging.conf": LOGGING,
        INFERENCE: json.dumps(inference(described), indent=4) + "\n",
        METADATA: json.dumps(bundle_metadata(described), indent=4) + "\n",
    }
    with folder_beside(out) as temporary:
        partial = temporary / out.name  # a folder of the usual permissions, which the temporary one has not
        for name, text in texts.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_text(text, encoding="utf-8")
        (partial / "models").mkdir()
        torch.save(described.network.state_dict(), partial / "models" / "model.pt")
        if not out.exists():
            os.replace(partial, out)
            return out
        for name in ("models/model.pt", *texts):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(partial / name, out / name)
    return out


def check_folder(out: Path, *, overwrite: bool) -> None:
    """Refuses a folder that cannot be made, or that holds something else than a bundle to replace."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give the name of a folder for the bundle.")
    if out.is_dir() and any(out.iterdir()):
        if not (out / METADATA).is_file():
            raise ValueError(f"{out} holds something else than a bundle: give the name of a folder to make.")
        if not overwrite:
            raise ValueError(f"{out} holds a bundle: give another folder, or --overwrite to replace it.")
    check_writable(out.absolute() / "LICENSE" if out.is_dir() else out.absolute())


def readme(described: Described) -> str:
    """The text for people."""
    words = described.words
    return README.format(
        model=words["model"],
        model_sha256=words["model_sha256"],
        version=words["versions"]["rsanet"],
        contrasts=" ".join(described.contrasts),
        window=" × ".join(map(str, described.window)),
        files=", ".join(f"'{name}.nii.gz'" for name in described.contrasts),
    )


def bundle_metadata(described: Described) -> dict[str, Any]:
    """The metadata that MONAI's schema asks for; under ``rsanet`` what `describe` says."""

    def version(name: str, least: str = "") -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return least

    def tensor(kind: str, channels: dict[str, str], **more: Any) -> dict[str, Any]:
        return {
            "type": "image",
            "format": kind,
            "num_channels": len(channels),
            "spatial_shape": list(described.window),
            "dtype": "float32",
            "value_range": [],
            "is_patch_data": True,
            "channel_def": channels,
            **more,
        }

    contrasts, classes = ({str(i): name for i, name in enumerate(names)} for names in (described.contrasts, CLASSES))
    return {
        "schema": SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": "as written by rsanet export-bundle"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {
            "rsanet": described.words["versions"]["rsanet"],
            **{name: version(name, least) for name, least in PACKAGES.items()},
        },
        "name": "Lesion segmentation with recurrent slice-wise attention",
        "task": "Segmentation of multiple-sclerosis lesions in brain MRI",
        "description": "A 3-D U-Net with recurrent slice-wise attention (RSANet) and the steps around it.",
        "authors": "State who trained the model",
        "copyright": "State the copyright of the weights",
        "data_type": "nibabel",
        "image_classes": f"{', '.join(described.contrasts)}: {described.words['intensities']}",
        "pred_classes": "channel 0 background, channel 1 lesion, as logits",
        "intended_use": "Research only: no medical device",
        "references": [
            'Zhang et al., "RSANet: Recurrent Slice-wise Attention Network for Multiple Sclerosis Lesion '
            'Segmentation", MICCAI 2019, https://arxiv.org/abs/2002.12470'
        ],
        "network_data_format": {
            "inputs": {"image": tensor("magnitude", contrasts, modality="MR")},
            "outputs": {"pred": tensor("labels", classes)},
        },
        "rsanet": described.words,
    }


def inference(described: Described) -> dict[str, Any]:
    """The configuration that applies the model as `rsanet predict` does, under the names that MONAI's tools know."""
    ours = "rsanet.integrations.monai"
    both = ["image", "tissue"]
    orient = {"_target_": "Orientationd", "keys": both, "axcodes": ORIENTATION, "labels": None}
    modes = ["bilinear", "nearest"]
    respace = {"_target_": "Spacingd", "keys": both, "pixdim": described.spacing, "mode": modes}
    crop = {"_target_": "CropForegroundd", "keys": both, "source_key": "tissue", "allow_smaller": True}
    return {
        "bundle_root": ".",
        "dataset_dir": "data",
        "output_dir": "$@bundle_root + '/eval'",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "contrasts": list(described.contrasts),
        "roi_size": list(described.window),
        "precision": "auto",
        "threshold": 0.5,
        "min_lesion_mm3": 0.0,
        "datalist": {"_target_": f"{ours}.list_images", "data": "@dataset_dir", "contrasts": "@contrasts"},
        "network_def": {"_target_": "rsanet.RSANet", **described.network.config},
        "network": "$@network_def.to(@device, memory_format=torch.channels_last_3d)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": f"{ours}.LoadContrasts", "contrasts": "@contrasts"},
                orient,
                *([respace] if described.spacing else []),
                crop,
                {"_target_": "rsanet.segment.data.NormalizeForeground", "tissue": "tissue"},
            ],
        },
        "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        "inferer": {"_target_": f"{ours}.LesionInferer", "roi_size": "@roi_size", "precision": "@precision"},
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {
                    "_target_": "Invertd",
                    "keys": "pred",
                    "transform": "@preprocessing",
                    "orig_keys": "image",
                    "nearest_interp": False,
                },
                {"_target_": f"{ours}.LesionMask", "threshold": "@threshold", "min_lesion_mm3": "@min_lesion_mm3"},
                {
                    "_target_": "SaveImaged",
                    "keys": "pred",
                    "output_dir": "@output_dir",
                    "output_postfix": "label-lesion_mask",
                    "output_dtype": "$numpy.uint8",
                    "resample": False,
                    "separate_folder": False,
                },
            ],
        },
        "handlers": [
            {
                "_target_": "CheckpointLoader",
                "load_path": "$@bundle_root + '/models/model.pt'",
                "load_dict": {"model": "@network"},
            },
            {"_target_": "StatsHandler", "iteration_log": False},
        ],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
        },
        "run": ["$@evaluator.run()"],
    }
