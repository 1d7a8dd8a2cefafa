"""`rsanet evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from rsanet.commands.common import Layout, ProtocolName, Raters
from rsanet.segment.words import counted


def evaluate(
    pred: Annotated[Path, typer.Argument(help="A predicted mask, or a folder of masks.")],
    ref: Annotated[Path, typer.Argument(help="The reference mask, or a folder or cohort of them.")],
    compare: Annotated[
        Path | None, typer.Option(help="Another prediction of the same references, tested against PRED case by case.")
    ] = None,
    protocol: ProtocolName = "custom",
    connectivity: Annotated[int | None, typer.Option(help="Neighbours that join voxels: 6, 18 or 26.")] = None,
    overlap: Annotated[
        float | None,
        typer.Option(help="Least IoU that detects a lesion, 0 is any overlap; for msseg2016, the share to cover."),
    ] = None,
    minimum_mm3: Annotated[float | None, typer.Option(help="Smallest volume of a lesion that counts.")] = None,
    split: Annotated[Path | None, typer.Option(help="Compare only the test part of this split file.")] = None,
    layout: Layout = "auto",
    raters: Raters = None,
    csv: Annotated[Path | None, typer.Option(help="Write one row per case here.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write protocol, cases, summaries and tests here.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
) -> None:
    """Compare masks with references, by voxel and by lesion."""
    from rsanet.segment import evaluation as work
    from rsanet.segment import files, metrics
    from rsanet.segment.datasets import is_simulated

    if csv and json and csv.resolve() == json.resolve():
        raise typer.BadParameter(f"{csv} is the file of --csv, too.", param_hint="--json")
    for path in filter(None, (csv, json)):
        files.check_new(path, overwrite=overwrite)
        if path.exists() and any(other.exists() and path.samefile(other) for other in (pred, ref, compare or pred)):
            raise ValueError(f"{path} is compared here, and would be lost: give another name to the table.")
    chosen = metrics.choose_protocol(protocol, connectivity=connectivity, overlap=overlap, minimum_mm3=minimum_mm3)
    result = work.evaluate(
        pred, ref, protocol=chosen, compare=compare, split=split, layout=layout, raters=raters, progress=True
    )
    typer.echo(str(result))
    if is_simulated(ref):
        typer.echo("The reference is simulated: these scores have no clinical meaning.")
    if csv and result.cases:
        work.write_csv(result, csv)
        typer.echo(f"One row per case is in {csv}.")
    if json:
        work.write_json(result, json)
        typer.echo(f"Protocol, cases, summaries and tests are in {json}.")
    failures = dict(result.failures)
    if result.comparison:
        others = result.comparison.other.failures
        failures |= {f"{subject} of {compare}": reason for subject, reason in others.items()}
    if failures:
        names, reasons = ", ".join(failures), list(failures.values())
        why = reasons[0] if len(reasons) == 1 else f"{names}; the reasons are at the end of the table."
        raise ValueError(f"{counted(len(reasons), 'case')} could not be compared: {why}")
