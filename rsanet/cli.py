"""The `rsanet` command.

Nothing heavy is imported here: torch, monai and the rest load inside the command that needs them, so that
`--help` answers at once. `main` is the one place where an error becomes a sentence and an exit status.
"""

import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from rsanet import __version__
from rsanet.extras import install

try:
    import typer
except ImportError:
    sys.exit(f"The rsanet command needs typer, which is not installed: {install('segment')}.")

from rsanet.commands.common import Command, Stopped
from rsanet.commands.doctor import doctor
from rsanet.commands.evaluate import evaluate
from rsanet.commands.export import export
from rsanet.commands.export_bundle import export_bundle
from rsanet.commands.nnunet import nnunet_path, nnunet_plans, nnunet_weights
from rsanet.commands.predict import predict
from rsanet.commands.report import report
from rsanet.commands.simulate import simulate
from rsanet.commands.train import train

UsageError = typer.BadParameter.__base__  # of click, or of the copy of it that newer typers bring along
# Every other optional package is in the extra "segment".
EXTRAS = {"nilearn": "demo", "onnx": "export", "onnxscript": "export"}
DEBUG = "--debug"
OUT_OF_MEMORY = ("out of memory", "can't allocate memory")  # of CUDA and of the CPU, in torch's words

app = typer.Typer(
    name="rsanet",
    help="Segmentation of multiple-sclerosis lesions with recurrent slice-wise attention. Research use only: "
    "no medical device. --debug with any command shows the traceback of an error.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def tell_version(asked: bool) -> None:
    """Prints the version and ends."""
    if asked:
        typer.echo(f"rsanet {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=tell_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """What goes before every verb."""


# Each with the example that ends its help.
VERBS: dict[Callable[..., None], str] = {
    simulate: "rsanet simulate cohort --subjects 12 --spacing 2 --split 0.6 0.2 0.2",
    train: "rsanet train cohort -o run --split cohort/split.json",
    predict: "rsanet predict run -i FLAIR.nii.gz T1w.nii.gz T2w.nii.gz -o lesions.nii.gz --preview",
    evaluate: "rsanet evaluate masks cohort --protocol shifts --csv scores.csv",
    report: "rsanet report report.png --data cohort --pred masks --model run",
    export: "rsanet export run -o model.onnx --format onnx",
    export_bundle: "rsanet export-bundle run bundle",
    nnunet_path: "rsanet nnunet-path",
    nnunet_plans: "rsanet nnunet-plans 501 --stages -3 -2 -1",
    nnunet_weights: "rsanet nnunet-weights fold_0/checkpoint_final.pth pretrained.pth",
    doctor: "rsanet doctor --device cpu",
}
for verb, example in VERBS.items():
    app.command(cls=Command, epilog=f"\b\nExample:\n  {example}")(verb)


@contextmanager
def stoppable() -> Iterator[None]:
    """Within it SIGINT and SIGTERM raise `Stopped`.

    A library must not see them otherwise: Lightning makes a silent exit of either, and reports success after SIGTERM.
    """
    process = os.getpid()

    def stop(signum: int, frame: Any) -> None:
        if os.getpid() != process:
            return  # a forked worker is ended by its parent
        if any(caller.f_code.co_name == "__del__" for caller, _ in traceback.walk_stack(frame)):
            threading.Timer(0.1, os.kill, (process, signum)).start()  # what a destructor raises is dropped
            return
        raise Stopped(signum)

    before = {}
    try:
        for signum in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(signum) not in (signal.SIG_IGN, None):  # ignored, as in a shell's background
                before[signum] = signal.signal(signum, stop)
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def remarked(debug: bool) -> Iterator[None]:
    """Within it our warnings are a line each on stderr, and those of libraries are silent unless asked for."""
    show = warnings.showwarning

    def remark(message: Warning | str, category: type[Warning], filename: str, *rest: Any) -> None:
        if Path(filename).is_relative_to(Path(__file__).parent):
            typer.echo(f"rsanet: warning: {message}", err=True)
        elif debug:
            show(message, category, filename, *rest)

    with warnings.catch_warnings():
        warnings.showwarning = remark
        yield


def is_ours(error: BaseException) -> bool:
    """Whether an error was raised by this project's code, with a sentence meant for the user."""
    frames = traceback.extract_tb(error.__traceback__)
    home = Path(__file__).parent
    return bool(frames) and any(
        Path(frames[-1].filename).is_relative_to(p) for p in (home, home.parent / "rsa_kernels")
    )


def explain(error: BaseException) -> str:
    """One sentence for the user about any error."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        extra = EXTRAS.get(package, "segment")
        return f"This command needs {package}, which is not installed: {install(extra)}."
    if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
        return "There is not enough memory: give a smaller --patch, --batch or --roi, or take a larger machine."
    if isinstance(error, NotADirectoryError) and error.filename:
        path = Path(os.fsdecode(error.filename))
        file = next((parent for parent in path.parents if parent.exists() and not parent.is_dir()), path)
        return f"{path} cannot be used: {file} is a file, not a folder; give another path."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}." if error.filename else f"{error.strerror}."
    if isinstance(error, (ValueError, RuntimeError, OSError)) and is_ours(error):
        return str(error)
    first = (str(error).strip().splitlines() or [""])[0]
    return f"Unexpected {type(error).__name__}: {first} (--debug shows the traceback)"


def main(args: list[str] | None = None) -> None:
    """Runs the command line and exits.

    The status is 1 after an error and 2 after wrong usage, 130 after Ctrl-C and 143 after SIGTERM, each with a
    sentence on stderr.

    Args:
        args: the arguments; those of the process by default.
    """
    args = sys.argv[1:] if args is None else list(args)
    if "_RSANET_COMPLETE" in os.environ:
        app(args)  # the shell asks what could follow, and this ends with the answer
    # Large volumes in large pages, where Linux has them on request: torch asks at its first allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        with stoppable(), remarked(DEBUG in args):
            status = app([arg for arg in args if arg != DEBUG], standalone_mode=False) or 0
    except Stopped as stopped:
        interrupted = stopped.signum == signal.SIGINT
        typer.echo(f"rsanet: {'interrupted' if interrupted else 'terminated'}.{stopped.left}", err=True)
        status = 128 + stopped.signum
    except SystemExit as error:
        status = error.code or 1  # whatever ends the command on its own has not done what was asked
    except UsageError as error:
        error.show()
        status = error.exit_code
    except Exception as error:
        if DEBUG in args:
            raise
        # Typer takes any EOFError for the end of its own input and aborts.
        reason = error.__cause__ if isinstance(error, typer.Abort) and error.__cause__ else error
        typer.echo(f"rsanet: {explain(reason)}", err=True)
        status = 1
    sys.exit(status)


if __name__ == "__main__":
    main()
