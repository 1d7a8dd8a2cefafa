"""RSANet: a 3-D U-Net with recurrent slice-wise attention, and the files its weights live in."""

import itertools
import json
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rsanet.attention import DEFAULT_AXES, NonLocalBlock, RSABlock
from rsanet.configuration import PAPER_CONFIGURATIONS, check_configuration
from rsanet.unet import ConvBlock, Downsample, Norm, UpConcat

FORMAT_KEY, FORMAT = "rsanet_format", "1"
CONFIG_KEY, EXTRA_KEY = "rsanet_config", "rsanet_extra"


class RSANet(nn.Module):
    """3-D U-Net with recurrent slice-wise attention, from "RSANet" (Zhang et al., MICCAI 2019).

    The defaults are the published network: the same function with the same 74 parameters under the same names.
    Volumes are ``(N, C, D, H, W)`` of any size; odd sizes are padded or cropped at the skip connections as published.
    Levels are numbered from 0, full resolution, to the bottleneck, which is also -1.

    RSA attention is global over its input, so predictions depend on the window they are made in. For training that
    repeats bitwise on CUDA, use ``torch.use_deterministic_algorithms(True)`` and neither ``upsample="trilinear"`` nor
    ``downsample="max_pool"``: their backward has no deterministic form in PyTorch.

    Args:
        in_channels: channels of the input, one per contrast.
        out_channels: channels of the output, one per class.
        channels: width of each level, full resolution first; two levels or more.
        norm: ``"batch"``, ``"instance"`` or ``("group", {"num_groups": 8})``, a name or a pair of name and
            options.
        dropout: probability of dropping a feature map between the two convolutions of a block. Where the
            published network drops is not visible in its checkpoints; predictions do not depend on it.
        attention: ``"rsa"``, ``"non_local"`` or None.
        attention_levels: encoder levels, the bottleneck included, whose output is attended.
        decoder_attention_levels: decoder levels whose output is attended.
        axes: axes of RSA attention in order; see ``RSABlock``.
        scale: factor on the attention's logits.
        block: ``"plain"`` (two convolutions), ``"residual"`` or ``"pre_activation"``.
        downsample: ``"conv"`` (strided), ``"residual"`` (a strided residual block) or ``"max_pool"``.
        upsample: ``"nearest"``, ``"trilinear"`` or ``"transposed"`` (a transposed convolution).
        deep_supervision: in training, return one output per decoder level as a list, highest resolution
            first. In evaluation the output is always the one tensor of full resolution.
        recompute: see ``RSABlock``; saves memory in training.
        backend: see ``RSABlock``.

    Attributes:
        config: the arguments that define the function, in JSON types: ``RSANet(**model.config)`` is its twin.
        extra: what else belongs to the model, in JSON types; travels in its file and means nothing here.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 2,
        channels: Sequence[int] = (32, 64, 128, 256, 512),
        *,
        norm: Norm = ("group", {"num_groups": 8}),
        dropout: float = 0.2,
        attention: str | None = "rsa",
        attention_levels: Sequence[int] = (-1,),
        decoder_attention_levels: Sequence[int] = (),
        axes: Sequence[int | str] = DEFAULT_AXES,
        scale: float = 1.0,
        block: str = "plain",
        downsample: str = "conv",
        upsample: str = "nearest",
        deep_supervision: bool = False,
        recompute: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.config = check_configuration(
            in_channels=in_channels,
            out_channels=out_channels,
            channels=channels,
            norm=norm,
            dropout=dropout,
            attention=attention,
            attention_levels=attention_levels,
            decoder_attention_levels=decoder_attention_levels,
            axes=axes,
            scale=scale,
            block=block,
            downsample=downsample,
            upsample=upsample,
            deep_supervision=deep_supervision,
        )
        self.extra: dict[str, Any] = {}
        self.deep_supervision = deep_supervision

        widths = self.config["channels"]
        bottleneck = len(widths) - 1
        self.init_conv = nn.Conv3d(in_channels, widths[0], 3, padding=1, bias=False)
        for level in range(bottleneck):
            before = widths[max(level - 1, 0)]
            self.add_module(f"conv{level + 1}", ConvBlock(before, widths[level], norm, block, dropout))
            self.add_module(f"down{level + 1}", Downsample(widths[level], norm, downsample))
        self.center = ConvBlock(widths[-2], widths[-1], norm, block, dropout)
        pad = downsample == "max_pool"
        for level in reversed(range(bottleneck)):
            up = UpConcat(widths[level + 1], widths[level], norm, block, dropout, upsample, pad)
            self.add_module(f"up_concat{level + 1}", up)
        self.final = nn.Sequential(
            nn.Conv3d(widths[0], widths[0], 3, padding=1, bias=False),
            nn.Conv3d(widths[0], out_channels, 1, bias=False),
        )
        self.deep_heads = nn.ModuleList(
            nn.Conv3d(width, out_channels, 1, bias=False) for width in widths[1:-1] if deep_supervision
        )

        # For each stage that attention follows: the name of the stage, and that of its attention block.
        self.attention_blocks: dict[str, str] = {}
        if attention is None:
            return
        for level in reversed(self.config["attention_levels"]):
            stage, suffix = ("center", "") if level == bottleneck else (f"conv{level + 1}", f"{level + 1}")
            self._add_attention(stage, suffix, widths[level], recompute, backend)
        for level in reversed(self.config["decoder_attention_levels"]):
            self._add_attention(f"up_concat{level + 1}", f"_up{level + 1}", widths[level], recompute, backend)

    def _add_attention(self, stage: str, suffix: str, width: int, recompute: bool, backend: str | None) -> None:
        kind, scale = self.config["attention"], self.config["scale"]
        block: nn.Module
        if kind == "rsa":
            block = RSABlock(width, self.config["axes"], scale=scale, recompute=recompute, backend=backend)
        else:
            block = NonLocalBlock(width, scale=scale)
        self.attention_blocks[stage] = f"{kind}_block{suffix}"
        self.add_module(self.attention_blocks[stage], block)

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "RSANet":
        """A network by the name the paper gives it, say ``"RSA-111"``; see ``PAPER_CONFIGURATIONS``."""
        if name not in PAPER_CONFIGURATIONS:
            raise ValueError(f"network {name!r} is unknown: use one of {', '.join(PAPER_CONFIGURATIONS)}")
        return cls(**{**PAPER_CONFIGURATIONS[name], **overrides})

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits ``(N, out_channels, D, H, W)``; a list of them while training with deep supervision."""
        features = self._decode(x)
        output = self.final(features[0])
        if self.training and self.deep_supervision:
            return [output, *self._deep_outputs(features)]
        return output

    def forward_deep(self, x: Tensor) -> list[Tensor]:
        """The list of deep supervision in any mode: full resolution first, every next one halved."""
        if not self.config["deep_supervision"]:
            raise ValueError("this network has no deep supervision: construct it with deep_supervision=True")
        features = self._decode(x)
        return [self.final(features[0]), *self._deep_outputs(features)]

    def attention_maps(self, x: Tensor) -> dict[str, list[Tensor]]:
        """The RSA maps that a forward pass on ``x`` makes: per block, ``(N, S, S)`` for each of its axes.

        Maps of inserted blocks are included. Call it in evaluation mode; no gradient is recorded.
        """
        maps: dict[str, list[Tensor]] = {}

        def keep(block: RSABlock, inputs: tuple[Tensor, ...], name: str) -> None:
            maps[name] = block.attention_maps(inputs[0])

        handles = [
            block.register_forward_pre_hook(lambda block, inputs, name=name: keep(block, inputs, name))
            for name, block in self.named_modules()
            if isinstance(block, RSABlock)
        ]
        try:
            with torch.no_grad():
                self(x)
        finally:
            for handle in handles:
                handle.remove()
        return maps

    def _decode(self, x: Tensor) -> list[Tensor]:
        """The features of every decoder level, full resolution first."""
        if not torch.compiler.is_compiling():
            # The messages are for a caller; in a graph the checks would be conditions on its sizes.
            self._check_input(x)
        bottleneck = len(self.config["channels"]) - 1
        skips, features = [], []
        x = self.init_conv(x)
        for level in range(1, bottleneck + 1):
            x = self._stage(f"conv{level}", x)
            skips.append(x)
            x = getattr(self, f"down{level}")(x)
        x = self._stage("center", x)
        for level in range(bottleneck, 0, -1):
            x = self._stage(f"up_concat{level}", x, skips.pop())
            features.insert(0, x)
        return features

    def _stage(self, name: str, *inputs: Tensor) -> Tensor:
        x = getattr(self, name)(*inputs)
        if name in self.attention_blocks:
            x = getattr(self, self.attention_blocks[name])(x)
        return x

    def _deep_outputs(self, features: list[Tensor]) -> list[Tensor]:
        return [head(level) for head, level in zip(self.deep_heads, features[1:], strict=False)]

    def _check_input(self, x: Tensor) -> None:
        config = self.config
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"RSANet needs a floating-point tensor, got {kind}: convert the images first")
        if x.dim() != 5 or x.shape[1] != config["in_channels"] or 0 in x.shape:
            raise ValueError(
                f"RSANet needs a volume (N, {config['in_channels']}, D, H, W), got shape {tuple(x.shape)}: "
                "stack one channel per contrast, and add the batch dim"
            )
        depth = len(config["channels"])
        size = tuple(x.shape[2:])
        if config["downsample"] == "max_pool" and min(size) < 2 ** (depth - 1):
            raise ValueError(
                f"a volume of {size} is too small to max-pool {depth - 1} times: "
                f"pad every size to at least {2 ** (depth - 1)}, or use fewer levels"
            )
        name, options = config["norm"]
        keeps_statistics = name == "batch" or (name == "instance" and options.get("track_running_stats"))
        if keeps_statistics and not self.training:
            return
        for width in config["channels"]:
            samples = 1 if name == "instance" else x.shape[0]
            channels = width // options["num_groups"] if name == "group" else 1
            if samples * channels * size[0] * size[1] * size[2] == 1:
                raise ValueError(
                    f"a volume of {tuple(x.shape[2:])} shrinks to a single value per {name} norm: "
                    "give a larger volume, more of them, or use fewer levels"
                )
            size = tuple(s // 2 if config["downsample"] == "max_pool" else (s + 1) // 2 for s in size)


# --- checkpoints of the published code ---


def _is_tensors(candidate: Any) -> bool:
    return (
        isinstance(candidate, Mapping)
        and len(candidate) > 0
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in candidate.items())
    )


def _find_state_dict(candidate: Any, source: str) -> Mapping[str, Tensor]:
    """The mapping of names to tensors in a checkpoint, at its top or below one of the usual keys."""
    if _is_tensors(candidate):
        return candidate
    if isinstance(candidate, Mapping):
        for key in ("state_dict", "model_state_dict", "model_state", "model", "network", "net", "weights"):
            if isinstance(candidate.get(key), Mapping):
                return _find_state_dict(candidate[key], source)
        held = "a mapping with " + (", ".join(map(repr, list(candidate)[:5])) or "nothing")
    else:
        held = type(candidate).__name__
    raise ValueError(f"{source} holds {held}, but a state_dict of tensors is needed: save model.state_dict()")


def _read_checkpoint(path: str | os.PathLike) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, or is no checkpoint, and is not unpickled because that could "
            "run code of its own: where it came from, write it with torch.save(model.state_dict(), path)"
        ) from error
    except (RuntimeError, EOFError, KeyError) as error:
        raise ValueError(
            f"{path} cannot be read as a PyTorch checkpoint ({type(error).__name__}), perhaps truncated: copy it again"
        ) from error


def _load_strictly(model: RSANet, tensors: Mapping[str, Tensor], source: str) -> None:
    """Makes the tensors the parameters of a model that was made on the meta device."""
    wanted = model.state_dict()
    problems = []
    if missing := [key for key in wanted if key not in tensors]:
        problems.append(f"{len(missing)} missing (first {missing[0]})")
    if unknown := [key for key in tensors if key not in wanted]:
        problems.append(f"{len(unknown)} unknown (first {unknown[0]})")
    for key, parameter in wanted.items():
        if key in tensors and tensors[key].shape != parameter.shape:
            given, needed = tuple(tensors[key].shape), tuple(parameter.shape)
            problems.append(f"{key} of shape {given} instead of {needed}")
            break
        if key in tensors and tensors[key].is_floating_point() != parameter.is_floating_point():
            problems.append(f"{key} of {tensors[key].dtype}")
            break
    if problems:
        raise ValueError(
            f"{source} does not fit this network: parameters {', '.join(problems)}; give the arguments it was made with"
        )
    # A copy, in the layout of a fresh parameter: neither the caller's tensors nor a mapped file stay attached.
    model.load_state_dict(
        {key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()},
        assign=True,
    )


def _infer_arguments(tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The arguments of ``RSANet`` that published parameters tell; None if they are not such parameters."""
    kernels = {key: tensor for key, tensor in tensors.items() if tensor.dim() == 5}
    levels = itertools.takewhile(lambda level: f"conv{level}.layer.layer.0.conv.weight" in kernels, itertools.count(1))
    stages = [*(f"conv{level}" for level in levels), "center"]
    needed = ["init_conv.weight", "final.1.weight", *(f"{stage}.layer.layer.0.conv.weight" for stage in stages)]
    if not all(key in kernels for key in needed):
        return None
    return {
        "in_channels": kernels["init_conv.weight"].shape[1],
        "out_channels": kernels["final.1.weight"].shape[0],
        "channels": [kernels[f"{stage}.layer.layer.0.conv.weight"].shape[0] for stage in stages],
        "attention": "rsa" if any(key.startswith("rsa_block.") for key in tensors) else None,
    }


def load_reference_checkpoint(path_or_state_dict: str | os.PathLike | Mapping[str, Any], **overrides: Any) -> RSANet:
    """Makes the network of a checkpoint that the published code has saved.

    Input and output channels, widths, and whether there is an RSA block are read off the tensors. Nothing
    but tensors is unpickled. A state_dict inside a larger checkpoint (``"state_dict"``,
    ``"model_state_dict"``, ...) and a common prefix of its keys (``"module."``) are found.

    Args:
        path_or_state_dict: a file, or what ``torch.load`` returned for it.
        **overrides: arguments of ``RSANet`` that tensors do not tell, for example ``norm`` or ``backend``.

    Returns:
        The network, in evaluation mode, in the dtype of the checkpoint.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If it is neither a path nor a mapping.
        ValueError: If it is not such a checkpoint.
    """
    if isinstance(path_or_state_dict, Mapping):
        source, checkpoint = "the mapping", path_or_state_dict
    elif isinstance(path_or_state_dict, str | os.PathLike):
        source = os.fspath(path_or_state_dict)
        if not os.path.isfile(source):
            raise FileNotFoundError(f"there is no file {source}: give the path of a checkpoint")
        checkpoint = _read_checkpoint(source)
    else:
        raise TypeError(f"{type(path_or_state_dict).__name__} is no checkpoint: give a path or a state_dict")
    found = _find_state_dict(checkpoint, source)

    first = next((key for key in found if key.endswith("init_conv.weight")), "")
    prefix = first.removesuffix("init_conv.weight")
    tensors = {key.removeprefix(prefix): tensor for key, tensor in found.items()}
    inferred = _infer_arguments(tensors)
    if inferred is None:
        raise ValueError(
            f"{source} has no layers init_conv, conv1, ..., center and final (its first key is "
            f"{next(iter(found))!r}): give a checkpoint of the published RSANet"
        )
    with torch.device("meta"):
        model = RSANet(**{**inferred, **overrides})
    _load_strictly(model, tensors, source)
    return model.eval()


# --- model files: weights and the configuration that rebuilds their network ---


def _require_safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "model files need the package safetensors, which is not installed: pip install 'rsanet[segment]'"
        ) from error
    return safetensors


def save_model(model: RSANet, path: str | os.PathLike, extra: Mapping[str, Any] | None = None) -> None:
    """Writes a model file: weights and configuration, so that the file alone rebuilds its network.

    The file appears whole or not at all: it is written beside ``path`` and renamed.

    Args:
        model: the network; one wrapped by ``torch.compile`` or ``DistributedDataParallel`` is unwrapped.
        path: the file to write, usually ``*.safetensors``.
        extra: anything in JSON types that belongs to the model; ``model.extra`` by default.

    Raises:
        ImportError: If safetensors is not installed.
        TypeError: If ``model`` is no ``RSANet``, or ``extra`` is not of JSON types.
        ValueError: If submodules were added, so that the configuration does not describe the network.
    """
    safetensors = _require_safetensors()
    while not isinstance(model, RSANet):
        inner = getattr(model, "_orig_mod", getattr(model, "module", None))
        if not isinstance(inner, nn.Module):
            raise TypeError(f"save_model saves an RSANet, not {type(model).__name__}: give an RSANet")
        model = inner
    tensors = model.state_dict()
    with torch.device("meta"):
        described = RSANet(**model.config).state_dict()
    if changed := sorted(set(tensors) ^ set(described)):
        raise ValueError(
            f"the network no longer is what its configuration says (first difference: {changed[0]}): "
            "use torch.save for the state_dict of a network with inserted modules"
        )
    try:
        described_extra = json.dumps(dict(model.extra if extra is None else extra), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"extra cannot be JSON ({error}): use strings, numbers, lists and dicts") from error
    metadata = {
        "format": "pt",
        FORMAT_KEY: FORMAT,
        CONFIG_KEY: json.dumps(model.config),
        EXTRA_KEY: described_extra,
    }
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        safetensors.torch.save_file(
            {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, partial, metadata
        )
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_model(path: str | os.PathLike, *, recompute: bool = False, backend: str | None = None) -> RSANet:
    """Rebuilds the network of a model file.

    The file is not trusted: it is data, and its configuration goes through the checks of the constructor.
    Memory is taken only for tensors that the file holds.

    Args:
        path: a file that ``save_model`` wrote.
        recompute: see ``RSABlock``.
        backend: see ``RSABlock``.

    Returns:
        The network on the CPU, in evaluation mode, in the dtype it was saved in, with its ``config`` and
        ``extra``.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If safetensors is not installed.
        ValueError: If the file is broken, or is no model file.
    """
    safetensors = _require_safetensors()
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}: give the path of a model file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is no safetensors file, or a truncated one ({error}): copy it again, or save it again"
        ) from error
    if FORMAT_KEY not in metadata or CONFIG_KEY not in metadata:
        raise ValueError(f"{path} has no RSANet configuration inside: give a file that save_model wrote")
    if metadata[FORMAT_KEY] != FORMAT:
        raise ValueError(
            f"{path} has format {metadata[FORMAT_KEY]!r}, and this version reads {FORMAT!r}: "
            "install the version that wrote it"
        )
    try:
        config = json.loads(metadata[CONFIG_KEY])
        extra = json.loads(metadata.get(EXTRA_KEY, "{}"))
        if not isinstance(config, dict) or not isinstance(extra, dict):
            raise TypeError("they are not JSON objects")
        with torch.device("meta"):
            model = RSANet(**config, recompute=recompute, backend=backend)
    except (TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise ValueError(f"{path} has an unusable configuration ({error}): save the model again") from error
    _load_strictly(model, tensors, os.fspath(path))
    model.extra = extra
    return model.eval()
