"""The `rsanet` command.

Nothing heavy is imported here: torch, monai and the rest load inside the command that needs them, so that
`--help` answers at once. `main` is the one place where an error becomes a sentence and an exit status.
"""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from rsanet.segment.recipe import ATTENTIONS, PRECISIONS, Recipe, triple

try:
    import typer
    from typer.core import TyperCommand
except ImportError:
    sys.exit('The rsanet command needs typer, which is not installed: pip install "rsanet[segment]"')

UsageError = typer.BadParameter.__base__  # of click, or of the copy of it that newer typers bring along
DEFAULTS = Recipe()
EXTRAS = {"nilearn": "demo"}  # every other optional package is in the extra "segment"


class Stopped(BaseException):
    """The user or the system ends the command: no error, so that nothing but `main` catches it.

    Args:
        signum: SIGINT or SIGTERM.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum
        self.left = ""  # what the command leaves on disk, in a sentence


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


class Command(TyperCommand):
    """A command whose repeatable options take several values at once: ``-i FLAIR.nii.gz T1.nii.gz``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeats the option's name before each further value, which is how the parser wants it."""
        repeatable = {name for param in self.params if getattr(param, "multiple", False) for name in param.opts}
        expanded: list[str] = []
        option = None
        for arg in args:
            if arg.startswith("-"):
                option = arg if arg in repeatable else None
            elif option and expanded[-1] != option:
                expanded.append(option)
            expanded.append(arg)
        return super().parse_args(ctx, expanded)


app = typer.Typer(
    name="rsanet",
    help="Segmentation of multiple-sclerosis lesions with recurrent slice-wise attention. Research use only: "
    "no medical device. RSANET_DEBUG=1 shows the traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")]
PrecisionName = Annotated[
    str,
    typer.Option(help=f"{', '.join(PRECISIONS)}. auto is bf16 where the hardware multiplies it, else fp32."),
]
Model = Annotated[Path, typer.Argument(help="A run folder of `rsanet train`, or a .safetensors file.")]
Roi = Annotated[
    list[int] | None,
    typer.Option(
        help="Window of the network in voxels, one number or three along z, y, x; by default the training patch. "
        "Slice-wise attention is global over its window, so results depend on it."
    ),
]


@app.command(cls=Command)
def simulate(
    out: Annotated[Path, typer.Argument(help="Folder of the cohort.")],
    subjects: Annotated[int, typer.Option(help="Number of patients.")],
    spacing: Annotated[list[float] | None, typer.Option(help="Voxel size in mm, one or three numbers (1).")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same patients.")] = 0,
) -> None:
    """Simulate patients with lesions on real anatomy. Scores on them have no clinical meaning."""
    from rsanet.segment.simulate import simulate_cohort

    def progress(done: int, total: int, name: str) -> None:
        typer.echo(f"{name}  {done}/{total}")

    simulate_cohort(out, subjects, spacing=triple(spacing or [1.0], "--spacing"), seed=seed, progress=progress)
    typer.echo(f"{out} holds {counted(subjects, 'simulated patient')}.")


@app.command(cls=Command)
def train(
    data: Annotated[Path, typer.Argument(help="Folder of a cohort with lesion masks.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Run folder to create.")],
    contrasts: Annotated[
        list[str] | None,
        typer.Option(help="Contrasts in channel order, e.g. FLAIR T1w; by default all there are."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = DEFAULTS.steps,
    patch: Annotated[
        list[int] | None, typer.Option(help="Patch in voxels, one number or three along z, y, x (64).")
    ] = None,
    batch: Annotated[int, typer.Option(help="Patches per step.")] = DEFAULTS.batch,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = DEFAULTS.lr,
    channels: Annotated[
        list[int] | None, typer.Option(help="Widths of the levels, the finest first (32 64 128 256 512).")
    ] = None,
    attention: Annotated[str, typer.Option(help=f"{', '.join(ATTENTIONS)}.")] = DEFAULTS.attention,
    attention_scale: Annotated[
        float, typer.Option(help="Factor on the attention's logits; 1 is as published, less is more graded.")
    ] = DEFAULTS.attention_scale,
    dropout: Annotated[float, typer.Option(help="Dropout probability.")] = DEFAULTS.dropout,
    spacing: Annotated[
        list[float] | None,
        typer.Option(help="Resample to this voxel size in mm, one number or three along z, y, x."),
    ] = None,
    val_fraction: Annotated[float, typer.Option(help="Share of the cases held out; 0 for none.")] = 0.2,
    validate_every: Annotated[int | None, typer.Option(help="Steps between validations (a fifth of all).")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same weights on a CPU.")] = DEFAULTS.seed,
    precision: PrecisionName = DEFAULTS.precision,
    device: Device = DEFAULTS.device,
    workers: Annotated[int, typer.Option(help="Processes that prepare patches.")] = DEFAULTS.workers,
) -> None:
    """Train a network; the run folder gets model.safetensors, config.json and log.csv."""
    recipe = Recipe(
        steps=steps,
        patch=triple(patch, "--patch") if patch else DEFAULTS.patch,
        batch=batch,
        lr=lr,
        channels=tuple(channels) if channels else DEFAULTS.channels,
        attention=attention,
        attention_scale=attention_scale,
        dropout=dropout,
        spacing=triple(spacing, "--spacing") if spacing else None,
        val_fraction=val_fraction,
        validate_every=validate_every,
        seed=seed,
        precision=precision,
        device=device,
        workers=workers,
    )
    from rsanet.segment.train import MODEL_NAME, train

    try:
        model = train(data, out, recipe, contrasts)
    except (Stopped, SystemExit) as end:
        stopped = end if isinstance(end, Stopped) else Stopped(signal.SIGTERM)  # Lightning was first
        kept = out / MODEL_NAME
        stopped.left = f" {kept} has the weights saved last." if kept.is_file() else f" {out} has no weights yet."
        raise stopped from None
    typer.echo(f"The model is {model}.")


@app.command(cls=Command)
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
    from rsanet.segment.predict import Segmenter, name_images, predict_case, predict_cohort

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


@app.command(cls=Command)
def evaluate(
    pred: Annotated[Path, typer.Argument(help="A predicted mask, or a folder of masks.")],
    ref: Annotated[Path, typer.Argument(help="The reference mask, or a folder or cohort of them.")],
    protocol: Annotated[
        str, typer.Option(help="custom, isbi2015, wmh2017 or shifts: how lesions are counted.")
    ] = "custom",
    connectivity: Annotated[int | None, typer.Option(help="Neighbours that join voxels: 6, 18 or 26.")] = None,
    overlap: Annotated[float | None, typer.Option(help="Least IoU that detects a lesion; 0 is any overlap.")] = None,
    minimum_mm3: Annotated[float | None, typer.Option(help="Smallest volume of a lesion that counts.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write one row per case here.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write protocol, means and cases here.")] = None,
) -> None:
    """Compare masks with a reference, voxel by voxel and lesion by lesion."""
    from rsanet.segment import files, metrics
    from rsanet.segment.data import is_simulated

    if csv and json and csv.resolve() == json.resolve():
        raise typer.BadParameter(f"{csv} is the file of --csv, too.", param_hint="--json")
    for path in filter(None, (csv, json)):
        files.check_writable(path)
    chosen = metrics.choose_protocol(protocol, connectivity=connectivity, overlap=overlap, minimum_mm3=minimum_mm3)
    evaluation = metrics.evaluate_paths(pred, ref, chosen)
    typer.echo(metrics.format_table(evaluation))
    if is_simulated(ref):
        typer.echo("The reference is simulated: these scores have no clinical meaning.")
    if csv:
        metrics.write_csv(evaluation, csv)
        typer.echo(f"One row per case is in {csv}.")
    if json:
        metrics.write_json(evaluation, json)
        typer.echo(f"Protocol, means and cases are in {json}.")
    if evaluation.failures:
        names, reasons = ", ".join(evaluation.failures), list(evaluation.failures.values())
        why = reasons[0] if len(reasons) == 1 else f"{names}; the reasons are at the end of the table."
        raise ValueError(f"{counted(len(reasons), 'case')} could not be compared: {why}")


@app.command(cls=Command)
def report(
    out: Annotated[Path, typer.Argument(help="The picture: .png, .pdf or .svg.")],
    data: Annotated[Path, typer.Option(help="Folder of the cohort.")],
    pred: Annotated[Path, typer.Option(help="Folder of the predicted masks.")],
    model: Annotated[Path | None, typer.Option(help="Draw the attention maps of this model, too.")] = None,
    subjects: Annotated[list[str] | None, typer.Option(help="Which subjects; by default the first three.")] = None,
    protocol: Annotated[str, typer.Option(help="As in evaluate.")] = "custom",
    roi: Roi = None,
    device: Device = DEFAULTS.device,
) -> None:
    """Draw predictions beside their references, and the model's attention maps."""
    from rsanet.segment import files, metrics
    from rsanet.segment.overview import draw_cohort
    from rsanet.segment.predict import Segmenter

    files.check_writable(out)
    chosen = metrics.choose_protocol(protocol)
    segmenter = Segmenter.load(model, roi=roi, device=device) if model else None
    draw_cohort(out, data, pred, segmenter, subjects=subjects or (), protocol=chosen)
    typer.echo(f"The picture is {out}.")


@app.command(cls=Command)
def doctor() -> None:
    """Show versions, hardware, and which attention backends can run here."""
    from rsanet.segment.environment import describe_environment

    rows = describe_environment()
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        typer.echo(f"{name:<{width}}  {value}")


def counted(number: int, noun: str) -> str:
    """A number with its noun: ``1 lesion``, ``2 lesions``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


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
        return f'This command needs {package}, which is not installed: pip install "rsanet[{extra}]"'
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}." if error.filename else f"{error.strerror}."
    if isinstance(error, (ValueError, RuntimeError, OSError)) and is_ours(error):
        return str(error)
    first = (str(error).strip().splitlines() or [""])[0]
    return f"Unexpected {type(error).__name__}: {first} (RSANET_DEBUG=1 shows the traceback)"


def main(args: list[str] | None = None) -> None:
    """Runs the command line and exits.

    The status is 1 after an error and 2 after wrong usage, 130 after Ctrl-C and 143 after SIGTERM, each with a
    sentence on stderr.

    Args:
        args: the arguments; those of the process by default.
    """
    try:
        with stoppable():
            status = app(args, standalone_mode=False) or 0
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
        if os.environ.get("RSANET_DEBUG", "0") not in ("", "0"):
            raise
        # Typer takes any EOFError for the end of its own input and aborts.
        reason = error.__cause__ if isinstance(error, typer.Abort) and error.__cause__ else error
        typer.echo(f"rsanet: {explain(reason)}", err=True)
        status = 1
    sys.exit(status)


if __name__ == "__main__":
    main()
