"""The operators under the compiler, export, opcheck and the FLOP counter."""

import pytest
import torch
from support import BACKENDS, FORMATS, random_block, random_volume, with_gradients
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from rsa_kernels import ops, recurrent_slice_attention, slice_attention, use_backend

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def block_inputs(shape=(2, 6, 4, 5, 3), dtype=torch.float32):
    return [tensor.to(dtype) for tensor in (random_volume(shape), *random_block(shape[1]))]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("keep_inputs", [True, False])
def test_opcheck_of_the_block(keep_inputs, memory_format, backend):
    x, *rest = block_inputs()
    leaves = [tensor.requires_grad_() for tensor in (x.contiguous(memory_format=memory_format), *rest)]
    torch.library.opcheck(ops.block, (*leaves, [3, 4, 2], 0.5, keep_inputs, backend))


@pytest.mark.parametrize("inputs_kept", [True, False])
def test_opcheck_of_the_block_backward(inputs_kept, backend):
    x, *rest = block_inputs()
    out, maps, inputs = ops.block(x, *rest, [3, 4, 2], 1.0, inputs_kept, backend)
    for needs in ([True, False, True, True, True, False, True, True], [True] * 8):
        torch.library.opcheck(
            ops.block_backward, (torch.randn_like(out), x, inputs, maps, *rest, [3, 4, 2], 1.0, needs, backend)
        )


def test_opcheck_of_slice_attention_and_its_backward(backend):
    query, key, value = (random_volume((2, 3, 4, 5, 2), seed).float() for seed in range(3))
    torch.library.opcheck(ops.attention, (query.requires_grad_(), key, value.requires_grad_(), 3, 1.0, backend))
    with torch.no_grad():
        out, attention = ops.attention(query, key, value, 3, 1.0, backend)
    torch.library.opcheck(
        ops.attention_backward,
        (torch.randn_like(out), query.detach(), key, value.detach(), attention, 3, 1.0, [True, False, True], backend),
    )


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_compiles_as_one_graph_forward_and_backward(memory_format, compiler, backend):
    def network(x, *weights):
        y = recurrent_slice_attention(x.relu(), *weights, ("coronal", "sagittal", "axial"), backend=backend)
        return (y + slice_attention(y, x, x, 2, backend=backend)).sigmoid()

    x, *weights = block_inputs()
    tensors = [x.contiguous(memory_format=memory_format), *weights]
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    expected = with_gradients(network, tensors, upstream)
    compiled = torch.compile(network, fullgraph=True, backend=compiler)
    for result, truth in zip(with_gradients(compiled, tensors, upstream), expected, strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-4, atol=1e-5)


def test_compiles_under_autocast(backend):
    x, *weights = (tensor.requires_grad_() for tensor in block_inputs())

    def network(x):
        with torch.autocast("cpu", torch.bfloat16):
            return recurrent_slice_attention(x, *weights, backend=backend)

    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")(x)
    assert compiled.dtype == torch.bfloat16
    assert torch.equal(compiled, network(x))
    compiled.float().sum().backward()
    assert torch.isfinite(x.grad).all()


def test_dynamic_shapes_do_not_recompile(backend):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x, *weights: recurrent_slice_attention(x, *weights, backend=backend),
        fullgraph=True,
        dynamic=True,
        backend=counter,
    )
    block = [tensor.requires_grad_() for tensor in random_block(6)]
    compilations = []
    for shape in [(2, 6, 4, 5, 7), (3, 6, 5, 4, 6), (5, 6, 7, 2, 3)]:
        x = random_volume(shape).requires_grad_()
        out = compiled(x, *block)
        torch.testing.assert_close(out, recurrent_slice_attention(x, *block, backend=backend))
        out.sum().backward()
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1] > 0


def test_a_change_of_the_ambient_backend_is_seen_by_compiled_code(backend):
    x, *block = block_inputs()
    compiled = torch.compile(lambda x: recurrent_slice_attention(x, *block), fullgraph=True, backend="aot_eager")
    default = compiled(x)
    with use_backend(backend):
        assert torch.equal(compiled(x), recurrent_slice_attention(x, *block, backend=backend))
    assert torch.equal(compiled(x), default)


def test_exports_with_dynamic_shapes(backend):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = torch.nn.ParameterList(tensor.float() for tensor in random_block(6))

        def forward(self, x):
            return recurrent_slice_attention(x, *self.weights, backend=backend)

    module = Block().eval()
    size = dict.fromkeys((0, 2, 3, 4), torch.export.Dim.DYNAMIC)
    program = torch.export.export(module, (random_volume((2, 6, 4, 5, 3)).float(),), dynamic_shapes=(size,))
    x = random_volume((3, 6, 7, 2, 9)).float()
    torch.testing.assert_close(program.module()(x), module(x))
    assert any(node.target == ops.block for node in program.graph.nodes)


def test_flops_are_counted_by_formula(backend):
    batch, channels, *sizes = shape = (2, 6, 4, 5, 3)
    x, *block = (tensor.requires_grad_() for tensor in block_inputs(shape))
    voxels = batch * sizes[0] * sizes[1] * sizes[2]
    with FlopCounterMode(display=False) as counter:
        out = recurrent_slice_attention(x, *block, backend=backend)
    projections = 3 if backend == "reference" else 2
    forward = sum(2 * projections * channels**2 * voxels + 4 * size * channels * voxels for size in sizes)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == sum(12 * channels**2 * voxels + 8 * size * channels * voxels for size in sizes)
    with FlopCounterMode(display=False) as counter:
        slice_attention(x, x, x, 3, backend=backend).sum().backward()
    assert counter.get_total_flops() == (4 + 8) * sizes[1] * channels * voxels
