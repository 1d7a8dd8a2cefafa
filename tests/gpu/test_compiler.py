"""torch.compile and torch.export with kernels on a GPU."""

import pytest
import torch
from gpu.device import CHANNELS_LAST, DRY_RUN, KERNELS, block_inputs
from support import FORMATS, random_volume, with_gradients
from torch._dynamo.testing import CompileCounterWithBackend

from rsa_kernels import ops, recurrent_slice_attention, slice_attention

pytestmark = pytest.mark.parametrize("backend", KERNELS)

COMPILER = "aot_eager" if DRY_RUN else "inductor"


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("dtype", "memory_format"), [(torch.float32, torch.contiguous_format), (torch.bfloat16, CHANNELS_LAST)]
)
def test_compiles_as_one_graph_forward_and_backward(dtype, memory_format, backend):
    def network(x, *weights):
        y = recurrent_slice_attention(x * 2, *weights, ("coronal", "sagittal", "axial"), backend=backend)
        return (y + slice_attention(y, x, x, 2, scale=1e-2, backend=backend)).sigmoid()

    shape = (2, 16, 5, 6, 7)
    tensors = block_inputs(shape, dtype, memory_format)
    upstream = random_volume(shape, seed=2).to(tensors[0])
    expected = with_gradients(network, tensors, upstream)
    compiled = torch.compile(network, fullgraph=True, backend=COMPILER)
    # The compiler fuses what stands around the operators, with fewer roundings.
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for result, truth in zip(with_gradients(compiled, tensors, upstream), expected, strict=True):
        assert (result - truth).norm() <= tolerance * truth.norm()


def test_new_sizes_do_not_recompile(backend):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda *tensors: recurrent_slice_attention(*tensors, backend=backend),
        fullgraph=True,
        dynamic=True,
        backend=counter,
    )
    compilations = []
    for shape in [(2, 16, 4, 5, 7), (3, 16, 9, 8, 10), (5, 16, 11, 2, 8)]:
        tensors = block_inputs(shape, torch.bfloat16)
        upstream = torch.ones_like(tensors[0])
        results = with_gradients(compiled, tensors, upstream)
        expected = with_gradients(lambda *t: recurrent_slice_attention(*t, backend=backend), tensors, upstream)
        assert all(torch.equal(result, other) for result, other in zip(results, expected, strict=True))
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1] > 0


def test_an_exported_program_runs_on_other_sizes(backend):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = torch.nn.ParameterList(block_inputs((1, 16, 4, 5, 3), torch.float32)[1:])

        def forward(self, x):
            return recurrent_slice_attention(x, *self.weights, backend=backend)

    module = Block().eval()
    x, other = (block_inputs(shape, torch.float32)[0] for shape in [(2, 16, 4, 5, 3), (3, 16, 7, 2, 9)])
    size = dict.fromkeys((0, 2, 3, 4), torch.export.Dim.DYNAMIC)
    program = torch.export.export(module, (x,), dynamic_shapes=(size,))
    assert any(node.target == ops.block for node in program.graph.nodes)
    with torch.no_grad():
        assert torch.equal(program.module()(other), module(other))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_the_operators_are_what_they_say(memory_format, backend):
    tensors = [tensor.requires_grad_() for tensor in block_inputs((2, 16, 4, 5, 3), torch.float32, memory_format)]
    torch.library.opcheck(ops.block, (*tensors, [3, 4, 2], 0.5, True, backend))
    volumes = [random_volume((2, 3, 4, 5, 2), seed).to(tensors[0]).requires_grad_() for seed in range(3)]
    torch.library.opcheck(ops.attention, (*volumes, 3, 1.0, backend))


def test_a_compiled_block_keeps_channels_last(backend):
    tensors = block_inputs((1, 16, 5, 6, 7), torch.bfloat16)
    compiled = torch.compile(
        lambda *t: recurrent_slice_attention(*t, backend=backend), fullgraph=True, backend="aot_eager"
    )
    out, grad, *_ = with_gradients(compiled, tensors, torch.ones_like(tensors[0]))
    assert out.is_contiguous(memory_format=CHANNELS_LAST)
    assert grad.is_contiguous(memory_format=CHANNELS_LAST)
