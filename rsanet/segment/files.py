"""Files that appear whole or not at all."""

import csv
import os
import re
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Whatever the locale; a path may have bytes that are no text, which stay as they are.
ENCODING: Mapping[str, str] = {"encoding": "utf-8", "errors": "surrogateescape"}


def check_writable(path: Path) -> None:
    """Refuses a file name in a folder that can neither be written nor made."""
    folder = next(folder for folder in path.absolute().parents if folder.exists() or folder.is_symlink())
    shown = path.parent if folder == path.absolute().parent else folder
    if not folder.is_dir():
        raise ValueError(f"{shown} is a file: give a folder for {path.name}.")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the name of a file.")
    if path.exists() and not path.is_file():  # it would be replaced, not written to
        raise ValueError(f"{path} is a device or a pipe: give the name of a file.")
    if not os.access(shown, os.W_OK):
        raise ValueError(f"{shown} is not writable: choose another folder for {path.name}.")


def check_new(path: Path, *, overwrite: bool = False) -> None:
    """Refuses a file name that cannot be written, or one that is taken where nothing may be lost."""
    check_writable(path)
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists: give another name, or --overwrite to replace it.")


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``, put in its place on success and removed otherwise, with folders made for it."""
    check_writable(path)
    # The name keeps its end: writers choose the format by it, and `.nii.gz` is more than a suffix. nibabel writes
    # `.Nii.gz` under another name than that it is given.
    partial = path.with_name(f".partial-{socket.gethostname()}-{os.getpid()}-{path.name.lower()}")
    try:
        with parents_made(path):
            try:
                yield partial
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        if error.strerror is None:
            raise
        # A full disk names no file, and another error names the temporary one.
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def parents_made(path: Path) -> Iterator[None]:
    """Makes the folders that a path is in; what was made goes again where nothing comes to lie in it."""
    made = [folder for folder in path.absolute().parents if not folder.exists()]
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in made:
            try:
                folder.rmdir()
            except OSError:  # something lies in it
                break
        raise


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path``, for a folder, or a file that holds its own name, to be moved from there."""
    try:
        with (
            parents_made(path),
            tempfile.TemporaryDirectory(prefix=f".unfinished-{path.name}-", dir=path.absolute().parent) as folder,
        ):
            yield Path(folder)
    except OSError as error:
        if error.strerror is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def remove_stale(folder: Path) -> None:
    """Removes what killed processes of this machine left half-written in a folder."""
    for path in folder.glob(".partial-*"):
        owner = re.match(rf"\.partial-{re.escape(socket.gethostname())}-(\d+)-", path.name)
        if owner and not _is_running(int(owner[1])):
            path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    if os.name != "posix":
        return True  # there, asking would end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # someone else's
    return True


def write_text(path: Path, text: str) -> None:
    """Writes a text in UTF-8."""
    with written_beside(path) as partial:
        partial.write_text(text, **ENCODING)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows under the keys of the first, in UTF-8."""
    with written_beside(path) as partial, partial.open("w", **ENCODING, newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
