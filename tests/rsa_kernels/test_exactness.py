"""Every backend computes the published equations: any size, axis, stride and dtype, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    BACKENDS,
    EXAMPLES,
    FORMATS,
    INTERPRETED,
    random_block,
    random_volume,
    relative_error,
    with_gradients,
)

from benchmarks.published import published
from rsa_kernels import folded, recurrent_slice_attention, slice_attention

pytestmark = pytest.mark.parametrize("backend", BACKENDS)

# ||error|| may be twice that of eager PyTorch in the same precision, plus this.
FLOORS = {torch.float32: 1e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
LARGE = (1, 32, 9, 11, 10) if INTERPRETED else (1, 32, 16, 18, 17)


@pytest.fixture
def small_tiles(monkeypatch):
    """Makes the folded backend cut even small volumes into many tiles, ragged ones included."""
    monkeypatch.setattr(folded, "CPU_TILE_BYTES", 512)


def compare(shape, axes, backend, volume=lambda x: x, scale=1.0, **options):
    """Asserts output and gradients against the published equations in float64, to 1e-9 of the largest entry."""
    tensors = [random_volume(shape), *random_block(shape[1], len(axes))]
    upstream = random_volume(shape, seed=2)
    truths = with_gradients(lambda *t: published(*t, axes=axes, scale=scale), tensors, upstream)

    def block(x, *weights):
        return recurrent_slice_attention(volume(x), *weights, axes, scale=scale, backend=backend, **options)

    for result, truth in zip(with_gradients(block, tensors, upstream), truths, strict=True):
        assert (result - truth).abs().max() <= 1e-9 * (1 + truth.abs().max())


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("axes", [(2,), (3,), (4,), (3, 4, 2), (2, 2), (4, 3, 2, 3)])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1), (2, 3, 1, 7, 2), (1, 5, 13, 2, 3), (3, 17, 4, 5, 6), (1, 40, 5, 3, 7)]
)
def test_any_shape_and_axes_in_many_tiles(shape, axes, memory_format, backend, small_tiles):
    compare(shape, axes, backend, lambda x: x.contiguous(memory_format=memory_format), scale=0.7)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "strided",
    [
        lambda x: x.transpose(2, 4).contiguous().transpose(2, 4),
        lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
        lambda x: torch.cat([x[..., :1], x], 4)[..., 1:],
        lambda x: x.repeat_interleave(2, 3)[:, :, :, ::2],
        lambda x: x.contiguous(memory_format=torch.channels_last_3d),
        lambda x: x.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2),
    ],
    ids=["transposed", "channel slice", "offset", "every second row", "channels last", "scrambled"],
)
def test_any_strides_in(strided, recompute, backend):
    compare((2, 6, 4, 5, 6), (3, 4, 2), backend, strided, recompute=recompute)


def test_an_expanded_volume(backend):
    tensors, upstream = [random_volume((1, 4, 3, 1, 5)), *random_block(4)], random_volume((2, 4, 3, 6, 5))
    results, truths = (
        with_gradients(lambda x, *w, block=block: block(x.expand(2, 4, 3, 6, 5), *w), tensors, upstream)
        for block in (lambda *t: recurrent_slice_attention(*t, backend=backend), published)
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
    "scalar": lambda y: y[0, 0, 0, 0, 0],
}


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("loss", UPSTREAM.values(), ids=UPSTREAM.keys())
def test_gradients_that_arrive_with_any_strides(loss, memory_format, backend):
    tensors = [random_volume((2, 6, 4, 5, 3)).contiguous(memory_format=memory_format), *random_block(6)]
    truths = with_gradients(lambda *t: loss(published(*t)), tensors, None)
    results = with_gradients(lambda *t: loss(recurrent_slice_attention(*t, backend=backend)), tensors, None)
    for result, truth in zip(results, truths, strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-9, atol=1e-9)


def test_the_gradient_that_arrives_is_not_written_to(backend):
    upstream = random_volume((1, 4, 3, 4, 5))
    before = upstream.clone()
    with_gradients(
        lambda *t: recurrent_slice_attention(*t, backend=backend),
        [random_volume((1, 4, 3, 4, 5)), *random_block(4)],
        upstream,
    )
    assert torch.equal(upstream, before)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=5, max_size=5),
    axes=st.lists(st.sampled_from([2, 3, 4, -1, -2, -3, "axial", "coronal", "sagittal"]), min_size=1, max_size=4),
    order=st.permutations(range(5)),
    recompute=st.booleans(),
)
def test_any_block(sizes, axes, order, recompute, backend):
    def scramble(x):
        inverse = [order.index(dim) for dim in range(5)]
        return x.permute(*order).contiguous().permute(*inverse)

    names = {"axial": 2, "coronal": 3, "sagittal": 4, -1: 4, -2: 3, -3: 2}
    dims = [names.get(axis, axis) for axis in axes]
    tensors = [random_volume(sizes), *random_block(sizes[1], len(axes))]
    upstream = random_volume(sizes, seed=2)
    truths = with_gradients(lambda *t: published(*t, axes=dims), tensors, upstream)

    def block(x, *weights):
        return recurrent_slice_attention(scramble(x), *weights, axes, recompute=recompute, backend=backend)

    for result, truth in zip(with_gradients(block, tensors, upstream), truths, strict=True):
        assert (result - truth).abs().max() <= 1e-9 * (1 + truth.abs().max())


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=5, max_size=5),
    axes=st.lists(st.sampled_from([2, 3, 4]), min_size=1, max_size=3),
    memory_format=st.sampled_from(FORMATS),
    dtype=st.sampled_from(list(FLOORS)),
)
def test_any_block_in_any_dtype(sizes, axes, memory_format, dtype, backend):
    tensors = [tensor.to(dtype) for tensor in (random_volume(sizes), *random_block(sizes[1], len(axes)))]
    truth = published(*(tensor.double() for tensor in tensors), axes=axes)
    budget = 2 * relative_error(published(*tensors, axes=axes), truth) + FLOORS[dtype]
    x = tensors[0].contiguous(memory_format=memory_format)
    assert relative_error(recurrent_slice_attention(x, *tensors[1:], axes, backend=backend), truth) <= budget


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=5, max_size=5),
    axis=st.sampled_from([2, 3, 4]),
    formats=st.lists(st.sampled_from(FORMATS), min_size=3, max_size=3),
)
def test_any_slice_attention(sizes, axis, formats, backend):
    tensors = [random_volume(sizes, seed).contiguous(memory_format=f) for seed, f in enumerate(formats)]
    upstream = random_volume(sizes, seed=3)

    def literal(query, key, value):
        rows, columns, slices = (volume.transpose(1, axis).flatten(2) for volume in (query, key, value))
        mixed = torch.softmax(0.5 * rows @ columns.transpose(1, 2), -1) @ slices
        return mixed.view(value.transpose(1, axis).shape).transpose(1, axis)

    truths = with_gradients(literal, tensors, upstream)
    results = with_gradients(
        lambda q, k, v: slice_attention(q, k, v, axis, scale=0.5, backend=backend), tensors, upstream
    )
    for result, truth in zip(results, truths, strict=True):
        assert (result - truth).abs().max() <= 1e-10 * (1 + truth.abs().max())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 2, 3, 2), (1, 5, 2, 1, 2)], ids=["narrow", "wide"])
def test_gradcheck(shape, recompute, backend):
    tensors = [random_volume(shape), *random_block(shape[1])]
    leaves = [tensor.requires_grad_() for tensor in tensors]
    block = lambda *t: recurrent_slice_attention(*t, recompute=recompute, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(block, leaves, check_undefined_grad=False, fast_mode=INTERPRETED)


def test_gradcheck_of_slice_attention(backend):
    volumes = [random_volume((2, 2, 3, 2, 2), seed).requires_grad_() for seed in range(3)]
    for axis in (2, 3, 4):
        attend = lambda *t, axis=axis: slice_attention(*t, axis, backend=backend)  # noqa: E731
        assert torch.autograd.gradcheck(attend, volumes, fast_mode=INTERPRETED)


@pytest.mark.parametrize("wanted", range(8))
def test_gradients_only_where_they_are_needed(wanted, backend):
    tensors = [random_volume((1, 5, 4, 2, 3)), *random_block(5)]
    upstream = random_volume((1, 5, 4, 2, 3), seed=2)
    truths = with_gradients(published, tensors, upstream)[1:]
    tensors[wanted].requires_grad_()
    recurrent_slice_attention(*tensors, backend=backend).backward(upstream)
    for index, (tensor, truth) in enumerate(zip(tensors, truths, strict=True)):
        if index == wanted:
            torch.testing.assert_close(tensor.grad, truth, rtol=1e-9, atol=1e-9)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("wanted", range(3))
def test_slice_attention_gradients_only_where_they_are_needed(wanted, backend):
    volumes = [random_volume((1, 3, 4, 2, 3), seed) for seed in range(3)]
    upstream = random_volume((1, 3, 4, 2, 3), seed=4)
    truths = with_gradients(lambda *t: slice_attention(*t, 3, backend="reference"), volumes, upstream)[1:]
    volumes[wanted].requires_grad_()
    slice_attention(*volumes, 3, backend=backend).backward(upstream)
    assert [volume.grad is not None for volume in volumes] == [index == wanted for index in range(3)]
    torch.testing.assert_close(volumes[wanted].grad, truths[wanted], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_phi_bias_has_an_exactly_zero_gradient(dtype, backend):
    tensors = [tensor.to(dtype).requires_grad_() for tensor in (random_volume((2, 6, 4, 5, 3)), *random_block(6))]
    recurrent_slice_attention(*tensors, backend=backend).sum().backward()
    assert tensors[4].grad is not None
    assert torch.equal(tensors[4].grad, torch.zeros(6, dtype=dtype))


def test_zero_betas_make_the_identity_and_still_learn(backend):
    x, *block = random_volume((2, 6, 4, 5, 3)), *random_block(6)
    block[-1] = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    out = recurrent_slice_attention(x, *block, backend=backend)
    assert torch.equal(out, x)
    out.square().sum().backward()
    assert (block[-1].grad != 0).all()


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", FLOORS)
@pytest.mark.parametrize("shape", [(2, 8, 6, 7, 5), LARGE, (1, 96, 5, 7, 6)])
def test_error_is_at_most_twice_eager_pytorch(shape, dtype, memory_format, backend):
    tensors = [tensor.to(dtype) for tensor in (random_volume(shape), *random_block(shape[1], gain=0.3))]
    upstream = random_volume(shape, seed=2).to(dtype)
    truths = with_gradients(published, [tensor.double() for tensor in tensors], upstream.double())
    eager = with_gradients(published, tensors, upstream)
    tensors[0] = tensors[0].contiguous(memory_format=memory_format)
    results = with_gradients(lambda *t: recurrent_slice_attention(*t, backend=backend), tensors, upstream)
    # phi_bias, the sixth, is exactly zero and has a test of its own.
    for index in (0, 1, 2, 3, 4, 6, 7, 8):
        budget = 2 * relative_error(eager[index], truths[index]) + FLOORS[dtype]
        assert relative_error(results[index], truths[index]) <= budget, index


def test_logits_beyond_the_range_of_float16_stay_finite(backend):
    shape = (1, 16, 8, 8, 8)
    tensors = [tensor.half() for tensor in (random_volume(shape), *random_block(16, gain=30))]
    assert not torch.isfinite(published(*tensors)).all()
    out, maps = recurrent_slice_attention(*tensors, return_maps=True, backend=backend)
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(attention).all() for attention in maps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_dtypes_and_memory_formats_are_kept(memory_format, dtype, backend):
    tensors = [tensor.to(dtype) for tensor in (random_volume((2, 6, 4, 5, 3)), *random_block(6))]
    x = tensors[0].contiguous(memory_format=memory_format).requires_grad_()
    out, maps = recurrent_slice_attention(x, *tensors[1:], return_maps=True, backend=backend)
    out.sum().backward()
    for volume in (out, x.grad, slice_attention(x, x, x, "axial", backend=backend)):
        assert volume.dtype == dtype
        assert volume.is_contiguous(memory_format=memory_format)
    assert [tuple(attention.shape) for attention in maps] == [(2, 5, 5), (2, 3, 3), (2, 4, 4)]
    for attention in maps:
        assert attention.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert not attention.requires_grad
        torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_on_every_run(dtype, memory_format, backend):
    shape = (1, 16, 9, 8, 10) if INTERPRETED else (1, 16, 24, 20, 22)
    tensors = [tensor.to(dtype) for tensor in (random_volume(shape), *random_block(16))]
    tensors[0] = tensors[0].contiguous(memory_format=memory_format)
    upstream = random_volume(shape, seed=2).to(dtype)
    runs = [
        with_gradients(lambda *t: recurrent_slice_attention(*t, backend=backend), tensors, upstream)
        for _ in range(2 if INTERPRETED else 3)
    ]
    for run in runs[1:]:
        assert all(torch.equal(first, again) for first, again in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("recompute", [False, True])
def test_memory_is_written_before_it_is_read(recompute, memory_format, backend):
    shape = (2, 9, 4, 5, 7)
    tensors = [random_volume(shape).contiguous(memory_format=memory_format), *random_block(9)]
    upstream = random_volume(shape, seed=2)
    block = lambda *t: recurrent_slice_attention(*t, recompute=recompute, backend=backend)  # noqa: E731
    clean = with_gradients(block, tensors, upstream)
    torch.use_deterministic_algorithms(True)  # fills every uninitialised tensor with NaN
    try:
        assert torch.empty(3).isnan().all()
        poisoned = with_gradients(block, tensors, upstream)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(clean, poisoned, strict=True))


def test_training_and_inference_agree_bit_for_bit(backend):
    tensors = [tensor.float() for tensor in (random_volume((2, 9, 4, 5, 7)), *random_block(9))]
    training = recurrent_slice_attention(tensors[0].requires_grad_(), *tensors[1:], backend=backend)
    with torch.no_grad():
        no_grad = recurrent_slice_attention(*tensors, backend=backend)
    with torch.inference_mode():
        inference = recurrent_slice_attention(*tensors, backend=backend)
    assert torch.equal(training, no_grad)
    assert torch.equal(training, inference)


def test_autocast_computes_in_its_dtype_and_keeps_the_weights(backend):
    x, *block = (tensor.float().requires_grad_() for tensor in (random_volume((2, 8, 4, 5, 3)), *random_block(8)))
    with torch.autocast("cpu", torch.bfloat16):
        out = recurrent_slice_attention(x, *block, backend=backend)
        attended = slice_attention(x, x, x.detach().bfloat16(), 2, backend=backend)
    assert out.dtype == attended.dtype == torch.bfloat16
    direct = recurrent_slice_attention(x.bfloat16(), *block, backend=backend)
    assert torch.equal(out, direct)
    out.float().square().sum().backward()
    for tensor in (x, *block):
        assert tensor.grad.dtype == torch.float32
        assert torch.isfinite(tensor.grad).all()
    with torch.autocast("cpu", torch.bfloat16):
        exact = recurrent_slice_attention(x.double(), *(tensor.double() for tensor in block), backend=backend)
    assert exact.dtype == torch.float64


def test_backward_inside_an_autocast_region_is_as_exact_as_outside(backend):
    block = [tensor.float() for tensor in random_block(8)]
    x, upstream = (random_volume((2, 8, 4, 5, 3), seed).float() for seed in (1, 2))

    def gradients(inside):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, *block)]
        with torch.autocast("cpu", torch.bfloat16):
            attended = recurrent_slice_attention(*leaves, backend=backend)
            out = slice_attention(attended, attended, attended, 3, backend=backend)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            return torch.autograd.grad(out, leaves, upstream.bfloat16())

    assert all(torch.equal(one, other) for one, other in zip(gradients(True), gradients(False), strict=True))
