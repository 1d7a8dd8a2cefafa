"""docs/tutorials/plug-in.md, read as a user would: each block of Python after the one before it."""

import re
from pathlib import Path

import pytest
import torch
from torch import distributed

PAGE = Path(__file__).parents[2] / "docs" / "tutorials" / "plug-in.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="this build of torch has no gloo")


@pytest.mark.filterwarnings("ignore:.*onnx.*:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_the_page_runs_from_top_to_bottom(tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the page writes ONNX, and nothing here can run it")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        for number, block in enumerate(BLOCK.findall(PAGE.read_text())):
            exec(compile(block, f"block {number} of {PAGE.name}", "exec"), names)
    finally:
        distributed.destroy_process_group()
    assert names["report"].missing_keys
    assert all(".rsa_block." in key for key in names["report"].missing_keys)
    assert not names["report"].unexpected_keys
    assert [attention.shape for attention in names["maps"]] == [(1, 4, 4)] * 3
    assert "rsa_block" not in dict(names["network"].get_submodule("downsamples.1").named_children())
    assert names["place"].rsa_block.g_conv.weight_orig.grad is not None
    session = onnxruntime.InferenceSession("network.onnx")
    volume = torch.randn(1, 1, 7, 12, 8)
    (found,) = session.run(None, {"image": volume.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), names["small"](volume).detach(), rtol=1e-4, atol=1e-4)
    assert names["y"].grad_fn is not None
    assert {name: tuple(tensor.shape[1:]) for name, tensor in names["by_sample"].items()} == {
        name: tuple(tensor.shape) for name, tensor in names["model"].named_parameters()
    }
    assert all(len(tensor) == 4 for tensor in names["by_sample"].values())
