"""What two processes on a CPU make of a network with attention blocks, for test_distributed.py, which runs this."""

import sys
from pathlib import Path

import torch
from torch import distributed, multiprocessing, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from rsanet import SABlock, insert_rsa, prepare_for_sharding

WORLD = 2
WHOLE = StateDictOptions(full_state_dict=True)


def network(seed=0):
    """A small network with both kinds of block, their betas open."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), SABlock(4, "axial"), nn.Conv3d(4, 2, 1))
    insert_rsa(model, "0")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "beta" in name:
                parameter.fill_(0.5)
    return model.double()


def batch():
    return torch.randn(2 * WORLD, 1, 4, 5, 6, generator=torch.Generator().manual_seed(1)).double()


def loss(model, x):
    return model(x).float().square().mean()


def part(rank):
    return batch().chunk(WORLD)[rank]


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(model):
    return {name: whole(parameter.grad).clone() for name, parameter in model.named_parameters()}


def replicated(rank, _):
    model = DistributedDataParallel(network())
    for _ in range(2):  # where a parameter had got no gradient, DDP would say so in the second pass
        model.zero_grad()
        loss(model, part(rank)).backward()
    return {"gradients": gradients(model.module)}


def sharded(rank, folder):
    mesh = init_device_mesh("cpu", (WORLD,))
    model = prepare_for_sharding(network())
    for module in (model[0].rsa_block, model[0], model):
        fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    loss(model, part(rank)).backward()
    found = {"gradients": gradients(model)}
    found["norm"] = whole(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    optimizer.step()
    found["keys"] = list(model.state_dict())
    found["stepped"] = get_model_state_dict(model, options=WHOLE)

    model_state, optimizer_state = get_state_dict(model, optimizer)
    checkpoint.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / "checkpoint")
    set_model_state_dict(model, network(seed=1).state_dict(), options=WHOLE)
    found["loaded"] = get_model_state_dict(model, options=WHOLE)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    states = {"model": model_state, "optimizer": optimizer_state}
    checkpoint.load(states, checkpoint_id=folder / "checkpoint")
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    found["restored"] = get_model_state_dict(model, options=WHOLE)
    return found


def half_precision(rank, _):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = fully_shard(
        prepare_for_sharding(network().float()), mesh=init_device_mesh("cpu", (WORLD,)), mp_policy=policy
    )
    out = model(part(rank).float())
    out.float().square().mean().backward()
    return {"dtype": str(out.dtype), "gradients": gradients(model)}


def main(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    for function in (replicated, sharded, half_precision):
        torch.save(function(rank, folder), folder / f"{function.__name__}_{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    multiprocessing.spawn(main, (Path(sys.argv[1]),), nprocs=WORLD)
