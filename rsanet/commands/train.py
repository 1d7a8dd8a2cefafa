"""`rsanet train`."""

import inspect
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

import typer

from rsanet.commands.common import DEFAULTS, DEVICES, Stopped, completed
from rsanet.segment.recipe import CHOICES, Recipe, settings

OFFERED = {**CHOICES, "device": DEVICES}


def train(
    ctx: typer.Context,
    data: Annotated[
        Path,
        typer.Argument(
            help="The cohort with lesion masks: a BIDS or nnU-Net folder, a folder per subject, a CSV or a JSON list."
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Run folder to create.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in this folder.")] = False,
    config: Annotated[
        Path | None, typer.Option(help="Settings from the config.yaml of a run; options given here come before it.")
    ] = None,
    **options: Any,
) -> None:
    """Train a network. The run folder gets its weights, settings, log, curve and checkpoint."""
    if resume and config:
        raise typer.BadParameter("a run that is resumed has its settings: leave --config out.", param_hint="--config")
    given = {name: value for name, value in options.items() if ctx.get_parameter_source(name).name == "COMMANDLINE"}
    if not (resume or config):  # settings from a file may belong to these
        Recipe(**given)  # a bad option is named before anything heavy is imported
    from rsanet.segment.runs import Run, read_recipe
    from rsanet.segment.training import leads, train

    run = Run(out)
    base = read_recipe(config) if config else DEFAULTS
    if resume and run.config.is_file():
        base = read_recipe(run.config)
    try:
        model = train(data, out, replace(base, **given), resume=resume)
    except Stopped as stopped:
        if run.checkpoint.is_file():
            stopped.left = f" The run is kept in {run.checkpoint}: give --resume to go on."
        elif run.config.is_file():
            stopped.left = f" {out} has no checkpoint yet: --resume begins it again."
        else:
            stopped.left = " No step was done yet, and nothing is left."
        raise
    if leads():
        doubtful = f", but it may be of no use: the remarks in {run.config} say why" if run.remarks() else ""
        typer.echo(f"The model is {model}{doubtful}.")


def _option(name: str, annotation: Any) -> inspect.Parameter:
    """A setting of the recipe as an option; several values are a list on a command line."""
    kind, words = get_args(annotation)
    kinds = get_args(kind) if NoneType in get_args(kind) else (kind,)
    listed = tuple(list[get_args(each)[0]] if get_origin(each) is tuple else each for each in kinds)  # type: ignore[misc]
    kind = listed[0] if len(listed) == 1 else listed[0] | None
    default = getattr(DEFAULTS, name)
    default = list(default) if isinstance(default, tuple) else default
    choices = OFFERED.get(name)
    option = typer.Option(help=words, autocompletion=completed(choices) if choices else None)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _with_settings() -> inspect.Signature:
    """The signature that the command line shows: one option for each setting of a `Recipe`."""
    own = [entry for entry in inspect.signature(train).parameters.values() if entry.name != "options"]
    return inspect.Signature([*own, *(_option(name, annotation) for name, annotation in settings().items())])


train.__signature__ = _with_settings()
