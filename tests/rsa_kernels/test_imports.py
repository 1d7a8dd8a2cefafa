"""The core needs torch alone: imports and runs in fresh processes where optional packages are blocked."""

import subprocess
import sys

import pytest

OPTIONAL = (
    "triton",
    "numpy",
    "monai",
    "nibabel",
    "scipy",
    "lightning",
    "typer",
    "matplotlib",
    "safetensors",
    "nilearn",
)

PROGRAM = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError("blocked: " + name, name=name)
sys.meta_path.insert(0, Blocker())
import torch, rsa_kernels
x = torch.randn(1, 3, 4, 5, 2, requires_grad=True)
rsa_kernels.slice_attention(x, x, x, "axial").sum().backward()
assert x.grad.isfinite().all()
print("ran")
"""


@pytest.mark.parametrize("blocked", [("triton",), OPTIONAL], ids=["triton", "all"])
def test_the_core_runs_without(blocked):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(blocked=blocked)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "ran\n", done.stderr


def test_importing_the_core_loads_no_optional_package():
    program = "import sys, torch; before = set(sys.modules); import rsa_kernels; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    # Triton, where installed, is loaded by torch's own FLOP counter, which has to be told our formulas.
    loaded = set(done.stdout.split()) - {"triton"}
    assert "rsa_kernels.ops" in loaded
    assert loaded.isdisjoint(OPTIONAL)
