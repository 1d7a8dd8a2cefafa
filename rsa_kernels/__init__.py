"""Slice-wise attention for 3-D volumes: the attention core of RSANet, exact and fast. Needs torch alone."""

from rsa_kernels.api import explain, recurrent_slice_attention, slice_attention
from rsa_kernels.backends import available_backends, use_backend

__all__ = [
    "available_backends",
    "explain",
    "recurrent_slice_attention",
    "slice_attention",
    "use_backend",
]
