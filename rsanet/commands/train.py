"""`rsanet train`."""

import signal
from pathlib import Path
from typing import Annotated

import typer

from rsanet.commands.common import DEFAULTS, Device, PrecisionName, Stopped
from rsanet.segment.recipe import ATTENTIONS, Recipe, triple


def train(
    data: Annotated[Path, typer.Argument(help="Folder of a cohort with lesion masks.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Run folder to create.")],
    contrasts: Annotated[
        list[str] | None,
        typer.Option(help="Contrasts in channel order, e.g. FLAIR T1w; by default all there are."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = DEFAULTS.steps,
    patch: Annotated[
        list[int] | None, typer.Option(help="Patch in voxels, one number or three along z, y, x (64).")
    ] = None,
    batch: Annotated[int, typer.Option(help="Patches per step.")] = DEFAULTS.batch,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = DEFAULTS.lr,
    channels: Annotated[
        list[int] | None, typer.Option(help="Widths of the levels, the finest first (32 64 128 256 512).")
    ] = None,
    attention: Annotated[str, typer.Option(help=f"{', '.join(ATTENTIONS)}.")] = DEFAULTS.attention,
    attention_scale: Annotated[
        float, typer.Option(help="Factor on the attention's logits; 1 is as published, less is more graded.")
    ] = DEFAULTS.attention_scale,
    dropout: Annotated[float, typer.Option(help="Dropout probability.")] = DEFAULTS.dropout,
    spacing: Annotated[
        list[float] | None,
        typer.Option(help="Resample to this voxel size in mm, one number or three along z, y, x."),
    ] = None,
    val_fraction: Annotated[float, typer.Option(help="Share of the cases held out; 0 for none.")] = 0.2,
    validate_every: Annotated[int | None, typer.Option(help="Steps between validations (a fifth of all).")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same weights on a CPU.")] = DEFAULTS.seed,
    precision: PrecisionName = DEFAULTS.precision,
    device: Device = DEFAULTS.device,
    workers: Annotated[int, typer.Option(help="Processes that prepare patches.")] = DEFAULTS.workers,
) -> None:
    """Train a network; the run folder gets model.safetensors, config.json and log.csv."""
    recipe = Recipe(
        steps=steps,
        patch=triple(patch, "--patch") if patch else DEFAULTS.patch,
        batch=batch,
        lr=lr,
        channels=tuple(channels) if channels else DEFAULTS.channels,
        attention=attention,
        attention_scale=attention_scale,
        dropout=dropout,
        spacing=triple(spacing, "--spacing") if spacing else None,
        val_fraction=val_fraction,
        validate_every=validate_every,
        seed=seed,
        precision=precision,
        device=device,
        workers=workers,
    )
    from rsanet.segment.training import MODEL_NAME, train

    try:
        model = train(data, out, recipe, contrasts)
    except (Stopped, SystemExit) as end:
        stopped = end if isinstance(end, Stopped) else Stopped(signal.SIGTERM)  # Lightning was first
        kept = out / MODEL_NAME
        stopped.left = f" {kept} has the weights saved last." if kept.is_file() else f" {out} has no weights yet."
        raise stopped from None
    typer.echo(f"The model is {model}.")
