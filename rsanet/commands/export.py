"""`rsanet export`."""

from pathlib import Path
from typing import Annotated

import typer

from rsanet.commands.common import Model, completed
from rsanet.extras import install


def export(
    model: Model,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="The file: .onnx, or .pt2 for the others; by default MODEL's name, here."),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="onnx, torch-export or aoti (compiled for this CPU); by default by the ending, or onnx.",
            autocompletion=completed(("onnx", "torch-export", "aoti")),
        ),
    ] = None,
    decompose: Annotated[
        bool, typer.Option("--decompose", help="torch-export: operators of PyTorch alone, to load without rsa_kernels.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
) -> None:
    """Write the network as ONNX, torch.export or AOTInductor.

    The file is compared with the network before it takes its place: rsanet export RUN -o model.onnx
    """
    from rsanet.integrations import export as work
    from rsanet.segment.words import counted

    if out is None:
        # An unknown format is refused by name, whatever the ending.
        out = Path(f"{model.resolve().name.removesuffix('.safetensors')}{work.SUFFIXES.get(kind or 'onnx', '')}")
    done = work.export(model, out, kind, decompose=decompose, overwrite=overwrite, say=typer.echo)
    if done.shapes:
        volumes = counted(len(done.shapes), "volume")
        typer.echo(f"The largest difference of a probability on {volumes} is {done.difference:.1g}.")
    else:
        typer.echo(f"It was not compared, as onnxruntime is not installed: {install('export')}.")
    typer.echo(f"The file is {out}.")
