"""Which backends there are, which one runs a volume, and the sentence that says why another does not.

A reason is one text wherever it appears: in :func:`available_backends`, in an :class:`Explanation`, and in the error
that an explicit choice raises.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from rsa_kernels import folded, reference

AUTO = "auto"
ENVIRONMENT_VARIABLE = "RSA_KERNELS_BACKEND"

_MODULES: dict[str, ModuleType] = {"torch": folded, "reference": reference}

# Plain values of the process, not of a thread: the compiler can then guard on them, and backward passes, which run on
# threads of their own, need not look. Each choice is a list of one name, so that it can be told from its equals.
_choices: list[list[str]] = []
_environment = os.environ.get(ENVIRONMENT_VARIABLE) or AUTO


def available_backends() -> dict[str, str | None]:
    """Every backend of this package.

    Returns:
        Name to ``None`` where the backend is usable on this machine, else to the reason in a sentence.
    """
    return dict.fromkeys(_MODULES)


def known(name: object, source: str = "backend") -> str:
    """Returns a backend's name, or raises ValueError if there is none of that name."""
    if not isinstance(name, str) or (name != AUTO and name not in _MODULES):
        raise ValueError(f"{source} is {name!r}, but must be one of {', '.join([AUTO, *_MODULES])}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Chooses the backend of every call inside the ``with`` block that does not name one itself.

    Blocks nest, and a choice ends with its block, by an exception too. The choice holds for the whole
    process, all threads. A backward pass runs on the backend of its forward pass, wherever it is called.

    Args:
        name: a key of :func:`available_backends`, or ``"auto"``.

    Raises:
        ValueError: if there is no backend of that name.
    """
    choice = [known(name)]
    _choices.append(choice)
    try:
        yield
    finally:
        # Blocks of several threads may end in any order.
        _choices[:] = [other for other in _choices if other is not choice]


def requested(argument: str | None) -> str:
    """The name in force: the argument, then :func:`use_backend`, then the environment variable, then ``auto``.

    The environment variable counts as it was when the package was imported.
    """
    if argument is not None:
        return known(argument)
    if _choices:
        return _choices[-1][0]
    return known(_environment, f"the environment variable {ENVIRONMENT_VARIABLE}")


def load(name: str, x: Tensor, axes: Sequence[int] = ()) -> ModuleType:
    """The module that runs ``x``: the one that was asked for, or the one that is best for these axes of a block."""
    if name == AUTO:
        name = choose(x, axes).backend if axes else next(iter(_MODULES))
    return _MODULES[name]


@dataclass(frozen=True)
class Explanation:
    """The backend that ``auto`` chooses for a volume, and why each other one is not chosen."""

    backend: str
    others: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.backend}: runs this volume"]
        return "\n".join(lines + [f"{name}: {reason}" for name, reason in self.others.items()])


def choose(x: Tensor, axes: Sequence[int | str]) -> Explanation:
    """The backend for a volume, by rules that the benchmarks justify."""
    channels, voxels = x.shape[1], x.numel() // x.shape[1]
    if voxels * len(axes) < channels:
        return Explanation(
            "reference",
            {"torch": f"folding the weights of {channels} channels costs more than it saves on {voxels} voxels"},
        )
    return Explanation("torch", {"reference": "makes three projections and three rearranged copies a step"})
