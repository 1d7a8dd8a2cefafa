"""DDP and FSDP2 on two processes of a CPU: what they compute is what one process computes on the whole batch."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from integrations.two_processes import WORLD, batch, loss, network
from torch import distributed
from torch.distributed.fsdp import fully_shard

from rsanet import RSABlock, prepare_for_sharding

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="this build of torch has no gloo")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By the name of a function of two_processes.py, what it found on each process."""
    folder = tmp_path_factory.mktemp("two_processes")
    tests = Path(__file__).parents[1]
    script = tests / "integrations" / "two_processes.py"
    path = os.pathsep.join([str(tests.parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, script, folder], check=True, env={**os.environ, "PYTHONPATH": path}, timeout=300)
    names = ("replicated", "sharded", "half_precision")
    return {name: [torch.load(folder / f"{name}_{rank}.pt") for rank in range(WORLD)] for name in names}


@pytest.fixture
def alone():
    model = network()
    loss(model, batch()).backward()
    return model


def check_gradients(results, model, **tolerance):
    for result in results:
        assert list(result["gradients"]) == [name for name, _ in model.named_parameters()]
        for name, parameter in model.named_parameters():
            gradient = result["gradients"][name].reshape(parameter.shape).to(parameter.dtype)
            torch.testing.assert_close(gradient, parameter.grad, **tolerance)
            assert gradient.any() == ("phi_conv.bias" not in name), "zero for the key's bias alone"


def test_ddp_has_the_gradients_of_one_process(found, alone):
    check_gradients(found["replicated"], alone)


def test_fsdp_has_the_gradients_of_one_process(found, alone):
    check_gradients(found["sharded"], alone)


def test_fsdp_clips_and_steps_as_one_process_does(found, alone):
    optimizer = torch.optim.AdamW(alone.parameters(), 1e-2)
    norm = torch.nn.utils.clip_grad_norm_(alone.parameters(), 1.0)
    optimizer.step()
    for result in found["sharded"]:
        torch.testing.assert_close(result["norm"], norm)
    # With the whole state_dict asked for, the first process has it.
    torch.testing.assert_close(found["sharded"][0]["stepped"], dict(alone.state_dict()))


def test_fsdp_keeps_the_keys_and_shapes_of_the_published_state_dict(found):
    state = network().state_dict()
    for result in found["sharded"]:
        assert result["keys"] == list(state)
    shapes = {key: tensor.shape for key, tensor in found["sharded"][0]["stepped"].items()}
    assert shapes == {key: tensor.shape for key, tensor in state.items()}


def test_fsdp_loads_whole_checkpoints_and_its_own(found):
    first = found["sharded"][0]
    torch.testing.assert_close(first["loaded"], dict(network(seed=1).state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(first["restored"], first["stepped"], rtol=0, atol=0)


def test_fsdp_with_bfloat16_parameters_is_as_exact_as_they_are(found, alone):
    results = found["half_precision"]
    assert {result["dtype"] for result in results} == {"torch.bfloat16"}
    check_gradients(results, alone, rtol=0.1, atol=2e-3)


def test_preparing_changes_neither_outputs_nor_checkpoints():
    model, prepared = network(), prepare_for_sharding(network())
    assert all(parameter.dim() for parameter in prepared.parameters())
    assert torch.equal(prepared(batch()), model(batch()))
    assert {key: value.shape for key, value in prepared.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }
    other = network(seed=1)
    prepared.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(prepared(batch()), other(batch()))
    model.load_state_dict(prepare_for_sharding(prepared).state_dict(), strict=True)
    assert torch.equal(model(batch()), other(batch()))
    copied = copy.deepcopy(prepared)
    copied.load_state_dict(network().state_dict(), strict=True)
    torch.testing.assert_close(dict(copied.state_dict()), dict(network().state_dict()), rtol=0, atol=0)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, not str"):
        prepare_for_sharding("network")


def test_without_preparing_torch_says_what_it_does_not_shard(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="doesn't support scalar parameters"):
            fully_shard(RSABlock(4))
    finally:
        distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:DTensor random operators:UserWarning")
def test_a_sharded_network_from_the_meta_device_starts_as_the_identity(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        with torch.device("meta"):
            model = prepare_for_sharding(network())
        for module in (model[0].rsa_block, model[2], model):
            fully_shard(module)
        model.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(7)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        assert "betas=sharded" in repr(model)
        assert "beta=sharded" in repr(model)
        betas = {key: value for key, value in model.state_dict().items() if "beta" in key}
        assert len(betas) == 4
        assert all(value == 0 for value in betas.values())
        assert not any((parameter == 7).any() for parameter in model.parameters())
        x = batch()
        assert torch.equal(model[2](x.expand(-1, 4, -1, -1, -1)), x.expand(-1, 4, -1, -1, -1))
    finally:
        distributed.destroy_process_group()
