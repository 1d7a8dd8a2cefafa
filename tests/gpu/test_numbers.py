"""Numbers on a GPU: output and all gradients against the published equations in float64."""

import math

import numpy as np
import pytest
import torch
from gpu.device import (
    CHANNELS_LAST,
    DEVICE,
    KERNELS,
    ON_DEVICE,
    asks_cuda,
    assert_same_but_for_rounding,
    assert_within_budget,
    block_inputs,
    floor,
    on_device,
    results_of,
)
from support import FORMATS, GOLDEN, WEIGHTS, golden_block, golden_tensor, random_volume, relative_error, with_gradients

from benchmarks.cases import DTYPES, SHAPES
from benchmarks.devices import arithmetic
from rsa_kernels import recurrent_slice_attention, slice_attention

PRECISIONS = list(DTYPES)
REAL = ("tiny 512", "tiny 512 x2", "wide 256", "middle 128", "middle 64", "narrow 32, 128", "brain 16")


def size(shape):
    return "x".join(map(str, shape))


# One step along an axis for each number of channels and of slices: sizes that fill a tile, just miss or just exceed it.
CHANNELS = (1, 3, 16, 20, 32, 48, 64, 96, 128, 200, 256, 512)
SLICES = (1, 17, 33, 65, 129, 257)
STEPS = [((2, channels, 17, 3, 2), 2) for channels in CHANNELS]
STEPS += [((1, 32, slices, 3, 5), 2) for slices in SLICES]
STEPS += [((1, 16, 2, slices, 7), 3) for slices in SLICES[2:]]
STEPS += [((2, 20, 3, 5, slices), 4) for slices in SLICES[1::2]]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(("shape", "axis"), STEPS, ids=[f"{size(shape)} axis {axis}" for shape, axis in STEPS])
def test_a_step_of_any_size_keeps_to_the_error_budget(shape, axis, backend):
    assert_within_budget(shape, (axis,), "bfloat16", CHANNELS_LAST, backend)


# Small blocks in bfloat16, and some of them in everything: compiling takes most of the time of these tests.
RAGGED, EVEN = (2, 20, 13, 3, 17), (1, 64, 12, 14, 10)
BLOCKS = [("bfloat16", shape) for shape in [(1, 1, 1, 1, 1), (2, 3, 5, 7, 11), (1, 256, 5, 7, 5)]]
BLOCKS += [(precision, shape) for precision in PRECISIONS for shape in (RAGGED, EVEN)]


@pytest.mark.parametrize("backend", ON_DEVICE)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("precision", "shape"), BLOCKS, ids=[f"{name} {size(shape)}" for name, shape in BLOCKS])
def test_a_block_keeps_to_the_error_budget(precision, shape, memory_format, backend):
    assert_within_budget(shape, (3, 4, 2), precision, memory_format, backend)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [RAGGED, EVEN], ids=size)
def test_a_recomputing_block_keeps_to_the_error_budget(shape, precision, backend):
    assert_within_budget(shape, (4, 2, 3, 2), precision, CHANNELS_LAST, backend, recompute=True, scale=0.7)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_mean_far_from_zero_keeps_to_the_error_budget(precision, backend):
    assert_within_budget((1, 32, 33, 17, 20), (3, 4, 2), precision, CHANNELS_LAST, backend, offset=2.0)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("logits", [0, 30], ids=["flat", "one-hot"])
@pytest.mark.parametrize(("shape", "axis"), [((1, 16, 300, 2, 2), 2), ((1, 32, 3, 100, 4), 3)], ids=["wide", "narrow"])
def test_flat_and_one_hot_maps_keep_to_the_error_budget(shape, axis, logits, precision, backend):
    assert_within_budget(shape, (axis,), precision, CHANNELS_LAST, backend, logits=logits)


@asks_cuda
@pytest.mark.xdist_group("large")
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", REAL)
def test_volumes_of_real_size_keep_to_the_error_budget(case, precision, memory_format, backend):
    free, _ = torch.cuda.mem_get_info()
    # The published equations in float64 keep fifteen volumes, and need room for as many at most.
    exact = torch.float64 if free > 30 * 8 * math.prod(SHAPES[case]) else torch.float32
    if exact == torch.float32 and precision == "float32":
        pytest.skip(f"needs more than {free >> 30} GiB of free memory to be compared with float64")
    assert_within_budget(SHAPES[case], (3, 4, 2), precision, memory_format, backend, exact)


ATTENTIONS = [("bfloat16", *case) for case in [((1, 64, 3, 65, 4), 3), ((1, 20, 4, 3, 129), 4), ((2, 3, 1, 4, 5), 2)]]
ATTENTIONS += [(precision, (2, 6, 17, 5, 3), axis) for precision in PRECISIONS for axis in (2, 3, 4)]


@pytest.mark.parametrize("backend", ON_DEVICE)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("precision", "shape", "axis"), ATTENTIONS)
def test_slice_attention_keeps_to_the_error_budget(precision, shape, axis, memory_format, backend):
    scale = 2 / math.sqrt(math.prod(shape[1:]) / shape[axis])
    with arithmetic(precision) as dtype:
        volumes = [
            x.contiguous(memory_format=memory_format)
            for x in on_device(map(random_volume, [shape] * 3, range(3)), dtype)
        ]
        upstream = random_volume(shape, seed=3).to(DEVICE, dtype)

        def results(tensors, name):
            grad = upstream.to(tensors[0].dtype)
            return with_gradients(lambda *t: slice_attention(*t, axis, scale=scale, backend=name), tensors, grad)

        truths = results([volume.double() for volume in volumes], "reference")
        eager = results(volumes, "reference")
        ours = results(volumes, backend)
    for result, truth, other in zip(ours, truths, eager, strict=True):
        assert result.is_contiguous(memory_format=memory_format)
        assert relative_error(result, truth) <= 2 * relative_error(other, truth) + floor(precision)


STRIDED = {
    "transposed": lambda x: x.transpose(2, 4).contiguous().transpose(2, 4),
    "channel slice": lambda x: torch.cat([x, x], 1).contiguous()[:, : x.shape[1]],
    "channels-last slice": lambda x: torch.cat([x, x], 1).contiguous(memory_format=CHANNELS_LAST)[:, x.shape[1] :],
    "unaligned": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
    "every second row": lambda x: x.repeat_interleave(2, 3)[:, :, :, ::2],
    "scrambled": lambda x: x.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2),
    "contiguous": lambda x: x.contiguous(),
}


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("strided", STRIDED.values(), ids=STRIDED)
def test_any_strides_of_a_volume_and_of_the_gradient_that_arrives(strided, dtype, backend):
    shape = (2, 16, 5, 6, 7)
    tensors = block_inputs(shape, dtype)
    upstream = random_volume(shape, seed=2).to(DEVICE, dtype).contiguous(memory_format=CHANNELS_LAST)
    expected = results_of(tensors, upstream, backend)
    # A leaf that is used through a view of other strides: the block then gets these strides.
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    x = strided(leaves[0])
    assert x.stride() != tensors[0].stride() or x.data_ptr() != leaves[0].data_ptr()
    out = recurrent_slice_attention(x, *leaves[1:], backend=backend)
    grads = torch.autograd.grad(out, [x, *leaves[1:]], strided(upstream))
    assert_same_but_for_rounding([out, *grads], expected)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    "loss",
    [
        lambda y: torch.cat([y.tanh(), y], 1)[:, y.shape[1] // 2 :].square().sum(),
        lambda y: y.sum(),
        lambda y: y.mean(3).square().sum(),
        lambda y: (y.transpose(1, 4).contiguous() ** 2).sum(),
        lambda y: y[:, :, 1:, ::2].square().sum(),
    ],
    ids=["cat", "expanded", "mean of a dim", "transposed", "slice"],
)
def test_gradients_that_arrive_with_any_strides(loss, backend):
    tensors = block_inputs((2, 6, 4, 5, 3), torch.float64)
    truths = with_gradients(lambda *t: loss(recurrent_slice_attention(*t, backend="reference")), tensors, None)
    results = with_gradients(lambda *t: loss(recurrent_slice_attention(*t, backend=backend)), tensors, None)
    for result, truth in zip(results, truths, strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", KERNELS)
def test_an_expanded_volume(backend):
    x, *block = block_inputs((1, 16, 3, 1, 5), torch.bfloat16)
    upstream = random_volume((2, 16, 3, 6, 5), seed=2).to(DEVICE, x.dtype)
    expanded = x.expand(upstream.shape)
    results = []
    for volume in (expanded, expanded.contiguous(memory_format=CHANNELS_LAST)):
        leaves = [tensor.detach().requires_grad_() for tensor in (volume, *block)]
        out = recurrent_slice_attention(*leaves, backend=backend)
        results.append([out, *torch.autograd.grad(out, leaves, upstream)])
    assert_same_but_for_rounding(*results)


GOLDEN_BLOCKS = {
    "rsa_small": ("rsa_block_small.npz", (2, 8, 5, 6, 7)),
    "rsa_odd": ("rsa_block_odd.npz", (1, 12, 9, 3, 11)),
}


def assert_golden(y, leaves, golden, prefix, keys):
    torch.testing.assert_close(y.cpu(), torch.from_numpy(golden[f"{prefix}y"]), rtol=0, atol=1e-10)
    for key, leaf in zip(keys, leaves, strict=True):
        torch.testing.assert_close(leaf.grad.cpu(), torch.from_numpy(golden[f"{prefix}grad.{key}"]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", ON_DEVICE)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("stem", GOLDEN_BLOCKS)
def test_the_golden_block_and_every_gradient(stem, recompute, memory_format, backend):
    file, shape = GOLDEN_BLOCKS[stem]
    x = golden_tensor(f"{stem}.x", shape).contiguous(memory_format=memory_format)
    leaves = [tensor.to(DEVICE).requires_grad_() for tensor in (x, *golden_block(shape[1]))]
    y = recurrent_slice_attention(leaves[0], *leaves[1:7], leaves[7:], recompute=recompute, backend=backend)
    y.backward(golden_tensor(f"{stem}.gy", shape).to(DEVICE))
    keys = ("x", *WEIGHTS, "betas.0", "betas.1", "betas.2")
    assert_golden(y, leaves, np.load(GOLDEN / file), "", keys)


@pytest.mark.parametrize("backend", ON_DEVICE)
@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_golden_slice_attention_and_every_gradient(axis, backend):
    shape = (2, 6, 5, 4, 7)
    leaves = [(0.3 * golden_tensor(f"sa_small.{axis}.{name}", shape)).to(DEVICE).requires_grad_() for name in "qkv"]
    y = slice_attention(*leaves, axis, backend=backend)
    y.backward(golden_tensor(f"sa_small.{axis}.gy", shape).to(DEVICE))
    assert_golden(y, leaves, np.load(GOLDEN / "slice_attention_small.npz"), f"{axis}.", "qkv")


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("recompute", [False, True])
def test_gradcheck(recompute, backend):
    leaves = [tensor.requires_grad_() for tensor in block_inputs((2, 3, 2, 3, 2), torch.float64)]
    block = lambda *t: recurrent_slice_attention(*t, recompute=recompute, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(block, leaves, check_undefined_grad=False)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("axis", [2, 3, 4])
def test_gradcheck_of_slice_attention(axis, backend):
    volumes = [random_volume((2, 2, 3, 2, 2), seed).to(DEVICE).requires_grad_() for seed in range(3)]
    assert torch.autograd.gradcheck(lambda *t: slice_attention(*t, axis, backend=backend), volumes)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("wanted", range(8))
def test_gradients_only_where_they_are_needed(wanted, backend):
    tensors = block_inputs((1, 16, 5, 6, 4), torch.bfloat16)
    upstream = random_volume(tensors[0].shape, seed=2).to(DEVICE, torch.bfloat16)
    expected = results_of(tensors, upstream, backend)[1:]
    leaves = [tensor.detach() for tensor in tensors]
    leaves[wanted].requires_grad_()
    recurrent_slice_attention(*leaves, backend=backend).backward(upstream)
    assert [leaf.grad is not None for leaf in leaves] == [index == wanted for index in range(8)]
    assert relative_error(leaves[wanted].grad, expected[wanted].double()) <= floor(torch.bfloat16)
