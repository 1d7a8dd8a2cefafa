"""Skips what needs a GPU where there is none, and keeps one test's memory from the next."""

import gc

import pytest
import torch
from gpu.device import DRY_RUN


@pytest.fixture(autouse=True)
def needs_a_gpu():
    if not (DRY_RUN or torch.cuda.is_available()):
        pytest.skip("needs a CUDA GPU; torch finds none")
    yield
    if torch.cuda.is_available() and torch.cuda.memory_reserved() > 2**33:
        gc.collect()
        torch.cuda.empty_cache()
