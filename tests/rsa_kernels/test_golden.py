"""Outputs and gradients equal those of the published code, in float64, to 1e-10."""

import numpy as np
import pytest
import torch
from support import BACKENDS, FORMATS, GOLDEN, WEIGHTS, golden_block, golden_tensor

from rsa_kernels import recurrent_slice_attention, slice_attention

BLOCKS = {"rsa_small": ("rsa_block_small.npz", (2, 8, 5, 6, 7)), "rsa_odd": ("rsa_block_odd.npz", (1, 12, 9, 3, 11))}
KEYS = ("x", *WEIGHTS, "betas.0", "betas.1", "betas.2")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("stem", BLOCKS)
def test_block_and_every_gradient_equal_the_published_ones(stem, recompute, memory_format, backend):
    file, shape = BLOCKS[stem]
    golden = np.load(GOLDEN / file)
    x = golden_tensor(f"{stem}.x", shape).contiguous(memory_format=memory_format)
    leaves = [tensor.requires_grad_() for tensor in (x, *golden_block(shape[1]))]
    y = recurrent_slice_attention(leaves[0], *leaves[1:7], leaves[7:], recompute=recompute, backend=backend)
    y.backward(golden_tensor(f"{stem}.gy", shape))
    torch.testing.assert_close(y, torch.from_numpy(golden["y"]), rtol=0, atol=1e-10)
    for key, leaf in zip(KEYS, leaves, strict=True):
        torch.testing.assert_close(leaf.grad, torch.from_numpy(golden[f"grad.{key}"]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_slice_attention_and_every_gradient_equal_the_published_ones(axis, memory_format, backend):
    golden = np.load(GOLDEN / "slice_attention_small.npz")
    shape = (2, 6, 5, 4, 7)
    leaves = [
        (0.3 * golden_tensor(f"sa_small.{axis}.{name}", shape)).contiguous(memory_format=memory_format).requires_grad_()
        for name in "qkv"
    ]
    y = slice_attention(*leaves, axis, backend=backend)
    y.backward(golden_tensor(f"sa_small.{axis}.gy", shape))
    torch.testing.assert_close(y, torch.from_numpy(golden[f"{axis}.y"]), rtol=0, atol=1e-10)
    for name, leaf in zip("qkv", leaves, strict=True):
        torch.testing.assert_close(leaf.grad, torch.from_numpy(golden[f"{axis}.grad.{name}"]), rtol=0, atol=1e-10)
