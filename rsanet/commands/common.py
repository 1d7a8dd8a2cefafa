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
        """Repeats the option's name before each further value, which is how the parser wants it.

        Where the last value of an option is the argument that is missing, as in ``-i FLAIR.nii.gz T1.nii.gz RUN``, it
        is taken as that; where it may be, the message says what to do.
        """
        args = self._with_argument(args)
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

    def _with_argument(self, args: list[str]) -> list[str]:
        wanted = [param for param in self.params if param.param_type_name == "argument" and param.required]
        options = {name: param for param in self.params for name in (*param.opts, *param.secondary_opts)}
        given, groups, option = 0, [], None  # groups: an option of several values, and the places of these
        for place, arg in enumerate(args):
            if arg == "--help" or arg == "-h":
                return args
            if arg.startswith("-") and not re.fullmatch(r"-\d+", arg):
                option = options.get(arg)
                if option is not None and getattr(option, "multiple", False):
                    groups.append((arg, option, []))
                elif option is None or getattr(option, "is_flag", False):
                    option = None
            elif option is None:
                given += 1
            elif getattr(option, "multiple", False):
                groups[-1][2].append(place)
            else:
                option = None  # which had this one value
        long = [(name, option, places) for name, option, places in groups if len(places) > 1]
        if given >= len(wanted) or not long:
            return args
        missing = wanted[given].name.upper()
        meant = [places[-1] for _, _, places in long if _is_argument(*(Path(args[place]) for place in places))]
        if len(wanted) - given == 1 and len(meant) == 1:
            return [args[meant[0]], *args[: meant[0]], *args[meant[0] + 1 :]]
        name, _, places = long[-1]
        raise typer.BadParameter(
            f"{name} took all that follows it ({' '.join(args[place] for place in places)}): put {missing} in front, "
            f"as in {self.name} {missing} {name} ..."
        )


def _is_argument(*values: Path) -> bool:
    """Whether the last value of an option is meant apart: a model, or something that exists after mere words."""
    *others, last = values
    if last.suffix == ".safetensors" or (last / "model.safetensors").is_file():
        return True
    return last.exists() and not any(value.exists() for value in others)
