"""`rsanet doctor`."""

import typer


def doctor() -> None:
    """Show versions, hardware, and which attention backends can run here."""
    from rsanet.segment.environment import describe_environment

    rows = describe_environment()
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        typer.echo(f"{name:<{width}}  {value}")
