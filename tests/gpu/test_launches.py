"""How a block behaves among streams, devices and CUDA graphs, and that it repeats itself bit for bit."""

from functools import partial

import pytest
import torch
from gpu.device import CHANNELS_LAST, DEVICE, DRY_RUN, KERNELS, asks_cuda, assert_same_bits, block_inputs, results_of
from support import FORMATS, random_volume

from benchmarks.devices import capture
from benchmarks.inputs import run
from rsa_kernels import recurrent_slice_attention, slice_attention

pytestmark = pytest.mark.parametrize("backend", KERNELS)

# Kernels that fuse the projections, many parts of a map; products of the library, few slices.
NARROW, WIDE = (2, 32, 24, 33, 40), (1, 256, 10, 14, 10)
REPEATS = 100
if DRY_RUN:
    NARROW, WIDE, REPEATS = (2, 16, 9, 5, 6), (1, 200, 3, 2, 5), 3
DTYPES = [torch.bfloat16, torch.float32]


def inputs(shape, dtype, seed=1, memory_format=CHANNELS_LAST):
    """The inputs of a block, and the gradient that arrives at it."""
    x, *block = block_inputs(shape, dtype)
    x, upstream = (
        random_volume(shape, which).to(x).contiguous(memory_format=memory_format) for which in (seed, seed + 100)
    )
    return [x, *block], upstream


def block_of(backend):
    return partial(recurrent_slice_attention, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [NARROW, WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("recompute", [False, True])
def test_every_repeat_gives_the_same_bits(recompute, shape, dtype, backend):
    tensors, upstream = inputs(shape, dtype)
    first = results_of(tensors, upstream, backend, recompute=recompute)
    for _ in range(REPEATS - 1):
        assert_same_bits(results_of(tensors, upstream, backend, recompute=recompute), first)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [NARROW, WIDE], ids=["narrow", "wide"])
@pytest.mark.filterwarnings("ignore:.*not deterministic because it uses CuBLAS")
def test_memory_is_written_before_it_is_read(shape, dtype, memory_format, backend):
    tensors, upstream = inputs(shape, dtype, memory_format=memory_format)
    clean = [results_of(tensors, upstream, backend, recompute=recompute) for recompute in (False, True)]
    # Fills every uninitialised tensor with NaN. A product of cuBLAS would raise, but for warn_only.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        poisoned = [results_of(tensors, upstream, backend, recompute=recompute) for recompute in (False, True)]
    finally:
        torch.use_deterministic_algorithms(False)
    for result, other in zip(poisoned, clean, strict=True):
        assert_same_bits(result, other)


@asks_cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["no_grad", "full"])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [NARROW, WIDE], ids=["narrow", "wide"])
def test_a_cuda_graph_replays_on_other_data(shape, memory_format, mode, dtype, backend):
    tensors, upstream = inputs(shape, dtype, memory_format=memory_format)
    graph, captured = capture(lambda: run(block_of(backend), tensors, upstream, mode))
    for seed in (2, 3):
        others, other_upstream = inputs(shape, dtype, seed, memory_format)
        for tensor, other in zip((*tensors, upstream), (*others, other_upstream), strict=True):
            tensor.copy_(other)
        graph.replay()
        assert_same_bits(captured, run(block_of(backend), others, other_upstream, mode))


@asks_cuda
def test_slice_attention_in_a_cuda_graph(backend):
    query, key, value = (random_volume(NARROW, seed).to(DEVICE, torch.bfloat16) for seed in range(3))
    attend = lambda: slice_attention(query, key, value, 3, scale=1e-3, backend=backend)  # noqa: E731
    graph, captured = capture(attend)
    query.copy_(random_volume(NARROW, seed=4))
    graph.replay()
    assert torch.equal(captured, attend())


@asks_cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [NARROW, WIDE], ids=["narrow", "wide"])
def test_streams_side_by_side_do_not_disturb_each_other(shape, dtype, backend):
    jobs = [inputs(shape, dtype, seed) for seed in (1, 2)]
    alone = [run(block_of(backend), *job, "full") for job in jobs]
    streams = [torch.cuda.Stream() for _ in jobs]
    torch.cuda.synchronize()
    together = [[] for _ in jobs]
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # both start when enough is queued on both
    for _ in range(10):
        for job, stream, results in zip(jobs, streams, together, strict=True):
            with torch.cuda.stream(stream):
                results.append(run(block_of(backend), *job, "full"))
    torch.cuda.synchronize()
    for expected, results in zip(alone, together, strict=True):
        for result in results:
            assert_same_bits(result, expected)


@asks_cuda
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [NARROW, WIDE], ids=["narrow", "wide"])
def test_everything_is_launched_on_the_current_stream(shape, memory_format, backend):
    tensors, upstream = inputs(shape, torch.bfloat16, memory_format=memory_format)
    side, busy = torch.cuda.Stream(), torch.cuda.Event()
    call = lambda: run(block_of(backend), tensors, upstream, "full")  # noqa: E731
    expected = call()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        call()  # memory and workspaces of this stream
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    busy.record()
    with torch.cuda.stream(side):
        results = call()
    side.synchronize()
    assert not busy.query(), "the default stream was waited for"
    # Read on the side stream, before the default stream could have delivered anything.
    with torch.cuda.stream(side):
        seen = [result.clone() for result in results]
    side.synchronize()
    assert not busy.query()
    assert_same_bits(seen, expected)


@asks_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_block_runs_on_the_device_of_its_volume(backend):
    tensors, upstream = inputs(NARROW, torch.bfloat16)
    expected = run(block_of(backend), tensors, upstream, "full")
    with torch.cuda.device(0):
        results = run(block_of(backend), [tensor.to("cuda:1") for tensor in tensors], upstream.to("cuda:1"), "full")
        assert torch.cuda.current_device() == 0
    assert {result.device for result in results} == {torch.device("cuda:1")}
    assert_same_bits([result.to("cuda:0") for result in results], expected)


@asks_cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [NARROW, WIDE], ids=["narrow", "wide"])
def test_the_host_never_waits_for_the_device(shape, memory_format, dtype, backend):
    tensors, upstream = inputs(shape, dtype, memory_format=memory_format)
    run(block_of(backend), tensors, upstream, "full")
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(block_of(backend), tensors, upstream, "full")
        run(block_of(backend), tensors, upstream, "no_grad")
    finally:
        torch.cuda.set_sync_debug_mode("default")
