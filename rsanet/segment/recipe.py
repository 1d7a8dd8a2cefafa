"""What a training run can be told. Imports at once, so that the command line knows the settings and their defaults."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, get_args, get_origin, get_type_hints

PRECISIONS = ("auto", "fp32", "bf16")
ATTENTIONS = ("rsa", "non_local", "none")
LOSSES = ("dice_ce", "dice_focal", "tversky")
LAYOUTS = (
    *("auto", "bids", "nnunet", "folders", "flat", "list"),  # of any data set
    *("isbi2015", "mslesseg", "msseg2016", "wmh2017", "shifts"),  # of the public ones
)
LAYOUT_HELP = f"How the data set lies on disk: {', '.join(LAYOUTS)}; auto finds out which of the first it is."
RATERS_HELP = (
    "Where several raters drew masks: the name of one of them (mask1, Consensus), or majority, union or intersection."
)
OPTIMIZERS = {"adamw": 1e-3, "sgd": 1e-2}  # with the peak learning rate where none is given
CHOICES = {
    "layout": LAYOUTS,
    "attention": ATTENTIONS,
    "loss": LOSSES,
    "optimizer": tuple(OPTIMIZERS),
    "precision": PRECISIONS,
}
GROUPS = 8  # of the network's group norm, which have as many channels each
SMALLEST_VOXEL, LARGEST_VOXEL = 0.05, 20  # mm; finer is a slip of the header, and no lesion survives coarser

# Settings of the machine, not of the result: a run may go on elsewhere.
OF_THE_MACHINE = ("device", "devices", "nodes", "workers", "compile")


@dataclass(frozen=True)
class Recipe:
    """Settings of a training run; each annotation says what it is, and is the help of its option.

    The widths are those of the published network.
    """

    contrasts: Annotated[
        tuple[str, ...] | None, "Contrasts in channel order, e.g. FLAIR T1w; by default all that there are."
    ] = None
    layout: Annotated[str, LAYOUT_HELP] = "auto"
    raters: Annotated[str | None, RATERS_HELP] = None
    steps: Annotated[int, "Optimizer steps."] = 2000
    patch: Annotated[
        tuple[int, ...] | None,
        "Voxels of a patch, and of the window at prediction, one number or three along z, y, x; by default what the "
        "volumes and the memory suggest.",
    ] = None
    batch: Annotated[int, "Patches per step, of all devices together."] = 2
    loss: Annotated[str, f"{', '.join(LOSSES)}."] = "dice_ce"
    optimizer: Annotated[str, f"{', '.join(OPTIMIZERS)}."] = "adamw"
    lr: Annotated[
        float | None,
        "Peak learning rate, reached after a warm-up; by default "
        + ", ".join(f"{rate:g} for {name}" for name, rate in OPTIMIZERS.items())
        + ".",
    ] = None
    channels: Annotated[tuple[int, ...], "Widths of the levels, the finest first; multiples of 8."] = (
        32,
        64,
        128,
        256,
        512,
    )
    attention: Annotated[str, f"{', '.join(ATTENTIONS)}: at the coarsest level."] = "rsa"
    attention_scale: Annotated[
        float,
        "Factor on the attention's logits. 1 is as published; the logits sum over a slice, so the softmax then picks "
        "single slices. About 1 / (channels × voxels of a slice) keeps it graded.",
    ] = 1.0
    dropout: Annotated[float, "Dropout probability of the network."] = 0.2
    spacing: Annotated[
        tuple[float, ...] | None,
        "Resample to this voxel size in mm, one number or three along z, y, x; by default the images' own, or the "
        "median of their sizes where these differ.",
    ] = None
    augment: Annotated[bool, "Flip, turn, bend, blur and shade the patches at random."] = True
    ema: Annotated[float, "Decay of the moving average of the weights, which is validated and kept; 0 for none."] = (
        0.999
    )
    val_fraction: Annotated[float, "Share of the subjects held out for validation; 0 for none."] = 0.2
    folds: Annotated[int | None, "Divide the subjects for cross-validation instead, and hold out one fold."] = None
    fold: Annotated[int | None, "Which fold to hold out, from 0."] = None
    split: Annotated[
        str | None, "JSON file with the cases to train on and those to validate on, as simulate and nnU-Net write it."
    ] = None
    validate_every: Annotated[int | None, "Steps between validations; a fifth of all, and 250 at most."] = None
    patience: Annotated[int | None, "Stop after so many validations without a better Dice."] = None
    seed: Annotated[int, "The same seed gives the same weights on a CPU."] = 0
    precision: Annotated[str, f"{', '.join(PRECISIONS)}. auto is bf16 where the hardware multiplies it, else fp32."] = (
        "auto"
    )
    compile: Annotated[bool, "Compile the network with torch.compile."] = False
    device: Annotated[str, "auto, cpu, cuda or cuda:1."] = "auto"
    devices: Annotated[int, "Processes on this machine, a GPU each, or CPU processes with --device cpu."] = 1
    nodes: Annotated[int, "Machines, each started with the same command."] = 1
    workers: Annotated[
        int | None, "Processes that prepare patches; by default one per core beside a GPU, up to 8, and none on a CPU."
    ] = None

    def __post_init__(self) -> None:
        """Refuses what cannot train, before any file is read."""
        for name, hint in settings().items():
            value = getattr(self, name)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, name, value)
            if not _fits(value, get_args(hint)[0]):
                raise ValueError(f"{_option(name)} is {value!r}, which is not {_wanted(get_args(hint)[0])}.")
        for name in ("patch", "spacing"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, triple(getattr(self, name), _option(name)))
        for names, smallest in (
            (("steps", "batch", "devices", "nodes", "validate_every", "patience"), 1),
            (("workers", "fold"), 0),
            (("folds",), 2),
        ):
            for name in names:
                if getattr(self, name) is not None and getattr(self, name) < smallest:
                    raise ValueError(f"{_option(name)} is {getattr(self, name)}: give {smallest} or more.")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{_option(name)} is {getattr(self, name)!r}: give one of {', '.join(choices)}.")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"--lr is {self.lr}: give a positive learning rate, for example 1e-3.")
        if not 0 < self.attention_scale < math.inf:
            raise ValueError(f"--attention-scale is {self.attention_scale}: give a positive factor, for example 1.")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"--val-fraction is {self.val_fraction}: give a share from 0 up to, not including, 1.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout is {self.dropout}: give a probability from 0 up to, not including, 1.")
        if not 0 <= self.ema < 1:
            raise ValueError(f"--ema is {self.ema}: give a decay from 0 up to, not including, 1, for example 0.999.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed is {self.seed}: give a whole number from 0 to {2**32 - 1}.")
        if len(self.channels) < 2 or min(self.channels) < 1:
            raise ValueError(f"--channels are {self.channels}: give one positive width per level, two or more.")
        if any(width % GROUPS for width in self.channels):
            widths = " ".join(map(str, self.channels))
            raise ValueError(f"--channels are {widths}: give multiples of {GROUPS}, for example 8 16 32.")
        if self.spacing is not None and not all(SMALLEST_VOXEL <= size <= LARGEST_VOXEL for size in self.spacing):
            raise ValueError(
                f"--spacing is {self.spacing}: give voxel sizes from {SMALLEST_VOXEL} to {LARGEST_VOXEL} mm."
            )
        if self.patch is not None and min(self.patch) < 1:
            raise ValueError(f"--patch is {self.patch}: give positive sizes in voxels.")
        if twice := sorted({name for name in self.contrasts or () if self.contrasts.count(name) > 1}):
            raise ValueError(f"--contrasts has {' and '.join(twice)} more than once: name each channel once.")
        if self.split is None and (self.folds is None) != (self.fold is None):
            raise ValueError("--folds and --fold belong together: give, for example, --folds 5 --fold 0.")
        if self.folds is not None and self.split is not None:
            raise ValueError("--folds and --split both divide the cases: give one of them.")
        if self.folds is not None and self.fold >= self.folds:
            raise ValueError(f"--fold is {self.fold}, but {self.folds} folds count from 0 to {self.folds - 1}.")
        if self.batch % (self.devices * self.nodes):
            raise ValueError(
                f"--batch is {self.batch}, which {self.devices * self.nodes} processes cannot share: give a multiple."
            )

    @property
    def peak_rate(self) -> float:
        """The chosen learning rate, or the optimizer's usual one."""
        return self.lr or OPTIMIZERS[self.optimizer]

    @property
    def steps_between_validations(self) -> int:
        """The chosen interval, or a fifth of the run, and no more than 250 steps."""
        return min(self.validate_every or min(-(-self.steps // 5), 250), self.steps)


def settings() -> dict[str, Any]:
    """The annotation of each setting of a `Recipe`: its type and its help."""
    hints = get_type_hints(Recipe, include_extras=True)
    return {entry.name: hints[entry.name] for entry in fields(Recipe)}


def recipe_of(values: Mapping[str, Any], source: str) -> Recipe:
    """A recipe from a mapping that someone wrote by hand.

    Args:
        values: settings by name.
        source: where they are from, for messages.

    Raises:
        ValueError: a setting that does not exist, or a value that it cannot have.
    """
    if unknown := [str(name) for name in values if name not in settings()]:
        raise ValueError(f"{source} has {', '.join(unknown)}, which no run can be told: see rsanet train --help.")
    try:
        return Recipe(**values)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def triple(values: Sequence[float], name: str) -> tuple:
    """Three values from one (repeated) or three."""
    if len(values) not in (1, 3):
        raise ValueError(f"{name} has {len(values)} values: give one for all the axes, or three.")
    return tuple(values) * (3 // len(values))


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated type; whole numbers are numbers, booleans are none."""
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(entry, get_args(kind)[0]) for entry in value)
    if kind is type(None):
        return value is None
    if isinstance(kind, type):
        kinds = (int, float) if kind is float else kind
        return isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))
    return any(_fits(value, choice) for choice in get_args(kind))  # a union


def _wanted(kind: Any) -> str:
    words = {int: "a whole number", float: "a number", str: "a word", bool: "true or false"}
    plural = {int: "whole numbers", float: "numbers", str: "words"}
    if get_origin(kind) is tuple:
        return f"a list of {plural[get_args(kind)[0]]}"
    if kind in words:
        return words[kind]
    return _wanted(get_args(kind)[0])
