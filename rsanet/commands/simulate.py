"""`rsanet simulate`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rsanet.commands.common import Stopped, completed
from rsanet.segment.recipe import triple
from rsanet.segment.scenario import CONTRASTS, KINDS, LOADS, PLANES, Scenario
from rsanet.segment.words import counted

if TYPE_CHECKING:
    from rsanet.segment.simulation import Subject

DEFAULTS = Scenario()


def simulate(
    out: Annotated[Path, typer.Argument(help="Folder of the cohort.")],
    subjects: Annotated[int, typer.Option(help="Number of patients.")],
    load: Annotated[
        str,
        typer.Option(
            help=f"Lesion load: {', '.join(LOADS)}; each has more and larger lesions than the one before.",
            autocompletion=completed(list(LOADS)),
        ),
    ] = DEFAULTS.load,
    kinds: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Where lesions arise, of {', '.join(KINDS)}; by default everywhere.",
            autocompletion=completed(KINDS),
        ),
    ] = None,
    contrasts: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Images, of {', '.join(CONTRASTS)}; by default {' '.join(DEFAULTS.contrasts)}.",
            autocompletion=completed(CONTRASTS),
        ),
    ] = None,
    spacing: Annotated[
        list[float] | None, typer.Option(help="Voxel size in mm, one number or three along x, y, z (1).")
    ] = None,
    slice_thickness: Annotated[
        float | None, typer.Option(help="Thickness of the slices in mm, in place of the voxel size across them.")
    ] = None,
    plane: Annotated[
        str,
        typer.Option(
            help=f"Plane of thick slices: {', '.join(reversed(PLANES))}.", autocompletion=completed(list(PLANES))
        ),
    ] = DEFAULTS.plane,
    noise: Annotated[
        float, typer.Option(help="Standard deviation of the noise, as a fraction of the brightest tissue.")
    ] = DEFAULTS.noise,
    sessions: Annotated[
        int, typer.Option(help="Scans of each patient, between which lesions appear, grow, shrink and vanish.")
    ] = DEFAULTS.sessions,
    split: Annotated[
        list[float] | None,
        typer.Option(help="Shares of train, validation and test, e.g. 0.7 0.1 0.2: writes split.json into OUT."),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same patients.")] = 0,
) -> None:
    """Simulate patients with lesions on real anatomy. Scores on them have no clinical meaning."""
    scenario = Scenario(
        spacing=triple(spacing, "--spacing") if spacing else DEFAULTS.spacing,
        slice_thickness=slice_thickness,
        plane=plane,
        contrasts=tuple(contrasts or DEFAULTS.contrasts),
        load=load,
        kinds=tuple(kinds or DEFAULTS.kinds),
        sessions=sessions,
        noise=noise,
    )
    from rsanet.segment.simulation import simulate
    from rsanet.segment.simulation.cohort import SPLIT_NAME

    def progress(number: int, total: int, subject: "Subject") -> None:
        line = f"{number}/{total}  {subject.participant_id}: {counted(subject.lesion_count, 'lesion')}"
        later = f"; later {counted(subject.new_lesion_count, 'new lesion')}" if scenario.sessions > 1 else ""
        typer.echo(f"{line}, {subject.lesion_load_mm3:g} mm³{later}")

    try:
        simulate(out, subjects, scenario, seed=seed, split=split or None, progress=progress)
    except Stopped as stopped:
        stopped.left = f" The same command completes {out}." if out.is_dir() else ""
        raise
    typer.echo(f"{out} holds {counted(subjects, 'simulated patient')}.")
    option = f" --split {shlex.quote(str(out / SPLIT_NAME))}" if split else ""
    typer.echo(f"To train on them: rsanet train {shlex.quote(str(out))}{option} -o run")
