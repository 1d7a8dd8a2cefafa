"""The lesion masks of a whole cohort, and one table of what they hold."""

import csv
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rsanet.segment.datasets import Case, list_cases, read_test_part
from rsanet.segment.ensemble import Ensemble, Model, Prepared
from rsanet.segment.files import ENCODING, check_writable, remove_stale, write_csv
from rsanet.segment.prediction import Options, Prediction, predict_case
from rsanet.segment.processes import Processes, shared_work
from rsanet.segment.provenance import DESCRIPTION, describe_derivatives, is_predicted
from rsanet.segment.words import counted, sizes

TABLE = "predictions.csv"
EARLIER = "is still that of an earlier run."  # ends the reason of a case whose mask could not be replaced
PART = ".predictions-{rank}.csv"  # the rows of another process than the first, until they are in the table
MASK_NAME = "{case}_label-lesion_mask.nii.gz"


@dataclass(frozen=True)
class Row:
    """A row of ``predictions.csv``.

    Attributes:
        case: name of the case.
        mask: the mask, below the folder of the table.
        lesions: number of 26-connected lesions.
        load_mm3: their volume.
        seconds: time from the files to the files, of this case alone.
        backend: what ran the attention.
        window: what each network saw at once, in voxels.
        made_by: the models and what was asked of them; a run that resumes has to ask the same.
        warnings: what is doubtful in the images and the mask, one sentence after the other; a table may lack them.
    """

    case: str
    mask: str
    lesions: int
    load_mm3: float
    seconds: float
    backend: str
    window: str
    made_by: str
    warnings: str = ""

    @classmethod
    def of(cls, found: Prediction, made_by: str, folder: Path) -> "Row":
        """The row of a prediction that was written into a folder."""
        return cls(
            found.case,
            found.path.relative_to(folder).as_posix() if found.path else "",
            found.lesions,
            round(found.load_mm3, 3),
            round(found.seconds, 2),
            found.backend,
            " ".join(dict.fromkeys(sizes(window.size) for window in found.windows)),
            made_by,
            "; ".join(found.warnings),
        )


@dataclass(frozen=True)
class Work:
    """What a run has to do.

    Attributes:
        cases: all the cases of the run.
        rows: rows of the table that stay, of masks that are there already.
        left: the cases to do.
        made_by: what the rows say of the models and settings.
    """

    cases: list[Case]
    rows: dict[str, Row]
    left: list[Case]
    made_by: str


def predict_cohort(
    model: Model | Sequence[Model],
    data: str | os.PathLike,
    out: str | os.PathLike,
    *,
    split: str | os.PathLike | None = None,
    layout: str = "auto",
    threshold: float = 0.5,
    min_lesion_mm3: float = 0.0,
    probability_map: bool = False,
    preview: bool = False,
    register: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int, Prediction | str], None] | None = None,
    say: Callable[[str], None] | None = None,
    **inference: Any,
) -> tuple[list[Row], dict[str, str]]:
    """Writes a mask for every case of a data set, and ``predictions.csv``. A bad case does not stop the others.

    Masks of a BIDS data set go into a tree like its own, and the folder becomes one of BIDS derivatives; those of other
    layouts lie side by side. Each has a ``.json`` that says how it came about.

    The table has a row for each mask, and is written again after each: what was done stays done if the run is killed.
    The next case is read while the network runs. Processes that `torchrun` started share the cases.

    Args:
        model: as in `predict`.
        data: the data set.
        out: folder for the masks, created where needed.
        split: a split file, of whose cases only the test part is done.
        layout: how the data set lies on disk; see `rsanet.segment.layouts.read_cases`.
        threshold: as in `predict`.
        min_lesion_mm3: as in `predict`.
        probability_map: as in `predict`.
        preview: as in `predict`.
        register: as in `predict`.
        resume: whether cases whose mask and row exist are left as they are; the model and its options have to be those
            of before.
        overwrite: whether masks that exist are replaced.
        progress: called after each case with its number, the number of cases, and its prediction or what is wrong.
        say: called with one line on device, backend, precision and window before the first case.
        inference: as in `predict`.

    Returns:
        The rows of the cases, and the reason for each case without one; the same in every process.

    Raises:
        ValueError: an argument, the model or the data set cannot serve, or masks exist without ``resume`` or
            ``overwrite``.
        OSError: the folder cannot be written.
        SystemExit: in the other processes, where the first raises.
    """
    options = Options(threshold, min_lesion_mm3, probability_map, preview, register)
    if resume and overwrite:
        raise ValueError("Both --resume and --overwrite are given: the one keeps the masks that the other replaces.")
    ensemble = Ensemble.load(model, **inference)
    options.check_contrasts(ensemble.contrasts)
    out, made_by = Path(out), describe_maker(ensemble, options)
    with shared_work() as processes:
        work = processes.decided_first(
            lambda: _plan(
                _cases(data, ensemble, split, layout),
                Path(data),
                out,
                options,
                ensemble.contrasts,
                made_by,
                resume=resume,
                overwrite=overwrite,
            )
        )
        if processes.rank == 0 and say:
            say(ensemble.describe())
            if len(work.left) < len(work.cases):
                say(f"{len(work.cases) - len(work.left)} of {counted(len(work.cases), 'mask')} are there already.")
        rows, failures = _do_share(ensemble, work, out, options, processes, progress)
        return _collect(work, out, rows, failures, processes)


def _cases(data: str | os.PathLike, ensemble: Ensemble, split: str | os.PathLike | None, layout: str) -> list[Case]:
    """The cases of a data set, or those of the test part of a split."""
    cases, _ = list_cases(data, ensemble.contrasts, layout=layout)
    there = {name for case in cases for name in (*case.images, *case.several)}
    if missing := [name for name in ensemble.contrasts if name not in there]:
        raise ValueError(
            f"No case of {data} has a {' or a '.join(missing)}, but the model takes {' '.join(ensemble.contrasts)}: "
            "give a model of the contrasts that there are, or name them in a .csv."
        )
    return cases if split is None else read_test_part(split, cases)


def describe_maker(ensemble: Ensemble, options: Options) -> str:
    """The models and settings that decide a mask, in one line."""
    words = [
        f"{Path(member.name).resolve()}{f' (sha256 {member.sha256[:12]})' if member.sha256 else ''}"
        for member in ensemble.members
    ]
    words.append(f"threshold {options.threshold:g}")
    if options.min_lesion_mm3:
        words.append(f"lesions from {options.min_lesion_mm3:g} mm³")
    words += ["registered"] * options.register
    first = ensemble.members[0]
    words += ["mirror images"] * first.flips + ["whole brain"] * first.whole_brain
    return ", ".join(words + [f"window {sizes(member.roi)}" for member in ensemble.members])


def mask_path(case: Case, out: Path) -> Path:
    """The mask of a case in a folder: in the tree of BIDS, if the case is from there."""
    return out / case.place / MASK_NAME.format(case=case.id)


def _plan(
    cases: list[Case],
    data: Path,
    out: Path,
    options: Options,
    contrasts: Sequence[str],
    made_by: str,
    *,
    resume: bool,
    overwrite: bool,
) -> Work:
    """Looks at what the folder holds, before anything is computed, and makes it ready."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder for the masks.")
    files = {case.id: options.files(mask_path(case, out), contrasts).values() for case in cases}
    derivatives = any(case.place for case in cases)
    if derivatives and (out / DESCRIPTION).exists() and not is_predicted(out):
        raise ValueError(
            f"{out} is another data set, by its {DESCRIPTION}: give the masks a folder of their own, for example "
            f"{data / 'derivatives' / 'rsanet'}."
        )
    present = [case.id for case in cases if any(file.exists() for file in files[case.id])]
    if present and not (resume or overwrite):
        some = ", ".join(present[:3]) + (", ..." if len(present) > 3 else "")
        raise ValueError(
            f"{out} already has files of {len(present)} of {counted(len(cases), 'case')} ({some}): give --resume to do "
            "the others, --overwrite to replace them, or another folder."
        )
    rows = {row.case: row for row in _read_tables(out, lenient=overwrite) if row.mask and (out / row.mask).exists()}
    done = {name for name in files if resume and name in rows and all(file.exists() for file in files[name])}
    if others := {rows[name].made_by for name in done} - {made_by}:
        raise ValueError(
            f"{out} has masks of {others.pop()}, and --resume would add some of {made_by}: give the same model and "
            "options, --overwrite to replace them, or another folder."
        )
    work = Work(
        cases,
        {name: row for name, row in rows.items() if name in done or name not in files},
        [case for case in cases if case.id not in done],
        made_by,
    )
    out.mkdir(parents=True, exist_ok=True)
    check_writable(out / TABLE)
    for folder in {out, *(file.parent for paths in files.values() for file in paths)}:
        remove_stale(folder)
    if derivatives:
        describe_derivatives(out, data)
    parts = list(out.glob(PART.format(rank="*")))
    if parts and work.rows:
        _write_table(out / TABLE, work.rows)
    for part in parts:
        part.unlink()
    return work


def _do_share(
    ensemble: Ensemble,
    work: Work,
    out: Path,
    options: Options,
    processes: Processes,
    progress: Callable[[int, int, Prediction | str], None] | None,
) -> tuple[dict[str, Row], dict[str, str]]:
    """Predicts this process's share of the cases: the rows, and the reason for each case without one."""
    first = processes.rank == 0
    table = out / (TABLE if first else PART.format(rank=processes.rank))
    rows: dict[str, Row] = {}
    failures: dict[str, str] = {}
    numbers = {case.id: number for number, case in enumerate(work.cases, start=1)}
    prepare = partial(ensemble.prepare, registered=options.register)
    for case, reading in read_ahead(prepare, work.left[processes.rank :: processes.size]):
        result: Prediction | str
        try:
            result = predict_case(ensemble, reading.result(), mask_path(case, out), options)
        except (ValueError, OSError) as error:
            known = isinstance(error, OSError) and error.strerror
            result = f"{error.filename}: {error.strerror.lower()}." if known else str(error)
            if mask_path(case, out).exists():  # whoever evaluates the folder would take it for a new one
                result += f" {mask_path(case, out)} {EARLIER}"
            failures[case.id] = result
        else:
            rows[case.id] = Row.of(result, work.made_by, out)
            _write_table(table, {**work.rows, **rows} if first else rows)
        if progress:
            progress(numbers[case.id], len(work.cases), result)
    return rows, failures


def read_ahead(read: Callable[[Case], Prepared], cases: Sequence[Case]) -> Iterator[tuple[Case, Future[Prepared]]]:
    """Reads each case in another thread while the one before it is computed; never more than one ahead."""
    with ThreadPoolExecutor(1) as reader:
        upcoming = None
        for case, after in zip_longest(cases, cases[1:]):
            current = upcoming or reader.submit(read, case)
            upcoming = after and reader.submit(read, after)
            yield case, current


def _collect(
    work: Work, out: Path, rows: dict[str, Row], failures: dict[str, str], processes: Processes
) -> tuple[list[Row], dict[str, str]]:
    """Writes one table of all processes' rows, which takes the place of their parts."""
    every = processes.gather((rows, failures))
    rows, failures = dict(work.rows), {}
    for theirs, reasons in every:
        rows |= theirs
        failures |= reasons
    if processes.rank == 0 and processes.size > 1:
        if rows:
            _write_table(out / TABLE, rows)
        for part in out.glob(PART.format(rank="*")):
            part.unlink()
    processes.wait()
    names = [case.id for case in work.cases]
    return [rows[name] for name in names if name in rows], {name: failures[name] for name in names if name in failures}


def _write_table(path: Path, rows: Mapping[str, Row]) -> None:
    write_csv(path, [asdict(rows[name]) for name in sorted(rows)])


def _read_tables(folder: Path, *, lenient: bool) -> Iterator[Row]:
    """The rows that runs into a folder have left; with ``lenient`` a table that is none has no rows."""
    columns = [entry.name for entry in fields(Row)]
    for path in (folder / TABLE, *folder.glob(PART.format(rank="*"))):
        if not path.is_file():
            continue
        try:
            with path.open(**ENCODING, newline="") as file:
                lines = csv.DictReader(file)
                rows = list(lines)
            if lines.fieldnames not in (columns, columns[:-1]):  # the last one came later
                raise ValueError("other columns")
            found = [
                Row(
                    **{
                        **row,
                        "lesions": int(row["lesions"]),
                        **{key: float(row[key]) for key in ("load_mm3", "seconds")},
                    }
                )
                for row in rows
            ]
        except (ValueError, TypeError, csv.Error) as error:
            if lenient:
                continue
            raise ValueError(
                f"{path} is not a table of rsanet predict: give another folder, or --overwrite to replace it."
            ) from error
        yield from found
