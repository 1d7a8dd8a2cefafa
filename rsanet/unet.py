"""The building blocks of a 3-D U-Net: convolution blocks, downsampling, upsampling.

Convolutions have no bias, because a norm follows them. Attribute names (``layer.layer.0.conv``, ``down``,
``up.up.0``) are those of the published network's state_dict.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rsa_kernels import group_norm
from rsanet.convolution import Conv3d, conv3d, is_traced

Norm = str | Sequence[Any]

NORM_OPTIONS = {
    "group": ("num_groups", "eps", "affine"),
    "batch": ("eps", "momentum", "affine", "track_running_stats"),
    "instance": ("eps", "momentum", "affine", "track_running_stats"),
}
OPTION_TYPES = {
    "num_groups": int,
    "eps": float,
    "momentum": float,
    "affine": bool,
    "track_running_stats": bool,
}


def parse_norm(norm: Norm) -> tuple[str, dict[str, Any]]:
    """Reads a norm given as MONAI does, a name or a pair of name and options, into the pair.

    Raises:
        TypeError: If it is neither.
        ValueError: If the name or an option is unknown, or if the number of groups is missing.
    """
    if isinstance(norm, str):
        name, options = norm, {}
    elif isinstance(norm, Sequence) and len(norm) == 2 and isinstance(norm[0], str) and isinstance(norm[1], dict):
        name, options = norm[0], dict(norm[1])
    else:
        raise TypeError(f"norm is {norm!r}: give a name or a pair like ('group', {{'num_groups': 8}})")
    name = name.lower()
    if name not in NORM_OPTIONS:
        raise ValueError(f"norm {name!r} is unknown: use one of {list(NORM_OPTIONS)}")
    for option, value in options.items():
        if option not in NORM_OPTIONS[name]:
            raise ValueError(f"norm {name!r} has no option {option!r}: use {list(NORM_OPTIONS[name])}")
        if type(value) is not OPTION_TYPES[option]:
            raise TypeError(f"option {option!r} of norm {name!r} is {value!r}: give {OPTION_TYPES[option].__name__}")
    if name == "group" and options.get("num_groups", 0) < 1:
        raise ValueError("norm 'group' needs a positive num_groups: write ('group', {'num_groups': 8})")
    return name, options


# Voxels whose outputs `narrow_conv` computes at once, and the most outputs of a voxel for which it is faster.
NEIGHBOURS, MOST_NARROW = 4, 4


class GroupNorm(nn.GroupNorm):
    """Group norm with paths of its own for channels-last volumes.

    On a GPU PyTorch's own makes them contiguous: a network in channels_last_3d would be rearranged around every norm,
    and around attention. On a CPU it is coarse in float32, and its backward pass is slow and not to be relied on. It
    never sees them: where the C++ extension cannot run, PyTorch's other operations compute the same.
    """

    def forward(self, x: Tensor, relu: bool = False, inplace: bool = False) -> Tensor:
        """The norm, and its ReLU if asked for.

        Args:
            x: ``(N, C, D, H, W)``.
            relu: whether negative values become zero.
            inplace: whether the result may take the place of ``x`` where no gradient is recorded.

        Returns:
            The shape and memory format of ``x``.
        """
        if group_norm.can_run(x, self.weight, self.bias):
            options = {"relu": relu, "inplace": inplace}
            return group_norm.group_norm(x, self.num_groups, self.weight, self.bias, self.eps, **options)
        if x.dim() != 5:
            x = super().forward(x.contiguous())
        elif may_be_channels_last(x):
            x = group_norm_channels_last(x, self.num_groups, self.weight, self.bias, self.eps)
        else:
            x = super().forward(x)
        return F.relu(x, inplace=True) if relu else x


def may_be_channels_last(x: Tensor) -> bool:
    """Whether PyTorch's own group norm could take a volume for one in channels_last_3d."""
    if is_traced():
        return x.is_contiguous(memory_format=torch.channels_last_3d) or not x.is_contiguous()
    if torch._C._are_functorch_transforms_active():  # vmap does not answer
        return True
    return len(x) > 0 and (x.is_contiguous(memory_format=torch.channels_last_3d) or not x.is_contiguous())


def group_norm_channels_last(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """``torch.nn.functional.group_norm`` in operations that keep channels_last_3d and the dtype; moments in float32.

    Args:
        x: ``(N, C, D, H, W)``, best in channels_last_3d; other strides are right, too.
        num_groups: number of groups of channels.
        weight: ``(C,)`` or None.
        bias: ``(C,)`` or None.
        eps: added to the variance.

    Returns:
        The shape, dtype and memory format of ``x``.
    """
    channels = x.shape[1]
    with torch.autocast(x.device.type, enabled=False):
        dtype = x.dtype
        x = x.to(torch.promote_types(dtype, torch.float32))
        grouped = x.permute(0, 2, 3, 4, 1).flatten(1, 3).unflatten(2, (num_groups, -1))
        variance, mean = torch.var_mean(grouped, (1, 3), correction=0)
        scale = torch.rsqrt(variance + eps).repeat_interleave(channels // num_groups, 1)
        if weight is not None:
            scale = scale * weight.to(x.dtype)
        shift = -mean.repeat_interleave(channels // num_groups, 1) * scale
        if bias is not None:
            shift = shift + bias.to(x.dtype)
        scale, shift = (part[:, :, None, None, None] for part in (scale, shift))
        return torch.addcmul(shift, x, scale).to(dtype)


def make_norm(norm: Norm, channels: int) -> nn.Module:
    """A normalisation layer for ``channels`` channels.

    Raises:
        ValueError: If the channels cannot be split into the groups asked for.
    """
    name, options = parse_norm(norm)
    if name == "batch":
        return nn.BatchNorm3d(channels, **options)
    if name == "instance":
        return nn.InstanceNorm3d(channels, **options)
    groups = options["num_groups"]
    if channels % groups:
        raise ValueError(
            f"{channels} channels cannot be split into {groups} groups: "
            "choose widths that the number of groups divides, or another norm"
        )
    return GroupNorm(num_channels=channels, **options)


def is_hooked(*modules: nn.Module) -> bool:
    """Whether someone watches or changes what goes in or out of any of them."""
    return any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
        for module in modules
    )


def is_untouched(conv: nn.Module, size: int) -> bool:
    """Whether a module is a convolution of ``size`` without bias that nobody replaced, parametrized or put hooks on.

    Only such a convolution may be computed by its weight alone, without a call of the module.
    """
    if type(conv) not in (Conv3d, nn.Conv3d) or conv.kernel_size != (size,) * 3 or conv.bias is not None:
        return False
    return not is_hooked(conv)


def normalize(norm: nn.Module, x: Tensor, relu: bool, inplace: bool = False) -> Tensor:
    """A norm, and its ReLU if asked for: in one pass where nobody watches the norm.

    Args:
        norm: any normalisation layer.
        x: ``(N, C, D, H, W)``.
        relu: whether negative values become zero.
        inplace: whether the result may take the place of ``x``.
    """
    if type(norm) is GroupNorm and not is_hooked(norm):
        return norm(x, relu, inplace)
    x = norm(x)
    # What a hook saw or gave must stay as it is.
    return F.relu(x, inplace=not is_hooked(norm)) if relu else x


class ConvPair(nn.Sequential):
    """A 3x3x3 and a 1x1x1 convolution, both without bias, computed as the one 3x3x3 convolution that they are."""

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in, D, H, W)`` to ``(N, out, D, H, W)``."""
        if len(self) != 2 or not (is_untouched(self[0], 3) and is_untouched(self[1], 1)):
            return super().forward(x)
        # The product of the weights is rounded once, when autocast casts it for the convolution.
        with torch.autocast(x.device.type, enabled=False):
            weight = torch.einsum("om,micde->oicde", self[1].weight[:, :, 0, 0, 0], self[0].weight)
        # In bfloat16, oneDNN 3.12 with AMX computes wrong results of a strided convolution of one slice, or to width 1.
        if (
            is_traced()
            or x.device.type != "cpu"
            or len(weight) > MOST_NARROW
            or x.shape[2] == 1
            or x.shape[4] % NEIGHBOURS
            or x.shape[4] == NEIGHBOURS
        ):
            return conv3d(x, weight, padding=(1, 1, 1))
        return narrow_conv(x, weight)


def narrow_conv(x: Tensor, weight: Tensor) -> Tensor:
    """``conv3d(x, weight, padding=1)`` with several neighbouring voxels at once.

    A CPU computes sixteen output channels in the time of two. Here the outputs of four voxels are the channels, under
    weights that are shifted from one to the next.

    Args:
        x: ``(N, in, D, H, W)``, ``W`` a multiple of ``NEIGHBOURS``.
        weight: ``(out, in, 3, 3, 3)``.

    Returns:
        ``(N, out, D, H, W)``.
    """
    out = weight.shape[0]
    shifted = [F.pad(weight, (place, NEIGHBOURS - 1 - place)) for place in range(NEIGHBOURS)]
    x = conv3d(x, torch.cat(shifted), padding=(1, 1, 1), stride=(1, 1, NEIGHBOURS))
    return x.unflatten(1, (NEIGHBOURS, out)).permute(0, 2, 3, 4, 5, 1).flatten(4)


def conv_of_upsampled(x: Tensor, weight: Tensor) -> Tensor:
    """``conv3d(interpolate(x, scale_factor=2), weight, padding=1)`` without the upsampled volume.

    Each voxel of it is seen through up to 27 weights, but of a nearest-neighbour upsampling only 8 voxels differ
    there. As a transposed convolution of stride 2 it takes 64 products per voxel of ``x`` instead of 216.

    Args:
        x: ``(N, in, D, H, W)``.
        weight: ``(out, in, 3, 3, 3)``.

    Returns:
        ``(N, out, 2D, 2H, 2W)``.
    """
    # A voxel of x reaches the 4x4x4 voxels around its 2x2x2 copies, through the sum of their 8 flipped kernels.
    dtype = torch.promote_types(weight.dtype, torch.float32)
    line = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]], dtype=dtype, device=weight.device)
    copies = torch.kron(line, torch.kron(line, line))
    with torch.autocast(x.device.type, enabled=False):
        # In the order of channels_last_3d, in which the convolution wants it: 27 weights are turned around, not 64.
        kernel = (copies.T @ weight.permute(1, 2, 3, 4, 0).flatten(1, 3).to(dtype)).to(weight.dtype)
    return F.conv_transpose3d(x, kernel.unflatten(1, (4, 4, 4)).permute(0, 4, 1, 2, 3), stride=2, padding=1)


class ConvUnit(nn.Module):
    """3x3x3 convolution, norm and ReLU.

    Args:
        in_channels: channels in.
        out_channels: channels out.
        norm: see ``parse_norm``.
        stride: of the convolution.
        order: ``"conv-norm-relu"``, ``"conv-norm"`` or ``"norm-relu-conv"``.
    """

    def __init__(
        self, in_channels: int, out_channels: int, norm: Norm, stride: int = 1, order: str = "conv-norm-relu"
    ) -> None:
        super().__init__()
        self.order = order
        self.conv = Conv3d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm = make_norm(norm, in_channels if order == "norm-relu-conv" else out_channels)

    @property
    def takes_parts(self) -> bool:
        """Whether ``forward`` can be given ``below``."""
        return self.order != "norm-relu-conv" and is_untouched(self.conv, 3)

    def forward(self, x: Tensor, below: Tensor | None = None) -> Tensor:
        """Applies the three in their order.

        Args:
            x: ``(N, in, D, H, W)``, or the first channels of it.
            below: ``(N, rest, D/2, H/2, W/2)``, whose nearest-neighbour upsampling is the other channels.
        """
        if self.order == "norm-relu-conv":
            return self.conv(normalize(self.norm, x, relu=True))
        if below is None:
            x = self.conv(x)
        else:
            of_x, of_below = self.conv.weight.split([x.shape[1], below.shape[1]], 1)
            x = conv3d(x, of_x, padding=(1, 1, 1)).add_(conv_of_upsampled(below, of_below))
        # What the convolution made belongs to nobody else.
        return normalize(self.norm, x, self.order == "conv-norm-relu", inplace=is_untouched(self.conv, 3))


# Dropout drops whole feature maps (neighbouring voxels are too alike for dropping single ones to
# regularise) and stands between the two convolutions, as in wide residual networks: what leaves a block,
# the input of skip connections and of attention with its unscaled logits, is never thinned out.


class PlainBlock(nn.Module):
    """Two convolutions, one after the other."""

    def __init__(self, in_channels: int, out_channels: int, norm: Norm, dropout: float = 0.0) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            ConvUnit(in_channels, out_channels, norm), ConvUnit(out_channels, out_channels, norm)
        )
        self.dropout = nn.Dropout3d(dropout)

    @property
    def takes_parts(self) -> bool:
        """See ``ConvUnit``."""
        return getattr(self.layer[0], "takes_parts", False)

    def forward(self, x: Tensor, *below: Tensor) -> Tensor:
        """``(N, in, D, H, W)``, or its parts as ``ConvUnit`` takes them, to ``(N, out, D, H, W)``."""
        return self.layer[1](self.dropout(self.layer[0](x, *below)))


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut around them, activated after the sum (He et al., CVPR 2016)."""

    def __init__(self, in_channels: int, out_channels: int, norm: Norm, dropout: float = 0.0, stride: int = 1) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            ConvUnit(in_channels, out_channels, norm, stride),
            ConvUnit(out_channels, out_channels, norm, order="conv-norm"),
        )
        self.dropout = nn.Dropout3d(dropout)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                Conv3d(in_channels, out_channels, 1, stride=stride, bias=False),
                make_norm(norm, out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in, D, H, W)`` to ``(N, out, ...)``, halved (rounded up) with stride 2."""
        return F.relu(self.layer[1](self.dropout(self.layer[0](x))) + self.shortcut(x))


class PreActivationBlock(nn.Module):
    """Two convolutions, each after its norm and activation, and a shortcut (He et al., ECCV 2016)."""

    def __init__(self, in_channels: int, out_channels: int, norm: Norm, dropout: float = 0.0) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            ConvUnit(in_channels, out_channels, norm, order="norm-relu-conv"),
            ConvUnit(out_channels, out_channels, norm, order="norm-relu-conv"),
        )
        self.dropout = nn.Dropout3d(dropout)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = Conv3d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in, D, H, W)`` to ``(N, out, D, H, W)``."""
        return self.layer[1](self.dropout(self.layer[0](x))) + self.shortcut(x)


BLOCKS = {"plain": PlainBlock, "residual": ResidualBlock, "pre_activation": PreActivationBlock}
DOWNSAMPLINGS = ("conv", "residual", "max_pool")
UPSAMPLINGS = ("nearest", "trilinear", "transposed")

# Voxels of the lower level, the whole batch's, from about which on a CPU convolves skip connection and upsampled volume
# faster apart. With fewer, making the larger kernel takes longer than it saves: both grow alike with the width.
FEWEST_VOXELS = 256


class ConvBlock(nn.Module):
    """The convolutions of one level, of the kind asked for.

    Args:
        in_channels: channels in.
        out_channels: channels out.
        norm: see ``parse_norm``.
        kind: a key of ``BLOCKS``.
        dropout: probability of dropping a feature map between the two convolutions.
    """

    def __init__(
        self, in_channels: int, out_channels: int, norm: Norm, kind: str = "plain", dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.layer = BLOCKS[kind](in_channels, out_channels, norm, dropout)

    @property
    def takes_parts(self) -> bool:
        """See ``ConvUnit``."""
        return getattr(self.layer, "takes_parts", False)

    def forward(self, x: Tensor, *below: Tensor) -> Tensor:
        """``(N, in, D, H, W)``, or its parts as ``ConvUnit`` takes them, to ``(N, out, D, H, W)``."""
        return self.layer(x, *below)


class Downsample(nn.Module):
    """Halves every spatial size: rounded up by the convolutions, rounded down by the max-pool.

    Args:
        channels: channels in and out.
        norm: see ``parse_norm``; only the residual kind has norms.
        kind: one of ``DOWNSAMPLINGS``.
    """

    def __init__(self, channels: int, norm: Norm, kind: str = "conv") -> None:
        super().__init__()
        self.down: nn.Module
        if kind == "conv":
            self.down = Conv3d(channels, channels, 3, stride=2, padding=1, bias=False)
        elif kind == "residual":
            self.down = ResidualBlock(channels, channels, norm, stride=2)
        else:
            self.down = nn.MaxPool3d(2)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, D, H, W)`` to ``(N, C, D/2, H/2, W/2)``."""
        return self.down(x)


class Upsample(nn.Module):
    """Doubles every spatial size and changes the number of channels.

    Args:
        in_channels: channels in.
        out_channels: channels out.
        kind: one of ``UPSAMPLINGS``.
    """

    def __init__(self, in_channels: int, out_channels: int, kind: str = "nearest") -> None:
        super().__init__()
        if kind == "transposed":
            self.up = nn.Sequential(nn.ConvTranspose3d(in_channels, out_channels, 2, stride=2, bias=False))
        else:
            # A 1x1x1 convolution commutes with interpolation; before it, it has an eighth of the voxels to
            # do.
            self.up = nn.Sequential(
                Conv3d(in_channels, out_channels, 1, bias=False), nn.Upsample(scale_factor=2, mode=kind)
            )

    @property
    def ends_in_copies(self) -> bool:
        """Whether its last step is a nearest-neighbour upsampling that nobody replaced or put hooks on."""
        if type(self.up) is not nn.Sequential or type(self.up[-1]) is not nn.Upsample or self.up[-1].mode != "nearest":
            return False
        return not is_hooked(self, self.up, self.up[-1])

    def before_copies(self, x: Tensor) -> Tensor:
        """``(N, in, D, H, W)`` to ``(N, out, D, H, W)``: all but the last step."""
        return self.up[:-1](x)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in, D, H, W)`` to ``(N, out, 2D, 2H, 2W)``."""
        return self.up(x)


def pad_or_crop(x: Tensor, size: Sequence[int], pad: bool) -> Tensor:
    """Brings an upsampled volume back to the size it had before downsampling, as the published network does.

    Sizes differ by one voxel at most. A volume that is too large loses its first slice; one that is too
    small gains a slice of zeros at its end.

    Args:
        x: ``(N, C, D, H, W)``.
        size: the spatial size wanted.
        pad: whether x is at most too small; otherwise it is at most too large. Known from the network, not
            from the volume, so that a graph needs no case distinction between odd and even sizes.

    Returns:
        ``(N, C, *size)``.
    """
    depth, height, width = size
    if pad:
        x = F.pad(x, (0, width - x.shape[4], 0, height - x.shape[3], 0, depth - x.shape[2]))
    elif torch.compiler.is_exporting():
        # Bounds of slices are conditions on the size: with them, an exported graph holds for odd or for even
        # sizes, not for both.
        for dim, wanted in enumerate(size, start=2):
            x = x.index_select(dim, torch.arange(x.shape[dim] - wanted, x.shape[dim], device=x.device))
    else:
        x = x[:, :, -depth:, -height:, -width:]
    return x


class UpConcat(nn.Module):
    """One level of the decoder: upsample, concatenate behind the skip connection, convolve.

    Args:
        in_channels: channels of the level below.
        out_channels: channels of this level, and of its skip connection.
        norm: see ``parse_norm``.
        block: kind of the convolution block, a key of ``BLOCKS``.
        dropout: see ``ConvBlock``.
        upsample: one of ``UPSAMPLINGS``.
        pad: whether the upsampled volume can be smaller than the skip connection.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: Norm,
        block: str = "plain",
        dropout: float = 0.0,
        upsample: str = "nearest",
        pad: bool = False,
    ) -> None:
        super().__init__()
        self.pad = pad
        self.up = Upsample(in_channels, out_channels, upsample)
        self.conv = ConvBlock(2 * out_channels, out_channels, norm, block, dropout)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Joins ``(N, in, ...)`` from below and the skip connection ``(N, out, D, H, W)``."""
        if self.can_split(x.device, x.shape[0], x.shape[2:], skip.shape[2:]):
            return self.conv(skip, self.up.before_copies(x))
        x = pad_or_crop(self.up(x), skip.shape[2:], self.pad)
        return self.conv(torch.cat([skip, x], dim=1))

    def can_split(self, device: torch.device, batch: int, below: Sequence[int], size: Sequence[int]) -> bool:
        """Whether its two inputs can be convolved apart: the same function in fewer operations, nothing concatenated.

        Args:
            device: of the inputs.
            batch: of the inputs.
            below: spatial size of the level below.
            size: of this level.
        """
        if device.type != "cpu" or is_traced():
            # It is faster on a CPU; on a GPU it was never measured.
            return False
        if batch * math.prod(below) < FEWEST_VOXELS or tuple(size) != tuple(2 * length for length in below):
            return False
        if 1 in below[1:]:
            # In bfloat16, oneDNN 3.12 writes the weight's gradient of the transposed convolution of a volume of
            # height 1 out of its bounds, and with AMX computes wrong gradients of a volume of width 1.
            return False
        return type(self.up) is Upsample and self.up.ends_in_copies and getattr(self.conv, "takes_parts", False)
