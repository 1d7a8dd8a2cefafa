import types

import pytest
import torch

from rsanet.network import RSANet
from rsanet.segment import environment


@pytest.mark.parametrize(("has_bf16", "name"), [(True, "bf16"), (False, "fp32")])
def test_auto_precision_is_bf16_only_where_the_hardware_has_it(monkeypatch, has_bf16, name):
    monkeypatch.setattr(environment, "has_bf16_instructions", lambda device: has_bf16)
    assert environment.pick_precision("auto", torch.device("cpu")).name == name
    assert environment.pick_precision("fp32", torch.device("cpu")).name == "fp32"


def test_a_device_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="finds no CUDA device"):
        environment.pick_device("cuda")
    with pytest.raises(ValueError, match="give auto, cpu"):
        environment.pick_device("abacus")


def test_the_backend_is_asked_for_the_window_of_the_level_with_attention(monkeypatch):
    seen = []
    backend = types.SimpleNamespace(backend="torch")
    monkeypatch.setattr(environment, "explain", lambda x: seen.append(tuple(x.shape)) or backend)
    network = RSANet(1, 2, (8, 8, 8))
    precision = environment.pick_precision("fp32", torch.device("cpu"))
    assert environment.attention_backend(network, (16, 32, 64), torch.device("cpu"), precision) == "torch"
    assert seen == [(1, 8, 4, 8, 16)]


def test_the_memory_of_a_container_counts(monkeypatch):
    cpu = torch.device("cpu")
    system = environment.available_memory(cpu)
    assert system > 2**20
    monkeypatch.setattr(environment, "_free_of_container", lambda: 1000)
    assert environment.available_memory(cpu) == 1000
    monkeypatch.setattr(environment, "meminfo", dict)
    monkeypatch.setattr(environment, "_free_of_container", lambda: None)
    assert environment.available_memory(cpu) > 2**30
    assert environment.describe_memory() == "unknown"


@pytest.mark.parametrize(("depth", "wrong"), [(1, False), (16, True), (17, True), (32, True), (33, False)])
def test_a_patch_that_would_train_on_wrong_gradients_is_refused(monkeypatch, depth, wrong):
    monkeypatch.setattr(environment, "shallow_gradient_is_wrong", lambda: True)
    arguments = ((depth, 64, 64), 5, environment.Precision("bf16", ""), torch.device("cpu"), False)
    if wrong:
        with pytest.raises(ValueError, match=rf"{depth} voxels deep is 2 deep at the network's level \d.*more than 32"):
            environment.refuse_wrong_gradients(*arguments)
    else:
        environment.refuse_wrong_gradients(*arguments)


def test_a_patch_is_not_refused_where_gradients_are_right(monkeypatch):
    monkeypatch.setattr(environment, "shallow_gradient_is_wrong", lambda: False)
    bf16, fp32 = (environment.Precision(name, "") for name in ("bf16", "fp32"))
    environment.refuse_wrong_gradients((32, 32, 32), 5, bf16, torch.device("cpu"), False)
    environment.refuse_wrong_gradients((32, 32, 32), 5, fp32, torch.device("cpu"), True)
    environment.refuse_wrong_gradients((32, 32, 32), 5, bf16, torch.device("cuda"), True)


def test_compiling_in_bf16_on_a_cpu_is_refused():
    with pytest.raises(ValueError, match="leave --compile out, or give --precision fp32"):
        environment.refuse_wrong_gradients(
            (64, 64, 64), 5, environment.Precision("bf16", ""), torch.device("cpu"), True
        )


def test_the_probe_of_gradients_sees_a_wrong_one(monkeypatch):
    environment.shallow_gradient_is_wrong.cache_clear()
    monkeypatch.setattr(environment, "conv3d", lambda volume, weight, padding: weight * volume.mean())
    try:
        assert not environment.shallow_gradient_is_wrong()
        halved = lambda volume, weight, padding: weight * (0.5 if weight.dtype == torch.bfloat16 else 1)  # noqa: E731
        environment.shallow_gradient_is_wrong.cache_clear()
        monkeypatch.setattr(environment, "conv3d", halved)
        assert environment.shallow_gradient_is_wrong()
    finally:
        environment.shallow_gradient_is_wrong.cache_clear()
