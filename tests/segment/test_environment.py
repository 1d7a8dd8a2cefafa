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
