"""`rsanet report`."""

from pathlib import Path
from typing import Annotated

import typer

from rsanet.commands.common import DEFAULTS, Device, Layout, ProtocolName, Raters, Roi, Stopped
from rsanet.segment.words import counted


def report(
    out: Annotated[Path, typer.Argument(help="A folder for HTML pages, or a picture: .png, .pdf or .svg.")],
    data: Annotated[Path, typer.Option(help="Folder of the cohort.")],
    pred: Annotated[Path, typer.Option(help="Folder of the predicted masks.")],
    model: Annotated[Path | None, typer.Option(help="Draw the attention maps of this model, too.")] = None,
    subjects: Annotated[
        list[str] | None,
        typer.Option(help="Which subjects; by default all in HTML, and the first three in a picture."),
    ] = None,
    protocol: ProtocolName = "custom",
    layout: Layout = "auto",
    raters: Raters = None,
    roi: Roi = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace pages or a picture that exist.")] = False,
    device: Device = DEFAULTS.device,
) -> None:
    """Show predictions beside their references, and the model's attention maps: HTML pages, or one picture."""
    from rsanet.segment import files, metrics
    from rsanet.segment.overview import draw_cohort, is_picture
    from rsanet.segment.segmenter import Segmenter

    picture = is_picture(out)
    if picture:
        files.check_new(out, overwrite=overwrite)
    chosen = metrics.choose_protocol(protocol)
    segmenter = Segmenter.load(model, roi=roi, device=device) if model else None
    shown = {"subjects": subjects or (), "protocol": chosen, "layout": layout, "raters": raters}
    if picture:
        draw_cohort(out, data, pred, segmenter, **shown)
        typer.echo(f"The picture is {out}.")
        return

    from rsanet.segment.html.cohort import write_report

    def progress(number: int, total: int, name: str, words: str) -> None:
        typer.echo(f"{number}/{total}  {name}: {words}")

    try:
        written = write_report(out, data, pred, segmenter, overwrite=overwrite, progress=progress, **shown)
    except Stopped as stopped:
        stopped.left = f" {out} keeps the pages that were done." if out.is_dir() else ""
        raise
    if written.failures:
        total = counted(len(written.failures) + len(written.pages), "case")
        have = "has" if len(written.failures) == 1 else "have"
        names = ", ".join(written.failures)
        raise ValueError(
            f"{len(written.failures)} of {total} {have} no page: {names}. The others are in {written.index}."
        )
    typer.echo(f"The report is {written.index}.")
