"""Random numbers by name: what one thing draws leaves every other as it is."""

import zlib

import numpy as np


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """A generator of its own for each name of a seed, such as ``stream(seed, "noise", 1, "FLAIR")``."""
    numbers = [zlib.crc32(name.encode()) if isinstance(name, str) else name for name in names]
    return np.random.default_rng([seed, *numbers])


def subject_seed(seed: int, number: int) -> int:
    """The seed of subject ``number`` (from 1) of a cohort, whatever the size of the cohort."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
