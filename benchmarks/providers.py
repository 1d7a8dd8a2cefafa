"""Who computes the block: what a user would write or pick instead, and every backend of ``rsa_kernels``."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv3d, scaled_dot_product_attention

from benchmarks.cases import BLOCK_AXES, DTYPES, Case
from benchmarks.published import published
from rsa_kernels import available_backends, recurrent_slice_attention
from rsa_kernels.backends import cannot_run, choose

EAGER, AUTOCAST, COMPILED, SDPA, NON_LOCAL = "eager", "eager autocast", "torch.compile", "sdpa", "non-local"
RECOMPUTE = "recompute"
# Where a full pass would take longer than this at the speed of a matrix product, it is skipped; so slow is only what
# RSA replaces, and float16 on processors without instructions for it. A GPU is lent for minutes.
LONGEST_SECONDS = {"cpu": 3.0, "cuda": 0.05}

Block = Callable[..., Tensor]


class Provider(NamedTuple):
    """A way to compute the block.

    Attributes:
        name: as in the table.
        block: the function of a volume, six weights, the betas, and ``axes``; None where it cannot run.
        reason: why it cannot, in a sentence.
        weights: dtype of the weights where it is not that of the volume.
        flops: operations of a forward pass, a multiply-add being two, where they may be too many.
        same: whether it computes the same function as the published block.
    """

    name: str
    block: Block | None
    reason: str | None = None
    weights: torch.dtype | None = None
    flops: Callable[[Case], float] | None = None
    same: bool = True


def slices_by_sdpa(x: Tensor, *weights_and_betas: Tensor, axes: Sequence[int] = BLOCK_AXES) -> Tensor:
    """The published block with PyTorch's attention over slices, each a token of ``C * P`` features."""
    *weights, betas = weights_and_betas
    for beta, axis in zip(betas.unbind(), axes, strict=True):
        query, key, value = (volume.transpose(1, axis).contiguous() for volume in _projections(x, weights))
        tokens = (volume.flatten(2)[:, None] for volume in (query, key, value))
        attended = scaled_dot_product_attention(*tokens, scale=1.0)
        x = x + beta * attended.view(value.shape).transpose(1, axis)
    return x


def non_local(x: Tensor, *weights_and_betas: Tensor, axes: Sequence[int] = BLOCK_AXES) -> Tensor:
    """What RSA replaces: every voxel attends to all others, once (Wang et al., CVPR 2018); ``axes`` say nothing."""
    *weights, betas = weights_and_betas
    query, key, value = (volume.flatten(2).transpose(1, 2)[:, None].contiguous() for volume in _projections(x, weights))
    attended = scaled_dot_product_attention(query, key, value, scale=1.0)
    return x + betas[0] * attended[:, 0].transpose(1, 2).reshape(x.shape)


def _projections(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    return [conv3d(x, weights[i][:, :, None, None, None], weights[i + 1]) for i in (0, 2, 4)]


def published_flops(case: Case) -> float:
    """Three projections and two products a step."""
    channels, size = case.shape[1], math.prod(case.shape)
    return sum(size * (6 * channels + 4 * case.shape[axis]) for axis in case.axes)


def non_local_flops(case: Case) -> float:
    """Three projections, and two products of all voxels with all."""
    channels, size = case.shape[1], math.prod(case.shape)
    return size * (6 * channels + 4 * math.prod(case.shape[2:]))


def _under_autocast(block: Block, kind: str, dtype: torch.dtype) -> Block:
    def call(*tensors: Tensor, axes: Sequence[int]) -> Tensor:
        with torch.autocast(kind, dtype):
            return block(*tensors, axes=axes)

    return call


def _own(*tensors: Tensor, axes: Sequence[int], backend: str, recompute: bool = False) -> Tensor:
    return recurrent_slice_attention(*tensors, axes=axes, backend=backend, recompute=recompute)


def providers(case: Case, kind: str) -> list[Provider]:
    """The providers of a case on a kind of device, cpu or cuda, those that cannot run there with the reason.

    On a CPU, where they take minutes, only float32 volumes in contiguous memory and whole blocks have all of them.
    """
    dtype = DTYPES[case.dtype][0]
    # Only where its speed is that of float16 can the published block be too slow: else its size is what is to be seen.
    published_cost = published_flops if case.dtype == "float16" else None
    found = [Provider(EAGER, published, flops=published_cost)]
    if dtype.itemsize == 2:
        block = _under_autocast(published, kind, dtype)
        found.append(Provider(AUTOCAST, block, weights=torch.float32, flops=published_cost))
    # A sweep shows how cost grows; only that over voxels shows the compiled block, too, and what recomputing saves.
    over_voxels, sweeping = case.name == "sweep V", case.name.startswith("sweep")
    whole = (case.dtype, case.memory_format, case.axes) == ("float32", "contiguous", BLOCK_AXES) or kind != "cpu"
    if over_voxels or not sweeping:
        found.append(Provider(COMPILED, torch.compile(published), flops=published_cost))
    if whole:
        found.append(Provider(SDPA, slices_by_sdpa, flops=published_cost))
    volume = torch.empty((1, case.shape[1], 1, 1, 1), dtype=dtype, device=kind)
    for name, missing in available_backends().items():
        reason = missing or cannot_run(name, volume)
        if reason:
            found.append(Provider(name, None, reason))
        elif name != "reference" or (whole and not sweeping):
            found.append(Provider(name, partial(_own, backend=name)))
    if over_voxels:
        chosen = choose(volume, ()).backend
        found.append(Provider(f"{chosen} {RECOMPUTE}", partial(_own, backend=chosen, recompute=True)))
    if whole:
        found.append(Provider(NON_LOCAL, non_local, flops=non_local_flops, same=False))
    return found
