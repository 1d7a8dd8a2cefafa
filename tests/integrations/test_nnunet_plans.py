"""What the `rsanet` command does for nnU-Net without nnU-Net: plans and weights are files."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rsanet import cli
from rsanet.integrations.nnunet.plans import NETWORK, choose_stages

DATASET = "Dataset501_Lesions"
PLAIN = "dynamic_network_architectures.architectures.unet.PlainConvUNet"


def configuration(patch_size, strides):
    """A configuration of nnU-Net's plans, in what matters of it."""
    dims, count = len(patch_size), len(strides)
    arguments = {
        "n_stages": count,
        "features_per_stage": [32, 64, 128, 256, 320, 320][:count],
        "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
        "kernel_sizes": [[3] * dims] * count,
        "strides": strides,
        "n_conv_per_stage": [2] * count,
    }
    return {
        "data_identifier": f"nnUNetPlans_{dims}d",
        "patch_size": patch_size,
        "architecture": {
            "network_class_name": PLAIN,
            "arch_kwargs": arguments,
            "_kw_requires_import": ["conv_op"],
        },
    }


PLANS = {
    "dataset_name": DATASET,
    "plans_name": "nnUNetPlans",
    "transpose_forward": [0, 1, 2],
    "configurations": {
        "2d": configuration([64, 48], [[1, 1], [2, 2], [2, 2]]),
        "3d_lowres": configuration([40, 32, 32], [[1, 1, 1], [2, 2, 2], [2, 2, 2]]),
        "3d_fullres": configuration([20, 64, 56], [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]]),
        "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
    },
}


@pytest.fixture
def preprocessed(tmp_path, monkeypatch):
    """nnU-Net's folder of preprocessed data, with a data set that is planned and one that is not."""
    for name in (DATASET, "Dataset007_Other"):
        (tmp_path / "preprocessed" / name).mkdir(parents=True)
    (tmp_path / "preprocessed" / DATASET / "nnUNetPlans.json").write_text(json.dumps(PLANS))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    return tmp_path / "preprocessed"


@pytest.fixture
def rsanet(capsys):
    """Runs the command line: returns exit status, stdout and stderr."""

    def run(*args):
        with pytest.raises(SystemExit) as stop:
            cli.main([str(arg) for arg in args])
        return (stop.value.code, *capsys.readouterr())

    return run


def refused(answer, *words):
    """Checks that the answer is an error in one sentence with these words."""
    code, out, err = answer
    assert code == 1
    assert out == ""
    assert err.startswith("rsanet: ")
    assert len(err.splitlines()) == 1
    for word in words:
        assert word in err


def test_the_printed_folder_holds_nothing_but_the_module_of_trainers(rsanet):
    code, out, err = rsanet("nnunet-path")
    assert (code, err) == (0, "")
    (folder,) = out.splitlines()
    modules = {path.name for path in Path(folder).iterdir() if path.name != "__pycache__"}
    assert modules == {"__init__.py", "rsanet_trainers.py"}
    source = (Path(folder) / "rsanet_trainers.py").read_text()
    assert all(f"class {name}(" in source for name in ("nnUNetTrainerRSANet", "nnUNetTrainerRSANetPublished"))


@pytest.mark.parametrize("name", ["501", DATASET, "folder", "raw"])
def test_plans_get_blocks_and_keep_all_else(name, preprocessed, rsanet, tmp_path, monkeypatch):
    if name == "folder":  # needs no variable
        monkeypatch.delenv("nnUNet_preprocessed")
        name = preprocessed / DATASET
    elif name == "raw":
        name = tmp_path / "raw" / DATASET
        name.mkdir(parents=True)
    code, out, _ = rsanet("nnunet-plans", name)
    assert code == 0
    assert "after encoder stage 2 of 0 to 3: 128 channels, 10×16×14 voxels" in out
    assert "after encoder stage 3 of 0 to 3: 256 channels, 5×8×7 voxels" in out
    assert "left out, not being three-dimensional: 2d" in out
    assert f"nnUNetv2_train {DATASET} 3d_lowres 0 -p nnUNetPlansRSA" in out

    written = json.loads((preprocessed / DATASET / "nnUNetPlansRSA.json").read_text())
    expected = copy.deepcopy(PLANS)
    expected["plans_name"] = "nnUNetPlansRSA"
    del expected["configurations"]["2d"]
    for part, stages in (("3d_lowres", [1, 2]), ("3d_fullres", [2, 3])):
        architecture = expected["configurations"][part]["architecture"]
        architecture["network_class_name"] = NETWORK
        architecture["arch_kwargs"] |= {"rsa_network": PLAIN, "rsa_stages": stages, "rsa_scale": 1.0}
    assert written == expected
    assert json.loads((preprocessed / DATASET / "nnUNetPlans.json").read_text()) == PLANS


def test_stages_scale_and_plans_are_chosen(preprocessed, rsanet):
    (preprocessed / DATASET / "nnUNetResEncUNetMPlans.json").write_text(json.dumps(PLANS))
    chosen = ("--plans", "nnUNetResEncUNetMPlans.json", "--stages", "1", "-1", "--scale", "0.005")
    code, out, _ = rsanet("nnunet-plans", 501, *chosen)
    assert code == 0
    assert "-p nnUNetResEncUNetMPlansRSA" in out
    written = json.loads((preprocessed / DATASET / "nnUNetResEncUNetMPlansRSA.json").read_text())
    assert written["plans_name"] == "nnUNetResEncUNetMPlansRSA"
    arguments = written["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    assert arguments["rsa_stages"] == [1, 3]
    assert arguments["rsa_scale"] == 0.005


def test_plans_that_exist_are_replaced_on_request_alone(preprocessed, rsanet):
    target = preprocessed / DATASET / "nnUNetPlansRSA.json"
    target.write_text("mine")
    refused(rsanet("nnunet-plans", 501), "nnUNetPlansRSA.json exists", "--overwrite")
    assert target.read_text() == "mine"
    assert rsanet("nnunet-plans", 501, "--overwrite")[0] == 0
    assert json.loads(target.read_text())["plans_name"] == "nnUNetPlansRSA"


def test_what_cannot_be_planned_is_refused_in_a_sentence(preprocessed, rsanet, monkeypatch):
    folder = preprocessed / DATASET
    refused(rsanet("nnunet-plans", 502), "no data set 502", "Dataset007_Other, Dataset501_Lesions")
    refused(rsanet("nnunet-plans", 7), "Dataset007_Other has no nnUNetPlans.json", "nnUNetv2_plan_and_preprocess")
    refused(rsanet("nnunet-plans", 501, "--plans", "mine"), "has no mine.json", "--plans, of nnUNetPlans")
    refused(rsanet("nnunet-plans", 501, "--stages", "4"), "no stage 4 in an encoder with 3", "-1, the bottleneck")
    refused(rsanet("nnunet-plans", 501, "--stages", "2", "-1"), "2 -1 name one twice in an encoder with 3")
    refused(rsanet("nnunet-plans", 501, "--scale", "nan"), "--scale is nan")
    (preprocessed / "Dataset501_Twin").mkdir()
    refused(rsanet("nnunet-plans", 501), "501 is the id of Dataset501_Lesions and Dataset501_Twin")
    monkeypatch.delenv("nnUNet_preprocessed")
    refused(rsanet("nnunet-plans", 501), "nnUNet_preprocessed is not set")
    assert [path.name for path in folder.iterdir()] == ["nnUNetPlans.json"]


def without_3d(plans):
    plans["configurations"] = {"2d": plans["configurations"]["2d"]}


def with_rsa_already(plans):
    plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = NETWORK


def of_a_transformer(plans):
    del plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["n_stages"]


def of_an_old_nnunet(plans):
    del plans["configurations"]["3d_fullres"]["architecture"]


def in_a_circle(plans):
    plans["configurations"]["3d_fullres"]["inherits_from"] = "3d_cascade_fullres"


def without_configurations(plans):
    del plans["configurations"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_3d, "no three-dimensional configuration (2d)"),
        (with_rsa_already, "have RSA blocks already"),
        (of_a_transformer, "has no stages that a block could follow"),
        (of_an_old_nnunet, "does not say which network 3d_fullres has"),
        (in_a_circle, "no complete configuration 3d_fullres"),
        (without_configurations, "has no configurations"),
    ],
)
def test_plans_that_can_have_no_blocks_are_refused(change, words, preprocessed, rsanet):
    plans = copy.deepcopy(PLANS)
    change(plans)
    (preprocessed / DATASET / "nnUNetPlans.json").write_text(json.dumps(plans))
    refused(rsanet("nnunet-plans", 501), words)
    assert not (preprocessed / DATASET / "nnUNetPlansRSA.json").exists()


def test_a_file_that_is_no_json_is_refused(preprocessed, rsanet):
    (preprocessed / DATASET / "nnUNetPlans.json").write_text("{")
    refused(rsanet("nnunet-plans", 501), "nnUNetPlans.json is not JSON")


def test_stages_count_from_either_end():
    assert choose_stages((-2, -1), 6) == [4, 5]
    assert choose_stages([3, 0], 4) == [0, 3]
    with pytest.raises(ValueError, match="at least one"):
        choose_stages([], 4)


def test_plans_need_neither_torch_nor_nnunet(preprocessed):
    program = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'nnunetv2', 'numpy', 'nibabel')));"
        "from rsanet.cli import main; main(['nnunet-plans', '501'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "The plans are" in done.stdout


def encoder(prefix, dims=3):
    """The encoder's weights in a state_dict of nnU-Net, in what matters of them."""
    return {
        f"{prefix}stages.{stage}.0.convs.0.{part}": torch.full(
            (width, 1, *(3,) * dims) if part[0] == "c" else (width,), 2.0
        )
        for stage, width in enumerate((4, 6, 8))
        for part in ("conv.weight", "norm.weight")
    }


@pytest.fixture
def checkpoint(tmp_path):
    """Saves a checkpoint as nnU-Net does."""
    import numpy as np

    def save(weights, **more):
        rest = {"logging": {"ema": [np.float32(0.5)]}, "_best_ema": np.float64(0.5), "trainer_name": "nnUNetTrainer"}
        torch.save({"network_weights": weights, **rest, **more}, tmp_path / "checkpoint_final.pth")
        return tmp_path / "checkpoint_final.pth"

    return save


def test_weights_get_the_keys_of_blocks_that_are_the_identity(checkpoint, rsanet, tmp_path):
    plain = (
        encoder("encoder.") | encoder("decoder.encoder.") | {"decoder.seg_layers.0.weight": torch.ones(2, 4, 1, 1, 1)}
    )
    out = tmp_path / "with-rsa.pth"
    code, printed, _ = rsanet("nnunet-weights", checkpoint(plain), out, "--stages", "-1", "1")
    assert code == 0
    assert "after the encoder stages 1, 2" in printed
    weights = torch.load(out, weights_only=True)["network_weights"]
    assert all(torch.equal(weights[key], tensor) for key, tensor in plain.items())
    for stage, width in ((1, 6), (2, 8)):
        block = f"encoder.stages.{stage}.rsa_block"
        assert weights[f"{block}.theta_conv.weight"].shape == (width, width, 1, 1, 1)
        assert [weights[f"{block}.betas.{axis}"].item() for axis in range(3)] == [0, 0, 0]
        assert torch.equal(weights[f"decoder.{block}.g_conv.weight"], weights[f"{block}.g_conv.weight"])
    blocks = {key.split(".rsa_block.")[0] for key in weights if ".rsa_block." in key}
    assert blocks == {f"{prefix}encoder.stages.{stage}" for prefix in ("", "decoder.") for stage in (1, 2)}
    refused(rsanet("nnunet-weights", out, tmp_path / "again.pth"), "has RSA blocks already")
    refused(rsanet("nnunet-weights", tmp_path / "checkpoint_final.pth", out), "exists", "--overwrite")


class Stranger:
    def __reduce__(self):
        return print, ("hello from a stranger",)


def test_checkpoints_that_are_none_are_refused_and_run_no_code(checkpoint, rsanet, tmp_path):
    out = tmp_path / "with-rsa.pth"
    refused(rsanet("nnunet-weights", checkpoint(encoder("encoder."), more=Stranger()), out), "is not unpickled")
    refused(rsanet("nnunet-weights", checkpoint(encoder("encoder.", dims=2)), out), "no three-dimensional encoder")
    refused(rsanet("nnunet-weights", checkpoint({"encoder": "none"}), out), "has no network_weights")
    (tmp_path / "junk.pth").write_bytes(b"PK junk")
    refused(rsanet("nnunet-weights", tmp_path / "junk.pth", out), "junk.pth")
    refused(rsanet("nnunet-weights", tmp_path / "absent.pth", out), "absent.pth: no such file")
    assert not out.exists()
