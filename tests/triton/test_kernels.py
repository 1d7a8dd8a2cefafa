"""The Triton kernels in the interpreter: each regime, sizes around the edges of tiles, traffic, rounding, offsets."""

import inspect

import pytest
import torch
from support import (
    FORMATS,
    golden_block,
    golden_tensor,
    random_block,
    random_volume,
    relative_error,
    with_gradients,
)

from benchmarks.published import published
from rsa_kernels import backends, recurrent_slice_attention, slice_attention

if not backends.interpreted():
    pytest.skip("runs under TRITON_INTERPRET=1, to which make test gives a process of its own", allow_module_level=True)

import triton

from rsa_kernels.triton import block, launch, tuning, volumes
from rsa_kernels.triton.volumes import Geometry

FLOORS = {torch.float32: 1e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


@pytest.fixture(params=["narrow", "wide"])
def regime(request, monkeypatch):
    """Makes the launch table choose one family of kernels wherever it can."""
    if request.param == "wide":
        monkeypatch.setattr(tuning, "_narrow", lambda *arguments: None)
    tuning.tiling.cache_clear()
    yield request.param
    tuning.tiling.cache_clear()


def launched(monkeypatch):
    """The names of the kernels that are launched from here on."""
    names = []
    call = launch.Bound.__call__

    def note(self, *arguments):
        names.append(f"{self._kernel.fn.__module__.rsplit('.', 1)[1]}.{self._kernel.fn.__name__}")
        call(self, *arguments)

    monkeypatch.setattr(launch.Bound, "__call__", note)
    return names


def compare(shape, axes, tolerance=1e-9, memory_format=torch.channels_last_3d, **options):
    tensors = [random_volume(shape), *random_block(shape[1], len(axes), gain=0.3)]
    upstream = random_volume(shape, seed=2)
    truths = with_gradients(lambda *t: published(*t, axes=axes), tensors, upstream)
    tensors[0] = tensors[0].contiguous(memory_format=memory_format)
    results = with_gradients(
        lambda *t: recurrent_slice_attention(*t, axes, backend="triton", **options), tensors, upstream
    )
    for result, truth in zip(results, truths, strict=True):
        assert (result - truth).abs().max() <= tolerance * (1 + truth.abs().max())


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((1, 1, 1, 1, 1), (2,)),
        ((2, 3, 1, 7, 2), (3, 4, 2)),
        ((1, 20, 17, 3, 5), (2, 3)),
        ((1, 40, 5, 3, 7), (4, 2)),
        ((3, 16, 2, 13, 2), (3,)),
        ((1, 130, 3, 2, 3), (2, 4)),
        ((1, 2, 33, 2, 3), (2,)),
        ((1, 2, 3, 2, 65), (4,)),
    ],
)
def test_any_shape_in_every_regime(shape, axes, memory_format, regime):
    compare(shape, axes, memory_format=memory_format)


@pytest.mark.parametrize("size", [127, 129, 257])
def test_many_slices(size):
    compare((1, 2, 2, size, 1), (3,))


def test_recomputed_steps_in_every_regime(regime):
    compare((2, 6, 4, 5, 3), (3, 4, 2), recompute=True)


def test_each_regime_runs_its_own_kernels(regime, monkeypatch):
    names = launched(monkeypatch)
    x, *weights = (random_volume((1, 16, 4, 4, 4)).contiguous(memory_format=torch.channels_last_3d), *random_block(16))
    recurrent_slice_attention(x, *weights, backend="triton")
    a_step = {
        "narrow": ["narrow.map_kernel", "maps.softmax_kernel", "narrow.mix_kernel"],
        "wide": ["wide.contract_kernel", "maps.softmax_kernel", "wide.mix_kernel"],
    }[regime]
    assert names == ["weights.fold_kernel"] + 3 * a_step


@pytest.mark.parametrize("dtype", FLOORS)
def test_error_is_at_most_twice_eager_pytorch_in_every_regime(dtype, regime):
    tensors = [tensor.to(dtype) for tensor in (random_volume((1, 24, 7, 6, 9)), *random_block(24, gain=0.3))]
    upstream = random_volume((1, 24, 7, 6, 9), seed=2).to(dtype)
    truths = with_gradients(published, [tensor.double() for tensor in tensors], upstream.double())
    eager = with_gradients(published, tensors, upstream)
    results = with_gradients(lambda *t: recurrent_slice_attention(*t, backend="triton"), tensors, upstream)
    for index in (0, 1, 2, 3, 4, 6, 7, 8):  # the sixth is exactly zero
        budget = 2 * relative_error(eager[index], truths[index]) + FLOORS[dtype]
        assert relative_error(results[index], truths[index]) <= budget, index


def test_weights_in_float32_with_volumes_in_bfloat16(regime):
    x, *weights = random_volume((1, 8, 5, 4, 6)).bfloat16(), *(tensor.float() for tensor in random_block(8, gain=0.3))
    results = with_gradients(lambda *t: recurrent_slice_attention(*t, backend="triton"), [x, *weights], x)
    assert [result.dtype for result in results] == [torch.bfloat16] * 2 + [torch.float32] * 7
    truths = with_gradients(published, [tensor.double() for tensor in (x, *weights)], x.double())
    for index in (0, 1, 2, 4, 6, 8):
        assert relative_error(results[index], truths[index]) <= 0.05, index


@pytest.mark.parametrize("needed", [(0,), (1,), (5,), (7,), (0, 5)])
def test_gradients_are_made_only_where_needed(needed, regime):
    tensors = [random_volume((1, 6, 4, 5, 3)), *random_block(6)]
    leaves = [tensor.clone().requires_grad_(index in needed) for index, tensor in enumerate(tensors)]
    out = recurrent_slice_attention(*leaves, backend="triton")
    truths = with_gradients(published, tensors, torch.ones_like(out))
    out.sum().backward()
    for index, (leaf, truth) in enumerate(zip(leaves, truths[1:], strict=True)):
        if index in needed:
            torch.testing.assert_close(leaf.grad, truth, rtol=1e-9, atol=1e-9)
        else:
            assert leaf.grad is None


def test_memory_is_written_before_it_is_read_in_every_regime(regime):
    tensors = [random_volume((2, 9, 4, 5, 7)), *random_block(9)]
    upstream = random_volume((2, 9, 4, 5, 7), seed=2)

    def run():
        return with_gradients(lambda *t: recurrent_slice_attention(*t, backend="triton"), tensors, upstream)

    clean = run()
    torch.use_deterministic_algorithms(True)  # fills every uninitialised tensor with NaN
    try:
        poisoned = run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(clean, poisoned, strict=True))


def test_the_golden_block_in_every_regime(regime):
    leaves = [golden_tensor("rsa_odd.x", (1, 12, 9, 3, 11)), *golden_block(12)]
    out = recurrent_slice_attention(leaves[0], *leaves[1:7], leaves[7:], backend="triton")
    truth = recurrent_slice_attention(leaves[0], *leaves[1:7], leaves[7:], backend="reference")
    torch.testing.assert_close(out, truth, rtol=0, atol=1e-10)


# Traffic -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def traffic(monkeypatch):
    """Counts the bytes of volumes that kernels load and store: ``{kernel: [loaded, stored]}``."""
    counts, watched, running = {}, [], [""]
    builder = type(triton.runtime.interpreter.interpreter_builder)
    load, store, call, empty = (
        builder.create_masked_load,
        builder.create_masked_store,
        launch.Bound.__call__,
        volumes.empty_packed,
    )

    def count(pointers, mask, which):
        touched = pointers.data[mask.data]
        if len(touched) and any(0 <= touched.flat[0] - first.data_ptr() < first.nbytes for first in watched):
            size = pointers.get_element_ty().primitive_bitwidth // 8
            counts.setdefault(running[0], [0, 0])[which] += touched.size * size

    def note_load(self, pointers, mask, *rest):
        count(pointers, mask, 0)
        return load(self, pointers, mask, *rest)

    def note_store(self, pointers, value, mask, *rest):
        count(pointers, mask, 1)
        return store(self, pointers, value, mask, *rest)

    def note_call(self, *arguments):
        running[0] = self._kernel.fn.__name__.removesuffix("_kernel")
        call(self, *arguments)

    def watch(volume):
        watched.append(volume)  # kept, so that nothing else comes to lie where it was
        return volume

    monkeypatch.setattr(builder, "create_masked_load", note_load)
    monkeypatch.setattr(builder, "create_masked_store", note_store)
    monkeypatch.setattr(launch.Bound, "__call__", note_call)
    for module in (volumes, block):
        monkeypatch.setattr(module, "empty_packed", lambda *arguments: watch(empty(*arguments)))
    return counts, watch


@pytest.mark.parametrize("shape", [(2, 16, 8, 6, 10), (1, 20, 7, 5, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_traffic_of_narrow_kernels_is_the_floor(memory_format, dtype, shape, traffic):
    counts, watch = traffic
    x, upstream = (
        watch(random_volume(shape, seed).to(dtype).contiguous(memory_format=memory_format)) for seed in (1, 2)
    )
    tensors = [tensor.to(dtype).requires_grad_() for tensor in (x, *random_block(shape[1]))]
    out = recurrent_slice_attention(x.requires_grad_(), *tensors[1:], backend="triton")
    watch(out)
    volume = x.nbytes
    repack = [volume, volume] if memory_format == torch.contiguous_format else [0, 0]

    def multiples():
        return {kernel: [part / volume for part in parts] for kernel, parts in counts.items() if kernel != "transpose"}

    # Three steps, each 2 reads and 1 write forward, 4 reads and 1 write backward.
    assert multiples() == {"map": [3, 0], "mix": [3, 3]}
    transposed = counts.pop("transpose", [0, 0])
    assert transposed[0] == 2 * repack[0]
    counts.clear()
    out.backward(upstream)
    assert multiples() == {"map_backward": [6, 0], "mix_backward": [6, 3]}
    assert counts.get("transpose", [0, 0])[0] == 3 * repack[0]


# Numbers -----------------------------------------------------------------------------------------------------------


def test_split_operands_make_logits_of_bfloat16_volumes_nearly_exact(monkeypatch):
    """Logits of some hundreds, as real features have, on volumes whose mean is not zero."""
    x = (random_volume((1, 16, 6, 8, 8)) + 0.5).bfloat16()
    weights = [tensor.float() for tensor in random_block(16, 1, gain=0.8)]
    truth = recurrent_slice_attention(
        x.double(), *(tensor.double() for tensor in weights), (2,), return_maps=True, backend="reference"
    )[1][0]

    def error(split):
        find = tuning._narrow

        def narrow(kernel, *arguments):
            return find(kernel, *arguments)._replace(split=split and kernel == "map")

        with monkeypatch.context() as patch:
            patch.setattr(tuning, "_narrow", narrow)
            tuning.tiling.cache_clear()
            maps = recurrent_slice_attention(x, *weights, (2,), return_maps=True, backend="triton")[1]
        tuning.tiling.cache_clear()
        return (maps[0] - truth).abs().max()

    assert error(split=True) < 2e-3
    assert error(split=False) > 10 * error(split=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_gradients_of_logits_keep_the_sums_of_their_rows(dtype):
    generator = torch.Generator().manual_seed(0)
    machine = block.Machine(torch.empty(2, 8, 21, 1, 1, dtype=dtype), 0, 0)
    attention = torch.softmax(3 * torch.randn(2, 21, 21, generator=generator), -1)
    contracted = torch.randn(2, 1, 32, 32, generator=generator)
    row_dots = torch.empty(1, 2, 32)
    rounded = machine.softmax_backward(contracted, attention, row_dots=row_dots)
    weighted = attention * contracted[:, 0, :21, :21]
    exact = weighted - attention * weighted.sum(-1, keepdim=True)
    torch.testing.assert_close(row_dots[0, :, :21], weighted.sum(-1))
    torch.testing.assert_close(rounded[:, :21, :21].float(), exact, rtol=0, atol=0.05)
    assert rounded[:, 21:].count_nonzero() == rounded[:, :, 21:].count_nonzero() == 0
    lost = exact.to(dtype).float().sum(-1).abs().mean()
    assert 3 * rounded.float().sum(-1)[:, :21].abs().mean() < lost


def test_flat_maps_stay_flat_when_rounded(regime):
    """Logits that are all equal: every entry of a row is rounded the same way."""
    x, *weights = (random_volume((1, 16, 40, 2, 2)).half(), *(part.half() for part in random_block(16, 1, gain=0.3)))
    weights[0].zero_()
    weights[1].zero_()
    truth = with_gradients(lambda *t: published(*t, axes=(2,)), [part.double() for part in (x, *weights)], x.double())
    eager = with_gradients(lambda *t: published(*t, axes=(2,)), [x, *weights], x)
    results = with_gradients(lambda *t: recurrent_slice_attention(*t, (2,), backend="triton"), [x, *weights], x)
    for index in (0, 1, 6, 7):  # output, x, g_weight, g_bias
        budget = 2 * relative_error(eager[index], truth[index]) + 2e-3
        assert relative_error(results[index], truth[index]) <= budget, index


def test_volumes_past_two_to_the_thirty_one_elements(monkeypatch):
    """Three slices 2^31 elements apart, of which only a few positions are read: the memory between is never touched."""
    monkeypatch.setattr(triton.runtime.interpreter.GridExecutor, "_restore_args_dev", lambda *arguments: None)
    channels, places, apart = 16, 5, 2**27 + 7
    geometry = Geometry(3, 1, places, (3 * apart, apart, 0, 1), True)
    memory = torch.empty((2 * apart + places) * channels, dtype=torch.float16)
    assert memory.numel() > 2**32
    far = memory.as_strided((3, places, channels), (apart * channels, channels, 1))
    far.copy_(random_volume((3, places, channels)))
    small = far.permute(2, 0, 1)[None, :, :, None].float()
    published_weights = [tensor.float() for tensor in random_block(channels, 1, gain=0.3)]
    machine = block.Machine(memory.new_empty(1, channels, 3, 1, places), 0, 0, published_weights)
    weights = block.Weights(machine, block.Projections(*published_weights[:6]), published_weights[6], 1.0)
    tiling = tuning.Tiling(64, 16, 4, 1)
    folded = weights.narrow(64)
    attention, rounded = machine.softmax(machine.narrow_map(memory, folded, geometry, tiling, 16), 3)
    machine.narrow_mix(memory, rounded, folded, weights.betas, 0, memory, geometry, tiling)
    truth, maps = recurrent_slice_attention(small, *published_weights, (2,), return_maps=True, backend="reference")
    torch.testing.assert_close(attention, maps[0], rtol=1e-2, atol=1e-2)
    assert relative_error(far.permute(2, 0, 1)[None, :, :, None], truth.double()) < 2e-3


def test_the_same_weights_serve_every_axis(monkeypatch):
    names = launched(monkeypatch)
    x = random_volume((1, 8, 3, 4, 5)).contiguous(memory_format=torch.channels_last_3d)
    recurrent_slice_attention(x, *random_block(8, 4), (2, 3, 4, 2), backend="triton")
    assert names.count("weights.fold_kernel") == 1


# Volumes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 3, 5, 1, 7), (1, 65, 3, 5, 9), (2, 16, 1, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_packing_there_and_back_is_exact(shape, dtype):
    volume = random_volume(shape).to(dtype)
    packed = volumes.pack(volume, 0, 0)
    assert volumes.is_packed(packed)
    assert torch.equal(packed, volume)
    again = volumes.unpack(packed, volume, 0, 0)
    assert again.stride() == volume.stride()
    assert torch.equal(again, volume)


def test_channels_last_volumes_are_never_copied(monkeypatch):
    names = launched(monkeypatch)
    x = random_volume((2, 6, 4, 5, 3)).contiguous(memory_format=torch.channels_last_3d)
    leaves = [tensor.requires_grad_() for tensor in (x, *random_block(6))]
    copies = []
    copy = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *arguments: copies.append(arguments[0].shape) or copy(*arguments))
    out = recurrent_slice_attention(*leaves, backend="triton")
    out.backward(torch.ones_like(out))
    assert out.is_contiguous(memory_format=torch.channels_last_3d)
    assert x.grad.is_contiguous(memory_format=torch.channels_last_3d)
    assert "volumes.transpose_kernel" not in names
    assert x.shape not in copies


@pytest.mark.parametrize("gradients", [True, False])
def test_inputs_are_left_as_they_were(gradients, regime):
    x = random_volume((1, 6, 4, 5, 3)).contiguous(memory_format=torch.channels_last_3d)
    tensors = [x, *random_block(6)]
    before = [tensor.clone() for tensor in tensors]
    out = recurrent_slice_attention(*(tensor.requires_grad_(gradients) for tensor in tensors), backend="triton")
    if gradients:
        upstream = x.detach().clone(memory_format=torch.preserve_format)
        out.backward(upstream)
        assert torch.equal(upstream, x)
    assert all(torch.equal(one, other) for one, other in zip(before, tensors, strict=True))


def test_every_pointer_is_aligned_or_compiled_for_as_unaligned(monkeypatch, regime):
    """Volumes, weights and betas that start in the middle of things, and channels of odd sizes."""
    call, seen = launch.Bound.__call__, []

    def note(self, programs, stream, *arguments):
        names = inspect.signature(self._kernel.fn).parameters
        for name, argument in zip(names, arguments, strict=False):
            if isinstance(argument, torch.Tensor) and name not in self._kernel.kwargs["do_not_specialize"]:
                seen.append(argument.data_ptr() % 16)
        call(self, programs, stream, *arguments)

    def shifted(tensor):
        memory = tensor.new_empty(tensor.numel() + 1)[1:]
        return torch.as_strided(memory, tensor.shape, tensor.stride()).copy_(tensor)

    monkeypatch.setattr(launch.Bound, "__call__", note)
    for channels in (8, 5):
        x = random_volume((2, channels, 3, 4, 5)).contiguous(memory_format=torch.channels_last_3d)
        tensors = [part.bfloat16() for part in (x, *random_block(channels, gain=0.3))]
        unaligned = [shifted(part) for part in tensors]
        assert all(part.data_ptr() % 16 for part in unaligned)
        assert not volumes.is_packed(unaligned[0])
        upstream = shifted(tensors[0])
        truths = with_gradients(published, [part.double() for part in tensors], upstream.double())
        leaves = [part.requires_grad_() for part in unaligned]
        out = recurrent_slice_attention(*leaves, backend="triton")
        results = [out, *torch.autograd.grad(out, leaves, upstream)]
        for index in (0, 1, 2, 4, 6, 8):
            assert relative_error(results[index], truths[index]) < 0.06, index
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("scale", [1 / (32 * 24 * 24) ** 0.5, 1 / (32 * 24 * 24)])
def test_small_scales_do_not_vanish_in_half_precision(scale, regime):
    x, *weights = (part.half() for part in (random_volume((1, 32, 6, 24, 24)), *random_block(32, 1, gain=0.6)))
    maps, truth = (
        recurrent_slice_attention(*parts, (2,), scale=scale, return_maps=True, backend=name)[1][0]
        for parts, name in (((x, *weights), "triton"), ([part.double() for part in (x, *weights)], "reference"))
    )
    assert relative_error(maps - 1 / 6, truth - 1 / 6) < 2e-3


@pytest.mark.parametrize("axis", [2, 3, 4])
@pytest.mark.parametrize("slices", [5, 33, 70])
def test_slice_attention_in_blocks(slices, axis):
    shape = [1, 3, 2, 2, 2]
    shape[axis] = slices
    tensors = [random_volume(shape, seed) for seed in range(3)]
    upstream = random_volume(shape, seed=3)
    results, truths = (
        with_gradients(lambda *t, name=name: slice_attention(*t, axis, scale=0.3, backend=name), tensors, upstream)
        for name in ("triton", "reference")
    )
    for result, truth in zip(results, truths, strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-9, atol=1e-9)
