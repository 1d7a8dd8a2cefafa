"""The C++ kernels: every instruction set, any number of threads, any caller, any strides."""

import hashlib
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from support import FORMATS, example, random_block, random_volume, relative_error, with_gradients

from rsa_kernels import cpp, recurrent_slice_attention, slice_attention

INSTRUCTION_SETS = ("amx", "avx512_bf16", "avx512", "avx2", "plain")
FLOORS = {torch.float64: 1e-10, torch.float32: 1e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
# Channels below, at and above a panel; slices and positions below, at and above a vector and a tile.
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 1, 13, 2),
    (1, 64, 3, 17, 33),
    (3, 70, 7, 9, 11),
    (1, 16, 24, 20, 22),
    (1, 130, 5, 7, 6),
    (1, 33, 2, 3, 70),
    (1, 8, 65, 5, 16),
]


def block(*tensors, **options):
    return recurrent_slice_attention(*tensors, backend="cpp", **options)


def large_enough_for_threads(memory_format=torch.contiguous_format, dtype=torch.float32):
    """A block that is cut into many parts along every axis."""
    tensors = [tensor.to(dtype) for tensor in (random_volume((2, 24, 14, 22, 26)), *random_block(24))]
    tensors[0] = tensors[0].contiguous(memory_format=memory_format)
    return tensors, random_volume(tensors[0].shape, seed=2).to(dtype)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other processors do not take long for them")
def test_numbers_below_2_to_the_minus_126_are_zero_for_a_pass_and_for_nothing_else(instruction_set):
    (x, *weights), upstream = large_enough_for_threads()
    weights[5] = torch.zeros_like(weights[5])
    tiny = torch.full_like(x, 1e-40)
    assert block(tiny, *weights).eq(0).all()
    with_gradients(block, [x, *weights], upstream)
    many = torch.full((1 << 22,), 1e-40)
    assert (many * 1.5).ne(0).all()  # on all threads


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", FLOORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_instruction_set_is_as_exact_as_eager(shape, dtype, memory_format, instruction_set):
    (volume, *weights), upstream, truths, eager = example(shape, dtype)
    results = with_gradients(block, [volume.contiguous(memory_format=memory_format), *weights], upstream)
    # phi_bias, the sixth, is exactly zero; with one slice so are the other gradients of the logits.
    for index in (0, 1, 2, 3, 4, 6, 7, 8):
        if truths[index].norm() > 1e-9:
            budget = 2 * relative_error(eager[index], truths[index]) + FLOORS[dtype]
            assert relative_error(results[index], truths[index]) <= budget, index
        else:
            assert results[index].double().abs().max() <= FLOORS[dtype], index


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", FLOORS)
@pytest.mark.parametrize("axis", [2, 3, 4])
def test_attention_of_every_instruction_set_agrees_with_the_reference(axis, dtype, memory_format, instruction_set):
    for shape in SHAPES:
        scale = (torch.Size(shape).numel() / shape[axis]) ** -0.5  # a softmax that says something of all logits

        def attention(*volumes, backend, scale=scale):
            return slice_attention(*volumes, axis, scale=scale, backend=backend)

        volumes = [random_volume(shape, seed).to(dtype).contiguous(memory_format=memory_format) for seed in (1, 2, 3)]
        upstream = random_volume(shape, seed=4).to(dtype)
        results = with_gradients(partial(attention, backend="cpp"), volumes, upstream)
        exact = [volume.double() for volume in volumes]
        truths = with_gradients(partial(attention, backend="reference"), exact, upstream.double())
        for result, truth in zip(results, truths, strict=True):
            assert (result.double() - truth).norm() <= 3 * FLOORS[dtype] * (truth.norm() + 1e-3), shape


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_bits_do_not_depend_on_the_number_of_threads(dtype, memory_format, instruction_set, threads):
    tensors, upstream = large_enough_for_threads(memory_format, dtype)
    runs = []
    for number in (1, 2, 3, 5):
        threads(number)
        volumes = [tensors[0], upstream, upstream * 0.5]
        runs.append(
            with_gradients(block, tensors, upstream)
            + with_gradients(lambda *v: slice_attention(*v, 3, scale=0.01, backend="cpp"), volumes, upstream)
        )
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("dtype", FLOORS)
@pytest.mark.parametrize("keep_inputs", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bits_do_not_depend_on_where_volumes_are_between_steps(
    shape, keep_inputs, dtype, instruction_set, monkeypatch
):
    tensors = [tensor.to(dtype) for tensor in (random_volume(shape), *random_block(shape[1]))]
    upstream = random_volume(shape, seed=2).to(dtype)
    runs = []
    for room in (True, False):
        monkeypatch.setattr(cpp, "_deserves_room", lambda *_, room=room: room)
        run = with_gradients(partial(block, recompute=not keep_inputs), tensors, upstream)
        with torch.no_grad():
            runs.append([block(*tensors), *run])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_volumes_between_steps_have_room_where_that_is_cheap_and_pays():
    def deserves_room(*shape, memory_format=torch.contiguous_format, axes=(3, 4, 2), dtype=torch.float32):
        x = torch.empty(shape, dtype=dtype, memory_format=memory_format)
        return cpp._deserves_room(x, torch.empty_like(x), axes)

    assert deserves_room(1, 128, 32, 32, 32)
    assert not deserves_room(1, 128, 32, 32, 32, memory_format=torch.channels_last_3d)
    assert not deserves_room(1, 128, 32, 32, 32, axes=(3,))
    assert not deserves_room(1, 16, 32, 32, 32)
    assert not deserves_room(1, 32, 64, 64, 64)
    assert deserves_room(1, 32, 64, 64, 64, dtype=torch.bfloat16)


def test_several_threads_do_work(threads):
    """The number of threads that worked on a block, as Linux tells it, lest the test above prove nothing."""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    program = (
        "import os, torch; from rsa_kernels import recurrent_slice_attention as block\n"
        "torch.set_num_threads(3); x = torch.randn(1, 24, 14, 22, 26); w = torch.eye(24); b = torch.zeros(24)\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "block(x, w, b, w, b, w, b, torch.ones(3), backend='cpp')\n"
        "print(len(os.listdir('/proc/self/task')) - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 2


def test_python_threads_may_call_at_once(threads):
    threads(2)
    tensors, upstream = large_enough_for_threads()
    expected = with_gradients(block, tensors, upstream)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: with_gradients(block, tensors, upstream), range(8)))
    for result in results:
        assert all(torch.equal(one, other) for one, other in zip(expected, result, strict=True))


class Attended(torch.utils.data.Dataset):
    """A data set whose items are made by the block, as a transform in a worker might."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        tensors, _ = large_enough_for_threads()
        return block(*tensors)[0]


@pytest.mark.parametrize("context", ["fork", "spawn"] if hasattr(os, "fork") else ["spawn"])
def test_workers_of_a_data_loader_may_call(context):
    tensors, _ = large_enough_for_threads()
    expected = block(*tensors)[0]  # before the fork: torch's threads and the extension are there
    loader = torch.utils.data.DataLoader(Attended(), num_workers=2, multiprocessing_context=context)
    items = [item[0] for item in loader]
    assert len(items) == 4
    assert all(torch.equal(item, expected) for item in items)


def _bits():
    """A digest of all results, for processes to compare."""
    tensors, upstream = large_enough_for_threads()
    digest = hashlib.sha256()
    for result in with_gradients(block, tensors, upstream):
        digest.update(result.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _in_a_process(_rank, queue):
    queue.put(_bits())


def test_processes_of_torch_multiprocessing_may_call():
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(_in_a_process, args=(queue,), nprocs=2)
    assert queue.get() == queue.get() == _bits()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_past_two_to_the_31(dtype):
    """Volumes that lie gigabytes apart in address space, of which next to nothing is touched."""
    if sys.maxsize < 2**32:
        pytest.skip("needs 64-bit addresses")
    shape, far = (2, 3, 4, 5, 6), 2**30 + 12
    strides = (3 * far, far, 30, 6, 1)
    tensors = [tensor.to(dtype) for tensor in (random_volume(shape), *random_block(3))]
    upstream = random_volume(shape, seed=2).to(dtype)
    expected = with_gradients(block, tensors, upstream)

    def spread(volume):
        room = torch.empty(0, dtype=dtype)
        try:
            room = torch.empty(5 * far + 120, dtype=dtype)
        except RuntimeError:
            pytest.skip("this system does not lend 10 to 20 GB of address space")
        return room.as_strided(shape, strides).copy_(volume)

    x = spread(tensors[0]).requires_grad_()
    assert (x.shape[0] - 1) * x.stride(0) + (x.shape[1] - 1) * x.stride(1) > 2**31
    leaves = [tensor.clone().requires_grad_() for tensor in tensors[1:]]
    out = block(x, *leaves)
    grads = torch.autograd.grad(out, [x, *leaves], upstream)
    assert all(torch.equal(one, other) for one, other in zip(expected, [out, *grads], strict=True))
    del out, grads
    wide = spread(upstream)
    x = tensors[0].clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(block(x, *leaves), x, wide)[0], expected[1])


def test_an_unknown_instruction_set_is_refused():
    from rsa_kernels import cpp

    with pytest.raises(RuntimeError, match="this processor does not have the instruction set sse9"):
        cpp.instruction_set("sse9")
    assert cpp.instruction_set() in INSTRUCTION_SETS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scratch_is_written_before_it_is_read(dtype, instruction_set):
    tensors, upstream = large_enough_for_threads(dtype=dtype)
    clean = with_gradients(block, tensors, upstream)
    torch.use_deterministic_algorithms(True)  # fills every uninitialised tensor with NaN, scratch too
    try:
        poisoned = with_gradients(block, tensors, upstream)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(clean, poisoned, strict=True))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_as_torch_rounds_it(dtype, memory_format, instruction_set):
    """The mean of two slices, whose sum is exact in float32, of numbers of all sizes; float16's subnormal ones too."""
    bits = torch.randint(-(2**15), 2**15, (1, 33, 2, 7, 19), generator=torch.Generator().manual_seed(0))
    value = bits.to(torch.int16).view(dtype)
    value = torch.where(value.isfinite() & (value.float().abs() < 1e30), value, 1)
    if dtype == torch.bfloat16:  # whose dot products take the smallest numbers for zero
        value = torch.where(value.float().abs() > 1e-30, value, 1)
    value = value.contiguous(memory_format=memory_format)
    equal = torch.zeros_like(value)
    out = slice_attention(equal, equal, value, 2, backend="cpp")
    mean = value.float().mean(2, keepdim=True).to(dtype)
    assert torch.equal(out, mean.expand_as(out))


def test_nan_and_infinity_stay_visible(instruction_set):
    for bad in (float("nan"), float("inf")):
        x = random_volume((1, 5, 6, 7, 8)).float()
        x[0, 2, 3, 4, 5] = bad
        assert not torch.isfinite(block(x, *[tensor.float() for tensor in random_block(5)])).all()
