"""What several tests share: the golden recipe, the published equations written a second time, and their inputs."""

import functools
import zlib
from pathlib import Path

import numpy as np
import torch

from benchmarks.published import published
from rsa_kernels import available_backends, backends

GOLDEN = Path(__file__).parent / "golden"
# Those that run tensors of the CPU.
BACKENDS = [name for name in available_backends() if backends.cannot_run(name, torch.empty((1,) * 5)) is None]
# Triton's interpreter takes a hundred times longer than the kernels of other backends.
INTERPRETED = backends.interpreted()
EXAMPLES = 10 if INTERPRETED else 60
FORMATS = [torch.contiguous_format, torch.channels_last_3d]
WEIGHTS = ("theta_conv.weight", "theta_conv.bias", "phi_conv.weight", "phi_conv.bias", "g_conv.weight", "g_conv.bias")


def shared_data():
    """The folder of real scans, ``shared/data`` beside the checkout or beside a folder above it; None without one."""
    places = (folder / "shared" / "data" for folder in Path(__file__).resolve().parents)
    return next((place for place in places if place.is_dir()), None)


def golden_tensor(name, shape):
    """The float64 tensor that the golden files' recipe makes from a name."""
    return torch.from_numpy(np.asarray(np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)))


def golden_parameter(key, shape):
    """The parameter that the golden files' recipe makes from a state_dict key."""
    values = golden_tensor(key, shape)
    if len(shape) == 5:
        return values / np.sqrt(np.prod(shape[1:]))
    if "betas" in key:
        return 0.5 + 0.1 * values
    if key.endswith("norm.weight"):
        return 1 + 0.1 * values
    return 0.1 * values


def golden_block(channels):
    """The nine parameters of the golden block, in the order of ``recurrent_slice_attention``."""
    shapes = [(channels,) * 2 + (1,) * 3, (channels,)] * 3
    parameters = [golden_parameter(key, shape) for key, shape in zip(WEIGHTS, shapes, strict=True)]
    return [*parameters, *(golden_parameter(f"betas.{step}", ()) for step in range(3))]


def random_block(channels, steps=3, seed=0, gain=0.6):
    """Weights, biases and betas ``(steps,)`` in float64: eight tensors, the last one the betas."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for _ in range(3):
        tensors.append(torch.randn(channels, channels, generator=generator, dtype=torch.float64) * gain / channels**0.5)
        tensors.append(torch.randn(channels, generator=generator, dtype=torch.float64) * 0.1)
    return [*tensors, torch.randn(steps, generator=generator, dtype=torch.float64) * 0.3 + 0.4]


def random_volume(shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_gradients(function, tensors, upstream):
    """The output of ``function(*tensors)`` and its gradients for all tensors."""
    leaves = [tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_() for tensor in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@functools.cache
def example(shape, dtype):
    """Inputs of a block, an upstream gradient, and what `with_gradients` gives in float64 and by eager operators."""
    tensors = [tensor.to(dtype) for tensor in (random_volume(shape), *random_block(shape[1], gain=0.3))]
    upstream = random_volume(shape, seed=2).to(dtype)
    truths = with_gradients(published, [tensor.double() for tensor in tensors], upstream.double())
    return tensors, upstream, truths, with_gradients(published, tensors, upstream)


def relative_error(result, truth):
    """``||result - truth|| / ||truth||``; infinite if anything is not finite."""
    if not torch.isfinite(result).all():
        return float("inf")
    return ((result.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()
