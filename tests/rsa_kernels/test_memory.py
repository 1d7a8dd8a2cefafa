"""What is kept for backward."""

import pytest
import torch
from support import BACKENDS, published, random_block, random_volume

from rsa_kernels import recurrent_slice_attention, slice_attention

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
