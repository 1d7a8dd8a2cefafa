"""What other programs say of the kernels on a GPU: compute-sanitizer, and the package's own check."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gpu.device import KERNELS, asks_cuda

pytestmark = asks_cuda

ROOT = Path(__file__).parents[2]
SECONDS = 120
# Sizes that leave a rest in every tile, on either side of each choice of kernels.
SANITIZED = """
import sys, torch
from rsa_kernels import recurrent_slice_attention, slice_attention
shapes = [(1, 3, 17, 3, 2), (2, 20, 5, 33, 3), (1, 32, 3, 5, 65), (1, 200, 3, 4, 35)]
for dtype, shape in [*((torch.bfloat16, shape) for shape in shapes), (torch.float32, shapes[1])]:
    for memory_format in (torch.contiguous_format, torch.channels_last_3d):
        x = torch.randn(shape, device="cuda", dtype=dtype).contiguous(memory_format=memory_format)
        weights = [torch.randn(size).to(x) / 9 for size in [(shape[1],) * 2, (shape[1],)] * 3]
        leaves = [leaf.requires_grad_() for leaf in (x, *weights, torch.ones(3).to(x))]
        recurrent_slice_attention(*leaves, backend=sys.argv[1]).sum().backward()
        slice_attention(x, x, x, 3, backend=sys.argv[1]).sum().backward()
torch.cuda.synchronize()
print("done")
"""


def run(*command, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="needs compute-sanitizer on the PATH")
def test_no_kernel_touches_memory_that_is_not_its_own(backend):
    python = [sys.executable, "-c", SANITIZED, backend]
    assert run(*python).stdout.endswith("done\n"), "compiles the kernels, unsanitized, into Triton's cache"
    options = ["--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "3", "--print-limit", "20"]
    try:
        # Without PyTorch's cache of memory every tensor is an allocation of its own, with bounds that are checked.
        result = run("compute-sanitizer", *options, *python, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    except subprocess.TimeoutExpired:
        pytest.skip(f"compute-sanitizer took longer than {SECONDS} s")
    if "not supported" in result.stdout and "ERROR SUMMARY" not in result.stdout:
        pytest.skip("compute-sanitizer does not support this device")
    assert result.returncode == 0, result.stdout[-4000:]
    assert "ERROR SUMMARY: 0 errors" in result.stdout


def test_the_package_finds_every_backend_right():
    result = run(sys.executable, "-m", "rsa_kernels", "--check")
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    assert all(f"ok   {name} on cuda" in result.stdout for name in KERNELS)
