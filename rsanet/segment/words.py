"""Words of messages that several places use, and the warning that tells of data."""

from collections.abc import Sequence


class DataWarning(UserWarning):
    """Something in the data that the user should know of and that stops nothing."""


def counted(number: int, noun: str) -> str:
    """A number with its noun: ``1 lesion``, ``2 lesions``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def sizes(shape: Sequence[int]) -> str:
    """The sizes of a volume: ``182×218×182``."""
    return "×".join(map(str, shape))


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few of many names."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
