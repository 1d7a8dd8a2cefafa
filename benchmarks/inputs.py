"""What a block is given, one pass of it, and how far it is from float64."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import BLOCK_AXES, DTYPES, FORMATS, Case
from benchmarks.devices import Pass
from benchmarks.providers import Block, Provider
from benchmarks.published import published
from rsa_kernels import recurrent_slice_attention
from rsa_kernels.__main__ import FLOORS

GRADIENT_OF_PHI_BIAS = 5  # is exactly zero, so that no relative error says anything
# With more elements than this the published equations take too long in float64: the folded ones, which tests hold
# against them to 1e-13, are the truth; and with still more the error is found on a part of the volume.
MOST_PUBLISHED, MOST_EXACT, PART = 1 << 21, 1 << 26, 64


def grade(tensors: list[Tensor], gain: float = 1.0) -> list[Tensor]:
    """Scales the query projection so that maps are graded, neither flat nor one-hot, whatever the size.

    The logits of random volumes grow with the number of positions; where they are hundreds, a softmax in half
    precision is noise, and no error says much.

    Args:
        tensors: a volume, six weights and the betas.
        gain: of the key and query projections, relative to ``1 / sqrt(C)``.
    """
    x, theta_weight, theta_bias, *rest = tensors
    positions = x[0, 0].numel() // min(x.shape[2:])
    scale = 4 / gain**2 / math.sqrt(positions * max(positions, x.shape[1]))
    return [x, theta_weight * scale, theta_bias * scale, *rest]


def block_inputs(case: Case, device: str, provider: Provider | None = None) -> list[Tensor]:
    """A volume, six weights and the betas, as a provider wants them."""
    # On the device itself: a processor would take longer to make and to send them than a GPU to run the block.
    generator = torch.Generator(device).manual_seed(0)
    random = partial(torch.randn, generator=generator, device=device)
    channels, dtype = case.shape[1], DTYPES[case.dtype][0]
    tensors = [random(case.shape).contiguous(memory_format=FORMATS[case.memory_format])]
    for _ in range(3):
        tensors.append(random(channels, channels) * 0.3 / channels**0.5)
        tensors.append(random(channels) * 0.1)
    x, *weights = grade([*tensors, torch.full((len(case.axes),), 0.5, device=device)], gain=0.3)
    precision = (provider.weights if provider else None) or dtype
    # Rounded to the volume's dtype first, so that all providers are given the same numbers.
    return [x.to(dtype), *(weight.to(dtype).to(precision) for weight in weights)]


def upstream_gradient(case: Case, device: str) -> Tensor:
    """The gradient that a network hands back: in the memory format that it got the volume in."""
    grad = torch.randn(case.shape, generator=torch.Generator(device).manual_seed(1), device=device)
    return grad.contiguous(memory_format=FORMATS[case.memory_format]).to(DTYPES[case.dtype][0])


def run(
    block: Block,
    tensors: Sequence[Tensor],
    upstream: Tensor,
    mode: str,
    mark: Pass = lambda: None,
    axes: Sequence[int] = BLOCK_AXES,
) -> list[Tensor]:
    """One pass; returns the output, and the gradients in mode ``full``, where ``mark`` is called between the two."""
    if mode == "no_grad":
        with torch.no_grad():
            return [block(*tensors, axes=axes)]
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = block(*leaves, axes=axes)
    mark()
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream, allow_unused=True, materialize_grads=True)]


def truths(block: Block, tensors: Sequence[Tensor], upstream: Tensor, axes: Sequence[int]) -> list[Tensor]:
    """Output and gradients of a function in float64."""
    return run(block, [tensor.double() for tensor in tensors], upstream.double(), "full", axes=axes)


def exact_block(size: int) -> Block:
    """The function that tells the truth on a volume with so many elements."""
    return published if size <= MOST_PUBLISHED else partial(recurrent_slice_attention, backend="torch")


def errors(results: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Relative errors of the output and of each gradient; infinite where anything is not finite, 0 of a true zero."""
    found = []
    for index, (result, truth) in enumerate(zip(results, exact, strict=False)):
        if index == GRADIENT_OF_PHI_BIAS or (size := truth.norm().item()) == 0:
            found.append(0.0)
            continue
        error = ((result.double() - truth).norm() / size).item()
        found.append(error if math.isfinite(error) else math.inf)
    return found


def part_of(case: Case, provider: Provider) -> Case:
    """The case, or a part of it that float64 can afford: a corner of the volume."""
    if not provider.same:
        side = 8
    elif math.prod(case.shape) > MOST_EXACT:
        side = PART
    else:
        return case
    return case._replace(shape=(*case.shape[:2], *(min(side, size) for size in case.shape[2:])))


def least_allowed(dtype: str) -> float:
    """The error that a provider may have where eager PyTorch has none, for a name of ``DTYPES``."""
    # TensorFloat-32 has as many digits as float16; and in small products the library may take float32 instead.
    return FLOORS[torch.float16 if dtype == "tf32" else DTYPES[dtype][0]]


def allowed(eager: Sequence[float], dtype: str) -> float:
    """The error that a provider may have: twice that of eager PyTorch and a floor."""
    return 2 * max(filter(math.isfinite, eager), default=0.0) + least_allowed(dtype)
