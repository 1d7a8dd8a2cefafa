"""Which backend runs, who decides, and what the report says."""

import os
import subprocess
import sys

import pytest
import torch
from support import BACKENDS, random_block, random_volume

from rsa_kernels import __main__ as report
from rsa_kernels import (
    available_backends,
    backends,
    explain,
    folded,
    native,
    recurrent_slice_attention,
    slice_attention,
    use_backend,
)

# What auto takes on a CPU.
FASTEST = "torch" if native.missing("cpp") else "cpp"


@pytest.fixture
def calls(monkeypatch):
    """The names of the backends that ran, in order."""
    ran = []
    real = backends.module

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getattr__(self, function):
            ran.append(self.name)
            return getattr(real(self.name), function)

    monkeypatch.setattr(backends, "module", Recorder)
    monkeypatch.setattr(backends, "_environment", backends.AUTO)
    return ran


def run(**options):
    recurrent_slice_attention(random_volume((1, 3, 2, 4, 3)), *random_block(3), **options)


def test_argument_then_context_then_environment_then_auto(calls, monkeypatch):
    run()
    monkeypatch.setattr(backends, "_environment", "reference")
    run()
    with use_backend("torch"):
        run()
        run(backend="reference")
        with use_backend("auto"):
            run()
    run()
    assert calls == [FASTEST, "reference", "torch", "reference", FASTEST, "reference"]


def test_a_context_nests_and_restores_on_exceptions(calls):
    volume = random_volume((1, 3, 2, 4, 3))
    with use_backend("reference"):
        with pytest.raises(ValueError, match="axis is 7"), use_backend("torch"):  # noqa: PT012 two calls on purpose
            slice_attention(volume, volume, volume, 2)
            slice_attention(volume, volume, volume, 7)
        slice_attention(volume, volume, volume, 2)
    slice_attention(volume, volume, volume, 2)
    assert calls == ["torch", "reference", FASTEST]


def test_backward_runs_where_forward_ran(calls):
    x = random_volume((1, 3, 2, 4, 3)).requires_grad_()
    with use_backend("reference"):
        out = recurrent_slice_attention(x, *random_block(3))
    out.sum().backward()
    assert calls == ["reference", "reference"]


def test_unknown_names_are_refused_wherever_they_come_from(monkeypatch):
    with pytest.raises(
        ValueError, match="backend is 'fast', but must be one of auto, triton, cuda, cpp, torch, reference"
    ):
        use_backend("fast").__enter__()
    monkeypatch.setattr(backends, "_environment", "fast")
    with pytest.raises(
        ValueError, match="environment variable RSA_KERNELS_BACKEND is 'fast', but must be one of auto, triton"
    ):
        run()


def test_the_environment_variable_is_read_at_import():
    program = "import rsa_kernels.backends as b; print(b.requested(None))"
    environment = {**os.environ, backends.ENVIRONMENT_VARIABLE: "reference"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "reference\n"


def test_choices_may_end_in_any_order():
    first, second = use_backend("reference"), use_backend("torch")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert backends.requested(None) == "torch"
    second.__exit__(None, None, None)
    assert backends.requested(None) == backends._environment


def test_every_backend_is_listed_and_explained():
    assert list(available_backends()) == list(backends._MODULES)
    explanation = explain(random_volume((1, 3, 2, 4, 3)))
    assert {explanation.backend, *explanation.others} == set(available_backends())
    assert str(explanation).startswith(f"{FASTEST}: runs this volume\n")
    assert explanation.others["reference"].startswith("makes three")


def test_weights_are_not_folded_where_that_costs_more_than_it_saves(calls):
    channels, limits = (1024, ((1, 5, 17), (1, 2, 43))) if FASTEST == "cpp" else (512, ((2, 5, 17), (3, 3, 19)))
    few, enough = (torch.ones(1, channels, *size) for size in limits)
    assert explain(few).backend == "reference"
    voxels = few[0, 0].numel()
    assert f"{channels} channels costs more than it saves on {voxels} voxels" in explain(few).others["torch"]
    assert explain(enough).backend == FASTEST
    recurrent_slice_attention(few.double(), *random_block(channels))
    recurrent_slice_attention(few.double(), *random_block(channels), backend="torch")
    slice_attention(few, few, few, 4)
    assert calls == ["reference", "torch", FASTEST]


def test_a_small_fold_is_cheap_in_cpp_alone(monkeypatch):
    few = torch.ones(1, 512, 3, 3, 3)  # the bottleneck of RSANet in windows of 48 voxels
    assert explain(few).backend == ("cpp" if FASTEST == "cpp" else "reference")
    monkeypatch.setattr(native, "missing", lambda name: "needs an extension")
    assert explain(few).backend == "reference"


def test_the_command_reports_and_checks():
    done = subprocess.run(
        [sys.executable, "-m", "rsa_kernels", "--check"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"torch {torch.__version__}" in done.stdout
    for name in BACKENDS:
        assert f"backend {name}: usable" in done.stdout
        for dtype in ("float64", "float32", "bfloat16", "float16"):
            assert f"ok   {name} on cpu, {dtype}: worst relative error" in done.stdout


@pytest.mark.parametrize("function", ["recurrent_slice_attention", "recurrent_slice_attention_backward"])
def test_the_check_finds_a_wrong_backend(function, monkeypatch, capsys):
    right = getattr(folded, function)

    def wrong(*arguments):
        result = right(*arguments)
        result[0].mul_(1.01)
        return result

    monkeypatch.setattr(folded, function, wrong)
    monkeypatch.setattr(sys, "argv", ["rsa_kernels", "--check"])
    assert report.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("FAIL torch on cpu, float32") for line in lines)
    assert any(line.startswith("ok   reference on cpu, float32") for line in lines)


class Volume:
    """What the rules look at of a volume on a GPU that is not there."""

    is_cuda, dtype, shape = True, torch.bfloat16, (1, 32, 8, 8, 8)
    device = torch.device("cuda:0")

    def numel(self):
        return 32 * 512


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU, as far as the rules ask."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(backends, "_triton_version", lambda: "3.7.1")
    monkeypatch.setattr(backends, "_triton_fails", lambda: None)
    caches = (backends._triton_is_missing, backends._gpu_is_too_old)
    for cache in caches:
        cache.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


def test_auto_takes_triton_for_volumes_on_a_gpu(gpu):
    assert backends.choose(Volume(), (3, 4, 2)).backend == backends.choose(Volume(), ()).backend == "triton"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda p: p.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5)), "8.0 or later, and this GPU"),
        (lambda p: p.setattr(backends, "_triton_version", lambda: None), "which is not installed"),
        (lambda p: p.setattr(backends, "_triton_version", lambda: "3.5.1"), "but 3.5.1 is installed"),
        (lambda p: p.setattr(torch.cuda, "is_available", lambda: False), "needs a GPU, and torch finds none"),
        (lambda p: p.setattr(backends, "_triton_fails", lambda: "is installed but does not start"), "does not start"),
        (lambda p: p.setattr(Volume, "dtype", torch.float64), "float64 products"),
        (lambda p: p.setattr(torch.version, "hip", "6.0"), "not tested on AMD GPUs"),
    ],
)
def test_auto_takes_torch_where_triton_cannot_run_or_is_not_proven(gpu, change, reason):
    change(gpu)
    explanation = backends.choose(Volume(), (3, 4, 2))
    assert explanation.backend == "torch"
    assert reason in explanation.others["triton"]


def test_auto_takes_the_cuda_extension_where_triton_cannot_run(gpu):
    gpu.setattr(native, "missing", lambda name: None)
    assert backends.choose(Volume(), (3, 4, 2)).backend == "triton"
    gpu.setattr(backends, "_triton_version", lambda: None)
    backends._triton_is_missing.cache_clear()
    explanation = backends.choose(Volume(), (3, 4, 2))
    assert explanation.backend == "cuda"
    assert "which is not installed" in explanation.others["triton"]
    assert "runs tensors on the CPU" in explanation.others["cpp"]
    gpu.setattr(Volume, "dtype", torch.float64)
    assert "float64 products" in backends.choose(Volume(), ()).others["cuda"]


@pytest.mark.parametrize("name", ["cpp", "cuda"])
def test_an_extension_that_is_not_there_is_no_choice(name, monkeypatch):
    monkeypatch.setattr(native, "missing", lambda name: "needs an extension, which was not built: build it")
    assert available_backends()[name] == "needs an extension, which was not built: build it"
    assert explain(random_volume((1, 3, 2, 4, 3))).backend == "torch"
    with pytest.raises(RuntimeError, match=rf"backend '{name}' was asked for, but it needs an extension, which was"):
        run(backend=name)


def test_a_triton_that_does_not_start_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton.runtime", None)
    assert "is installed but does not start (" in backends._triton_fails()


@pytest.mark.skipif(backends.interpreted(), reason="interpreted kernels do run tensors of the CPU")
def test_an_explicit_choice_never_falls_back():
    with pytest.raises(RuntimeError, match=r"backend 'triton' was asked for, but it (needs|runs)"):
        run(backend="triton")
