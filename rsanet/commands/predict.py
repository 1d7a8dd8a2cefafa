"""`rsanet predict`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from rsanet.commands.common import DEFAULTS, Device, Layout, Model, PrecisionName, Roi, Stopped
from rsanet.segment.words import counted, sizes


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
    split: Annotated[Path | None, typer.Option(help="With --data: do only the test part of this split file.")] = None,
    layout: Layout = "auto",
    ensemble: Annotated[
        list[Path] | None, typer.Option(help="Further models of the same contrasts: the probabilities are averaged.")
    ] = None,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Probability above which a voxel is lesion.")] = 0.5,
    min_lesion_mm3: Annotated[
        float, typer.Option("--min-lesion-mm3", min=0, help="Remove lesions of a smaller volume.")
    ] = 0.0,
    probability_map: Annotated[
        bool, typer.Option("--probability-map", help="Write the probability, too: ..._probseg.nii.gz.")
    ] = False,
    preview: Annotated[
        bool, typer.Option("--preview", help="Draw the slices with the most lesion beside each mask, as .png.")
    ] = False,
    register: Annotated[
        bool,
        typer.Option(
            "--register",
            help="Register each further contrast to the first, rigidly, and write the transform beside the mask.",
        ),
    ] = False,
    flips: Annotated[
        bool, typer.Option("--flips", help="Average over the eight mirror images; takes eight times as long.")
    ] = False,
    roi: Roi = None,
    whole_brain: Annotated[
        bool, typer.Option("--whole-brain", help="Give the network the whole brain at once, where it fits into memory.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Leave the masks that a cohort has, and do the others.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what exists.")] = False,
    precision: PrecisionName = DEFAULTS.precision,
    device: Device = DEFAULTS.device,
) -> None:
    """Predict lesion masks, on the grid of each subject's first image. Under torchrun, processes share a cohort."""
    if out is None:
        raise typer.BadParameter("give the mask's name, or with --data a folder.", param_hint="-o")
    if bool(images) == bool(data):
        raise typer.BadParameter("give either the images of one subject or --data with a cohort.", param_hint="-i")
    for given, option in ((split, "--split"), (resume, "--resume"), (layout != "auto", "--layout")):
        if given and not data:
            raise typer.BadParameter("this is for a cohort: give --data.", param_hint=option)
    if resume and overwrite:
        raise typer.BadParameter("the one keeps what the other replaces: give one.", param_hint="--resume, --overwrite")
    models = [model, *(ensemble or [])]
    written = {
        "threshold": threshold,
        "min_lesion_mm3": min_lesion_mm3,
        "probability_map": probability_map,
        "preview": preview,
        "register": register,
        "overwrite": overwrite,
    }
    inference = {"roi": roi, "device": device, "precision": precision, "flips": flips, "whole_brain": whole_brain}
    if images:
        import sys

        from rsanet.segment.prediction import predict as predict_subject

        bar = sys.stderr.isatty()
        found = predict_subject(models, images, out, say=typer.echo, progress=bar, **written, **inference)
        typer.echo(f"{_words(found)}.")
        typer.echo(f"The mask is {out}.")
        return

    from rsanet.segment.cohort import EARLIER, predict_cohort
    from rsanet.segment.processes import is_first

    def progress(number: int, total: int, result: Any) -> None:
        if isinstance(result, str):
            typer.echo(f"{number}/{total}  no mask: {result}")
            return
        window = f", window {' and '.join(window.words for window in result.windows)}" if whole_brain else ""
        typer.echo(f"{number}/{total}  {result.case} ({sizes(result.mask.shape)}): {_words(result)}{window}")

    try:
        rows, failures = predict_cohort(
            models,
            data,
            out,
            split=split,
            layout=layout,
            resume=resume,
            progress=progress,
            say=typer.echo,
            **written,
            **inference,
        )
    except Stopped as stopped:
        stopped.left = f" {out} keeps the masks that were done: give --resume to go on."
        raise
    if not is_first():
        raise typer.Exit(1 if failures else 0)
    if doubtful := [row.case for row in rows if row.warnings]:
        some = ", ".join(doubtful[:3]) + (", ..." if len(doubtful) > 3 else "")
        typer.echo(f"{len(doubtful)} of {counted(len(rows), 'mask')} came with warnings ({some}): see predictions.csv.")
    if failures:
        others = f" The other masks are in {out}." if rows else ""
        total = counted(len(failures) + len(rows), "case")
        have = "has" if len(failures) == 1 else "have"
        old = [name for name, reason in failures.items() if reason.endswith(EARLIER)]
        kept = f" What {out} has of {', '.join(old)} is of an earlier run." if old else ""
        raise ValueError(
            f"{len(failures)} of {total} {have} no {'new ' * bool(old)}mask: {', '.join(failures)}.{kept}{others}"
        )
    typer.echo(f"The masks are in {out}, with predictions.csv.")


def _words(found: Any) -> str:
    return f"{counted(found.lesions, 'lesion')}, {found.load_mm3:.1f} mm³, {found.seconds:.1f} s"
