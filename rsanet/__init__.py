"""Recurrent slice-wise attention for 3-D medical images: modules and networks. Imports with torch alone."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rsanet.attention import NonLocalBlock, RSABlock, SABlock
    from rsanet.checkpoints import load_model, load_reference_checkpoint, save_model
    from rsanet.insertion import insert_rsa, remove_rsa
    from rsanet.network import RSANet
    from rsanet.sharding import prepare_for_sharding

__version__ = "0.1.0"  # the one place: pyproject.toml takes it from here

__all__ = [
    "NonLocalBlock",
    "RSABlock",
    "RSANet",
    "SABlock",
    "insert_rsa",
    "load_model",
    "load_reference_checkpoint",
    "prepare_for_sharding",
    "remove_rsa",
    "save_model",
]

# Loaded on first use: `rsanet --help` imports this package and has no time for torch.
_MODULES = dict.fromkeys(("NonLocalBlock", "RSABlock", "SABlock"), "rsanet.attention")
_MODULES |= dict.fromkeys(("insert_rsa", "remove_rsa"), "rsanet.insertion")
_MODULES |= dict.fromkeys(("load_model", "load_reference_checkpoint", "save_model"), "rsanet.checkpoints")
_MODULES |= {"RSANet": "rsanet.network", "prepare_for_sharding": "rsanet.sharding"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'rsanet' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
