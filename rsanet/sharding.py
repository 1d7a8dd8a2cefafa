"""Makes attention blocks ready for FSDP2, which shards parameters along a dim and refuses scalars, as the betas are."""

from typing import Any

from torch import Tensor, nn

from rsanet.attention import RSABlock, SABlock


def prepare_for_sharding(model: nn.Module) -> nn.Module:
    """Turns the betas of all attention blocks into vectors of one element, which ``fully_shard`` takes.

    The blocks compute the same, and their state_dict keeps the published shapes: there betas are scalars, whole on
    every process. Reading it is a collective call then, as for all that FSDP2 gathers. Call this before
    ``fully_shard``, and make the optimizer after both.

    Args:
        model: a network with attention blocks; changed in place.

    Returns:
        ``model``.

    Raises:
        TypeError: If ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}: pass the network itself")
    for block in model.modules():
        if isinstance(block, SABlock | RSABlock) and any(not beta.dim() for _, beta in _betas(block)):
            for name, beta in _betas(block):
                owner, _, attribute = name.rpartition(".")
                vector = nn.Parameter(beta.detach().reshape(1), requires_grad=beta.requires_grad)
                setattr(block.get_submodule(owner), attribute, vector)
            block.register_state_dict_post_hook(_as_scalars)
            block.register_load_state_dict_pre_hook(_as_vectors)
    return model


def _betas(block: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in block.named_parameters() if name.startswith("beta")]


def _as_scalars(block: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    for name, _beta in _betas(block):
        values = state_dict[prefix + name]
        # A sharded tensor has one element on one process; this one gathers it.
        values = values.full_tensor() if hasattr(values, "full_tensor") else values
        state_dict[prefix + name] = values.reshape(())


def _as_vectors(block: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, beta in _betas(block):
        value = state_dict.get(prefix + name)
        if isinstance(value, Tensor) and value.dim() == 0:
            state_dict[prefix + name] = _like(value.reshape(1), beta)


def _like(values: Tensor, beta: Tensor) -> Tensor:
    """Values that all processes have, spread over them as a parameter is."""
    if not hasattr(beta, "device_mesh"):
        return values
    from torch.distributed.tensor import distribute_tensor

    values = values.to(beta.device, beta.dtype)
    return distribute_tensor(values, beta.device_mesh, beta.placements, src_data_rank=None)
