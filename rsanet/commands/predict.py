"""`rsanet predict`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from rsanet.commands.common import DEFAULTS, Device, Model, PrecisionName, Roi
from rsanet.segment.words import counted


def predict(
    model: Model,
    images: Annotated[
        list[Path] | None,
        typer.Option("-i", "--images", help="The images of one subject, in the order of the model's contrasts."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of a cohort, instead of -i.")] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The mask, .nii.gz; with --data, the folder for masks.")
    ] = None,
    roi: Roi = None,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Probability above which a voxel is lesion.")] = 0.5,
    precision: PrecisionName = DEFAULTS.precision,
    device: Device = DEFAULTS.device,
) -> None:
    """Predict lesion masks, on the grid of each subject's first image."""
    if out is None:
        raise typer.BadParameter("give the mask's name, or with --data a folder.", param_hint="-o")
    if bool(images) == bool(data):
        raise typer.BadParameter("give either the images of one subject or --data with a cohort.", param_hint="-i")
    from rsanet.segment.prediction import Segmenter, name_images, predict_case, predict_cohort

    segmenter = Segmenter.load(model, roi=roi, device=device, precision=precision)
    if images:
        case = name_images(segmenter, images)
        typer.echo(segmenter.describe())
        found = predict_case(segmenter, case, out, threshold=threshold)
        typer.echo(f"{counted(found.lesions, 'lesion')}, {found.load_mm3:g} mm³, {found.seconds:.1f} s.")
        typer.echo(f"The mask is {out}.")
        return

    def progress(number: int, total: int, result: Any) -> None:
        if isinstance(result, str):
            typer.echo(f"{number}/{total}  no mask: {result}")
        else:
            typer.echo(
                f"{number}/{total}  {result.case}: {counted(result.lesions, 'lesion')}, {result.load_mm3:g} mm³, "
                f"{result.seconds:.1f} s"
            )

    typer.echo(segmenter.describe())
    predictions, failures = predict_cohort(segmenter, data, out, threshold=threshold, progress=progress)
    if failures:
        others = f" The other masks are in {out}." if predictions else ""
        total = len(failures) + len(predictions)
        have = "has" if len(failures) == 1 else "have"
        raise ValueError(f"{len(failures)} of {counted(total, 'case')} {have} no mask: {', '.join(failures)}.{others}")
    typer.echo(f"The masks are in {out}, with predictions.csv.")
