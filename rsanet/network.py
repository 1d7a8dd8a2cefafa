"""RSANet: a 3-D U-Net with recurrent slice-wise attention."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rsanet.attention import DEFAULT_AXES, NonLocalBlock, RSABlock
from rsanet.configuration import PAPER_CONFIGURATIONS, check_configuration
from rsanet.convolution import Conv3d
from rsanet.unet import ConvBlock, ConvPair, Downsample, Norm, UpConcat


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

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If its value is impossible.
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
        self.init_conv = Conv3d(in_channels, widths[0], 3, padding=1, bias=False)
        for level in range(bottleneck):
            before = widths[max(level - 1, 0)]
            self.add_module(f"conv{level + 1}", ConvBlock(before, widths[level], norm, block, dropout))
            self.add_module(f"down{level + 1}", Downsample(widths[level], norm, downsample))
        self.center = ConvBlock(widths[-2], widths[-1], norm, block, dropout)
        pad = downsample == "max_pool"
        for level in reversed(range(bottleneck)):
            up = UpConcat(widths[level + 1], widths[level], norm, block, dropout, upsample, pad)
            self.add_module(f"up_concat{level + 1}", up)
        self.final = ConvPair(
            Conv3d(widths[0], widths[0], 3, padding=1, bias=False),
            Conv3d(widths[0], out_channels, 1, bias=False),
        )
        self.deep_heads = nn.ModuleList(
            Conv3d(width, out_channels, 1, bias=False) for width in widths[1:-1] if deep_supervision
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

    def reset_parameters(self) -> None:
        """Draws all parameters anew, as when the network was made: its attention blocks are the identity."""
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()

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
        if isinstance(x, torch.fx.Proxy):
            raise TypeError(
                "RSANet takes ways that depend on sizes, which torch.fx.symbolic_trace does not know: use torch.export"
            )
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"RSANet needs a floating-point tensor, got {kind}: convert the images first")
        if x.dim() != 5 or x.shape[1] != config["in_channels"] or 0 in x.shape[1:]:
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
