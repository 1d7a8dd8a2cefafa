"""The operators that every backend stands behind: schemas, fake kernels, autocast, autograd, FLOP counts.

A block crosses this boundary once, whatever the number of its axes. The kernels are opaque to the compiler; what
they need to be compiled, exported, differentiated and counted is stated here, once, in Python.

The contract of a backend module:

    recurrent_slice_attention(x, weights, betas, axes, scale, keep_inputs) -> out, maps, inputs
        ``x`` ``(N, C, D, H, W)``; ``weights`` a :class:`~rsa_kernels.folding.Projections`; ``betas`` ``(len(axes),)``.
        ``out`` has ``x``'s dtype and memory format; ``maps`` is one ``(N, S, S)`` per axis, float32 (float64 for
        float64); ``inputs`` holds what steps 2, 3, ... read if ``keep_inputs``, else nothing: one contiguous tensor
        ``(N, D, H, W, C)`` of ``x``'s dtype each, so that every backend can read what another one kept.
    recurrent_slice_attention_backward(grad, x, inputs, maps, weights, betas, axes, scale, needs) -> Gradients
        ``grad`` must not be written to; missing ``inputs`` are made again from the maps.
    slice_attention(query, key, value, axis, scale) -> out, map
    slice_attention_backward(grad, query, key, value, attention, axis, scale, needs) -> three gradients or None

Every tensor may have any strides, what a forward pass saved too: hooks on saved tensors promise values, not strides.
What a backend sees has no negative bit and at least one sample; both are seen to here.

The operators' ``backend`` is a name, ``auto``, which leaves each call to :func:`~rsa_kernels.backends.choose`, or what
:func:`~rsa_kernels.backends.resolve` makes of ``auto`` once for a forward and its backward pass.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from rsa_kernels import backends
from rsa_kernels.folding import Gradients, Projections, accumulation_dtype

_WEIGHTS = ", ".join(f"Tensor {name}" for name in Projections._fields)

library = torch.library.Library("rsa_kernels", "DEF")
library.define(
    f"block(Tensor x, {_WEIGHTS}, Tensor betas, int[] axes, float scale, bool keep_inputs, str backend)"
    " -> (Tensor out, Tensor[] maps, Tensor[] inputs)"
)
library.define(
    f"block_backward(Tensor grad, Tensor x, Tensor[] inputs, Tensor[] maps, {_WEIGHTS}, Tensor betas, int[] axes,"
    " float scale, bool[] needs, str backend) -> Tensor[]"
)
library.define(
    "attention(Tensor query, Tensor key, Tensor value, int axis, float scale, str backend) -> (Tensor out, Tensor map)"
)
library.define(
    "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor attention, int axis,"
    " float scale, bool[] needs, str backend) -> Tensor[]"
)

block = torch.ops.rsa_kernels.block.default
block_backward = torch.ops.rsa_kernels.block_backward.default
attention = torch.ops.rsa_kernels.attention.default
attention_backward = torch.ops.rsa_kernels.attention_backward.default


# Kernels ---------------------------------------------------------------------------------------------------------


def _conform(result: Tensor, like: Tensor) -> Tensor:
    """Gives a result the dtype and strides of ``torch.empty_like(like)``, which the fake kernels promise."""
    if result.dtype == like.dtype:
        strides = result.stride()
        # The first comparison is the cheap one: a dense tensor's strides are those of empty_like.
        if strides == like.stride() or strides == torch.empty_like(like, device="meta").stride():
            return result
    return torch.empty_like(like).copy_(result)


def _plain(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors whose memory holds their values: kernels read memory, and know nothing of a negative bit."""
    return [tensor.resolve_neg() if tensor.is_neg() else tensor for tensor in tensors]


def _block(x: Tensor, *args: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    *tensors, axes, scale, keep_inputs, backend = args
    kernels = backends.load(backend, x, axes)
    if not len(x):
        return _fake_block(x, *args)
    x, *tensors, betas = _plain((x, *tensors))
    out, maps, inputs = kernels.recurrent_slice_attention(x, Projections(*tensors), betas, axes, scale, keep_inputs)
    return _conform(out, x), maps, inputs


def _block_backward(grad: Tensor, x: Tensor, inputs: list[Tensor], maps: list[Tensor], *args: Any) -> list[Tensor]:
    *tensors, axes, scale, needs, backend = args
    kernels = backends.load(backend, x, axes)
    if not len(x):
        return _zeros((x, *tensors), needs)
    grad, x, *tensors, betas = _plain((grad, x, *tensors))
    inputs, maps = _plain(inputs), _plain(maps)
    grads = kernels.recurrent_slice_attention_backward(
        grad, x, inputs, maps, Projections(*tensors), betas, axes, scale, Gradients(*needs)
    )
    wanted = zip(grads, (x, *tensors, betas), needs, strict=True)
    return [_conform(gradient, tensor) for gradient, tensor, need in wanted if need]


def _zeros(tensors: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    """The gradients of a batch without samples."""
    return [torch.zeros_like(tensor) for tensor, need in zip(tensors, needs, strict=True) if need]


def _attention(
    query: Tensor, key: Tensor, value: Tensor, axis: int, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    kernels = backends.load(backend, query)
    if not len(query):
        return _fake_attention(query, key, value, axis, scale, backend)
    query, key, value = _plain((query, key, value))
    out, weights = kernels.slice_attention(query, key, value, axis, scale)
    return _conform(out, value), weights


def _attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention: Tensor,
    axis: int,
    scale: float,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    kernels = backends.load(backend, query)
    if not len(query):
        return _zeros((query, key, value), needs)
    grad, query, key, value, attention = _plain((grad, query, key, value, attention))
    grads = kernels.slice_attention_backward(grad, query, key, value, attention, axis, scale, needs)
    wanted = zip(grads, (query, key, value), needs, strict=True)
    return [_conform(gradient, tensor) for gradient, tensor, need in wanted if need]


for _name, _kernel in {
    "block": _block,
    "block_backward": _block_backward,
    "attention": _attention,
    "attention_backward": _attention_backward,
}.items():
    library.impl(_name, _kernel, "CompositeExplicitAutograd")


# Fake kernels: shapes, dtypes and strides without data -------------------------------------------------------------


def _fake_map(x: Tensor, axis: int) -> Tensor:
    size = x.shape[axis]
    return x.new_empty((x.shape[0], size, size), dtype=accumulation_dtype(x.dtype))


def _fake_block(x: Tensor, *args: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    *_, axes, _scale, keep_inputs, _backend = args
    batch, channels, *sizes = x.shape
    inputs = [x.new_empty((batch, *sizes, channels)) for _ in axes[1:]] if keep_inputs else []
    return torch.empty_like(x), [_fake_map(x, axis) for axis in axes], inputs


def _fake_block_backward(grad: Tensor, x: Tensor, inputs: list[Tensor], maps: list[Tensor], *args: Any) -> list[Tensor]:
    *tensors, _axes, _scale, needs, _backend = args
    return [torch.empty_like(tensor) for tensor, need in zip((x, *tensors), needs, strict=True) if need]


def _fake_attention(
    query: Tensor, key: Tensor, value: Tensor, axis: int, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(value), _fake_map(query, axis)


def _fake_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, attention: Tensor, *args: Any
) -> list[Tensor]:
    _axis, _scale, needs, _backend = args
    return [torch.empty_like(tensor) for tensor, need in zip((query, key, value), needs, strict=True) if need]


torch.library.register_fake("rsa_kernels::block", _fake_block, lib=library)
torch.library.register_fake("rsa_kernels::block_backward", _fake_block_backward, lib=library)
torch.library.register_fake("rsa_kernels::attention", _fake_attention, lib=library)
torch.library.register_fake("rsa_kernels::attention_backward", _fake_attention_backward, lib=library)


# Autograd: the first derivative, for training. What else can be differentiated is in rsa_kernels.transforms ----------


# Elsewhere rsa_kernels.api sees the transforms, and calls what can be transformed.
_IN_A_GRAPH = "inside torch.compile or an exported program, which has its operators alone: transform the module itself"
_PLAIN = (Tensor, torch.nn.Parameter)


def _below_autograd(operator: Callable, kernel: Callable, *args: Any) -> Any:
    """Calls an operator below autograd; its kernel itself where nothing could come between: half the way, 8 µs less."""
    with torch._C._AutoDispatchBelowAutograd():
        alone = torch._C._len_torch_dispatch_stack() == 0 and not torch._C._are_functorch_transforms_active()
        if alone and all(type(argument) in _PLAIN for argument in args if isinstance(argument, Tensor)):
            return kernel(*args)
        return operator(*args)


def has_tangents(tensors: Sequence[Tensor]) -> bool:
    """Whether forward mode is on, and one of the tensors is dual."""
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def _differentiable(tensors: Sequence[Tensor]) -> bool:
    if has_tangents(tensors):
        raise RuntimeError(f"slice-wise attention was given tangents {_IN_A_GRAPH}")
    needed = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if needed and torch._C._are_functorch_transforms_active():
        raise RuntimeError(f"slice-wise attention was differentiated by torch.func {_IN_A_GRAPH}")
    return needed


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, axes: list[int], scale: float, keep_inputs: bool, backend: str, x: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        backend = backends.resolve(backend, x, axes)
        out, maps, inputs = _below_autograd(block, _block, x, *tensors, axes, scale, keep_inputs, backend)
        ctx.save_for_backward(x, *tensors, *maps, *inputs)
        ctx.arguments = (axes, scale, backend)
        ctx.mark_non_differentiable(*maps)
        ctx.set_materialize_grads(False)  # the maps have none, and zeros for them would be made for nothing
        return out, *maps

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        axes, scale, backend = ctx.arguments
        x, *saved = ctx.saved_tensors
        count = len(Gradients._fields) - 1
        tensors, maps, inputs = saved[:count], saved[count : count + len(axes)], saved[count + len(axes) :]
        needs = list(ctx.needs_input_grad[4:])
        grads = iter(block_backward(grad, x, inputs, maps, *tensors, axes, scale, needs, backend))
        return None, None, None, None, *(next(grads) if need else None for need in needs)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, axis: int, scale: float, backend: str, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        backend = backends.resolve(backend, query)
        out, weights = _below_autograd(attention, _attention, query, key, value, axis, scale, backend)
        ctx.save_for_backward(query, key, value, weights)
        ctx.arguments = (axis, scale, backend)
        ctx.mark_non_differentiable(weights)
        ctx.set_materialize_grads(False)
        return out, weights

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        axis, scale, backend = ctx.arguments
        needs = list(ctx.needs_input_grad[3:])
        grads = iter(attention_backward(grad, *ctx.saved_tensors, axis, scale, needs, backend))
        return None, None, None, *(next(grads) if need else None for need in needs)


def _block_autograd(x: Tensor, *args: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    *tensors, axes, scale, keep_inputs, backend = args
    if not _differentiable((x, *tensors)):
        return _below_autograd(block, _block, x, *tensors, axes, scale, keep_inputs, backend)
    out, *maps = _Block.apply(axes, scale, keep_inputs, backend, x, *tensors)
    return out, maps, []  # the inputs are for backward, which has them


def _attention_autograd(
    query: Tensor, key: Tensor, value: Tensor, axis: int, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    if not _differentiable((query, key, value)):
        return _below_autograd(attention, _attention, query, key, value, axis, scale, backend)
    return _Attention.apply(axis, scale, backend, query, key, value)


library.impl("block", _block_autograd, "Autograd")
library.impl("attention", _attention_autograd, "Autograd")


# Autocast: volumes take the region's dtype, as for a convolution; weights stay as precise as they are --------------


def _register_autocast(device: str) -> None:
    key = f"Autocast{device.upper()}"
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.to(torch.get_autocast_dtype(device))

    def block_rule(x: Tensor, *args: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return block(cast(x), *args)

    def attention_rule(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return attention(cast(query), cast(key), cast(value), *args)

    def as_it_is(operator: Callable) -> Callable:
        def rule(*args: Any) -> list[Tensor]:
            with torch._C._ExcludeDispatchKeyGuard(keyset):
                return operator(*args)

        return rule

    library.impl("block", block_rule, key)
    library.impl("attention", attention_rule, key)
    # Where backward() is called inside the region, too, the dtypes are those that forward chose.
    library.impl("block_backward", as_it_is(block_backward), key)
    library.impl("attention_backward", as_it_is(attention_backward), key)


for _device in ("cpu", "cuda", "xpu", "mps"):
    _register_autocast(_device)


# FLOP counts (a multiply-add is two) -------------------------------------------------------------------------------


def _step_flops(shape: Sequence[int], axes: Sequence[int], projections: int, mixes: int) -> int:
    """``2 C^2 V`` for a product with the weights, ``2 S C V`` for one with a map, over all axes.

    Nominal, as such counts are: those of the algebra with all gradients, without what is computed again.
    """
    batch, channels, *sizes = shape
    voxels = batch * channels * sizes[0] * sizes[1] * sizes[2]
    return sum(2 * voxels * (projections * channels + mixes * sizes[axis - 2]) for axis in axes)


@register_flop_formula(torch.ops.rsa_kernels.block)
def _block_flops(x_shape: Sequence[int], *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    *_, axes, _scale, _keep_inputs, backend = args
    return _step_flops(x_shape, axes, projections=3 if backends.name_of(backend) == "reference" else 2, mixes=2)


@register_flop_formula(torch.ops.rsa_kernels.block_backward)
def _block_backward_flops(grad_shape: Sequence[int], *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    *_, axes, _scale, _needs, _backend = args
    return _step_flops(grad_shape, axes, projections=6, mixes=4)


@register_flop_formula(torch.ops.rsa_kernels.attention)
def _attention_flops(query_shape: Sequence[int], *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    _key, _value, axis, *_ = args
    return _step_flops(query_shape, [axis], projections=0, mixes=2)


@register_flop_formula(torch.ops.rsa_kernels.attention_backward)
def _attention_backward_flops(grad_shape: Sequence[int], *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    *_, axis, _scale, needs, _backend = args
    return _step_flops(grad_shape, [axis], projections=0, mixes=bool(needs[0] or needs[1]) + sum(needs))
