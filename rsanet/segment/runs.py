"""The folder of a training run: its files, and how they are written so that a kill at any moment spoils none."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

from rsanet.segment.files import check_writable, remove_stale, write_csv, write_text, written_beside
from rsanet.segment.recipe import OF_THE_MACHINE, Recipe, recipe_of

MODEL_NAME = "model.safetensors"


class Run:
    """A run folder.

    Attributes:
        model: the best weights on the held-out cases, or their average, which predict takes; the last where none are
            held out.
        last: the weights of the last validated step, as the optimizer left them.
        average: their moving average.
        config: the recipe, the cases and the versions, as YAML; and, at the end, remarks on a run that came to nothing.
        log: a row per validation.
        curve: a picture of the log.
        checkpoint: what ``resume`` needs.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.model = self.folder / MODEL_NAME
        self.last = self.folder / "last.safetensors"
        self.average = self.folder / "ema.safetensors"
        self.config = self.folder / "config.yaml"
        self.log = self.folder / "log.csv"
        self.curve = self.folder / "curve.png"
        self.checkpoint = self.folder / "checkpoint.pt"

    def check_free(self) -> None:
        """Refuses a folder that holds a run."""
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file: give the name of a folder.")
        for path in (self.model, self.config):
            if path.exists():
                onwards = ", or --resume to go on" if self.config.is_file() else ""
                raise ValueError(f"{self.folder} already holds {path.name}: give another folder to -o{onwards}.")

    def begin(self, content: Mapping[str, Any]) -> None:
        """Creates the folder with its configuration; tuples become lists."""
        self.folder.mkdir(parents=True, exist_ok=True)
        check_writable(self.config)
        plain = json.loads(json.dumps(content))
        write_text(self.config, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))

    def begun(self) -> dict[str, Any]:
        """What ``begin`` wrote."""
        if not self.config.is_file():
            raise FileNotFoundError(f"{self.config} does not exist: there is no run to resume in {self.folder}.")
        remove_stale(self.folder)
        content = read_yaml(self.config)
        if "recipe" not in content:
            raise ValueError(f"{self.config} is not the configuration of a run: begin another one.")
        # Edited by hand, it would fail deep in the network.
        return {**content, "patch": recipe_of({"patch": content.get("patch")}, str(self.config)).patch}

    def note(self, remarks: Sequence[str]) -> None:
        """Replaces the remarks on how the run went, which stand in its configuration."""
        content = read_yaml(self.config)
        if list(remarks) != content.pop("remarks", []):
            kept = {**content, "remarks": list(remarks)} if remarks else content
            write_text(self.config, yaml.safe_dump(kept, sort_keys=False, allow_unicode=True))

    def remarks(self) -> list[str]:
        """The remarks on how the run went."""
        return read_yaml(self.config).get("remarks", []) if self.config.is_file() else []

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replaces the checkpoint."""
        with written_beside(self.checkpoint) as partial:
            try:
                torch.save(dict(state), partial)
            except RuntimeError as error:  # torch's word for a write that failed
                raise OSError(f"{self.checkpoint} cannot be written: make room on its disk, then --resume.") from error

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The checkpoint, or None where the run was ended before its first. It is data: no code in it is run."""
        if not self.checkpoint.is_file():
            return None
        try:
            return torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except (PermissionError, MemoryError):
            raise
        except Exception as error:  # the unpickler raises a dozen types for bytes that are none of its own
            raise ValueError(f"{self.checkpoint} is damaged, or no checkpoint: begin another run.") from error

    def write_log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replaces the log and its picture."""
        write_csv(self.log, rows)
        draw_curve(rows, self.curve)


class Settings(yaml.SafeLoader):
    """YAML as people write settings: ``1e-3`` is a number, and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As ``SafeLoader``, which would take the last of several."""
        keys = [key.value for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"{twice} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


SCIENTIFIC = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
Settings.add_implicit_resolver("tag:yaml.org,2002:float", SCIENTIFIC, list("-+0123456789"))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Settings)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not YAML ({reason}): give a config.yaml of a run, or one like it.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no settings: give a config.yaml of a run, or one like it.")
    return content


def read_recipe(path: Path) -> Recipe:
    """The recipe of a run's ``config.yaml``, or of a file with the settings alone."""
    content = read_yaml(path)
    values = content.get("recipe", content)
    if not isinstance(values, dict):
        raise ValueError(f"{path} has a recipe that is no list of settings: give a config.yaml of a run.")
    return recipe_of(values, str(path))


def resumed_recipe(run: Run, recipe: Recipe | None) -> Recipe:
    """The recipe that a run was begun with, on the machine of another recipe.

    Raises:
        ValueError: the other recipe would give other weights.
    """
    begun = read_recipe(run.config)
    if recipe is None:
        return begun
    goes_on = replace(begun, **{name: getattr(recipe, name) for name in OF_THE_MACHINE})
    for name, value in asdict(goes_on).items():
        if getattr(recipe, name) != value:
            raise ValueError(
                f"--{name.replace('_', '-')} is {getattr(recipe, name)}, but {run.folder} was begun with {value}: "
                "leave it out to resume, or begin another run."
            )
    return goes_on


def draw_curve(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws loss and held-out Dice over the steps, the best one marked."""
    from matplotlib.figure import Figure

    steps = [row["step"] for row in rows]
    lines = {"dice": "weights", "dice_ema": "their average"}
    scores = {words: [row[name] for row in rows] for name, words in lines.items() if rows[0].get(name, "") != ""}
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    loss, dice = figure.subplots(2, 1, sharex=True) if scores else (figure.subplots(), None)
    loss.plot(steps, [row["loss"] for row in rows], color="#0072B2", marker=".")
    loss.set_ylabel("training loss")
    if dice is not None:
        for words, colour in zip(scores, ("#D55E00", "#009E73"), strict=False):
            dice.plot(steps, scores[words], color=colour, marker=".", label=words)
        # Of several the first, whose weights are kept.
        points = [point for values in scores.values() for point in zip(values, steps, strict=True)]
        top, step = max(points, key=lambda point: (point[0], -point[1]))
        dice.plot(step, top, color="black", marker="o", fillstyle="none", markersize=10)
        label = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
        place = {
            "xytext": (0, -18 if top > 0.2 else 12),
            "textcoords": "offset points",
            "ha": "right" if step == steps[-1] else "center",
        }
        dice.annotate(f"best {top:.3f}", (step, top), bbox=label, **place)
        dice.set_ylabel("held-out Dice")
        dice.set_ylim(0, 1)
        if len(scores) > 1:
            dice.legend(frameon=False)
    (dice or loss).set_xlabel("step")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    with written_beside(path) as partial:
        figure.savefig(partial, dpi=120)


class TensorBoard:
    """Writes the log for TensorBoard where it is installed, and nothing elsewhere."""

    def __init__(self, folder: Path) -> None:
        self.writer = None
        if find_spec("tensorboard"):
            self.writer = import_module("torch.utils.tensorboard").SummaryWriter(folder / "tensorboard")

    def add(self, row: Mapping[str, Any]) -> None:
        """The numbers of a row of the log."""
        if self.writer:
            for name in ("loss", "dice", "dice_ema", "lr"):
                if row.get(name, "") != "":
                    self.writer.add_scalar(name, float(row[name]), row["step"])
            self.writer.flush()
