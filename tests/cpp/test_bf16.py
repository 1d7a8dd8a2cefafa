"""Volumes in bfloat16 with the processor's own products of it: as exact as eager, with maps as exact as in float."""

from functools import partial

import pytest
import torch
from support import FORMATS, example, random_block, random_volume, relative_error, with_gradients

from benchmarks.published import published
from rsa_kernels import recurrent_slice_attention, slice_attention
from rsa_kernels.folding import Projections

FLOOR = 1.6e-2
# One channel; odd numbers of channels, slices and positions; channels that end within a panel, a vector, a pair;
# tiles of one position, of a few, and of whole lines.
SHAPES = [
    (1, 1, 1, 1, 1),
    (1, 1, 3, 4, 5),
    (2, 3, 1, 13, 2),
    (3, 5, 7, 9, 11),
    (1, 17, 33, 5, 40),
    (2, 32, 16, 12, 14),
    (1, 47, 3, 35, 34),
    (2, 70, 7, 9, 11),
    (1, 129, 5, 6, 7),
    (1, 8, 65, 5, 16),
    (1, 520, 4, 9, 10),
]


@pytest.fixture(autouse=True, params=["amx", "avx512_bf16"])
def pairs(request):
    """Chooses products of tiles, then of pairs; returns what chooses another instruction set; puts the old one back."""
    from rsa_kernels import cpp

    before = cpp.instruction_set()
    try:
        cpp.instruction_set(request.param)
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    yield cpp.instruction_set
    cpp.instruction_set(before)


def block(*tensors, **options):
    return recurrent_slice_attention(*tensors, backend="cpp", **options)


def half(tensors, memory_format=torch.contiguous_format):
    """The tensors in bfloat16, the first one a volume in a memory format."""
    volume, *rest = (tensor.bfloat16() for tensor in tensors)
    return [volume.contiguous(memory_format=memory_format), *rest]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_exact_as_eager(shape, memory_format, recompute):
    (volume, *weights), upstream, truths, eager = example(shape, torch.bfloat16)
    tensors = [volume.contiguous(memory_format=memory_format), *weights]
    results = with_gradients(lambda *t: block(*t, recompute=recompute), tensors, upstream)
    # phi_bias, the sixth, is exactly zero; with one slice so are the other gradients of the logits.
    for index in (0, 1, 2, 3, 4, 6, 7, 8):
        if truths[index].norm() > 1e-9:
            budget = 2 * relative_error(eager[index], truths[index]) + FLOOR
            assert relative_error(results[index], truths[index]) <= budget, index
        else:
            assert results[index].abs().max() <= FLOOR, index
    assert results[5].abs().max() == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_every_way_to_read_and_write_a_tile_moves_the_same_numbers(shape):
    """Bit for bit, where strides put the positions in the same order; else but for what the order rounds."""
    layouts = [
        lambda x: x.contiguous(),
        lambda x: x.contiguous(memory_format=torch.channels_last_3d),
        lambda x: x.repeat_interleave(2, 4)[..., ::2],
        lambda x: x.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2),
    ]
    tensors = half([random_volume(shape), *random_block(shape[1], gain=0.3)])
    upstream = random_volume(shape, seed=2).bfloat16()
    first, *others, reordered = (
        with_gradients(lambda x, *weights, layout=layout: block(layout(x), *weights), tensors, upstream)
        for layout in layouts
    )
    for results in others:
        assert all(torch.equal(one, other) for one, other in zip(first, results, strict=True))
    assert relative_error(reordered[0], first[0].double()) <= FLOOR


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_agrees_with_the_reference(shape, memory_format):
    upstream = random_volume(shape, seed=4).bfloat16()
    for axis in (2, 3, 4):
        volumes = [random_volume(shape, seed).bfloat16().contiguous(memory_format=memory_format) for seed in (1, 2, 3)]
        scale = (upstream.numel() / shape[axis]) ** -0.5
        results = with_gradients(partial(slice_attention, axis=axis, scale=scale, backend="cpp"), volumes, upstream)
        truths = with_gradients(
            partial(slice_attention, axis=axis, scale=scale, backend="reference"),
            [volume.double() for volume in volumes],
            upstream.double(),
        )
        for result, truth in zip(results, truths, strict=True):
            assert (result.double() - truth).norm() <= FLOOR * (truth.norm() + 1e-3), axis


def first_map(tensors, axis):
    """The first map of a block, as the extension keeps it for the backward pass."""
    from rsa_kernels import cpp

    x, *weights, betas = tensors
    return cpp.recurrent_slice_attention(x, Projections(*weights), betas[:1], [axis], 1.0, False)[1][0]


def true_logits(tensors, axis):
    x, *weights, _ = (tensor.double() for tensor in tensors)
    slices = x.movedim(axis, 1).flatten(3)
    query, key = (
        torch.einsum("oc,nscp->nsop", weight, slices) + bias[:, None] for weight, bias in (weights[:2], weights[2:4])
    )
    return torch.einsum("niop,njop->nij", query, key)


@pytest.mark.parametrize("alike", [False, True], ids=["any slices", "slices alike"])
@pytest.mark.parametrize("gain", [0.05, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("shape", [(1, 32, 24, 30, 24), (1, 64, 12, 31, 12), (1, 512, 10, 14, 10), (2, 5, 9, 11, 7)])
def test_maps_of_large_logits_are_as_exact_as_in_float(shape, gain, alike, pairs):
    x, *weights = random_volume(shape), *random_block(shape[1], gain=gain)
    if alike:  # large logits that differ by little, whose softmax shows what is wrong with them
        x = 2 + 0.1 * x + random_volume((*shape[:3], 1, shape[4]), seed=5)
        weights[2] = weights[0]
    tensors = half([x, *weights])
    logits = true_logits(tensors, 3)
    if gain == 3:
        assert logits.abs().max() > 100
    truth = torch.softmax(logits, -1)
    error = (first_map(tensors, 3).double() - truth).abs().max()
    pairs("avx512")
    in_float = (first_map(tensors, 3).double() - truth).abs().max()
    assert error <= in_float + 1e-3


@pytest.mark.parametrize("memory_format", FORMATS)
def test_the_bits_depend_neither_on_the_number_of_threads_nor_on_the_run(memory_format):
    before = torch.get_num_threads()
    runs = []
    tensors = half([random_volume((2, 24, 14, 22, 26)), *random_block(24)], memory_format)
    upstream = random_volume((2, 24, 14, 22, 26), seed=2).bfloat16()
    try:
        for number in (1, 1, 2, 3, 5):
            torch.set_num_threads(number)
            volumes = [tensors[0], upstream, upstream * 0.5]
            runs.append(
                with_gradients(block, tensors, upstream)
                + with_gradients(lambda *v: slice_attention(*v, 3, scale=0.01, backend="cpp"), volumes, upstream)
            )
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], run, strict=True))


def test_inference_gives_the_bits_of_training():
    tensors = half([random_volume((2, 24, 14, 22, 26)), *random_block(24)])
    trained = with_gradients(block, tensors, tensors[0])[0]
    with torch.no_grad():
        assert torch.equal(block(*tensors), trained)


def test_scratch_is_written_before_it_is_read():
    for shape in SHAPES:
        tensors = half([random_volume(shape), *random_block(shape[1])])
        clean = with_gradients(block, tensors, tensors[0])
        torch.use_deterministic_algorithms(True)  # fills every uninitialised tensor with NaN, scratch too
        try:
            poisoned = with_gradients(block, tensors, tensors[0])
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(torch.equal(one, other) for one, other in zip(clean, poisoned, strict=True)), shape


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_stay_visible(bad, memory_format):
    x, *weights = half([random_volume((1, 5, 7, 6, 8)), *random_block(5)])
    good = block(x, *weights)
    assert torch.isfinite(good).all()
    x = x.contiguous(memory_format=memory_format)
    x[0, 2, 6, 4, 5] = bad
    assert not torch.isfinite(block(x, *weights)).all()
    upstream = torch.ones_like(x)
    upstream[0, 2, 6, 4, 5] = bad
    grads = with_gradients(block, [good, *weights], upstream)[1:]
    assert not torch.isfinite(grads[0]).all()
    assert not torch.isfinite(grads[5]).all()


def test_values_far_from_one():
    """Products of pairs take numbers below 2^-126 for zero; those of sizes that occur keep their relative error."""
    for size in (2.0**-40, 2.0**20):
        tensors = half([random_volume((1, 6, 5, 7, 6)) * size, *random_block(6)])
        for index in (1, 3):  # logits of the order of one
            tensors[index] = tensors[index] * 0.4 / size
        results = with_gradients(block, tensors, tensors[0])
        truths = with_gradients(published, [tensor.double() for tensor in tensors], tensors[0].double())
        eager = with_gradients(published, tensors, tensors[0])
        for index in (0, 1, 7):
            budget = 2 * relative_error(eager[index], truths[index]) + FLOOR
            assert relative_error(results[index], truths[index]) <= budget, (size, index)


def test_other_dtypes_are_computed_as_without_pairs(pairs):
    own = pairs()
    for dtype in (torch.float64, torch.float32, torch.float16):
        tensors = [tensor.to(dtype) for tensor in (random_volume((1, 9, 5, 7, 6)), *random_block(9))]
        results = with_gradients(block, tensors, tensors[0])
        pairs("avx512")
        expected = with_gradients(block, tensors, tensors[0])
        pairs(own)
        assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))
