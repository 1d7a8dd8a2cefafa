"""``torch.func``, forward mode and second derivatives: as a loop or plain PyTorch has them, or refused."""

import pytest
import torch
from support import BACKENDS, INTERPRETED, random_block, random_volume
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

from rsa_kernels import backends, recurrent_slice_attention, reference, slice_attention
from rsa_kernels.folding import Projections
from rsanet import RSABlock

# Whatever has kernels refuses what it has no kernels for; the choice of auto is correct for the call.
PLAIN = ["reference", "auto"]
KERNELS = [name for name in BACKENDS if name != "reference"]
each_backend = pytest.mark.parametrize("backend", [*BACKENDS, "auto"])

SHAPE = (1, 3, 2, 3, 2)
close = torch.testing.assert_close


def attend(backend, **options):
    return lambda x, *block: recurrent_slice_attention(x, *block, backend=backend, **options)


def equations(x, *block):
    """The published equations in plain PyTorch, which every transform of PyTorch takes."""
    return reference.recurrent_slice_attention(x, Projections(*block[:-1]), block[-1])[0]


def core_equations(query, key, value):
    return reference.slice_attention(query, key, value, 3, 0.7)[0]


def core(backend):
    return lambda query, key, value: slice_attention(query, key, value, 3, scale=0.7, backend=backend)


def volumes(count, shape=SHAPE):
    return [random_volume(shape, seed) for seed in range(count)]


def loss(function):
    return lambda *tensors: function(*tensors).square().sum()


@each_backend
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_vmap_of_volumes_is_a_loop(memory_format, backend):
    block = random_block(3)
    xs = [x.contiguous(memory_format=memory_format) for x in volumes(4)]
    expected = torch.stack([attend(backend)(x, *block) for x in xs])
    for dim in (3,) if INTERPRETED else (0, 3, 5):
        stacked = torch.stack(xs, dim)
        close(vmap(lambda x: attend(backend)(x, *block), dim)(stacked), expected)
        with torch.no_grad():
            close(vmap(lambda x: attend(backend)(x, *block), dim)(stacked), expected)
    pairs = torch.stack(xs).unflatten(0, (2, 2))
    close(vmap(vmap(lambda x: attend(backend)(x, *block)))(pairs), expected.unflatten(0, (2, 2)))
    out, maps = vmap(lambda x: attend(backend, return_maps=True)(x, *block))(torch.stack(xs))
    close(out, expected)
    singles = [attend(backend, return_maps=True)(x, *block)[1] for x in xs]
    for attention, parts in zip(maps, zip(*singles, strict=True), strict=True):
        close(attention, torch.stack(parts))
        assert not attention.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_joins_its_dim_to_the_batch_of_one_call(monkeypatch, backend):
    module, batches = backends.module(backend), []
    for name in ("recurrent_slice_attention", "recurrent_slice_attention_backward"):
        kernel = getattr(module, name)

        def record(first, *args, kernel=kernel):
            batches.append(len(first))
            return kernel(first, *args)

        monkeypatch.setattr(module, name, record)
    xs, block = torch.stack(volumes(4, (2, *SHAPE[1:]))), random_block(3)
    vmap(grad(lambda x: loss(attend(backend))(x, *block)))(xs)
    # The reference backend makes its backward pass by another forward pass.
    assert batches[0] == batches[1] == 8
    assert len(batches) == (3 if backend == "reference" else 2)


@each_backend
def test_no_gradient_flows_through_the_maps(backend):
    x, *block = random_volume(SHAPE), *random_block(3)

    def entropy(x):
        return sum((attention * attention.log()).sum() for attention in attend(backend, return_maps=True)(x, *block)[1])

    assert entropy(x) < 0
    assert not grad(entropy)(x).any()
    if backend in PLAIN:
        assert not jvp(entropy, (x,), (x,))[1].any()


@each_backend
def test_vmap_of_weights_is_a_loop(backend):
    blocks = [RSABlock(3, backend=backend).double() for _ in range(3)]
    for seed, block in enumerate(blocks):
        for parameter, values in zip(block.betas, random_block(3, seed=seed)[-1], strict=True):
            parameter.data = values.clone()
    parameters, _ = stack_module_state(blocks)
    x = random_volume(SHAPE)
    out = vmap(lambda parameters: functional_call(blocks[0], parameters, (x,)))(parameters)
    close(out, torch.stack([block(x) for block in blocks]))


@each_backend
def test_gradients_of_torch_func_are_those_of_autograd(backend):
    tensors = [random_volume(SHAPE), *random_block(3)]
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    expected = torch.autograd.grad(loss(attend(backend))(*leaves), leaves)
    numbers = tuple(range(len(tensors)))
    for result in (
        grad(loss(attend(backend)), numbers)(*tensors),
        vjp(loss(attend(backend)), *tensors)[1](torch.ones(()).double()),
    ):
        for one, other in zip(result, expected, strict=True):
            close(one, other)
        assert torch.equal(result[4], torch.zeros(3).double()), "the key's bias has no influence"
    # A gradient for the volume alone, as in a saliency map, needs none of the weights'.
    close(grad(loss(attend(backend)))(*tensors), expected[0])
    queries = volumes(3)
    leaves = [tensor.clone().requires_grad_() for tensor in queries]
    expected = torch.autograd.grad(loss(core(backend))(*leaves), leaves)
    for one, other in zip(grad(loss(core(backend)), (0, 1, 2))(*queries), expected, strict=True):
        close(one, other)


@each_backend
def test_per_sample_gradients_are_a_loop(backend):
    block = RSABlock(3, backend=backend).double()
    with torch.no_grad():
        for beta in block.betas:
            beta.fill_(0.4)
    parameters = dict(block.named_parameters())
    xs = torch.stack(volumes(3))

    def energy(parameters, x):
        return functional_call(block, parameters, (x,)).square().sum()

    by_weight, by_volume = vmap(grad(energy, (0, 1)), (None, 0))(parameters, xs)
    total = grad(lambda parameters: vmap(lambda x: energy(parameters, x))(xs).sum())(parameters)
    for index, x in enumerate(xs):
        block.zero_grad()
        leaf = x.clone().requires_grad_()
        block(leaf).square().sum().backward()
        close(by_volume[index], leaf.grad)
        for name, parameter in parameters.items():
            close(by_weight[name][index], parameter.grad)
    for name in parameters:
        close(total[name], by_weight[name].sum(0))
    assert not by_weight["phi_conv.bias"].any()


@each_backend
def test_per_sample_gradients_of_the_core_are_a_loop(backend):
    query, key, value = (torch.stack(volumes(3)) + shift for shift in range(3))
    gradients = vmap(grad(loss(core(backend)), (0, 1, 2)), (0, None, 0))(query, key[0], value)
    for index in range(3):
        singles = grad(loss(core(backend)), (0, 1, 2))(query[index], key[0], value[index])
        for stacked, single in zip(gradients, singles, strict=True):
            close(stacked[index], single)


@each_backend
def test_jacobians_by_reverse_mode_are_those_of_the_equations(backend):
    # Each entry of a jacobian for the weights is a call of its own.
    shape, numbers = (1, 2, 2, 2, 1), (0,) if INTERPRETED else (0, 1, 7)
    tensors = [random_volume(shape), *random_block(2)]
    results, truths = (jacrev(function, numbers)(*tensors) for function in (attend(backend), equations))
    for one, other in zip(results, truths, strict=True):
        close(one, other)
    triple = volumes(3, shape)
    results, truths = (jacrev(function, (0, 1, 2))(*triple) for function in (core(backend), core_equations))
    for one, other in zip(results, truths, strict=True):
        close(one, other)


@each_backend
def test_gradients_under_autocast_are_those_of_autograd(backend):
    x, *block = (tensor.float() for tensor in (random_volume(SHAPE), *random_block(3)))
    with torch.autocast("cpu", torch.bfloat16):
        result = grad(lambda x: attend(backend)(x, *block).float().square().sum())(x)
        leaf = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(attend(backend)(leaf, *block).float().square().sum(), leaf)
    assert result.dtype == torch.float32
    close(result, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", PLAIN)
def test_forward_mode_is_that_of_the_equations(backend):
    primals = (random_volume(SHAPE), *random_block(3))
    tangents = tuple(torch.randn_like(primal) for primal in primals)
    for one, other in zip(jvp(attend(backend), primals, tangents), jvp(equations, primals, tangents), strict=True):
        close(one, other)
    (x, *block), dx = primals, tangents[0]
    expected = jvp(lambda x: equations(x, *block), (x,), (dx,))[1]
    leaf = x.clone().requires_grad_()
    before = attend(backend)(leaf, *block)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, dx)
        close(forward_ad.unpack_dual(attend(backend)(dual, *block)).tangent, expected)
        close(attend(backend)(x, *block), equations(x, *block))
        outs = before, attend(backend)(leaf, *block), equations(leaf, *block)
        *grads, truth = (forward_ad.unpack_dual(torch.autograd.grad(out, leaf, dual)[0]).tangent for out in outs)
        for one in grads:
            close(one, truth)
    close(jacfwd(lambda x: attend(backend)(x, *block))(x), jacrev(lambda x: equations(x, *block))(x))
    tangent = jvp(lambda bias: attend(backend)(x, *block[:3], bias, *block[4:]), (block[3],), (block[3],))[1]
    assert not tangent.any(), "the key's bias has no influence"
    triple, given = tuple(volumes(3)), tuple(volumes(3)[::-1])
    close(jvp(core(backend), triple, given)[1], jvp(core_equations, triple, given)[1])
    with torch.autocast("cpu", torch.bfloat16):
        tangent = jvp(lambda x: attend(backend)(x, *(t.float() for t in block)), (x.float(),), (dx.float(),))[1]
    assert tangent.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", PLAIN)
def test_second_derivatives_are_those_of_the_equations(backend):
    x, *block = tensors = [random_volume(SHAPE), *random_block(3)]
    leaves = [tensor.clone().requires_grad_() for tensor in tensors if tensor is not tensors[4]]

    def by_leaf(*leaves):
        return attend(backend)(*leaves[:4], block[3], *leaves[4:])

    assert torch.autograd.gradgradcheck(by_leaf, leaves, nondet_tol=0)
    assert torch.autograd.gradgradcheck(core(backend), [volume.requires_grad_() for volume in volumes(3)])
    close(hessian(lambda x: loss(attend(backend))(x, *block))(x), hessian(lambda x: loss(equations)(x, *block))(x))
    close(
        jacrev(jacrev(lambda beta: loss(attend(backend))(x, *block[:-1], beta)))(block[-1]),
        hessian(lambda beta: loss(equations)(x, *block[:-1], beta))(block[-1]),
    )


@pytest.mark.parametrize("backend", KERNELS)
def test_a_backend_without_such_kernels_refuses_forward_mode_and_second_derivatives(backend):
    x, *block = random_volume(SHAPE), *random_block(3)
    advice = rf"backend '{backend}' has no kernels: call it with backend='reference'"
    with pytest.raises(RuntimeError, match=f"was given tangents, for which {advice}"):
        jvp(lambda x: attend(backend)(x, *block), (x,), (x,))
    leaf = x.clone().requires_grad_()
    before = core(backend)(leaf, x, x)
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match="was given tangents"):
            core(backend)(x, x, forward_ad.make_dual(x, x))
        out = core(backend)(leaf, x, x)
        assert out.isfinite().all()
        for one in (before, out):
            with pytest.raises(RuntimeError, match="was given tangents"):
                one.backward(forward_ad.make_dual(x, x))
    for function in (attend(backend), lambda x, *_: core(backend)(x, x, x)):
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(function)(leaf, *block), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match=f"was differentiated twice, for which {advice}"):
            first.sum().backward()
    with pytest.raises(RuntimeError, match="differentiated twice"):
        grad(lambda x: grad(lambda x: loss(attend(backend))(x, *block))(x).sum())(x)


@each_backend
def test_compiled_transforms_run_or_are_refused_with_advice(backend):
    torch._dynamo.reset()
    block = random_block(3)
    xs = torch.stack(volumes(3))
    mapped = vmap(lambda x: attend(backend)(x, *block))
    close(torch.compile(mapped, fullgraph=True, backend="aot_eager")(xs), mapped(xs))
    compiled = torch.compile(grad(lambda x: loss(attend(backend))(x, *block)), backend="aot_eager")
    with pytest.raises(Exception, match=r"differentiated by torch\.func inside torch\.compile"):
        compiled(xs[0])
    compiled = torch.compile(
        lambda x: jvp(lambda x: attend(backend)(x, *block), (x,), (x,))[1], fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(Exception, match=r"given tangents inside torch\.compile"):
        compiled(xs[0])
    torch._dynamo.reset()
