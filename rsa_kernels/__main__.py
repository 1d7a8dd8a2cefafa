"""``python -m rsa_kernels``: what runs here; with ``--check``, whether it is right."""

import argparse
import platform
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from rsa_kernels import available_backends, recurrent_slice_attention, reference
from rsa_kernels.folding import Projections

# Bounds on ||result - exact|| / ||exact||, the worst of the output and all gradients.
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 5e-2}
SHAPES = ((2, 8, 5, 6, 7), (1, 12, 9, 3, 11), (1, 32, 17, 16, 18), (3, 1, 2, 1, 4))
FORMATS = {"contiguous": torch.contiguous_format, "channels_last_3d": torch.channels_last_3d}


def report() -> str:
    """Versions, devices and backends, a line each."""
    lines = [
        f"python {platform.python_version()} · torch {torch.__version__} · {platform.system()} {platform.machine()}",
        f"cpu: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
    ]
    for index in range(torch.cuda.device_count()):
        lines.append(f"gpu {index}: {torch.cuda.get_device_name(index)}")
    if not torch.cuda.is_available():
        lines.append("gpu: none that torch can use")
    lines += [f"backend {name}: {reason or 'usable'}" for name, reason in available_backends().items()]
    return "\n".join(lines)


def _leaves(shape: tuple[int, ...], device: str, seed: int) -> list[Tensor]:
    """A volume, the weights and the betas of a block, in float64, with logits of a few tens at most."""
    generator = torch.Generator().manual_seed(seed)
    channels = shape[1]
    weights = [(channels, channels), (channels,)] * 3
    tensors = [
        torch.randn(size, generator=generator, dtype=torch.float64) for size in (shape, *weights, (3,))
    ]
    for index in (1, 3, 5):
        tensors[index] *= 0.3 / channels**0.5
    return [tensor.to(device) for tensor in tensors]


def _differences(
    block: Callable[..., Tensor], leaves: list[Tensor], exact: list[Tensor], upstream: Tensor
) -> float:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = block(*leaves)
    results = [out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]
    worst = 0.0
    for result, truth in zip(results, exact, strict=True):
        error = (result.double() - truth).norm() / truth.norm().clamp_min(1e-6)
        worst = max(worst, error.item() if torch.isfinite(result).all() else float("inf"))
    return worst


def check(device: str) -> bool:
    """Compares every usable backend with the reference in float64, forward and backward; prints a line each."""
    fine = True
    for name, reason in available_backends().items():
        if reason is not None:
            continue
        for dtype, tolerance in TOLERANCES.items():
            start, worst = time.perf_counter(), 0.0
            for seed, shape in enumerate(SHAPES):
                rounded = [leaf.to(dtype) for leaf in _leaves(shape, device, seed)]
                upstream = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
                truths = [leaf.double().requires_grad_() for leaf in rounded]
                out, _, _ = reference.recurrent_slice_attention(
                    truths[0], Projections(*truths[1:7]), truths[7]
                )
                exact = [out, *torch.autograd.grad(out, truths, upstream.to(dtype).double())]
                exact[5] = torch.zeros_like(exact[5])  # phi_bias cancels in the softmax
                for memory_format in FORMATS.values():
                    rounded[0] = rounded[0].contiguous(memory_format=memory_format)
                    worst = max(
                        worst,
                        _differences(
                            lambda x, *rest, name=name: recurrent_slice_attention(
                                x, *rest[:6], rest[6], backend=name
                            ),
                            rounded,
                            exact,
                            upstream,
                        ),
                    )
            good = worst <= tolerance
            fine &= good
            print(
                f"{'ok  ' if good else 'FAIL'} {name} on {device}, {str(dtype).removeprefix('torch.')}: "
                f"error {worst:.1e} (at most {tolerance:.0e}), {time.perf_counter() - start:.2f} s"
            )
    return fine


def main() -> int:
    """Prints the report; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m rsa_kernels", description="What runs here, and whether it is right."
    )
    parser.add_argument(
        "--check", action="store_true", help="compare every usable backend with the reference"
    )
    arguments = parser.parse_args()
    print(report())
    if not arguments.check:
        return 0
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    # Every device is checked, whatever the first one says.
    return 0 if all([check(device) for device in devices]) else 1


if __name__ == "__main__":
    sys.exit(main())
