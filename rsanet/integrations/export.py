"""A trained network as a file of another runtime: ONNX, `torch.export`, AOTInductor.

What is written is the network alone, in float32: normalized windows ``(N, C, D, H, W)`` in, logits of background and
lesion ``(N, 2, D, H, W)`` out. Before a file takes its place, it is opened as a user would, and compared with the
network.
"""

import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from rsa_kernels import ops, reference, use_backend
from rsa_kernels.folding import Projections
from rsanet.integrations.description import Described, describe
from rsanet.segment.files import check_new, folder_beside
from rsanet.segment.words import sizes

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "aoti": ".pt2"}
METADATA = "rsanet"  # the name under which a file holds what `describe` says, as JSON
OPSET = 18  # the oldest that the exporter writes, which the most runtimes read
TOLERANCE = 1e-3  # of a probability


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        path: the file.
        shapes: of the volumes it was compared on; none where nothing here can run it.
        difference: the largest of a probability from the network's own.
    """

    path: Path
    shapes: list[tuple[int, ...]]
    difference: float


def export(
    model: str | Path,
    out: str | Path,
    kind: str | None = None,
    *,
    decompose: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda words: None,
) -> Exported:
    """Writes the network of a model in another format, and compares the file with it.

    Args:
        model: a run folder or a ``.safetensors`` file.
        out: the file to write.
        kind: a key of `SUFFIXES`; None takes the first of the ending of ``out``.
        decompose: for ``torch-export``, whether attention is written in operators of PyTorch alone, so that the file
            loads where rsa_kernels is not installed; the other formats always are.
        overwrite: whether a file that exists is replaced.
        say: called with a line before each long step.

    Returns:
        What was written, and how it compares.

    Raises:
        ValueError: an argument or the model cannot serve, or the file would not compute what the network does.
        OSError: a file cannot be read or written.
        ModuleNotFoundError: the format needs a package that is not installed.
    """
    out = Path(out)
    kind = _check(out, kind, decompose)
    check_new(out, overwrite=overwrite)
    if kind == "onnx":
        import onnxscript  # noqa: F401 (torch would tell of it less clearly)
    described = describe(model)
    window = described.window
    if kind == "torch-export":
        _check_window(described, decompose)
    example, others = _shapes(described)
    say(f"Tracing the network of {described.words['model']} ...")
    with _quiet(), folder_beside(out) as folder:
        partial = folder / out.name
        if kind == "aoti":
            compared = [(1, *window), (2, *window)]
            program = trace(described.network, (2, *window), free=(0,))
            say("Compiling it, which can take minutes ...")
            _compile(decomposed(program), described, partial)
        else:
            compared = [(1, *window), *others]
            program = trace(described.network, example, free=(0, 2, 3, 4))
            if kind == "onnx":
                say("Translating it to ONNX ...")
                _write_onnx(program, described, partial)
            else:
                program = decomposed(program) if decompose else _stripped(program)
                torch.export.save(program, partial, extra_files={f"{METADATA}.json": json.dumps(described.words)})
        if kind == "onnx" and not find_spec("onnxruntime"):
            os.replace(partial, out)
            return Exported(out, [], 0.0)
        say(f"Comparing it with the network on volumes of {', '.join(sizes(shape[1:]) for shape in compared)} ...")
        difference = compare(described.network, _opened(kind, partial), compared)
        os.replace(partial, out)
    return Exported(out, compared, difference)


def _check(out: Path, kind: str | None, decompose: bool) -> str:
    """The format asked for, or the one of the ending."""
    if kind is None:
        kind = next((name for name, suffix in SUFFIXES.items() if out.suffix == suffix), None)
        if kind is None:
            raise ValueError(f"{out} ends in neither .onnx nor .pt2: give such a name, or --format.")
    if kind not in SUFFIXES:
        raise ValueError(f"--format is {kind!r}: give one of {', '.join(SUFFIXES)}.")
    if out.suffix != SUFFIXES[kind]:
        raise ValueError(f"{out} is not a name for {kind}: end it in {SUFFIXES[kind]}.")
    if decompose and kind != "torch-export":
        raise ValueError(f"--decompose is for --format torch-export: {kind} is decomposed anyway, leave it out.")
    return kind


def _check_window(described: Described, decompose: bool) -> None:
    """Refuses a window that shrinks to what torch.export takes for a case of its own."""
    step, pool = _step(described)
    coarsest = [size // step if pool else -(-size // step) for size in described.window]
    least = min(coarsest) if decompose else math.prod(coarsest)
    if least == 1:
        left = "one slice along an axis" if decompose else "a single voxel"
        raise ValueError(
            f"A window of {sizes(described.window)} leaves the network's coarsest level {left}, where torch.export "
            f"makes no graph for several sizes: give --format onnx{', or leave out --decompose' * decompose}."
        )


def _step(described: Described) -> tuple[int, bool]:
    """What the sizes are divided by on the way to the coarsest level, and whether they are rounded down."""
    config = described.network.config
    return 2 ** (len(config["channels"]) - 1), config["downsample"] == "max_pool"


def _shapes(described: Described) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Batch and sizes to trace with, and some to compare on: odd, even, and unlike along each axis."""
    step, pool = _step(described)
    least = step * (1 + pool)
    half, most = ([max(part * size // 4, least) for size in described.window] for part in (2, 3))
    odd, other = (half[0] + 1, half[1] + 2, half[2] + 3), (most[0] + 3, most[1] + 2, most[2] + 1)
    return (2, 2 * step + 1, 2 * step + 3, 2 * step + 5), [(2, *odd), (1, *other)]


def trace(network: nn.Module, shape: Sequence[int], free: Sequence[int]) -> ExportedProgram:
    """The network as one graph for many sizes.

    Args:
        network: the network, in evaluation mode.
        shape: batch, depth, height, width to trace with; the graph does not depend on those that are free.
        free: dims of ``(N, C, D, H, W)`` that may have any size.
    """
    batch, *size = shape
    image = torch.zeros(batch, network.config["in_channels"], *size)
    # Otherwise a size of 1, at whatever level, would be a case of its own, and the graph would hold for larger ones.
    oblivious = torch.fx.experimental._config.patch(backed_size_oblivious=len(free) > 1)
    # The file chooses its backend where it runs, whatever is chosen here.
    with oblivious, torch.no_grad(), use_backend("auto"):
        return torch.export.export(network, (image,), dynamic_shapes=(dict.fromkeys(free, Dim.DYNAMIC),))


def decomposed(program: ExportedProgram) -> ExportedProgram:
    """The program with slice-wise attention in operators of PyTorch, by the published equations."""

    def block(x: Tensor, *args: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        *tensors, betas, axes, scale, keep_inputs, _backend = args
        return reference.recurrent_slice_attention(x, Projections(*tensors), betas, axes, scale, keep_inputs)

    def attention(query: Tensor, key: Tensor, value: Tensor, axis: int, scale: float, _: str) -> tuple[Tensor, Tensor]:
        return reference.slice_attention(query, key, value, axis, scale)

    with torch.fx.experimental._config.patch(backed_size_oblivious=True):
        return _stripped(program.run_decompositions({ops.block: block, ops.attention: attention}))


def _stripped(program: ExportedProgram) -> ExportedProgram:
    """The program without the lines of source it was traced from, which name the folders of this machine."""
    for module in program.graph_module.modules():  # what runs under a mode of its own is a graph within the graph
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
    return program


def _write_onnx(program: ExportedProgram, described: Described, path: Path) -> None:
    written = torch.onnx.export(
        decomposed(program),
        (),
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch", 2: "depth", 3: "height", 4: "width"},),  # only their names
    )
    written.model.metadata_props[METADATA] = json.dumps(described.words)
    written.save(path, external_data=False)


def _compile(program: ExportedProgram, described: Described, path: Path) -> None:
    options = {"aot_inductor.metadata": {METADATA: json.dumps(described.words)}}
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
    except Exception as error:
        if "InvalidCxxCompiler" in f"{type(error).__name__}: {error}":  # its own, or inside that of inductor
            raise ValueError(
                "AOTInductor needs a C++ compiler, and finds none that works: install g++, or name one in CXX."
            ) from error
        raise


def _opened(kind: str, path: Path) -> Callable[[Tensor], Tensor]:
    """What a file computes, by the runtime that it is for."""
    if kind == "aoti":
        return torch._inductor.aoti_load_package(str(path))
    if kind == "torch-export":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


@torch.no_grad()
def compare(network: nn.Module, run: Callable[[Tensor], Tensor], shapes: Sequence[Sequence[int]]) -> float:
    """The largest difference between two probabilities of lesion, on normalized noise.

    Args:
        network: the network.
        run: another form of it.
        shapes: batch, depth, height, width of the volumes.

    Raises:
        ValueError: it is more than rounding.
    """
    largest = 0.0
    for batch, *size in shapes:
        image = torch.randn(batch, network.config["in_channels"], *size, generator=torch.Generator().manual_seed(0))
        # A softmax over sums of a whole slice can magnify rounding: what this network makes of the input's own is fair.
        wanted, nudged = (torch.softmax(network(volume), 1) for volume in (image, image * (1 + 2**-22)))
        try:
            found = torch.softmax(run(image).float(), 1)
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"The file cannot compute a volume of {sizes(size)} ({reason}), so it is not kept."
            ) from error
        difference = (found - wanted).abs().max().item()
        if not difference <= max(TOLERANCE, 10 * (nudged - wanted).abs().max().item()):
            raise ValueError(
                f"The file differs from the network by up to {difference:.2g} of a probability on a volume of "
                f"{sizes(size)}, so it is not kept: another version of torch may write it right."
            )
        largest = max(largest, difference)
    return largest


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the remarks of the exporters, which are for their developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.fx", "torch.export", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)
