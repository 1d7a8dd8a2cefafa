"""What a forward pass hands to its backward pass: one order and one backend, whatever comes between them."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from support import BACKENDS, FORMATS, INTERPRETED, random_block, random_volume, with_gradients
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from benchmarks.published import published
from rsa_kernels import backends, ops, recurrent_slice_attention, slice_attention

SHAPE = (1, 2, 4, 5, 2) if INTERPRETED else (2, 3, 4, 5, 2)
each_backend = pytest.mark.parametrize("backend", BACKENDS)
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


def spread(tensor):
    """A copy whose neighbours lie apart, last dim outermost."""
    order = tuple(reversed(range(tensor.dim())))
    wide = torch.stack([tensor.permute(order)] * 2, -1).contiguous()[..., 0]
    return wide.permute(order)


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last_3d) if tensor.dim() == 5 else tensor.clone()


HOOKS = {
    "contiguous": lambda: saved_tensors_hooks(lambda t: t, lambda t: t.contiguous()),
    "channels last": lambda: saved_tensors_hooks(lambda t: t, channels_last),
    "spread": lambda: saved_tensors_hooks(spread, lambda t: t),
    "numpy": lambda: saved_tensors_hooks(lambda t: t.numpy(), lambda a: torch.from_numpy(np.ascontiguousarray(a))),
    "save_on_cpu": save_on_cpu,
    # What save_on_cpu(pin_memory=True) does, but for the pinning, which needs a GPU's driver.
    "pinned": lambda: saved_tensors_hooks(
        lambda t: torch.empty(t.size(), dtype=t.dtype, layout=t.layout).copy_(t), lambda t: t.to("cpu")
    ),
}


def block(backend, recompute=False):
    return lambda *tensors: recurrent_slice_attention(*tensors, scale=0.7, recompute=recompute, backend=backend)


def gradients(function, tensors, upstream, around):
    with around():
        leaves = [tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_() for tensor in tensors]
        out = function(*leaves)
    return torch.autograd.grad(out, leaves, upstream)


@pytest.mark.parametrize("hook", ["channels last", "spread"] if INTERPRETED else HOOKS)
@pytest.mark.parametrize("memory_format", FORMATS)
@each_backend
def test_gradients_do_not_depend_on_the_strides_of_what_was_saved(backend, memory_format, hook):
    tensors = [random_volume(SHAPE).contiguous(memory_format=memory_format), *random_block(SHAPE[1])]
    upstream = random_volume(SHAPE, seed=2)
    truths = with_gradients(lambda *t: published(*t, scale=0.7), tensors, upstream)[1:]
    for recompute in (False, True):
        for one, truth in zip(
            gradients(block(backend, recompute), tensors, upstream, HOOKS[hook]), truths, strict=True
        ):
            close(one, truth)
    volumes = [random_volume(SHAPE, seed).contiguous(memory_format=memory_format) for seed in range(3)]
    attend = lambda *t: slice_attention(*t, 3, backend=backend)  # noqa: E731
    expected = with_gradients(lambda *t: slice_attention(*t, 3, backend="reference"), volumes, upstream)[1:]
    for one, truth in zip(gradients(attend, volumes, upstream, HOOKS[hook]), expected, strict=True):
        close(one, truth)


@pytest.mark.parametrize("reentrant", [False, True])
@each_backend
def test_checkpointing_keeps_the_gradients(backend, reentrant):
    upstream = random_volume(SHAPE, seed=2)
    for memory_format, recompute in itertools.product(FORMATS, (False, True)):
        tensors = [random_volume(SHAPE).contiguous(memory_format=memory_format), *random_block(SHAPE[1])]
        expected = with_gradients(block(backend, recompute), tensors, upstream)
        leaves = [tensor.requires_grad_() for tensor in tensors]
        out = checkpoint(block(backend, recompute), *leaves, use_reentrant=reentrant)
        out.backward(upstream)
        for one, truth in zip([out, *(leaf.grad for leaf in leaves)], expected, strict=True):
            assert torch.equal(one, truth)


@each_backend
def test_weights_may_have_any_strides(backend):
    tensors = [random_volume(SHAPE), *random_block(SHAPE[1])]
    truths = with_gradients(published, tensors, random_volume(SHAPE, seed=2))
    scattered = lambda x, *rest: recurrent_slice_attention(x, *map(spread, rest), backend=backend)  # noqa: E731
    for one, truth in zip(with_gradients(scattered, tensors, random_volume(SHAPE, seed=2)), truths, strict=True):
        close(one, truth)


@pytest.mark.parametrize("memory_format", FORMATS)
@each_backend
def test_inner_inputs_are_those_of_the_equations_in_one_order(backend, memory_format):
    tensors = [random_volume(SHAPE).contiguous(memory_format=memory_format), *random_block(SHAPE[1])]
    _, _, inputs = ops.block(*tensors, [3, 4, 2], 1.0, True, backend)
    for steps, found in enumerate(inputs, start=1):
        truth = published(*tensors[:-1], tensors[-1][:steps], axes=(3, 4, 2)[:steps])
        assert found.is_contiguous()
        close(found, truth.permute(0, 2, 3, 4, 1).contiguous())


@each_backend
def test_a_backend_takes_what_another_one_kept(backend):
    tensors = [random_volume(SHAPE), *random_block(SHAPE[1])]
    upstream = random_volume(SHAPE, seed=2)
    truths = with_gradients(published, tensors, upstream)[1:]
    _, maps, inputs = ops.block(*tensors, [3, 4, 2], 1.0, True, "reference")
    x, *rest = tensors
    grads = ops.block_backward(upstream, x, inputs, maps, *rest, [3, 4, 2], 1.0, [True] * 8, backend)
    for one, truth in zip(grads, truths, strict=True):
        close(one, truth)


# --- one choice a pass ---


@pytest.fixture
def flips(monkeypatch):
    """Another backend at each choice; notes the choices, and what ran."""
    names, chosen, ran = itertools.cycle(["torch", "reference"]), [], []
    module = backends.module

    def choose(x, axes):
        chosen.append(next(names))
        return backends.Explanation(chosen[-1], {})

    monkeypatch.setattr(backends, "choose", choose)
    monkeypatch.setattr(backends, "module", lambda name: ran.append(name) or module(name))
    return chosen, ran


def loss_of(x, rest, **options):
    return recurrent_slice_attention(x, *rest, backend="auto", **options).square().sum()


PASSES = {
    "autograd": lambda x, rest: loss_of(x.requires_grad_(), rest).backward(),
    "recompute": lambda x, rest: loss_of(x.requires_grad_(), rest, recompute=True).backward(),
    "torch.func": lambda x, rest: torch.func.grad(lambda x: loss_of(x, rest))(x),
    "vmap": lambda x, rest: torch.func.vmap(torch.func.grad(lambda x: loss_of(x, rest)))(x[None]),
    "slices": lambda x, rest: slice_attention(x.requires_grad_(), x, x, 3, backend="auto").sum().backward(),
}


@pytest.mark.parametrize("way", PASSES)
def test_auto_chooses_once_a_pass(way, flips):
    chosen, ran = flips
    PASSES[way](random_volume(SHAPE), random_block(SHAPE[1]))
    assert chosen == ["torch"]
    assert set(ran) == {"torch"}
    assert len(ran) >= 2


def test_a_compiled_pass_runs_backward_where_forward_ran(flips):
    torch._dynamo.reset()
    x, rest = random_volume(SHAPE).requires_grad_(), random_block(SHAPE[1])
    compiled = torch.compile(lambda x: loss_of(x, rest), fullgraph=True, backend="aot_eager")
    compiled(x).backward()
    flips[1].clear()
    compiled(x).backward()
    torch._dynamo.reset()
    assert len(flips[1]) == 2
    assert len(set(flips[1])) == 1


def test_what_auto_chose_can_still_be_differentiated_twice(monkeypatch):
    monkeypatch.setattr(backends, "choose", lambda x, axes: backends.Explanation("torch", {}))
    x, rest = random_volume(SHAPE).requires_grad_(), random_block(SHAPE[1])
    (first,) = torch.autograd.grad(loss_of(x, rest), x, create_graph=True)
    first.square().sum().backward()
    assert x.grad.isfinite().all()


# --- the negative bit ---


def negated(tensor):
    """The negative of a tensor, in the tensor's own memory with a bit that says so."""
    return torch._neg_view(tensor)


def imaginary(tensor):
    """The same, as conjugated complex numbers have it."""
    return torch.complex(torch.zeros_like(tensor), tensor).conj().imag


@pytest.mark.parametrize("view", [negated, imaginary])
@pytest.mark.parametrize("gradient", [True, False])
@each_backend
def test_the_negative_bit_is_heeded(backend, gradient, view):
    tensors = [random_volume(SHAPE), *random_block(SHAPE[1])]
    upstream = random_volume(SHAPE, seed=2)
    run = lambda *t: recurrent_slice_attention(*t, backend=backend)  # noqa: E731
    attend = lambda q, k, v, *_: slice_attention(q, k, v, 2, backend=backend)  # noqa: E731
    volumes = [random_volume(SHAPE, seed) for seed in range(3)]
    for function, inputs in ((run, tensors), (attend, volumes)):
        if not gradient:
            with torch.no_grad():
                close(function(*map(view, inputs)), function(*(-tensor for tensor in inputs)))
            continue
        flipped = with_gradients(lambda *t: function(*map(view, t)), inputs, view(upstream))  # noqa: B023
        plain = with_gradients(lambda *t: function(*(-tensor for tensor in t)), inputs, -upstream)  # noqa: B023
        for one, truth in zip(flipped, plain, strict=True):
            close(one, truth)
            assert not one.is_neg()


@each_backend
def test_what_was_saved_may_come_back_with_the_negative_bit(backend):
    tensors = [random_volume(SHAPE), *random_block(SHAPE[1])]
    upstream = random_volume(SHAPE, seed=2)
    expected = with_gradients(block(backend), tensors, upstream)[1:]
    around = lambda: saved_tensors_hooks(torch.neg, torch._neg_view)  # noqa: E731
    for one, truth in zip(gradients(block(backend), tensors, upstream, around), expected, strict=True):
        close(one, truth)


# --- a batch without samples ---


@pytest.mark.parametrize("memory_format", FORMATS)
@each_backend
def test_an_empty_batch_passes_through(backend, memory_format):
    x = torch.empty((0, *SHAPE[1:]), dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    rest = [tensor.requires_grad_() for tensor in random_block(SHAPE[1])]
    for recompute in (False, True):
        out, maps = recurrent_slice_attention(x, *rest, return_maps=True, recompute=recompute, backend=backend)
        grads = torch.autograd.grad(out.sum(), [x, *rest])
        assert out.shape == x.shape
        assert [tuple(attention.shape) for attention in maps] == [(0, 5, 5), (0, 2, 2), (0, 4, 4)]
        for gradient, tensor in zip(grads, [x, *rest], strict=True):
            assert torch.equal(gradient, torch.zeros_like(tensor))
    attended = slice_attention(x, x, x, 2, backend=backend)
    (gradient,) = torch.autograd.grad(attended.sum(), x)
    assert attended.shape == gradient.shape == x.shape
    grads = torch.func.grad(lambda *t: recurrent_slice_attention(*t, backend=backend).sum(), tuple(range(8)))(x, *rest)
    assert [gradient.shape for gradient in grads] == [tensor.shape for tensor in (x, *rest)]
