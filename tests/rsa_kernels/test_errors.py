"""Bad input gets one sentence: what was given, what is wanted."""

import pytest
import torch
from support import random_block, random_volume

from rsa_kernels import explain, recurrent_slice_attention, slice_attention


def block(**changes):
    names = ("theta_weight", "theta_bias", "phi_weight", "phi_bias", "g_weight", "g_bias", "betas")
    arguments = {"x": random_volume((1, 4, 3, 2, 5)), **dict(zip(names, random_block(4), strict=True)), **changes}
    return recurrent_slice_attention(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"x": "volume"}, TypeError, r"x is a str, but must be a tensor \(N, C, D, H, W\)"),
        ({"x": torch.ones(4, 3, 2, 5)}, ValueError, r"x has shape \(4, 3, 2, 5\), but must have five dims"),
        (
            {"x": torch.ones(1, 4, 3, 2, 5, dtype=torch.int32)},
            TypeError,
            r"x has dtype torch.int32, but must be float64",
        ),
        ({"x": torch.ones(1, 4, 0, 2, 5)}, ValueError, r"x has shape \(1, 4, 0, 2, 5\), but no dim may be empty"),
        ({"g_weight": None}, TypeError, r"g_weight is a NoneType, but must be a tensor"),
        (
            {"g_weight": torch.ones(4, 3)},
            ValueError,
            r"g_weight has shape \(4, 3\), but must have \(4, 4\) or \(4, 4, 1, 1, 1\)",
        ),
        ({"phi_bias": torch.ones(3)}, ValueError, r"phi_bias has shape \(3,\), but must have \(4,\), one per channel"),
        (
            {"theta_bias": torch.ones(4).half()},
            TypeError,
            r"theta_bias has dtype torch.float16, but must have that of x",
        ),
        (
            {"theta_weight": torch.ones(4, 4, device="meta")},
            ValueError,
            r"theta_weight has device meta, but must have that",
        ),
        (
            {"betas": torch.ones(2)},
            ValueError,
            r"betas has shape \(2,\), but axes has 3 entries: give one beta per axis",
        ),
        ({"betas": [torch.ones(())]}, ValueError, r"betas has 1 entries, but axes has 3"),
        ({"betas": [torch.ones(2)] * 3}, ValueError, r"betas\[0\] has shape \(2,\), but must be a scalar tensor"),
        ({"betas": [0.5] * 3}, TypeError, r"betas\[0\] is a float, but must be a tensor"),
        ({"betas": 0.5}, TypeError, r"betas is 0.5, but must be a sequence with one entry per step"),
        ({"axes": ()}, ValueError, r"axes is empty, but must name at least one axis"),
        ({"axes": "axial"}, TypeError, r"axes is 'axial', but must be a sequence"),
        ({"axes": (3, 4, 1)}, ValueError, r"axis is 1, but must be 2 or 'axial', 3 or 'coronal', 4 or 'sagittal'"),
        ({"axes": (3, 4, "transverse")}, ValueError, r"axis is 'transverse', but must be 2 or 'axial'"),
        ({"axes": (3, 4, True)}, ValueError, r"axis is True, but must be"),
        ({"axes": {2, 3, 4}}, TypeError, r"axes is \{2, 3, 4\}, but must be a sequence"),
        ({"axes": torch.tensor(3)}, TypeError, r"axes is tensor\(3\), but must be a sequence"),
        ({"betas": torch.ones(3).half()}, TypeError, r"betas has dtype torch.float16, but must have that of x"),
        ({"g_bias": torch.ones(4, device="meta").half()}, TypeError, r"g_bias has dtype torch.float16, but must have"),
        ({"scale": "0.5"}, TypeError, r"scale is '0.5', but must be a number"),
        ({"scale": torch.ones(())}, TypeError, r"scale is tensor\(1.\), but must be a number"),
        (
            {"x": torch.ones(1, 4, 3, 2, 5).to_sparse()},
            TypeError,
            r"x has layout torch.sparse_coo, but must be a dense",
        ),
        ({"backend": ["torch"]}, ValueError, r"backend is \['torch'\], but must be one of"),
        (
            {"backend": "cudnn"},
            ValueError,
            r"backend is 'cudnn', but must be one of auto, triton, cuda, cpp, torch, reference",
        ),
    ],
)
def test_block(changes, error, sentence):
    with pytest.raises(error, match=sentence):
        block(**changes)


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"key": 3}, TypeError, r"key is a int, but must be a tensor"),
        (
            {"key": torch.ones(1, 4, 3, 2, 6)},
            ValueError,
            r"key has shape \(1, 4, 3, 2, 6\), but must have that of query",
        ),
        (
            {"value": torch.ones(1, 4, 3, 2, 5).half()},
            TypeError,
            r"value has dtype torch.float16, but must have that of query",
        ),
        ({"value": torch.ones(1, 4, 3, 2, 5, device="meta")}, ValueError, r"value has device meta"),
        ({"axis": 5}, ValueError, r"axis is 5, but must be"),
        ({"axis": None}, ValueError, r"axis is None, but must be"),
        ({"backend": ""}, ValueError, r"backend is '', but must be one of"),
    ],
)
def test_slice_attention(changes, error, sentence):
    volumes = {name: torch.ones(1, 4, 3, 2, 5) for name in ("query", "key", "value")}
    with pytest.raises(error, match=sentence):
        slice_attention(**{**volumes, "axis": 3, **changes})


def test_autocast_does_not_hide_wrong_dtypes():
    x = torch.ones(1, 4, 3, 2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match=r"g_weight has dtype torch.complex64, but must have that of x"):
            block(g_weight=torch.eye(4) + 0j)
        with pytest.raises(TypeError, match=r"value has dtype torch.float64, but must have that of query"):
            slice_attention(x, x.bfloat16(), x.double(), 2)


def test_explain():
    with pytest.raises(ValueError, match="axes is empty"):
        explain(torch.ones(1, 4, 3, 2, 5), ())
    with pytest.raises(TypeError, match="x is a list, but must be a tensor"):
        explain([1])
    with pytest.raises(ValueError, match="axis is 9, but must be"):
        explain(torch.ones(1, 4, 3, 2, 5), (9,))
