"""Training and inference of the whole network, side by side with the published network as its code would be run."""

import argparse
import ctypes
import gc
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from monai.inferers import sliding_window_inference
from torch import Tensor, nn

from benchmarks.cases import FORMATS
from benchmarks.devices import (
    Device,
    drift_percent,
    first_line,
    free_bytes,
    here,
    others_load_percent,
    rounds,
)
from benchmarks.published import published
from benchmarks.table import (
    FAILED,
    MEASURED,
    OUT_OF_MEMORY,
    RESULTS,
    UNUSABLE,
    WHERE,
    WRONG,
    Table,
    file_name,
)
from rsa_kernels.api import AXIS_NAMES
from rsanet.attention import RSABlock
from rsanet.checkpoints import load_model
from rsanet.network import RSANet
from rsanet.segment.data import preprocessing
from rsanet.segment.datasets import find_cases
from rsanet.segment.environment import Precision, has_bf16_instructions
from rsanet.segment.metrics import dice
from rsanet.segment.prediction import name_images
from rsanet.segment.recipe import Recipe
from rsanet.segment.segmenter import WINDOWS, lesion_probability, model_file
from rsanet.segment.training import CRITERIA, LONGEST_GRADIENT, make_optimizer
from rsanet.unet import GroupNorm, UpConcat, pad_or_crop

TRAIN, WINDOWED, WHOLE = "training step", "windows", "whole volume"
COLUMNS = WHERE | {
    "case": f"{TRAIN}: forward, loss, backward, clipping and optimizer as `rsanet train` has them, no moving average; "
    f"{WINDOWED}: a volume in overlapping windows, two at a time, blended; {WHOLE}: in one window",
    "shape": "N x C x D x H x W of the patches or of the volume",
    "window": "D x H x W that the network sees at once",
    "channels": "widths of the levels, the finest first",
    "huge_pages": "whether torch asked for large pages of memory, as `rsanet` lets it",
    "provider": "whose network, its precision, and what differs from the usual: see benchmarks/README.md",
    "status": f"{MEASURED}, or why there is no time: {WRONG}, {FAILED}, {OUT_OF_MEMORY}, {UNUSABLE}",
    "note": "the reason in a sentence, or why there is no Dice",
    "samples": "passes that were timed",
    "median_ms": "of one pass",
    "low_ms": "lower quartile",
    "high_ms": "upper quartile",
    "peak_extra_mib": "largest use of memory above that of weights, inputs and the optimizer's state",
    "attention_ms": "of the attention blocks in one pass: each timed alone on the features that it meets there, "
    "forward and in training backward, times its calls; not of a compiled network, where it has no bounds",
    "attention_percent": "attention_ms over the median, times 100",
    "error": "relative, of the logits and in training of the gradient, against the published network in float64 on a "
    "small volume",
    "dice": "of the mask and that of the published network in eager float32 in the same case",
}
KEY = ("device", "threads", "case", "shape", "window", "channels", "provider")

# The volume on which errors are found: small, since float64 takes its time, but not so small that the bottleneck is two
# slices deep: there oneDNN 3.12 gives convolutions in bfloat16 a wrong gradient of their weights.
SMALL = (48, 32, 32)
# What an error may be besides twice that of the published network: ReLUs open and close by the last bit of a sum.
FLOORS = {"fp32": 1e-3, "bf16": 1.6e-2}
# Seconds for the turns of a case, and how many turns there are.
SECONDS, QUICK_SECONDS, FEWEST, MOST = 120.0, 20.0, 3, 15
# What is left to others, in bytes.
RESERVE = 1 << 30


class PublishedAttention(RSABlock):
    """The RSA block computed by the published equations in eager PyTorch; its parameters are those of `RSABlock`."""

    def forward(self, x: Tensor) -> Tensor:
        """Attends ``(N, C, D, H, W)``; same shape."""
        convolutions = (self.theta_conv, self.phi_conv, self.g_conv)
        weights = [tensor for each in convolutions for tensor in (each.weight.flatten(1), each.bias)]
        axes = [AXIS_NAMES[axis] for axis in self.axes]
        return published(x, *weights, torch.stack(list(self.betas)), axes, self.scale)


class PublishedUpConcat(UpConcat):
    """A level of the decoder that is upsampled, concatenated and convolved as it stands."""

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Joins ``(N, in, ...)`` from below and the skip connection ``(N, out, D, H, W)``."""
        return self.conv(torch.cat([skip, pad_or_crop(self.up(x), skip.shape[2:], self.pad)], 1))


def published_network(network: RSANet) -> RSANet:
    """The published network with the weights of one of ours: eager equations, PyTorch's group norm, contiguous.

    Its decoder and its last convolutions are computed as they stand, too.

    Args:
        network: any `RSANet`; is left as it is.

    Returns:
        A network with the same state_dict, on the device, in the dtype and in the mode of ``network``.
    """
    twin = RSANet(**network.config)
    for name, module in list(twin.named_modules()):
        if isinstance(module, RSABlock):
            twin.set_submodule(name, PublishedAttention(module.channels, module.axes, scale=module.scale))
        elif isinstance(module, GroupNorm):
            plain = nn.GroupNorm(module.num_groups, module.num_channels, module.eps, module.affine)
            twin.set_submodule(name, plain)
        elif isinstance(module, UpConcat):
            module.__class__ = PublishedUpConcat
    twin.final = nn.Sequential(*twin.final)
    twin.load_state_dict(network.state_dict())
    weight = next(network.parameters())
    return twin.to(weight.device, weight.dtype).train(network.training)


class Provider(NamedTuple):
    """A way to run the network.

    Attributes:
        name: as in the table.
        published: whether the network is the published one.
        precision: ``fp32``, or ``bf16`` by autocast.
        memory_format: a key of ``FORMATS``.
        compiled: whether ``torch.compile`` compiles it.
        fused: whether the optimizer updates all weights in one kernel.
    """

    name: str
    published: bool
    precision: str
    memory_format: str
    compiled: bool = False
    fused: bool = False


EAGER = Provider("published eager fp32", True, "fp32", "contiguous")
AUTOCAST = Provider("published eager autocast bf16", True, "bf16", "contiguous")
YARDSTICKS = {"fp32": EAGER, "bf16": AUTOCAST}
PREDICTING = (
    EAGER,
    AUTOCAST,
    Provider("ours fp32", False, "fp32", "channels_last_3d"),
    Provider("ours bf16", False, "bf16", "channels_last_3d"),
)
TRAINING = (
    *PREDICTING,
    Provider("ours fp32 contiguous", False, "fp32", "contiguous"),
    Provider("ours bf16 contiguous", False, "bf16", "contiguous"),
    Provider("ours bf16 fused optimizer", False, "bf16", "channels_last_3d", fused=True),
)
# Compiling takes a minute or two. Ours in bf16 is not among them: torch computes wrong gradients of it on a CPU.
COMPILED = (Provider("published compiled fp32", True, "fp32", "contiguous", compiled=True),)


class Source(NamedTuple):
    """Where weights and volumes come from; a process of its own makes the same ones of it.

    Attributes:
        model: a run folder or model file; None for random weights with betas of 0.5.
        images: a folder of simulated subjects, of which the first is taken, or a file for each contrast of the model;
            none for random voxels.
        config: arguments of `RSANet` with random weights.
    """

    model: Path | None = None
    images: tuple[Path, ...] = ()
    config: Mapping[str, Any] = {}

    def network(self) -> RSANet:
        """The network, in evaluation mode, contiguous."""
        if self.model is not None:
            return load_model(model_file(self.model)).float().eval()
        torch.manual_seed(0)
        network = RSANet(**self.config).eval()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if ".betas." in name:
                    parameter.fill_(0.5)
        return network

    def volume(self, shape: Sequence[int]) -> Tensor:
        """``(N, C, D, H, W)``: random, or the middle of the prepared images, all of them where those are smaller."""
        if not self.images:
            return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(1))
        image = self._prepared()
        starts = [max(0, (have - want) // 2) for have, want in zip(image.shape[1:], shape[2:], strict=True)]
        return image[(slice(None), *(slice(a, a + want) for a, want in zip(starts, shape[2:], strict=True)))][None]

    def _prepared(self) -> Tensor:
        extra = load_model(model_file(self.model)).extra
        contrasts, spacing = extra["contrasts"], extra.get("spacing")
        if len(self.images) == 1 and self.images[0].is_dir():
            case = find_cases(self.images[0], contrasts, require_mask=False)[0]
        else:
            case = name_images(contrasts, self.images)
        return preprocessing(spacing)(case)["image"].as_tensor()


class Workload(NamedTuple):
    """What the network is to do.

    Attributes:
        name: ``TRAIN``, ``WINDOWED`` or ``WHOLE``.
        shape: ``(N, C, D, H, W)`` of the patches or the volume.
        window: voxels that the network sees at once.
    """

    name: str
    shape: tuple[int, ...]
    window: tuple[int, ...]


def build(source: Source, provider: Provider, kind: str) -> RSANet:
    """The network as a provider runs it, in evaluation mode, on a kind of device."""
    network = source.network()
    if provider.published:
        network = published_network(network)
    network.to(kind).to(memory_format=FORMATS[provider.memory_format])
    if provider.compiled:
        network.compile()
    return network


def precision_of(provider: Provider) -> Precision:
    """As ``rsanet`` takes it."""
    return Precision(provider.precision, "as asked")


def training_step(network: RSANet, provider: Provider, shape: Sequence[int], kind: str) -> Callable[[], None]:
    """A step of training on patches of random voxels, with a lesion in the middle of each; changes the weights."""
    patches = Source().volume(shape).to(kind)
    mask = torch.zeros_like(patches[:, :1])
    mask[(..., *(slice(size // 3, size // 2 + 1) for size in shape[2:]))] = 1
    criterion, recipe = CRITERIA[Recipe().loss](), Recipe()
    optimizer = make_optimizer(network, recipe)
    if provider.fused:
        optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.peak_rate, fused=True)
    network.train()

    def step() -> None:
        with precision_of(provider).autocast(patches.device):
            logits = network(patches.contiguous(memory_format=FORMATS[provider.memory_format]))
        criterion(logits.float(), mask).backward()
        nn.utils.clip_grad_norm_(network.parameters(), LONGEST_GRADIENT)
        optimizer.step()
        optimizer.zero_grad()

    return step


@torch.inference_mode()
def predict(network: RSANet, provider: Provider, volume: Tensor, window: Sequence[int]) -> Tensor:
    """Probability of lesion ``(N, 1, D, H, W)``: ours as `rsanet predict` finds it, the published network's as is."""
    if not provider.published:
        return lesion_probability(network, volume, window, precision_of(provider))

    def predict_windows(windows: Tensor) -> Tensor:
        with precision_of(provider).autocast(windows.device):
            logits = network(windows)
        return torch.softmax(logits.float(), 1)[:, 1:]

    device = next(network.parameters()).device
    return sliding_window_inference(
        volume, window, WINDOWS, predict_windows, overlap=0.25, mode="gaussian", sw_device=device, device=volume.device
    )


@dataclass
class Subject:
    """A provider at work, and what is found out about it."""

    provider: Provider
    status: str = MEASURED
    note: str = ""
    error: float | None = None
    peak_mib: float | None = None
    attention_ms: float | None = None
    dice: float | None = None
    run: Callable[[], Any] | None = None
    times: list[float] = field(default_factory=list)

    def end(self, status: str, note: str) -> None:
        """Says why there are no times, and frees the network."""
        self.status, self.note, self.run, self.times = status, note, None, []

    def cells(self) -> dict[str, object]:
        """Its row, without what all rows of the case share."""
        row: dict[str, object] = {"provider": self.provider.name, "status": self.status, "note": self.note}
        if self.error is not None:
            row["error"] = f"{self.error:.1e}"
        if not self.times:
            return row
        median = statistics.median(self.times)
        low, _, high = statistics.quantiles(self.times, n=4, method="inclusive") if self.times[1:] else [median] * 3
        row |= {"samples": len(self.times)}
        row |= {"median_ms": f"{median:.1f}", "low_ms": f"{low:.1f}", "high_ms": f"{high:.1f}"}
        if self.peak_mib is not None:
            row["peak_extra_mib"] = f"{self.peak_mib:.0f}"
        if self.attention_ms is not None:
            row["attention_ms"] = f"{self.attention_ms:.2f}"
            row["attention_percent"] = f"{100 * self.attention_ms / median:.2f}"
        if self.dice is not None:
            row["dice"] = f"{self.dice:.4f}"
        return row


def measure(
    device: Device, source: Source, work: Workload, providers: Sequence[Provider], seconds: float
) -> Iterator[list[dict[str, object]]]:
    """The rows of a case after each turn of all providers; those before the last lack only the drift.

    Args:
        device: to measure on.
        source: of weights and volumes.
        work: what is done.
        providers: who does it; a wrong one is not timed.
        seconds: for the turns.
    """
    common = {
        **device.where(),
        "load_percent": _rounded(others_load_percent()),
        "case": work.name,
        "shape": "x".join(map(str, work.shape)),
        "window": "x".join(map(str, work.window)),
        "channels": " ".join(map(str, source.network().config["channels"])),
        "huge_pages": "yes" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else "no",
    }
    before = device.ceilings("float32")
    subjects = [Subject(provider) for provider in providers]
    check(subjects, source, device.kind, work.name == TRAIN)
    first, masks = [], {}
    for subject in subjects:
        if subject.status != MEASURED:
            continue
        with failing(subject):
            if device.kind == "cpu" and sys.platform == "linux":
                subject.peak_mib = peak_mib(source, work, subject.provider)
            first.append(begin(subject, device, source, work, masks))
        device.free()
    if work.name != TRAIN:
        compare(subjects, masks, source)
    able = [subject for subject in subjects if subject.status == MEASURED]
    for _ in range(rounds(first, seconds, FEWEST, MOST) if able else 0):
        for subject in able:
            subject.times += [sum(parts) for parts in device.times([lambda mark, run=subject.run: run()], 1)]
        yield [common | subject.cells() for subject in subjects]
    drift = {"drift_percent": _rounded(drift_percent(before, device.ceilings("float32")))}
    yield [common | drift | subject.cells() for subject in subjects]


def check(subjects: Sequence[Subject], source: Source, kind: str, training: bool) -> None:
    """Ends what cannot run and what is wrong: further from float64 than twice the published network so computed."""
    truth = results(source, None, kind, training)
    limits: dict[str, float] = {}
    for subject in subjects:
        provider = subject.provider
        if provider.precision == "bf16" and not has_bf16_instructions(torch.device(kind)):
            subject.end(UNUSABLE, f"this {kind.upper()} has no bf16 instructions")
            continue
        with failing(subject):
            if provider.precision not in limits:
                found = relative_error(results(source, YARDSTICKS[provider.precision], kind, training), truth)
                limits[provider.precision] = 2 * found + FLOORS[provider.precision]
            subject.error = relative_error(results(source, provider, kind, training), truth)
            limit = limits[provider.precision]
            if not subject.error <= limit:
                subject.end(WRONG, f"the error is {subject.error:.1e}, at most {limit:.1e} may be")
    torch._dynamo.reset()  # what was compiled for small volumes is not to be generalised to large ones


def results(source: Source, provider: Provider | None, kind: str, training: bool) -> list[Tensor]:
    """Logits, and in training the gradient of all weights as one vector, on a small volume.

    Args:
        source: of the weights.
        provider: who computes; None for the published network in float64.
        kind: of device.
        training: whether the gradient is wanted.
    """
    network = build(source, provider or EAGER, kind)
    volume = Source().volume((2, network.config["in_channels"], *SMALL)).to(kind)
    if provider is None:
        network, volume, provider = network.double(), volume.double(), EAGER
    with torch.set_grad_enabled(training):
        with precision_of(provider).autocast(volume.device):
            logits = network(volume.contiguous(memory_format=FORMATS[provider.memory_format]))
        if not training:
            return [logits]
        upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(logits)
        gradients = torch.autograd.grad(logits, list(network.parameters()), upstream)
    return [logits.detach(), torch.cat([gradient.flatten() for gradient in gradients])]


def relative_error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The larger one of the relative errors; infinite where anything is not finite."""
    errors = [((one.double() - exact).norm() / exact.norm()).item() for one, exact in zip(found, truth, strict=True)]
    return max(error if math.isfinite(error) else math.inf for error in errors)


def begin(subject: Subject, device: Device, source: Source, work: Workload, masks: dict[str, Tensor]) -> float:
    """Makes the pass and runs it for the first time, in which attention's features and the mask are kept.

    Returns:
        Seconds of a pass.
    """
    provider = subject.provider
    network = build(source, provider, device.kind)
    if work.name == TRAIN:
        subject.run = training_step(network, provider, work.shape, device.kind)
    else:
        volume = source.volume(work.shape)
        subject.run = partial(predict, network, provider, volume, work.window)
    if provider.compiled:
        subject.run()  # compiles
        (parts,) = device.times([lambda mark: subject.run()], 1)
        return sum(parts) / 1e3
    found = []
    with features_of_attention(network) as features:
        (parts,) = device.times([lambda mark: found.append(subject.run())], 1)
    if work.name != TRAIN:
        masks[provider.name] = found[0] > 0.5
    subject.attention_ms = attention_ms(device, network, provider, features, work.name == TRAIN)
    if device.kind != "cpu":
        subject.peak_mib = device.peak_mib(lambda mark: subject.run())
    return sum(parts) / 1e3


@contextmanager
def features_of_attention(network: RSANet) -> Iterator[dict[tuple, list]]:
    """Within it, what enters each attention block: by name and shape, the latest features and how often they came."""
    kept: dict[tuple, list] = {}

    def keep(block: nn.Module, inputs: tuple[Tensor, ...], name: str) -> None:
        entry = kept.setdefault((name, tuple(inputs[0].shape)), [None, 0])
        entry[0], entry[1] = inputs[0].detach(), entry[1] + 1

    names = network.attention_blocks.values()
    handles = [network.get_submodule(name).register_forward_pre_hook(partial(keep, name=name)) for name in names]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def attention_ms(
    device: Device, network: RSANet, provider: Provider, features: Mapping[tuple, list], training: bool
) -> float:
    """Milliseconds of all calls of the attention blocks, each kind of call timed alone."""

    def call(block: nn.Module, x: Tensor, mark: Callable[[], None]) -> None:
        with torch.set_grad_enabled(training), precision_of(provider).autocast(x.device):
            out = block(x)
        if training:
            torch.autograd.grad(out, [x, *block.parameters()], torch.ones_like(out), allow_unused=True)

    total = 0.0
    for (name, _), (x, count) in features.items():
        run = partial(call, network.get_submodule(name), x.clone().requires_grad_() if training else x)
        total += count * statistics.median(sum(parts) for parts in device.times([run], 7)[2:])
    return total


def compare(subjects: Sequence[Subject], masks: Mapping[str, Tensor], source: Source) -> None:
    """Fills the Dice where there are masks that mean something."""
    missing = "no trained model was given" if source.model is None else "" if source.images else "no image was given"
    for subject in subjects:
        if subject.status != MEASURED:
            continue
        if missing or EAGER.name not in masks:
            subject.note = f"no Dice: {missing or f'{EAGER.name} did not run'}"
        else:
            subject.dice = dice(masks[subject.provider.name], masks[EAGER.name])


@contextmanager
def failing(subject: Subject) -> Iterator[None]:
    """Within it, an error ends the subject, and no one else."""
    try:
        yield
    except (BrokenProcessPool, MemoryError, torch.OutOfMemoryError):
        subject.end(OUT_OF_MEMORY, f"{free_bytes('cpu') / 2**30:.1f} GiB were free")
    except Exception as error:
        short = "allocate memory" in str(error)
        subject.end(OUT_OF_MEMORY if short else FAILED, first_line(error))


def peak_mib(source: Source, work: Workload, provider: Provider) -> float:
    """MiB of resident memory that a pass takes above the level before it, in a process that does nothing else."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.network"])
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(high_water_mib, source, work, provider, torch.get_num_threads()).result()


def high_water_mib(source: Source, work: Workload, provider: Provider, threads: int) -> float:
    """In this process, which may not take more than is free; see ``peak_mib``."""
    torch.set_num_threads(threads)
    most = _status_mib("VmData") * 2**20 + free_bytes("cpu") - RESERVE
    resource.setrlimit(resource.RLIMIT_DATA, (int(most),) * 2)
    network = build(source, provider, "cpu")
    # A first pass before: libraries, thread pools and the optimizer's state are not the pass's memory.
    if work.name == TRAIN:
        run = training_step(network, provider, work.shape, "cpu")
        run()
    else:
        volume = source.volume(work.shape)
        run = partial(predict, network, provider, volume, work.window)
        small = [min(pair) for pair in zip(SMALL, work.window, strict=True)]
        predict(network, provider, volume[(..., *(slice(size) for size in small))].contiguous(), small)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the mark
    before = _status_mib("VmRSS")
    run()
    return _status_mib("VmHWM") - before


def _status_mib(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def _rounded(value: float | None) -> str | None:
    return None if value is None else f"{value:.0f}"


def workloads(network: RSANet, source: Source, quick: bool) -> list[Workload]:
    """What is measured of a network."""
    channels = network.config["in_channels"]
    patches = (1, channels, 48, 48, 48) if quick else (2, channels, 64, 64, 64)
    volume = (1, channels, 64, 80, 64) if quick else (1, channels, 176, 208, 176)
    if source.images:
        volume = tuple(source.volume(volume).shape)
    window = tuple(network.extra.get("roi", patches[2:]))
    # Halved on the way down and doubled on the way up, other sizes would not meet their own voxels again.
    stride = 2 ** (len(network.config["channels"]) - 1)
    whole = tuple(math.ceil(size / stride) * stride for size in volume[2:])
    return [
        Workload(TRAIN, patches, patches[2:]),
        Workload(WINDOWED, volume, window),
        Workload(WHOLE, volume, whole),
    ]


def network_table(device: str, folder: Path = RESULTS) -> Table:
    """The table of the network's measurements on a device."""
    return Table(folder / f"{file_name(device)}-network.csv", tuple(COLUMNS), KEY)


def line(row: Mapping[str, object]) -> str:
    """A row as it is printed."""
    start = f"  {row['provider']:30s}"
    if row["status"] != MEASURED:
        return f"{start} not timed: {row['status']}: {row['note']}"
    words = [f"{row['median_ms']:>9} ms ({row['low_ms']} to {row['high_ms']}, {row['samples']} samples)"]
    if row.get("peak_extra_mib"):
        words.append(f"{row['peak_extra_mib']} MiB")
    if row.get("attention_percent"):
        words.append(f"attention {row['attention_percent']} %")
    words.append(f"error {row['error']}")
    if row.get("dice"):
        words.append(f"Dice {row['dice']}")
    return f"{start} " + ", ".join(words)


def compare_batches(turns: int, size: int = 64) -> None:
    """Prints what a batch of one costs in shares of a batch of two, in training and inference, taken in pairs.

    Args:
        turns: pairs of each.
        size: of the volumes, along every axis.
    """
    network = Source().network().to(memory_format=torch.channels_last_3d)
    pair = torch.randn(2, 3, size, size, size, generator=torch.Generator().manual_seed(1))
    pair = pair.contiguous(memory_format=torch.channels_last_3d)

    def infer(volumes: Tensor) -> Tensor:
        with torch.inference_mode():
            return network(volumes)

    def train(volumes: Tensor) -> Tensor:
        network.zero_grad()
        out = network(volumes)
        out.square().mean().backward()
        return out.detach()

    for name, run in (("inference", infer), ("training step", train)):
        network.train(run is train)
        times: dict[int, list[float]] = {1: [], 2: []}
        for turn in range(turns + 2):
            # In both orders, so that neither batch always runs on what the other left in the caches.
            for batch in sorted(times, reverse=turn % 2 == 1):
                volumes = pair[:batch].contiguous(memory_format=torch.channels_last_3d)
                start = time.perf_counter()
                run(volumes)
                if turn >= 2:
                    times[batch].append(time.perf_counter() - start)
        ratios = [2 * one / two for one, two in zip(times[1], times[2], strict=True)]
        one, share = statistics.median(times[1]), statistics.median(times[2]) / 2
        quartiles = statistics.quantiles(ratios, n=4)
        print(
            f"batches {name} alone {1e3 * one:.0f} ms, share of two {1e3 * share:.0f} ms, "
            f"ratio {quartiles[1]:.3f} ({quartiles[0]:.3f} to {quartiles[2]:.3f}, the middle half of {turns} pairs)"
        )
    network.eval()
    masks = infer(pair).argmax(1)
    lone = torch.cat([infer(volume[None]).argmax(1) for volume in pair])
    print(f"batches masks differ in {int((masks != lone).sum())} of {masks.numel()} voxels")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the options; a wrong one ends the process with a sentence and status 2."""
    names = [provider.name for provider in (*TRAINING, *COMPILED)]
    parser = argparse.ArgumentParser(prog="python -m benchmarks network", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small volumes, few repeats, nothing compiled")
    parser.add_argument("--model", type=Path, help="run folder or model file of rsanet train; without: random weights")
    parser.add_argument("--image", type=Path, nargs="+", default=[], help="folder of rsanet simulate, or files")
    parser.add_argument("--providers", nargs="+", choices=names, metavar="NAME", help=f"only these of {names}")
    parser.add_argument("--batches", action="store_true", help="alone: what a lone volume costs beside one of a pair")
    parser.add_argument("--only", choices=("train", "predict"), help="one of the two")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder of the table (default: benchmarks/results)"
    )
    arguments = parser.parse_args(argv)
    if arguments.image and not arguments.model:
        parser.error("--image is given, but no model that knows its contrasts: give --model, too")
    return arguments


def main(argv: Sequence[str]) -> int:
    """Measures the network and puts rows into the table as they come; 1 if a provider was wrong or failed."""
    arguments = parse(argv)
    if arguments.batches:
        compare_batches(6 if arguments.quick else 24)
        return 0
    source, device = Source(arguments.model, tuple(arguments.image)), here()
    try:
        network = source.network()
        chosen = workloads(network, source, arguments.quick)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    table, start, status = network_table(device.name, arguments.output), time.monotonic(), 0
    for work in chosen:
        if arguments.only and (work.name == TRAIN) != (arguments.only == "train"):
            continue
        providers = PREDICTING if work.name != TRAIN else TRAINING if arguments.quick else (*TRAINING, *COMPILED)
        providers = [each for each in providers if not arguments.providers or each.name in arguments.providers]
        size, window = ("x".join(map(str, sizes)) for sizes in (work.shape, work.window))
        print(f"[{time.monotonic() - start:.0f} s] {work.name} {size}, window {window}", flush=True)
        rows: list[dict[str, object]] = []
        for rows in measure(device, source, work, providers, QUICK_SECONDS if arguments.quick else SECONDS):
            table.put(rows)
        for row in rows:
            print(line(row), flush=True)
            status |= row["status"] in (WRONG, FAILED)
    print(f"rows: {table.path}, after {time.monotonic() - start:.0f} s")
    return int(status)
