"""Lesion segmentation from files to scores, from Python as from the command. Needs the extra ``segment``.

``train``, ``predict``, ``evaluate`` and ``simulate`` do what the verbs of the ``rsanet`` command do, and
``predict_cohort`` what ``rsanet predict --data`` does. They load when they are first used, so that importing this
package takes no time.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "simulate": "simulation",
    "train": "training",
    "predict": "prediction",
    "predict_cohort": "cohort",
    "evaluate": "evaluation",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """The function of a verb, from its module."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
