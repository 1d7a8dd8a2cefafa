"""`rsanet report`."""

from pathlib import Path
from typing import Annotated

import typer

from rsanet.commands.common import DEFAULTS, Device, Roi


def report(
    out: Annotated[Path, typer.Argument(help="The picture: .png, .pdf or .svg.")],
    data: Annotated[Path, typer.Option(help="Folder of the cohort.")],
    pred: Annotated[Path, typer.Option(help="Folder of the predicted masks.")],
    model: Annotated[Path | None, typer.Option(help="Draw the attention maps of this model, too.")] = None,
    subjects: Annotated[list[str] | None, typer.Option(help="Which subjects; by default the first three.")] = None,
    protocol: Annotated[str, typer.Option(help="As in evaluate.")] = "custom",
    roi: Roi = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a picture that exists.")] = False,
    device: Device = DEFAULTS.device,
) -> None:
    """Draw predictions beside their references, and the model's attention maps."""
    from rsanet.segment import files, metrics
    from rsanet.segment.overview import draw_cohort
    from rsanet.segment.segmenter import Segmenter

    files.check_new(out, overwrite=overwrite)
    chosen = metrics.choose_protocol(protocol)
    segmenter = Segmenter.load(model, roi=roi, device=device) if model else None
    draw_cohort(out, data, pred, segmenter, subjects=subjects or (), protocol=chosen)
    typer.echo(f"The picture is {out}.")
