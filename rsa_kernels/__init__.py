"""Slice-wise attention for 3-D volumes: the attention core of RSANet, exact and fast. Needs torch alone."""

from rsa_kernels.api import recurrent_slice_attention, slice_attention

__all__ = ["recurrent_slice_attention", "slice_attention"]
