"""The compiled extensions: loaded at the first question about them, and explained where they cannot be.

Whether an extension was built, for what, and why not, ``setup.py`` notes in a file beside this one.
"""

import json
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch  # loads the libraries that the extensions link to: they look for them nowhere else

INSTALL = "pip install --no-build-isolation ."

# By the name of the backend: what it is called in a sentence, and where it is.
_EXTENSIONS = {"cpp": ("C++", "rsa_kernels._cpp"), "cuda": ("CUDA", "rsa_kernels._cuda")}
_NOTE = Path(__file__).with_name("_built.json")

# No lock, which a fork could leave shut for ever: threads that ask at once come to the same answer, and the import
# system lets one of them load.
_reasons: dict[str, str | None] = {}


def missing(name: str) -> str | None:
    """Why the extension of a backend cannot be used, in a sentence that follows on "it"; None once it is loaded.

    The first call loads the extension, and the later ones cost a look into a dictionary.

    Args:
        name: ``"cpp"`` or ``"cuda"``. A CUDA extension loads without a GPU, too.
    """
    try:
        return _reasons[name]
    except KeyError:
        return _reasons.setdefault(name, _load(name))


def _load(name: str) -> str | None:
    language, extension = _EXTENSIONS[name]
    try:
        import_module(extension)
    except ModuleNotFoundError as error:
        if error.name == extension:
            return _is_absent(name, language)
        return _does_not_load(name, error)
    except Exception as error:
        return _does_not_load(name, error)
    return None


def _is_absent(name: str, language: str) -> str:
    note = _note(name)
    if "cause" in note:
        return f"needs the {language} extension, which was not built ({note['cause']}): {note.get('remedy', INSTALL)}"
    if note:
        return f"needs the {language} extension, which was built for {_target(note)} and is not here: {INSTALL}"
    wanted = "a C++17 compiler" if name == "cpp" else "CUDA's nvcc"
    return f"needs the {language} extension, which was not built: {INSTALL} with {wanted}"


def _does_not_load(name: str, error: Exception) -> str:
    cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
    cause = cause.removeprefix(f"{getattr(error, 'path', None)}: ")
    note = _note(name)
    built = f"was built for {_target(note)} and" if note and "cause" not in note else "was built, but"
    return f"{built} does not load with torch {torch.__version__} ({cause}): build it again with {INSTALL}"


def _target(note: dict[str, Any]) -> str:
    """What an extension was built for, as far as the note says."""
    parts = [f"torch {note.get('torch', 'of an unknown version')}"]
    parts += [f"with {note['compiler']}"] if "compiler" in note else []
    parts += [f"on {note['platform']}"] if "platform" in note else []
    return " ".join(parts)


@lru_cache(maxsize=1)
def _notes() -> dict[str, Any]:
    try:
        notes = json.loads(_NOTE.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return notes if isinstance(notes, dict) else {}


def _note(name: str) -> dict[str, Any]:
    note = _notes().get(name)
    return note if isinstance(note, dict) else {}
