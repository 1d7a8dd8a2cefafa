"""What an ``RSANet`` can be: the checks of its arguments, and the networks that the paper names."""

from collections.abc import Collection, Sequence
from itertools import product
from typing import Any

from rsanet.attention import axis_name, finite_number, positive_int
from rsanet.unet import BLOCKS, DOWNSAMPLINGS, UPSAMPLINGS, Norm, make_norm, parse_norm

ATTENTIONS = ("rsa", "non_local")
MAX_LEVELS = 16  # a volume of 2^15 voxels a side; more is a slip

MAX_WIDTH = 2**16  # a convolution between two such levels takes half a terabyte


def one_of(name: str, value: Any, choices: Collection[str]) -> str:
    """``value`` if it is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {value!r}, which is unknown: use one of {list(choices)}")
    return value


def list_of(name: str, value: Any) -> list[Any]:
    """``value`` as a list, if it is a sequence and no string."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} is {value!r}, but must be a sequence: give a list or a tuple")
    return list(value)


def check_widths(channels: Any, norm: Norm) -> list[int]:
    """The widths of the levels, full resolution first."""
    widths = [positive_int("every width in channels", width) for width in list_of("channels", channels)]
    if not 2 <= len(widths) <= MAX_LEVELS:
        raise ValueError(
            f"channels has {len(widths)} widths, but a U-Net has 2 to {MAX_LEVELS} levels: give one per level"
        )
    if max(widths) > MAX_WIDTH:
        raise ValueError(f"channels has a width of {max(widths)}, but {MAX_WIDTH} is the most: give narrower levels")
    name, options = parse_norm(norm)
    if name == "group":
        for width in widths:
            make_norm(("group", {"num_groups": options["num_groups"]}), width)
    return widths


def check_dropout(dropout: Any) -> float:
    """A probability below one."""
    dropout = finite_number("dropout", dropout)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}, but must be at least 0 and below 1: give a probability")
    return dropout


def check_levels(name: str, levels: Any, depth: int, bottleneck: bool) -> list[int]:
    """Level numbers from 0, ascending; negative ones count from the bottleneck.

    Args:
        name: the argument's name, for the error message.
        levels: the levels given.
        depth: how many levels the network has.
        bottleneck: whether the bottleneck is one of the levels that can be named.
    """
    found = set()
    for level in list_of(name, levels):
        if isinstance(level, bool) or not isinstance(level, int):
            raise TypeError(f"{name} has {level!r}, but levels are ints: 0 is full resolution, -1 the bottleneck")
        if not -depth <= level < depth:
            raise ValueError(f"{name} has {level}, but the network has {depth} levels: use {-depth} to {depth - 1}")
        level %= depth
        if level == depth - 1 and not bottleneck:
            raise ValueError(f"{name} has the bottleneck, which is no decoder level: name it in attention_levels")
        if level in found:
            raise ValueError(f"{name} names level {level} twice: name each level once")
        found.add(level)
    return sorted(found)


def check_configuration(**given: Any) -> dict[str, Any]:
    """Checks the arguments that define the function of an ``RSANet`` and brings them into plain JSON types.

    Args:
        **given: every such argument of ``RSANet``.

    Returns:
        The same keys, with values that survive JSON and that ``RSANet`` accepts again.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If its value is impossible.
    """
    norm_name, norm_options = parse_norm(given["norm"])
    widths = check_widths(given["channels"], given["norm"])
    attention = given["attention"]
    if not isinstance(given["deep_supervision"], bool):
        raise TypeError(
            f"deep_supervision is {given['deep_supervision']!r}, but must be True or False: give one of them"
        )
    axes = [axis_name(axis) for axis in list_of("axes", given["axes"])]
    if not axes:
        raise ValueError("axes is empty, but attention needs at least one axis: use attention=None for no attention")
    return {
        "in_channels": positive_int("in_channels", given["in_channels"]),
        "out_channels": positive_int("out_channels", given["out_channels"]),
        "channels": widths,
        "norm": [norm_name, norm_options],
        "dropout": check_dropout(given["dropout"]),
        "attention": None if attention is None else one_of("attention", attention, ATTENTIONS),
        "attention_levels": check_levels("attention_levels", given["attention_levels"], len(widths), True),
        "decoder_attention_levels": check_levels(
            "decoder_attention_levels", given["decoder_attention_levels"], len(widths), False
        ),
        "axes": axes,
        "scale": finite_number("scale", given["scale"]),
        "block": one_of("block", given["block"], BLOCKS),
        "downsample": one_of("downsample", given["downsample"], DOWNSAMPLINGS),
        "upsample": one_of("upsample", given["upsample"], UPSAMPLINGS),
        "deep_supervision": given["deep_supervision"],
    }


def _paper_configurations() -> dict[str, dict[str, Any]]:
    configurations = {}
    for (family, attention), digits in product((("RSA", "rsa"), ("NCL", "non_local")), product((0, 1), repeat=3)):
        before, at, after = digits
        configurations[f"{family}-{before}{at}{after}"] = {
            "attention": attention if any(digits) else None,
            "attention_levels": (-2,) * before + (-1,) * at,
            "decoder_attention_levels": (-2,) * after,
        }
    return configurations


# The paper calls its networks RSA-111, NCL-010 and so on: RSA for recurrent slice-wise attention, NCL for
# non-local blocks, and 000 for the plain 3-D U-Net. Which three places the digits stand for is read here as
# before, at and after the bottleneck: on the last encoder level above it, on the bottleneck itself, on the
# first decoder level above it. The published code puts its one block at the bottleneck: RSA-010 in this
# reading, and the default of ``RSANet``.
PAPER_CONFIGURATIONS = _paper_configurations()
