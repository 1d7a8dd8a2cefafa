"""Mixed precision on a GPU: the block in a network, as it is trained."""

import pytest
import torch
from gpu.device import CHANNELS_LAST, DEVICE, DRY_RUN, KERNELS
from support import relative_error
from torch import nn

from rsa_kernels import use_backend
from rsanet import RSABlock, RSANet

pytestmark = pytest.mark.parametrize("backend", KERNELS)

HALVES = [torch.bfloat16, torch.float16]


def awake(model):
    """Moves the betas from zero, where a block is the identity, and tames logits."""
    for block in model.modules():
        if isinstance(block, RSABlock):
            block.scale = 1e-2
            for beta in block.betas:
                nn.init.constant_(beta, 0.5)
    return model.to(DEVICE, memory_format=CHANNELS_LAST)


def network(**options):
    """Attention at every level: before a skip connection, at the bottleneck, in the decoder."""
    torch.manual_seed(0)
    levels = {"attention_levels": (0, 1, 2), "decoder_attention_levels": (0, 1)}
    return awake(RSANet(2, 2, (16, 32, 64), dropout=0.0, **levels, **options))


def volume(channels, size=12 if DRY_RUN else 24):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, size, size - 4, size, generator=generator).to(DEVICE, memory_format=CHANNELS_LAST)


@pytest.fixture
def repacks(monkeypatch):
    """Counts the copies that bring volumes into the kernels' memory format and back."""
    from rsa_kernels.triton import block, volumes

    made = []
    # As pack and unpack see them: a transposition, or room for a copy. The block makes room of its own.
    assert block.empty_packed is volumes.empty_packed
    for name in ("_transpose", "empty_packed"):
        original = getattr(volumes, name)
        monkeypatch.setattr(
            volumes, name, lambda *args, original=original, name=name: made.append(name) or original(*args)
        )
    return made


def note_formats(model):
    """For every call of a block: whether volume and output, and later their gradients, are channels last."""
    noted = []

    def note(tensor):
        noted.append(tensor.is_contiguous(memory_format=CHANNELS_LAST))

    def hook(module, inputs, out):
        for tensor in (inputs[0], out):
            note(tensor)
            if tensor.requires_grad:
                tensor.register_hook(note)

    for block in model.modules():
        if isinstance(block, RSABlock):
            block.register_forward_hook(hook)
    return noted


@pytest.mark.parametrize("dtype", HALVES)
def test_a_block_under_autocast(dtype, backend):
    torch.manual_seed(0)
    block, x = awake(RSABlock(32)), volume(32)
    outs = {}
    for name in (backend, "reference"):
        with torch.autocast(DEVICE, dtype), use_backend(name):
            out = block(x)
        assert out.dtype == dtype
        assert out.is_contiguous(memory_format=CHANNELS_LAST)
        grads = torch.autograd.grad(out.float().square().sum(), block.parameters())
        outs[name] = [out.detach(), *grads]
    for parameter, grad in zip(block.parameters(), outs[backend][1:], strict=True):
        assert grad.dtype == parameter.dtype == torch.float32
    for index, (result, other) in enumerate(zip(outs[backend], outs["reference"], strict=True)):
        if index != 4:  # that of phi's bias, zero
            assert relative_error(result, other) <= 5e-2, index


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("channels", [32, 256], ids=["narrow", "wide"])
def test_a_backward_pass_inside_autocast_is_as_exact(channels, dtype, backend):
    torch.manual_seed(0)
    block, x = awake(RSABlock(channels, backend=backend)), volume(channels, 8)
    with torch.autocast(DEVICE, dtype):
        loss = block(x).float().square().sum()
        inside = torch.autograd.grad(loss, block.parameters(), retain_graph=True)
    outside = torch.autograd.grad(loss, block.parameters())
    assert all(torch.equal(grad, other) for grad, other in zip(inside, outside, strict=True))


@pytest.mark.parametrize("dtype", HALVES)
def test_a_network_under_autocast_equals_that_of_the_published_equations(dtype, backend):
    model, x = network().eval(), volume(2)
    outs = []
    for name in (backend, "reference"):
        with torch.no_grad(), torch.autocast(DEVICE, dtype), use_backend(name):
            outs.append(model(x))
    assert relative_error(*outs) <= 5e-2


@pytest.mark.parametrize("norm", ["batch", ("group", {"num_groups": 8})], ids=["batch", "group"])
def test_a_network_keeps_channels_last_end_to_end(norm, backend, repacks):
    model, x = network(norm=norm), volume(2)
    noted = note_formats(model)
    with use_backend(backend):
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(x).float().square().mean()
        loss.backward()
        model.eval()
        with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
            assert model(x).is_contiguous(memory_format=CHANNELS_LAST)
    # Five blocks: volume and output, both gradients; then volume and output without gradients.
    assert len(noted) == 5 * 6
    assert all(noted)
    if backend == "triton":
        assert not repacks


def test_a_contiguous_volume_is_repacked_and_that_is_noticed(backend, repacks):
    block, x = awake(RSABlock(16)), volume(16).contiguous()
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16), use_backend(backend):
        block(x)
    assert repacks or backend != "triton"


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_training_in_mixed_precision(dtype, recompute, backend):
    model, x = network(recompute=recompute, backend=backend), volume(2)
    target = (x[:, 0] > 0).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler(DEVICE, enabled=dtype == torch.float16, init_scale=1024.0)
    losses = []
    for _ in range(3 if DRY_RUN else 60):
        optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype):
            loss = nn.functional.cross_entropy(model(x), target)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < (1 if DRY_RUN else 0.8) * losses[0]
