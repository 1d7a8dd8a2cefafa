"""Words of messages that several places use, and the warning that tells of data."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_noted: ContextVar[dict[str, None] | None] = ContextVar("noted", default=None)


class DataWarning(UserWarning):
    """Something in the data that the user should know of and that stops nothing. `noted` keeps what it says."""

    def __init__(self, *words: Any) -> None:
        super().__init__(*words)
        kept = _noted.get()
        if kept is not None:
            kept[str(self)] = None


@contextmanager
def noted() -> Iterator[dict[str, None]]:
    """Within it the sentences of every `DataWarning` of this thread are kept, in order and once each, as keys.

    Python makes a warning before it asks its filters, so that one is kept, too, that was shown before or is not shown.
    """
    kept: dict[str, None] = {}
    token = _noted.set(kept)
    try:
        yield kept
    finally:
        _noted.reset(token)


def counted(number: int, noun: str) -> str:
    """A number with its noun: ``1 lesion``, ``2 lesions``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def sizes(shape: Sequence[int]) -> str:
    """The sizes of a volume: ``182×218×182``."""
    return "×".join(map(str, shape))


def listed(words: Sequence[str]) -> str:
    """A list in a sentence: ``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few of many names."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
