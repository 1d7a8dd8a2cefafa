"""What the operators need under ``torch.func``, forward mode, and second derivatives.

The autograd of :mod:`rsa_kernels.ops` is made for training: it is quick to call and keeps what makes backward quick. A
call under a transform or with tangents takes the way of this module instead, which PyTorch can transform again.

- Reverse mode (``grad``, ``vjp``, ``jacrev``) runs the kernels of every backend; ``x`` and the maps alone are kept.
- ``vmap`` joins its dim to the batch, in one call. Where each sample has weights of its own, or gradients of the
  weights of its own, the kernels are called once a sample.
- Forward mode (``jvp``, ``jacfwd``) and second derivatives have no kernels. They differentiate the published equations,
  in plain PyTorch, where the backend is ``reference`` or left to ``auto``; another one was asked for, and refuses.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rsa_kernels import ops, reference
from rsa_kernels.backends import left_to_auto, resolve
from rsa_kernels.folding import Gradients, Projections
from rsa_kernels.ops import has_tangents

_TANGENTS = "was given tangents"


def active() -> bool:
    """Whether a call has to take the way of this module."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def block(x: Tensor, *args: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """As ``ops.block``, without inputs."""
    *tensors, axes, scale, _keep_inputs, backend = args
    x = _autocast(x)
    out, *maps = _apply(_Block(resolve(backend, x, axes), scale, axes), x, *tensors)
    return out, [attention.detach() for attention in maps], []


def attention(
    query: Tensor, key: Tensor, value: Tensor, axis: int, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """As ``ops.attention``."""
    volumes = [_autocast(volume) for volume in (query, key, value)]
    out, attention = _apply(_Attention(resolve(backend, volumes[0]), scale, [axis]), *volumes)
    return out, attention.detach()


def _autocast(volume: Tensor) -> Tensor:
    """The volume as ``ops`` takes it under autocast: cast here, so that the cast is differentiated, too."""
    device = volume.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return volume if volume.dtype == torch.float64 else volume.to(torch.get_autocast_dtype(device))
    return volume


# What is called --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """An operator with the arguments that are no tensors.

    Attributes:
        backend: the backend's name, or ``auto`` as it was resolved.
        scale: factor on the logits.
        axes: one axis per step.
        needs: for each of the operator's tensors, whether its gradient is needed.
    """

    backend: str
    scale: float
    axes: list[int]
    needs: tuple[bool, ...] = ()

    # How many tensors the operator takes.
    count = 0

    def run(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The output, then a map per axis."""
        raise NotImplementedError

    def differentiate(self, grad: Tensor, tensors: Sequence[Tensor], kept: Sequence[Tensor]) -> list[Tensor]:
        """The gradients that are needed, from what was kept: maps, then inputs."""
        raise NotImplementedError

    def equations(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """As ``run``, in plain PyTorch."""
        raise NotImplementedError

    def differentiated_equations(self, grad: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """As ``differentiate``, in plain PyTorch."""
        _, pull_back = torch.func.vjp(lambda *tensors: self.equations(*tensors)[0], *tensors)
        return tuple(gradient for gradient, need in zip(pull_back(grad), self.needs, strict=True) if need)

    def check_plain(self, what: str) -> None:
        """Refuses what there are no kernels for, if kernels were asked for."""
        if self.backend != "reference" and not left_to_auto(self.backend):
            raise RuntimeError(
                f"slice-wise attention {what}, for which backend {self.backend!r} has no kernels: call it with "
                "backend='reference', which is plain PyTorch"
            )


class _Block(_Call):
    count = len(Gradients._fields)

    def run(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        out, maps, _ = ops.block(*tensors, self.axes, self.scale, False, self.backend)
        return out, *maps

    def differentiate(self, grad: Tensor, tensors: Sequence[Tensor], kept: Sequence[Tensor]) -> list[Tensor]:
        x, *weights = tensors
        maps, inputs = kept[: len(self.axes)], kept[len(self.axes) :]
        return ops.block_backward(
            grad, x, inputs, maps, *weights, self.axes, self.scale, list(self.needs), self.backend
        )

    def equations(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        x, *weights, betas = tensors
        projections = Projections(*weights)
        # It cancels in the softmax: its gradient is zero, and not the rounding noise that autograd would find.
        projections = projections._replace(phi_bias=projections.phi_bias.detach())
        with torch.autocast(x.device.type, enabled=False):
            out, maps, _ = reference.recurrent_slice_attention(x, projections, betas, self.axes, self.scale, False)
        return out, *maps


class _Attention(_Call):
    count = 3

    def run(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return ops.attention(*tensors, *self.axes, self.scale, self.backend)

    def differentiate(self, grad: Tensor, tensors: Sequence[Tensor], kept: Sequence[Tensor]) -> list[Tensor]:
        return ops.attention_backward(grad, *tensors, *kept, *self.axes, self.scale, list(self.needs), self.backend)

    def equations(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(tensors[0].device.type, enabled=False):
            return reference.slice_attention(*tensors, *self.axes, self.scale)


# Autograd that can be transformed ----------------------------------------------------------------------------------


def _tangents(primals: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    pairs = zip(primals, tangents, strict=True)
    return tuple(torch.zeros_like(primal) if tangent is None else tangent for primal, tangent in pairs)


class _Forward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return call.run(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, *tensors = inputs
        ctx.call = call
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.save_for_forward(*tensors, *output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[1:]
        if grad is None:
            return (None,) * (1 + len(needs))
        grads = iter(_apply_backward(replace(ctx.call, needs=tuple(needs)), grad, *ctx.saved_tensors))
        return None, *(next(grads) if need else None for need in needs)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        ctx.call.check_plain(_TANGENTS)
        primals = ctx.saved_tensors[: len(tangents)]
        return torch.func.jvp(ctx.call.equations, tuple(primals), _tangents(primals, tangents))[1]


class _Backward(torch.autograd.Function):
    """The gradients of an operator, which are functions of the incoming gradient and of the operator's tensors."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: _Call, grad: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(call.differentiate(grad, tensors[: call.count], tensors[call.count :]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, *tensors = inputs
        ctx.call = call
        ctx.kept = len(tensors) - 1 - call.count
        ctx.save_for_backward(*tensors[: 1 + call.count])
        ctx.save_for_forward(*tensors[: 1 + call.count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.call.check_plain("was differentiated twice")
        _, pull_back = torch.func.vjp(ctx.call.differentiated_equations, *ctx.saved_tensors)
        # What was kept follows from the tensors, and they have got all of the gradient.
        return None, *pull_back(grads), *(None,) * ctx.kept

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        ctx.call.check_plain(_TANGENTS)
        primals = ctx.saved_tensors
        given = _tangents(primals, tangents[: len(primals)])
        return torch.func.jvp(ctx.call.differentiated_equations, tuple(primals), given)[1]


def _apply(call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
    if _has_dual_numbers(tensors):
        call.check_plain(_TANGENTS)
        return call.equations(*tensors)
    return _Forward.apply(call, *tensors)


def _apply_backward(call: _Call, grad: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    if _has_dual_numbers((grad, *tensors)):
        call.check_plain(_TANGENTS)
        return call.differentiated_equations(grad, *tensors[: call.count])
    return _Backward.apply(call, grad, *tensors)


def _has_dual_numbers(tensors: Sequence[Tensor]) -> bool:
    """Whether tangents come as dual numbers, which plain operators carry on, and not by a transform."""
    return not torch._C._are_functorch_transforms_active() and has_tangents(tensors)


def _once_more(tensors: Sequence[Tensor]) -> bool:
    """Whether gradients are to be differentiated: they are made with ``create_graph=True``, or of dual numbers."""
    return (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)) or has_tangents(tensors)


def _block_backward(grad: Tensor, x: Tensor, inputs: list[Tensor], maps: list[Tensor], *args: Any) -> list[Tensor]:
    *weights, axes, scale, needs, backend = args
    if _once_more((grad, x, *weights)):
        call = _Block(backend, scale, axes, tuple(needs))
        return list(_apply_backward(call, grad, x, *weights, *maps, *inputs))
    with torch._C._AutoDispatchBelowAutograd():
        return ops.block_backward(grad, x, inputs, maps, *args)


def _attention_backward(grad: Tensor, *args: Any) -> list[Tensor]:
    *tensors, axis, scale, needs, backend = args
    if _once_more((grad, *tensors)):
        return list(_apply_backward(_Attention(backend, scale, [axis], tuple(needs)), grad, *tensors))
    with torch._C._AutoDispatchBelowAutograd():
        return ops.attention_backward(grad, *args)


ops.library.impl("block_backward", _block_backward, "Autograd")
ops.library.impl("attention_backward", _attention_backward, "Autograd")


# vmap --------------------------------------------------------------------------------------------------------------


def _joined(size: int, tensors: Sequence[Tensor], dims: Sequence[int | None]) -> list[Tensor]:
    """Each tensor with the mapped dim, or a repetition of it, as part of its first dim."""
    apart = [
        tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, dims, strict=True)
    ]
    # A repetition that is not copied has neighbours zero apart, which the kernels read in volumes, but not in maps.
    return [part.contiguous() if part.dim() == 3 else part for part in (tensor.flatten(0, 1) for tensor in apart)]


def _parted(size: int, tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.unflatten(0, (size, len(tensor) // size)) for tensor in tensors]


def _sample_by_sample(
    size: int, function: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor], dims: Sequence[int | None]
) -> list[Tensor]:
    """What a function returns for the tensors of each sample, stacked."""
    results = []
    for index in range(size):
        pairs = zip(tensors, dims, strict=True)
        results.append(function(*(tensor if dim is None else tensor.select(dim, index) for tensor, dim in pairs)))
    return [torch.stack(parts) for parts in zip(*results, strict=True)]


def _vmap_block(info: Any, in_dims: tuple[Any, ...], x: Tensor, *args: Any) -> Any:
    *weights, axes, scale, _keep_inputs, backend = args
    dims = in_dims[: 1 + len(weights)]
    call, size = _Block(backend, scale, axes), info.batch_size
    if any(dim is not None for dim in dims[1:]):
        out, *maps = _sample_by_sample(size, call.run, (x, *weights), dims)
    else:
        out, *maps = _parted(size, call.run(*_joined(size, [x], dims[:1]), *weights))
    return (out, maps, []), (0, [0] * len(maps), [])


def _vmap_block_backward(
    info: Any, in_dims: tuple[Any, ...], grad: Tensor, x: Tensor, _: list[Tensor], maps: list[Tensor], *args: Any
) -> Any:
    # The inputs are not joined: the backend makes them again.
    *weights, axes, scale, needs, backend = args
    call, size, end = _Block(backend, scale, axes, tuple(needs)), info.batch_size, 4 + len(weights)
    volumes, dims = [grad, x, *maps], [in_dims[0], in_dims[1], *in_dims[3]]
    if any(needs[1:]) or any(dim is not None for dim in in_dims[4:end]):

        def run(grad: Tensor, x: Tensor, *rest: Tensor) -> list[Tensor]:
            return call.differentiate(grad, (x, *rest[len(maps) :]), rest[: len(maps)])

        grads = _sample_by_sample(size, run, [*volumes, *weights], [*dims, *in_dims[4:end]])
    else:
        grad, x, *maps = _joined(size, volumes, dims)
        grads = _parted(size, call.differentiate(grad, (x, *weights), maps))
    return grads, [0] * len(grads)


def _vmap_attention(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    *volumes, axis, scale, backend = args
    joined = _joined(info.batch_size, volumes, in_dims[:3])
    return tuple(_parted(info.batch_size, ops.attention(*joined, axis, scale, backend))), (0, 0)


def _vmap_attention_backward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    tensors, arguments = args[:5], args[5:]
    grads = _parted(
        info.batch_size, ops.attention_backward(*_joined(info.batch_size, tensors, in_dims[:5]), *arguments)
    )
    return grads, [0] * len(grads)


torch.library.register_vmap("rsa_kernels::block", _vmap_block, lib=ops.library)
torch.library.register_vmap("rsa_kernels::block_backward", _vmap_block_backward, lib=ops.library)
torch.library.register_vmap("rsa_kernels::attention", _vmap_attention, lib=ops.library)
torch.library.register_vmap("rsa_kernels::attention_backward", _vmap_attention_backward, lib=ops.library)
