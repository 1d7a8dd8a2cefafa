"""What tests of every folder share."""

import pytest


@pytest.fixture
def rsanet(capsys):
    """Runs the command line: returns exit status, stdout and stderr."""
    from rsanet import cli  # wants typer, which tests of the kernels do without

    def run(*args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return run
