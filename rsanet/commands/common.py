"""What the verbs share: how their options are read, and what a stopped one leaves."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from rsanet.segment.recipe import LAYOUT_HELP, LAYOUTS, PRECISIONS, RATERS_HELP, Recipe

DEFAULTS = Recipe()
DEVICES = ("auto", "cpu", "cuda")
PROTOCOLS = ("custom", "isbi2015", "msseg2016", "wmh2017", "shifts")


def completed(words: Sequence[str]) -> Callable[[str], list[str]]:
    """What the shell offers for an option of few words."""

    def offer(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return offer


Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.", autocompletion=completed(DEVICES))]
PrecisionName = Annotated[
    str,
    typer.Option(
        help=f"{', '.join(PRECISIONS)}. auto is bf16 where the hardware multiplies it, else fp32.",
        autocompletion=completed(PRECISIONS),
    ),
]
ProtocolName = Annotated[
    str,
    typer.Option(
        help=f"{', '.join(PROTOCOLS[:-1])} or {PROTOCOLS[-1]}: how lesions are counted.",
        autocompletion=completed(PROTOCOLS),
    ),
]
Model = Annotated[Path, typer.Argument(help="A run folder of `rsanet train`, or a .safetensors file.")]
Roi = Annotated[
    list[int] | None,
    typer.Option(
        help="Window of the network in voxels, one number or three along z, y, x; by default the training patch. "
        "Slice-wise attention is global over its window, so results depend on it."
    ),
]

Layout = Annotated[str, typer.Option(help=LAYOUT_HELP, autocompletion=completed(LAYOUTS))]
Raters = Annotated[str | None, typer.Option(help=RATERS_HELP)]


class Stopped(BaseException):
    """The user or the system ends the command: no error, so that nothing but `main` catches it.

    Args:
        signum: SIGINT or SIGTERM.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum
        self.left = ""  # what the command leaves on disk, in a sentence


class Command(TyperCommand):
    """A command whose repeatable options take several values at once: ``-i FLAIR.nii.gz T1.nii.gz``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeats the option's name before each further value, which is how the parser wants it."""
        repeatable = {name for param in self.params if getattr(param, "multiple", False) for name in param.opts}
        expanded: list[str] = []
        option = None
        for arg in args:
            if arg.startswith("-") and not re.fullmatch(r"-\d+", arg):  # -1 is a value
                option = arg if arg in repeatable else None
            elif option and expanded[-1] != option:
                expanded.append(option)
            expanded.append(arg)
        return super().parse_args(ctx, expanded)
