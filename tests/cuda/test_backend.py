"""The ``cuda`` backend computes the published equations, with its operators replaced by stand-ins on the CPU."""

import emulation
import pytest
import stand_ins
import torch
from support import FORMATS, random_block, random_volume, relative_error, with_gradients

from benchmarks.published import published
from rsa_kernels import backends, cuda, recurrent_slice_attention, slice_attention

FLOORS = {torch.float32: 1e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


@pytest.fixture
def kernels(monkeypatch):
    """Makes the public functions run this backend, on stand-ins in plain PyTorch, which it returns."""
    plain = stand_ins.Plain()
    monkeypatch.setattr(cuda, "operators", plain)
    monkeypatch.setattr(backends, "load", lambda *args: cuda)
    return plain


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    if emulation.compiler() is None:
        pytest.skip("needs g++ on Linux, to run the kernels on the CPU")
    return emulation.compile_into(tmp_path_factory.mktemp("emulation"))


def compare(shape, axes=(3, 4, 2), volume=lambda x: x, scale=1.0, tolerance=1e-9, **options):
    tensors = [random_volume(shape), *random_block(shape[1], len(axes))]
    upstream = random_volume(shape, seed=2)
    truths = with_gradients(lambda *t: published(*t, axes=axes, scale=scale), tensors, upstream)

    def block(x, *weights):
        return recurrent_slice_attention(volume(x), *weights, axes, scale=scale, **options)

    for result, truth in zip(with_gradients(block, tensors, upstream), truths, strict=True):
        assert (result - truth).abs().max() <= tolerance * (1 + truth.abs().max())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("axes", [(2,), (3,), (4,), (3, 4, 2), (2, 2), (4, 3, 2, 3)])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 3, 1, 7, 2), (3, 16, 4, 5, 6), (1, 40, 5, 3, 17)])
def test_any_shape_and_axes(shape, axes, memory_format, recompute, kernels):
    compare(shape, axes, lambda x: x.contiguous(memory_format=memory_format), scale=0.7, recompute=recompute)
    assert kernels.calls


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "strided",
    [
        lambda x: x.transpose(2, 4).contiguous().transpose(2, 4),
        lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
        lambda x: torch.cat([x[..., :1], x], 4)[..., 1:],
        lambda x: x.contiguous(memory_format=torch.channels_last_3d)[:, :, 1:].contiguous(
            memory_format=torch.channels_last_3d
        ),
        lambda x: (
            torch.cat([x.permute(0, 2, 3, 4, 1).reshape(-1), x.new_zeros(1)])[1:]
            .view(*x.shape[:1], *x.shape[2:], x.shape[1])
            .permute(0, 4, 1, 2, 3)
        ),
    ],
    ids=["transposed", "channel slice", "offset", "channels last", "unaligned"],
)
def test_any_strides_in(strided, recompute, kernels):
    shape = (2, 6, 4, 5, 6)
    tensors = [random_volume(shape), *random_block(6)]
    out = strided(tensors[0])
    upstream = random_volume(out.shape, seed=2)
    truths = with_gradients(lambda x, *w: published(strided(x), *w), tensors, upstream)
    results = with_gradients(
        lambda x, *w: recurrent_slice_attention(strided(x), *w, recompute=recompute), tensors, upstream
    )
    for result, truth in zip(results, truths, strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-9, atol=1e-9)


UPSTREAM = {
    "cat": lambda y: torch.cat([y.tanh(), y], 1)[:, y.shape[1] // 2 :].square().sum(),
    "expand": lambda y: y.sum(),
    "mean of a dim": lambda y: y.mean(3).square().sum(),
    "transpose": lambda y: (y.transpose(1, 4).contiguous().cumsum(0) ** 2).sum(),
    "slice": lambda y: y[:, :, 1:, ::2].square().sum(),
    "channels_last_3d": lambda y: y.contiguous(memory_format=torch.channels_last_3d).square().sum(),
}


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("loss", UPSTREAM.values(), ids=UPSTREAM.keys())
def test_gradients_that_arrive_with_any_strides(loss, memory_format, kernels):
    tensors = [random_volume((2, 6, 4, 5, 3)).contiguous(memory_format=memory_format), *random_block(6)]
    truths = with_gradients(lambda *t: loss(published(*t)), tensors, None)
    results = with_gradients(lambda *t: loss(recurrent_slice_attention(*t)), tensors, None)
    for result, truth in zip(results, truths, strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("axes", [(3,), (3, 4, 2)])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_nothing_of_the_callers_is_written_to(memory_format, axes, kernels):
    shape = (1, 4, 3, 4, 5)
    tensors = [random_volume(shape).contiguous(memory_format=memory_format), *random_block(4, len(axes))]
    upstream = random_volume(shape, seed=2).contiguous(memory_format=memory_format)
    before = [tensor.clone() for tensor in (*tensors, upstream)]
    leaves = [tensor.requires_grad_() for tensor in tensors]
    recurrent_slice_attention(*leaves, axes).backward(upstream)
    with torch.no_grad():
        recurrent_slice_attention(*leaves, axes)
    for tensor, copy in zip((*tensors, upstream), before, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("wanted", range(8))
def test_gradients_only_where_they_are_needed(wanted, kernels):
    tensors = [random_volume((1, 5, 4, 2, 3)), *random_block(5)]
    upstream = random_volume((1, 5, 4, 2, 3), seed=2)
    truths = with_gradients(published, tensors, upstream)[1:]
    tensors[wanted].requires_grad_()
    out = recurrent_slice_attention(*tensors)
    kernels.calls.clear()
    out.backward(upstream)
    assert [tensor.grad is not None for tensor in tensors] == [index == wanted for index in range(8)]
    torch.testing.assert_close(tensors[wanted].grad, truths[wanted], rtol=1e-9, atol=1e-9)
    # The two earlier steps hand a gradient on, by three mixes each; the last one makes what is wanted alone.
    last = {0: 3, 1: 1, 2: 1, 3: 1, 4: 0, 5: 1, 6: 0, 7: 0}[wanted]
    assert kernels.calls.count("mix") == 6 + 2 * (wanted == 5) + last


@pytest.mark.parametrize("wanted", range(3))
def test_slice_attention_gradients_only_where_they_are_needed(wanted, kernels, monkeypatch):
    volumes = [random_volume((1, 3, 4, 2, 3), seed) for seed in range(3)]
    upstream = random_volume((1, 3, 4, 2, 3), seed=4)
    truths = with_gradients(lambda *t: literal(*t, 3, 1.0), volumes, upstream)[1:]
    volumes[wanted].requires_grad_()
    out = slice_attention(*volumes, 3)
    kernels.calls.clear()
    out.backward(upstream)
    assert kernels.calls.count("mix") == 1
    assert kernels.calls.count("contract") == (wanted < 2)
    torch.testing.assert_close(volumes[wanted].grad, truths[wanted], rtol=1e-9, atol=1e-9)


def literal(query, key, value, axis, scale):
    rows, columns, slices = (volume.transpose(1, axis).flatten(2) for volume in (query, key, value))
    mixed = torch.softmax(scale * rows @ columns.transpose(1, 2), -1) @ slices
    return mixed.view(value.transpose(1, axis).shape).transpose(1, axis)


@pytest.mark.parametrize("axis", [2, 3, 4])
@pytest.mark.parametrize("formats", [FORMATS * 2, FORMATS[::-1] * 2, FORMATS[:1] * 3, FORMATS[1:] * 3])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (2, 5, 3, 7, 4), (1, 16, 2, 3, 18)])
def test_slice_attention(sizes, formats, axis, kernels):
    tensors = [random_volume(sizes, seed).contiguous(memory_format=formats[seed]) for seed in range(3)]
    upstream = random_volume(sizes, seed=3)
    truths = with_gradients(lambda *t: literal(*t, axis, 0.5), tensors, upstream)
    results = with_gradients(lambda *t: slice_attention(*t, axis, scale=0.5), tensors, upstream)
    for result, truth in zip(results, truths, strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", FLOORS)
@pytest.mark.parametrize("shape", [(2, 8, 6, 7, 5), (1, 32, 16, 18, 17), (1, 96, 5, 7, 6)])
def test_error_is_at_most_twice_eager_pytorch(shape, dtype, memory_format, kernels):
    tensors = [tensor.to(dtype) for tensor in (random_volume(shape), *random_block(shape[1], gain=0.3))]
    upstream = random_volume(shape, seed=2).to(dtype)
    truths = with_gradients(published, [tensor.double() for tensor in tensors], upstream.double())
    eager = with_gradients(published, tensors, upstream)
    tensors[0] = tensors[0].contiguous(memory_format=memory_format)
    results = with_gradients(recurrent_slice_attention, tensors, upstream)
    for index in (0, 1, 2, 3, 4, 6, 7, 8):
        budget = 2 * relative_error(eager[index], truths[index]) + FLOORS[dtype]
        assert relative_error(results[index], truths[index]) <= budget, index
    assert torch.equal(results[5], torch.zeros_like(results[5]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_dtypes_and_memory_formats_are_kept(memory_format, dtype, kernels):
    tensors = [tensor.to(dtype) for tensor in (random_volume((2, 6, 4, 5, 3)), *random_block(6))]
    x = tensors[0].contiguous(memory_format=memory_format).requires_grad_()
    out, maps = recurrent_slice_attention(x, *tensors[1:], return_maps=True)
    out.sum().backward()
    for volume in (out, x.grad, slice_attention(x, x, x, "axial")):
        assert volume.dtype == dtype
        assert volume.is_contiguous(memory_format=memory_format)
    assert [tuple(attention.shape) for attention in maps] == [(2, 5, 5), (2, 3, 3), (2, 4, 4)]
    assert {attention.dtype for attention in maps} == {torch.promote_types(dtype, torch.float32)}


def test_a_channels_last_volume_is_transposed_nowhere_and_a_contiguous_one_twice(kernels):
    for memory_format, times in zip(FORMATS, (2, 0), strict=True):
        x = random_volume((2, 6, 4, 5, 3)).contiguous(memory_format=memory_format)
        kernels.calls.clear()
        recurrent_slice_attention(x, *random_block(6))
        assert kernels.calls.count("transpose") == times
        assert [call for call in kernels.calls if call != "transpose"] == ["contract", "softmax", "mix"] * 3


def test_logits_beyond_the_range_of_float16_stay_finite(kernels):
    tensors = [tensor.half() for tensor in (random_volume((1, 16, 8, 8, 8)), *random_block(16, gain=30))]
    assert not torch.isfinite(published(*tensors)).all()
    out, maps = recurrent_slice_attention(*tensors, return_maps=True)
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(attention).all() for attention in maps)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_memory_is_written_before_it_is_read(memory_format, recompute, kernels):
    shape = (2, 9, 4, 5, 7)
    tensors = [random_volume(shape).contiguous(memory_format=memory_format), *random_block(9)]
    upstream = random_volume(shape, seed=2)
    block = lambda *t: recurrent_slice_attention(*t, recompute=recompute)  # noqa: E731
    clean = with_gradients(block, tensors, upstream)
    torch.use_deterministic_algorithms(True)  # fills every uninitialised tensor with NaN
    try:
        poisoned = with_gradients(block, tensors, upstream)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(clean, poisoned, strict=True))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [(1, 8, 5, 3, 7), (2, 3, 4, 6, 2)])
def test_a_block_of_the_kernels_themselves(shape, memory_format, kernels, emulator, monkeypatch):
    monkeypatch.setattr(cuda, "operators", stand_ins.Emulated(emulator))
    compare(shape, volume=lambda x: x.contiguous(memory_format=memory_format))


@pytest.mark.parametrize("dtype", FLOORS)
def test_a_block_of_the_kernels_themselves_in_less_precision(dtype, kernels, emulator, monkeypatch):
    monkeypatch.setattr(cuda, "operators", stand_ins.Emulated(emulator))
    tensors = [tensor.to(dtype) for tensor in (random_volume((2, 8, 4, 5, 6)), *random_block(8, gain=0.3))]
    upstream = random_volume((2, 8, 4, 5, 6), seed=2).to(dtype)
    truths = with_gradients(published, [tensor.double() for tensor in tensors], upstream.double())
    eager = with_gradients(published, tensors, upstream)
    results = with_gradients(recurrent_slice_attention, tensors, upstream)
    for index in (0, 1, 2, 3, 4, 6, 7, 8):
        budget = 2 * relative_error(eager[index], truths[index]) + FLOORS[dtype]
        assert relative_error(results[index], truths[index]) <= budget, index
