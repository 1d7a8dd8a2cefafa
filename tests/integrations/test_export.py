import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from integrations.models import CONTRASTS, write_images, write_model

import rsanet as package
from rsa_kernels import ops, reference, use_backend
from rsanet import load_model, save_model
from rsanet.integrations import export as exports
from rsanet.integrations.description import describe
from rsanet.integrations.export import export
from rsanet.segment import predict, simulate
from rsanet.segment.checks import BINS, QUANTILES, summary
from rsanet.segment.data import preprocessing
from rsanet.segment.datasets import list_cases
from rsanet.segment.scenario import Scenario

PAGE = Path(__file__).parents[2] / "docs" / "export.md"
FOLDER = str(Path(package.__file__).parents[1]).encode()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "model.safetensors")


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """The model in each format, written once, by someone who prefers a backend."""
    folder = tmp_path_factory.mktemp("files")
    with use_backend("torch"):
        export(model, folder / "model.onnx")
        export(model, folder / "model.pt2")
        export(model, folder / "decomposed.pt2", decompose=True)
    return folder


@pytest.fixture(scope="module")
def least(files):
    """A model with so little in it that its compilation takes half a minute, not one."""
    return write_model(files / "least.safetensors", channels=(8, 8), axes=("axial",))


@pytest.fixture(scope="module")
def compiled(least, files):
    export(least, files / "compiled.pt2", "aoti")
    return files / "compiled.pt2"


def metadata_of(path):
    if path.suffix == ".onnx":
        return json.loads(onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map["rsanet"])
    extra = {"rsanet.json": ""}
    torch.export.load(path, extra_files=extra)
    return json.loads(extra["rsanet.json"])


def largest(found, wanted):
    return (torch.as_tensor(found) - wanted).abs().max().item()


def test_onnx_computes_a_simulated_patient_at_every_size(files, model, tmp_path):
    simulate(tmp_path / "cohort", 1, Scenario(spacing=(4.0, 4.0, 4.0), contrasts=CONTRASTS), seed=5)
    cases, _ = list_cases(tmp_path / "cohort", CONTRASTS)
    volume = preprocessing()(cases[0])["image"].as_tensor()[None].contiguous()
    session = onnxruntime.InferenceSession(files / "model.onnx")
    network = load_model(model)
    for size in ((30, 30, 30), (31, 24, 17), (16, 12, 20), (2, 33, 30), volume.shape[2:]):
        part = volume[:, :, : size[0], : size[1], : size[2]]
        assert part.shape[2:] == tuple(size)
        assert part.std() > 0.1
        (logits,) = session.run(None, {"image": part.numpy()})
        assert largest(logits, network(part)) < 1e-4 * network(part).abs().max()
    (logits,) = session.run(None, {"image": torch.cat([part, -part, part]).numpy()})
    assert logits.shape == (3, 2, *volume.shape[2:])


def test_the_onnx_file_is_sound_and_names_its_dims(files):
    written = onnx.load(files / "model.onnx")
    onnx.checker.check_model(written, full_check=True)
    assert [(entry.domain, entry.version) for entry in written.opset_import] == [("", 18)]
    for value, channels in zip((*written.graph.input, *written.graph.output), (2, 2), strict=True):
        dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        assert dims == ["batch", channels, "depth", "height", "width"]


def test_the_operators_are_kept_and_choose_their_backend_where_they_run(files):
    program = torch.export.load(files / "model.pt2")
    kept = [node for node in program.graph.nodes if node.target == ops.block]
    assert [node.args[-1] for node in kept] == ["auto"]


def test_the_decomposed_file_loads_where_rsanet_and_rsa_kernels_are_not(files, model, tmp_path):
    volume = torch.randn(3, 2, 11, 14, 9)
    torch.save({"volume": volume, "logits": load_model(model)(volume).detach()}, tmp_path / "wanted.pt")
    code = f"""
import sys
sys.modules["rsanet"] = sys.modules["rsa_kernels"] = None
import torch
wanted = torch.load({str(tmp_path / "wanted.pt")!r}, weights_only=True)
logits = torch.export.load({str(files / "decomposed.pt2")!r}).module()(wanted["volume"])
print((logits - wanted["logits"]).abs().max().item() < 1e-4, "rsanet.unet" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert done.stdout.split() == ["True", "False"], done.stderr


def test_what_the_training_images_looked_like_goes_along(model, tmp_path):
    looks = {"shell": [0.0] * 2, "rim": [[1.0] * BINS] * 2, "quantiles": [[0.0] * len(QUANTILES)] * 2,
             "alike": np.eye(2).tolist()}  # fmt: skip
    network = load_model(model)
    trained_on = summary([looks])
    save_model(network, tmp_path / "model.safetensors", {**network.extra, "trained_on": trained_on})
    assert describe(tmp_path / "model.safetensors").words["trained_on"] == trained_on
    assert describe(model).words["trained_on"] is None


@pytest.mark.parametrize("name", ["model.onnx", "model.pt2", "decomposed.pt2"])
def test_a_file_says_what_it_wants_and_nothing_of_this_machine(files, model, name):
    said = metadata_of(files / name)
    assert said["contrasts"] == list(CONTRASTS)
    assert (said["window"], said["spacing"], said["orientation"]) == ([16, 12, 20], None, "SAR")
    assert said["network"] == load_model(model).config
    assert re.fullmatch("[0-9a-f]{64}", said["model_sha256"])
    content = (files / name).read_bytes()
    assert FOLDER not in content
    assert b"unfinished" not in content  # where it was written


@pytest.mark.slow
def test_aotinductor_compiles_the_network_for_its_window(compiled, least):
    run = torch._inductor.aoti_load_package(str(compiled))
    for batch in (1, 3):
        volume = torch.randn(batch, 2, 16, 12, 20)
        assert largest(run(volume), load_model(least)(volume)) < 1e-4
    assert json.loads(run.get_metadata()["rsanet"])["contrasts"] == list(CONTRASTS)


@pytest.mark.slow
def test_the_page_s_programs_run_and_give_the_mask_of_predict(files, compiled, model, monkeypatch):
    images = write_images(files, 3)
    monkeypatch.chdir(files)
    names = {}
    for program in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(program, PAGE, "exec"), names)
        if "mask" in names and "found" not in names:
            names["found"] = names["mask"]
    wanted = predict(model, list(images.values()), precision="fp32")
    assert np.array_equal(names["found"], wanted.mask)
    assert 0.02 < wanted.mask.mean() < 0.98
    assert names["logits"].shape == (1, 2, 16, 12, 20)


@pytest.mark.parametrize(
    ("choice", "decompose"),
    [
        ({"downsample": "max_pool", "upsample": "trilinear", "attention": "non_local", "norm": "batch"}, True),
        ({"channels": (8, 8, 16), "block": "residual", "upsample": "transposed", "deep_supervision": True}, False),
    ],
    ids=str,
)
def test_other_networks_are_exported_too(choice, decompose, tmp_path):
    model = write_model(tmp_path / "model.safetensors", **choice)
    done = export(model, tmp_path / "model.pt2", decompose=decompose)
    assert len(done.shapes) == 3
    assert done.difference < 1e-3


def test_the_command_says_how_the_file_compares_and_replaces_nothing_unasked(model, tmp_path, rsanet):
    out = tmp_path / "model.pt2"
    code, said, err = rsanet("export", model, "-o", out)
    assert (code, err) == (0, "")
    first, second, third, last = said.splitlines()
    assert first == "Tracing the network of model.safetensors ..."
    assert second == "Comparing it with the network on volumes of 16×12×20, 9×8×13, 15×11×16 ..."
    assert float(re.fullmatch(r"The largest difference of a probability on 3 volumes is (\S+)\.", third)[1]) < 1e-4
    assert last == f"The file is {out}."
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
    content = out.read_bytes()
    code, _, err = rsanet("export", model, "-o", out)
    assert (code, err) == (1, f"rsanet: {out} exists: give another name, or --overwrite to replace it.\n")
    assert out.read_bytes() == content


def test_without_a_name_the_file_is_called_as_the_model_is(model, tmp_path, rsanet, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said, err = rsanet("export", model, "--format", "torch-export")
    assert (code, err) == (0, "")
    assert said.endswith("The file is model.pt2.\n")
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(model, run / "model.safetensors")
    assert rsanet("export", "run/")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt2", "run", "run.onnx"]
    code, _, err = rsanet("export", "run", "--format", "keras")
    assert (code, err) == (1, "rsanet: --format is 'keras': give one of onnx, torch-export, aoti.\n")


def test_a_wrong_file_is_not_kept(model, tmp_path, rsanet, monkeypatch):
    right = reference.attention_map
    monkeypatch.setattr(reference, "attention_map", lambda query, key, axis, scale: right(query, key, axis, -scale))
    code, _, err = rsanet("export", model, "-o", tmp_path / "model.pt2", "--decompose")
    assert code == 1
    assert err.startswith("rsanet: The file differs from the network by up to ")
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_without_onnxruntime_the_file_is_not_said_to_be_compared(model, tmp_path, rsanet, monkeypatch):
    monkeypatch.setattr(exports, "find_spec", lambda name: None)
    monkeypatch.setattr(exports, "_write_onnx", lambda program, described, path: path.write_bytes(b"graph"))
    code, said, _ = rsanet("export", model, "-o", tmp_path / "model.onnx")
    assert code == 0
    assert 'It was not compared, as onnxruntime is not installed: pip install ".[export]"' in said
    assert "difference" not in said
    assert (tmp_path / "model.onnx").read_bytes() == b"graph"


def test_without_a_compiler_aotinductor_is_refused_in_one_sentence(model, tmp_path, rsanet, monkeypatch):
    def compile_nothing(*args, **options):
        raise torch._inductor.exc.InvalidCxxCompiler()

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_nothing)
    code, _, err = rsanet("export", model, "-o", tmp_path / "model.pt2", "--format", "aoti")
    assert code == 1
    assert err.endswith("finds none that works: install g++, or name one in CXX.\n")
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["-o", "model.txt"], "ends in neither .onnx nor .pt2"),
        (["-o", "model.pt2", "--format", "onnx"], "end it in .onnx"),
        (["-o", "model.onnx", "--format", "tflite"], "give one of onnx, torch-export, aoti"),
        (["-o", "model.onnx", "--decompose"], "onnx is decomposed anyway"),
        (["-o", "{model}/model.onnx"], "is a file: give a folder for model.onnx"),
    ],
)
def test_what_cannot_be_written_is_refused_in_one_sentence(model, tmp_path, rsanet, monkeypatch, args, reason):
    monkeypatch.chdir(tmp_path)
    code, _, err = rsanet("export", model, *(arg.format(model=model) for arg in args))
    assert code == 1
    assert reason in err
    assert err.startswith("rsanet: ")
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_window_that_no_graph_serves_is_refused_with_what_to_do(tmp_path, rsanet):
    thin = write_model(tmp_path / "thin.safetensors", roi=(2, 16, 16))
    code, _, err = rsanet("export", thin, "-o", tmp_path / "model.pt2", "--decompose")
    assert code == 1
    assert "one slice along an axis" in err
    assert "give --format onnx, or leave out --decompose." in err
    assert rsanet("export", thin, "-o", tmp_path / "model.pt2")[0] == 0
