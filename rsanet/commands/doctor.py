"""`rsanet doctor`."""

from typing import Annotated

import typer

from rsanet.commands.common import DEFAULTS, Device
from rsanet.segment.words import counted


def doctor(
    device: Device = DEFAULTS.device,
    check: Annotated[bool, typer.Option(help="Do ten seconds of real work, to see whether it comes out right.")] = True,
) -> None:
    """Show what this machine can do. Versions, hardware, disk, attention backends, and whether all works."""
    from rsanet.segment.environment import describe_environment

    rows = describe_environment()
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        typer.echo(f"{name:<{width}}  {value}")
    if not check:
        return
    from rsanet.segment.selfcheck import self_check

    typer.echo("")
    checks = []
    for done in self_check(device):
        typer.echo(str(done))
        checks.append(done)
    failed = [done.name for done in checks if done.problem]
    if failed:
        raise RuntimeError(f"{counted(len(failed), 'check')} failed: {'; '.join(failed)}.")
    typer.echo(f"All works. The checks took {sum(done.seconds for done in checks):.0f} s.")
