"""``python -m rsa_kernels``: what runs here; with ``--check``, whether it is right."""

import argparse
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rsa_kernels import available_backends, recurrent_slice_attention, reference
from rsa_kernels.backends import cannot_run, interpreted, triton_is_missing
from rsa_kernels.folding import Projections

# What a backend's error may be besides twice that of the published equations in the same precision.
FLOORS = {torch.float64: 1e-10, torch.float32: 1e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
SHAPES = ((2, 8, 5, 6, 7), (1, 12, 9, 3, 11), (1, 32, 17, 16, 18), (3, 4, 2, 1, 4))


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
    tensors = [torch.randn(size, generator=generator, dtype=torch.float64) for size in (shape, *weights, (3,))]
    for index in (1, 3, 5):
        tensors[index] *= 0.3 / channels**0.5
    return [tensor.to(device) for tensor in tensors]


def _published(x: Tensor, *tensors: Tensor) -> Tensor:
    return reference.recurrent_slice_attention(x, Projections(*tensors[:6]), tensors[6])[0]


def _results(block: Callable[..., Tensor], leaves: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """The output and all gradients but that of ``phi_bias``, whose truth is zero: it has no relative error."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = block(*leaves)
    grads = torch.autograd.grad(out, leaves, upstream.to(out.dtype))
    return [out.detach(), *grads[:4], *grads[5:]]


def _errors(results: list[Tensor], truths: list[Tensor]) -> list[float]:
    """``||result - truth|| / ||truth||`` of each, infinite where a result is not finite."""
    errors = [
        ((result.double() - truth).norm() / truth.norm()).item() for result, truth in zip(results, truths, strict=True)
    ]
    return [error if math.isfinite(error) else math.inf for error in errors]


def _check_one(backend: str, dtype: torch.dtype, device: str) -> tuple[float, float]:
    """The backend's worst error, and its worst share of the error that it may make."""
    worst = share = 0.0
    for seed, shape in enumerate(SHAPES):
        leaves = [leaf.to(dtype) for leaf in _leaves(shape, device, seed)]
        upstream = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
        truths = _results(_published, [leaf.double() for leaf in leaves], upstream.double())
        budgets = [2 * error + FLOORS[dtype] for error in _errors(_results(_published, leaves, upstream), truths)]
        for memory_format in (torch.contiguous_format, torch.channels_last_3d):
            leaves[0] = leaves[0].contiguous(memory_format=memory_format)
            results = _results(
                lambda x, *tensors: recurrent_slice_attention(x, *tensors, backend=backend), leaves, upstream
            )
            errors = _errors(results, truths)
            worst = max(worst, *errors)
            share = max(share, *(error / budget for error, budget in zip(errors, budgets, strict=True)))
    return worst, share


def check(device: str, dtypes: Sequence[torch.dtype] = tuple(FLOORS)) -> bool:
    """Compares every usable backend with the published equations in float64, forward and backward."""
    fine = True
    volume = torch.empty((1,) * 5, device=device)
    for name in available_backends():
        for dtype in dtypes if cannot_run(name, volume) is None else ():
            start = time.perf_counter()
            worst, share = _check_one(name, dtype, device)
            fine &= share <= 1
            print(
                f"{'ok  ' if share <= 1 else 'FAIL'} {name} on {device}, {str(dtype).removeprefix('torch.')}: worst "
                f"relative error {worst:.1e}, {share:.0%} of what it may be, {time.perf_counter() - start:.2f} s"
            )
    return fine


def tune(shape: Sequence[int], dtype: str, output: Path) -> int:
    """Measures the Triton kernels' tilings for a volume, and writes a launch table; returns the exit status."""
    reason = triton_is_missing() or (interpreted() and "is interpreted here: unset TRITON_INTERPRET") or None
    if reason is None and (len(shape) != 5 or min(shape) < 1):
        reason = f"is tuned for a volume N C D H W, not {shape}: give five sizes of at least 1"
    if reason:
        print(f"the triton backend {reason}", file=sys.stderr)
        return 1
    from rsa_kernels.triton.tune import tune as measure
    from rsa_kernels.triton.tune import write
    from rsa_kernels.triton.tuning import ENVIRONMENT_VARIABLE

    table = measure(shape, getattr(torch, dtype), f"cuda:{torch.cuda.current_device()}", print)
    write(table, output)
    count = sum(map(len, table.values()))
    print(f"{output}: {count} entries beat the table; use them with {ENVIRONMENT_VARIABLE}={output}")
    return 0


def main() -> int:
    """Prints the report; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m rsa_kernels", description="What runs here, and whether it is right."
    )
    parser.add_argument("--check", action="store_true", help="compare every usable backend with the reference")
    commands = parser.add_subparsers(dest="command", metavar="{tune}")
    tuner = commands.add_parser(
        "tune", help="measure the Triton kernels' tilings on this GPU, and write a launch table"
    )
    tuner.add_argument("--shape", type=int, nargs=5, required=True, metavar=("N", "C", "D", "H", "W"))
    tuner.add_argument("--dtype", choices=["bfloat16", "float16", "float32", "float64"], default="bfloat16")
    tuner.add_argument("-o", "--output", type=Path, default=Path("rsa_kernels_table.json"))
    arguments = parser.parse_args()
    if arguments.command == "tune":
        return tune(arguments.shape, arguments.dtype, arguments.output)
    print(report())
    if not arguments.check:
        return 0
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    verdicts = [check(device) for device in devices]
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
