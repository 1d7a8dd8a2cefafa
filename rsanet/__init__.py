"""Recurrent slice-wise attention for 3-D medical images: modules and networks. Imports with torch alone."""

from rsanet.attention import NonLocalBlock, RSABlock, SABlock, insert_rsa
from rsanet.network import RSANet, load_model, load_reference_checkpoint, save_model

__all__ = [
    "NonLocalBlock",
    "RSABlock",
    "RSANet",
    "SABlock",
    "insert_rsa",
    "load_model",
    "load_reference_checkpoint",
    "save_model",
]
