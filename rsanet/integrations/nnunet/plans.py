"""nnU-Net's plans with RSA blocks in their networks. Plans are JSON: neither nnunetv2 nor torch is needed here."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsanet.segment.files import check_new, written_beside

NETWORK = "rsanet.integrations.nnunet.network.unet_with_rsa"
STAGES = (-2, -1)  # with 1/32 of the resolution alone, five slices would have little to attend to
SCALE = 1.0
SUFFIX = "RSA"  # of the plans' name
ROOT = "nnUNet_preprocessed"  # nnU-Net's variable


@dataclass(frozen=True)
class Attended:
    """An encoder stage with an RSA block.

    Attributes:
        stage: its number, counted from 0.
        stages: how many stages the encoder has.
        channels: of its features.
        size: of its features in voxels, in nnU-Net's order of axes.
    """

    stage: int
    stages: int
    channels: int
    size: tuple[int, ...]


@dataclass(frozen=True)
class WrittenPlans:
    """What ``write_plans`` wrote.

    Attributes:
        path: the file.
        attended: the stages with a block of each configuration that has a network of its own.
        left_out: the configurations that are two-dimensional.
    """

    path: Path
    attended: dict[str, list[Attended]]
    left_out: list[str]


def choose_stages(stages: Sequence[int], count: int) -> list[int]:
    """Encoder stages as numbers from 0, ascending.

    Args:
        stages: numbers from 0, full resolution, or from -1, the bottleneck, upwards.
        count: how many stages the encoder has.

    Raises:
        ValueError: If there is none, or one that the encoder does not have, or one twice.
    """
    given = " ".join(map(str, stages))
    if not stages:
        raise ValueError("no stage is named: give at least one, such as -1 for the bottleneck.")
    if outside := [stage for stage in stages if not -count <= stage < count]:
        raise ValueError(
            f"there is no stage {outside[0]} in an encoder with {count}: give numbers from 0, the full resolution, to "
            f"{count - 1}, or from -1, the bottleneck, to -{count}."
        )
    chosen = sorted({stage % count for stage in stages})
    if len(chosen) < len(stages):
        raise ValueError(f"the stages {given} name one twice in an encoder with {count}: give each once.")
    return chosen


def check_3d(architecture: Mapping[str, Any]) -> None:
    """Refuses an architecture that is not of volumes."""
    if not str(architecture["arch_kwargs"].get("conv_op")).endswith("3d"):
        raise ValueError(
            "this configuration is not three-dimensional, and RSA attends along three axes: train 3d_fullres or "
            "3d_lowres."
        )


def with_rsa(architecture: Mapping[str, Any], stages: Sequence[int] = STAGES, scale: float = SCALE) -> dict[str, Any]:
    """An ``architecture`` of plans with RSA blocks.

    Args:
        architecture: of a configuration of nnU-Net's plans; left as it is.
        stages: encoder stages that get a block; see ``choose_stages``.
        scale: factor on the attention's logits.

    Returns:
        The architecture, in JSON types.

    Raises:
        ValueError: If it is two-dimensional, no U-Net or has RSA blocks already, or if a number is impossible.
    """
    if architecture["network_class_name"] == NETWORK:
        raise ValueError("these plans have RSA blocks already: give those they were made from.")
    arguments = architecture["arch_kwargs"]
    count = arguments.get("n_stages")
    if not isinstance(count, int):
        raise ValueError(
            f"{architecture['network_class_name']} has no stages that a block could follow: give plans of nnU-Net's "
            "U-Nets, plain or residual."
        )
    check_3d(architecture)
    if not math.isfinite(scale):
        raise ValueError(f"--scale is {scale}: give a finite number.")
    options = {
        "rsa_network": architecture["network_class_name"],
        "rsa_stages": choose_stages(stages, count),
        "rsa_scale": float(scale),
    }
    return {**architecture, "network_class_name": NETWORK, "arch_kwargs": {**arguments, **options}}


def seen_by_blocks(architecture: Mapping[str, Any], patch_size: Sequence[int]) -> list[Attended]:
    """What the blocks of an architecture see of a patch.

    Args:
        architecture: one with RSA blocks.
        patch_size: voxels of a patch along each axis.
    """
    arguments = architecture["arch_kwargs"]
    sizes = [tuple(patch_size)]
    for strides in arguments["strides"]:
        sizes.append(tuple(math.ceil(size / stride) for size, stride in zip(sizes[-1], strides, strict=True)))
    return [
        Attended(stage, arguments["n_stages"], arguments["features_per_stage"][stage], sizes[stage + 1])
        for stage in arguments["rsa_stages"]
    ]


def write_plans(
    dataset: str,
    plans: str = "nnUNetPlans",
    stages: Sequence[int] = STAGES,
    scale: float = SCALE,
    *,
    overwrite: bool = False,
) -> WrittenPlans:
    """Writes plans with RSA blocks beside the plans of a data set: ``nnUNetPlansRSA.json`` for ``nnUNetPlans.json``.

    The preprocessed data stay those of the original plans; nothing is preprocessed twice.

    Args:
        dataset: id, name or folder of a data set that nnU-Net has planned.
        plans: name of its plans.
        stages: encoder stages that get a block; see ``choose_stages``.
        scale: factor on the attention's logits.
        overwrite: whether a file that exists is replaced.

    Returns:
        The file and what is in it.

    Raises:
        ValueError: If the plans cannot have RSA blocks, an argument is impossible, or the file exists.
        OSError: If there is no such data set, or no such plans, or the file cannot be written.
    """
    plans = plans.removesuffix(".json")
    source = _find_plans(dataset, plans)
    content = _read_plans(source)
    target = source.with_name(f"{plans}{SUFFIX}.json")
    check_new(target, overwrite=overwrite)

    kept: dict[str, Any] = {}
    attended: dict[str, list[Attended]] = {}
    for name, configuration in content["configurations"].items():
        whole = _inherit(content["configurations"], name, source)
        if len(whole["patch_size"]) != 3:
            continue
        kept[name] = dict(configuration)
        if "architecture" in configuration:
            kept[name]["architecture"] = with_rsa(configuration["architecture"], stages, scale)
            attended[name] = seen_by_blocks(kept[name]["architecture"], whole["patch_size"])
    if not attended:
        names = ", ".join(content["configurations"])
        raise ValueError(
            f"{source} has no three-dimensional configuration ({names}), and RSA attends along three axes: plan the "
            "data set for 3d_fullres."
        )
    result = {**content, "plans_name": plans + SUFFIX, "configurations": kept}
    with written_beside(target) as partial:
        partial.write_text(json.dumps(result, indent=4), encoding="utf-8")
    return WrittenPlans(target, attended, [name for name in content["configurations"] if name not in kept])


def _find_plans(dataset: str, plans: str) -> Path:
    """The file of the plans of a data set, given by id, name or folder."""
    folder = Path(dataset)
    if not folder.is_dir():
        folder = _find_dataset(dataset)
    elif not list(folder.glob("*Plans*.json")):  # that of the raw data, perhaps
        folder = _find_dataset(folder.resolve().name)
    path = folder / f"{plans}.json"
    if not path.is_file():
        others = sorted(file.stem for file in folder.glob("*.json") if "plans" in file.stem.lower())
        remedy = f"give --plans, of {', '.join(others)}" if others else "run nnUNetv2_plan_and_preprocess first"
        raise FileNotFoundError(f"{folder} has no {path.name}: {remedy}.")
    return path


def _find_dataset(dataset: str) -> Path:
    """The folder of preprocessed data of a data set, given by id or name."""
    if not (root := os.environ.get(ROOT)):
        raise FileNotFoundError(f"{ROOT} is not set: export it as for nnU-Net, or give the folder of the plans.")
    known = sorted(path for path in Path(root).glob("Dataset*") if path.is_dir())
    prefix = f"Dataset{int(dataset):03d}_" if dataset.isdecimal() else None
    found = [path for path in known if path.name == dataset or (prefix and path.name.startswith(prefix))]
    if not found:
        names = ", ".join(path.name for path in known) or "none"
        raise FileNotFoundError(
            f"there is no data set {dataset} in {root} (there is {names}): give its id or name, or run "
            "nnUNetv2_plan_and_preprocess first."
        )
    if len(found) > 1:
        raise ValueError(f"{dataset} is the id of {' and '.join(path.name for path in found)}: give the name.")
    return found[0]


def _read_plans(path: Path) -> dict[str, Any]:
    """Plans of nnU-Net."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: run nnUNetv2_plan_experiment again.") from error
    if not isinstance(content, dict) or not isinstance(content.get("configurations"), dict):
        raise ValueError(f"{path} has no configurations: give plans that nnU-Net wrote.")
    return content


def _inherit(configurations: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    """A configuration with what it inherits."""
    chain: list[str] = []
    whole: dict[str, Any] = {}
    while name is not None:
        if name in chain or not isinstance(configurations.get(name), dict):
            whose = (chain or [name])[0]
            raise ValueError(f"{path} has no complete configuration {whose}: run nnUNetv2_plan_experiment again.")
        chain.append(name)
        whole = {**configurations[name], **whole}
        name = configurations[name].get("inherits_from")
    architecture = whole.get("architecture")
    told = isinstance(architecture, dict) and architecture.keys() >= {"network_class_name", "arch_kwargs"}
    if not told or not isinstance(whole.get("patch_size"), list):
        raise ValueError(
            f"{path} does not say which network {chain[0]} has, as plans of nnU-Net 2.5 and later do: run "
            "nnUNetv2_plan_experiment again."
        )
    return whole
