"""What is kept for backward."""

import pytest
import torch
from support import BACKENDS, random_block, random_volume
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.published import published
from rsa_kernels import folded, recurrent_slice_attention, slice_attention

SHAPE = (2, 16, 8, 10, 9)
MAPS = sum(2 * size * size * 4 for size in SHAPE[2:])
VOLUME = 4 * 2 * 16 * 8 * 10 * 9


def saved_bytes(function, *tensors):
    """Bytes that autograd keeps beyond the parameters, each storage once."""
    parameters = {tensor.untyped_storage().data_ptr() for tensor in tensors[1:]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function(*tensors)
    assert out.requires_grad
    return sum(kept.values())


def inputs():
    return [tensor.float().requires_grad_() for tensor in (random_volume(SHAPE), *random_block(16))]


def test_eager_pytorch_keeps_at_least_fifteen_volumes():
    # The count sees what it should: x and, per step, the query, key, value, the mix, and their rearranged copies.
    assert saved_bytes(published, *inputs()) >= 15 * VOLUME


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_keeps_three_volumes_and_the_maps(backend):
    kept = saved_bytes(lambda *t: recurrent_slice_attention(*t, backend=backend), *inputs())
    assert 3 * VOLUME <= kept <= 3 * VOLUME + MAPS + 64


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_recomputing_block_keeps_its_input_and_the_maps(backend):
    kept = saved_bytes(lambda *t: recurrent_slice_attention(*t, recompute=True, backend=backend), *inputs())
    assert VOLUME <= kept <= VOLUME + MAPS + 64


@pytest.mark.parametrize("backend", BACKENDS)
def test_slice_attention_keeps_its_inputs_and_the_map(backend):
    x = inputs()[0]
    kept = saved_bytes(lambda x: slice_attention(x, x, x, 3, backend=backend), x)
    assert kept <= VOLUME + 2 * SHAPE[3] ** 2 * 4


def volumes_made(monkeypatch, function):
    """How many tensors of at least the volume's size the folded backend allocates."""
    made = []
    empty, empty_like, new_zeros = torch.Tensor.new_empty, torch.empty_like, torch.Tensor.new_zeros
    contiguous = torch.Tensor.contiguous

    def note(allocate):
        def call(*args, **kwargs):
            result = allocate(*args, **kwargs)
            copied = allocate is not contiguous or result.data_ptr() != args[0].data_ptr()
            if copied and result.device.type != "meta" and result.nbytes >= VOLUME:
                made.append(result.shape)
            return result

        return call

    monkeypatch.setattr(folded, "CPU_TILE_BYTES", 1024)
    monkeypatch.setattr(torch, "empty_like", note(empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", note(empty))
    monkeypatch.setattr(torch.Tensor, "new_zeros", note(new_zeros))
    monkeypatch.setattr(torch.Tensor, "contiguous", note(contiguous))
    function()
    return len(made)


@pytest.mark.parametrize("gradients", [True, False])
def test_inference_makes_one_volume(gradients, monkeypatch):
    tensors = [tensor.detach() for tensor in inputs()]
    with torch.set_grad_enabled(gradients):  # without tensors that need any, gradients being on changes nothing
        assert volumes_made(monkeypatch, lambda: recurrent_slice_attention(*tensors, backend="torch")) == 1


def test_training_makes_three_volumes_forward_and_two_backward(monkeypatch):
    tensors, outputs = inputs(), []
    forward = volumes_made(monkeypatch, lambda: outputs.append(recurrent_slice_attention(*tensors, backend="torch")))
    upstream = torch.ones(SHAPE)
    assert forward == 3
    # One for the gradient; 16 channels against 8 to 10 slices keep no projected gradient.
    assert volumes_made(monkeypatch, lambda: outputs[0].backward(upstream)) == 1


def test_many_tiny_slices_make_no_map_per_channel(monkeypatch):
    volume = torch.ones(1, 64, 300, 1, 2)
    largest = []
    bmm = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: largest.append(bmm(a, b).numel()) or bmm(a, b))
    slice_attention(volume, volume, volume, 2, backend="torch")
    assert max(largest) == 300 * 300


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_without_gradients(mode, backend):
    tensors = inputs()
    live = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.rsa_kernels.block.default:
                live.append(len(result[2]))
            return result

    with mode(), Recorder():
        out = recurrent_slice_attention(*tensors, backend=backend)
    assert live == [0]
    assert not out.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradients_are_made_for_maps(backend):
    made = []

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            if isinstance(result, torch.Tensor):
                made.append((str(function), tuple(result.shape)))
            return result

    x, *weights = inputs()
    block = recurrent_slice_attention(x, *weights, backend=backend)
    attention = slice_attention(x, x, x, 3, backend=backend)
    upstream = torch.ones_like(block)
    with Note():
        torch.autograd.grad([block, attention], x, [upstream, upstream])
    zeros = [shape for function, shape in made if function.startswith(("aten.zeros", "aten.new_zeros"))]
    assert made
    assert not {(2, size, size) for size in SHAPE[2:]} & set(zeros)


class Swallow(torch.autograd.Function):
    """Passes a volume on, and no gradient back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_where_no_gradient_comes_none_goes_on():
    x, *weights = inputs()
    for out in (recurrent_slice_attention(x, *weights), slice_attention(x, x, x, 3)):
        gradients = torch.autograd.grad(Swallow.apply(out).sum(), [x, weights[0]], allow_unused=True)
        assert gradients == (None, None)
