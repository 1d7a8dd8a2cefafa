"""`rsanet simulate`."""

from pathlib import Path
from typing import Annotated

import typer

from rsanet.segment.recipe import triple
from rsanet.segment.words import counted


def simulate(
    out: Annotated[Path, typer.Argument(help="Folder of the cohort.")],
    subjects: Annotated[int, typer.Option(help="Number of patients.")],
    spacing: Annotated[list[float] | None, typer.Option(help="Voxel size in mm, one or three numbers (1).")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same patients.")] = 0,
) -> None:
    """Simulate patients with lesions on real anatomy. Scores on them have no clinical meaning."""
    from rsanet.segment.simulation import simulate_cohort

    def progress(done: int, total: int, name: str) -> None:
        typer.echo(f"{name}  {done}/{total}")

    simulate_cohort(out, subjects, spacing=triple(spacing or [1.0], "--spacing"), seed=seed, progress=progress)
    typer.echo(f"{out} holds {counted(subjects, 'simulated patient')}.")
