"""`rsanet export-bundle`."""

from pathlib import Path
from typing import Annotated

import typer

from rsanet.commands.common import Model


def export_bundle(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files of a bundle that exists.")] = False,
) -> None:
    """Write a MONAI bundle.

    It applies the model as predict does, by python -m monai.bundle run: rsanet export-bundle RUN bundle
    """
    from rsanet.integrations import bundle

    bundle.export_bundle(model, out, overwrite=overwrite)
    typer.echo(f"The bundle is {out}. docs/README.md in it says how to run it.")
