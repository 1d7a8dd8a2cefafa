import json
import os
import re
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from integrations.models import CONTRASTS, read_voxels, write_images, write_model
from monai.bundle import ConfigParser, ConfigWorkflow, ckpt_export, verify_metadata, verify_net_in_out

from rsanet import RSANet, load_model
from rsanet.integrations import bundle as bundles
from rsanet.integrations.bundle import INFERENCE, METADATA, export_bundle
from rsanet.segment import predict, predict_cohort

# What MONAI's schema of metadata asks for, which verify_metadata would fetch.
TENSOR = {"required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"]}
TENSORS = {"type": "object", "minProperties": 1, "additionalProperties": TENSOR}
TEXTS = ["schema", "version", "monai_version", "pytorch_version", "numpy_version", "task", "description", "authors"]
WANTED = {
    "type": "object",
    "required": [*TEXTS, "copyright", "required_packages_version", "network_data_format"],
    "properties": {
        **{key: {"type": "string"} for key in [*TEXTS, "copyright"]},
        "required_packages_version": {"type": "object"},
        "network_data_format": {
            "required": ["inputs", "outputs"],
            "properties": {"inputs": TENSORS, "outputs": TENSORS},
        },
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "model.safetensors", spacing=[1.2, 1.0, 1.1])


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    return export_bundle(model, tmp_path_factory.mktemp("bundles") / "bundle")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    root = tmp_path_factory.mktemp("cohort")
    write_images(root / "sub-01", 1)
    write_images(root / "sub-02", 2, (24, 26, 19), np.diag([-1, -1, 1, 1.0]))
    return root


def assert_same_masks(found, wanted, cases=("sub-01", "sub-02")):
    names = [f"{case}_label-lesion_mask.nii.gz" for case in cases]
    assert sorted(path.name for path in found.iterdir()) == names
    for name in names:
        mask, truth = nib.load(found / name), nib.load(wanted / name)
        assert np.array_equal(np.asarray(mask.dataobj), np.asarray(truth.dataobj))
        assert 0.02 < np.asarray(truth.dataobj).mean() < 0.98
        assert mask.get_data_dtype() == np.uint8
        np.testing.assert_allclose(mask.affine, truth.affine, atol=1e-5)


def test_a_monai_configuration_names_the_network():
    parser = ConfigParser({"network": {"_target_": "rsanet.RSANet", "in_channels": 2, "channels": [8, 16]}})
    network = parser.get_parsed_content("network")
    assert isinstance(network, RSANet)
    assert network.config["channels"] == [8, 16]
    assert network(torch.zeros(1, 2, 5, 6, 7)).shape == (1, 2, 5, 6, 7)


def test_the_bundle_gives_the_masks_of_predict_voxel_by_voxel(bundle, model, cohort, tmp_path):
    command = re.search(r"^python (-m monai.bundle run .*)$", (bundle / "docs" / "README.md").read_text(), re.MULTILINE)
    words = command[1].replace("DATA", str(cohort)).replace("masks", str(tmp_path / "found")).split()
    # As many threads as in this process, which decide the last bits.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *words], check=True, cwd=bundle, env=environment, timeout=240)
    torch.set_num_threads(1)
    predict_cohort(model, cohort, tmp_path / "wanted")
    (tmp_path / "wanted" / "predictions.csv").unlink()
    assert_same_masks(tmp_path / "found", tmp_path / "wanted")


def test_a_workflow_in_python_takes_what_is_overridden(cohort, tmp_path):
    model = write_model(tmp_path / "model.safetensors")
    bundle = export_bundle(model, tmp_path / "bundle")
    images = [str(cohort / "sub-01" / f"{name}.nii.gz") for name in CONTRASTS]
    workflow = ConfigWorkflow(
        config_file=str(bundle / INFERENCE),
        meta_file=str(bundle / METADATA),
        workflow_type="inference",
        bundle_root=str(bundle),
        output_dir=str(tmp_path / "found"),
        datalist=[{"image": images}],
        roi_size=24,
        precision="fp32",
        threshold=0.6,
        min_lesion_mm3=20.0,
    )
    workflow.initialize()
    assert workflow.check_properties() == []
    workflow.run()
    asked = {"roi": [24], "precision": "fp32", "threshold": 0.6, "min_lesion_mm3": 20.0}
    found = read_voxels(tmp_path / "found" / "FLAIR_label-lesion_mask.nii.gz")
    assert np.array_equal(found, predict(model, images, **asked).mask)
    for name, other in (("roi", [16]), ("threshold", 0.5), ("min_lesion_mm3", 0.0)):
        assert not np.array_equal(found, predict(model, images, **{**asked, name: other}).mask)


def test_monai_verifies_metadata_and_network(bundle, tmp_path):
    (tmp_path / "schema.json").write_text(json.dumps(WANTED))
    verify_metadata(meta_file=str(bundle / METADATA), filepath=str(tmp_path / "schema.json"))
    files = {"meta_file": str(bundle / METADATA), "config_file": str(bundle / INFERENCE)}
    verify_net_in_out("network_def", device="cpu", **files)
    with pytest.raises(ValueError, match="output channel number"):
        verify_net_in_out("network_def", device="cpu", **files, **{"network_def#out_channels": 3})


def test_the_weights_are_the_model_s_and_no_pickle(bundle, model):
    state = torch.load(bundle / "models" / "model.pt", weights_only=True)
    wanted = load_model(model).state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)


def test_monai_traces_the_network_to_torchscript(bundle, model, tmp_path):
    ckpt_export(
        "network_def",
        filepath=str(tmp_path / "model.ts"),
        ckpt_file=str(bundle / "models" / "model.pt"),
        meta_file=str(bundle / METADATA),
        config_file=str(bundle / INFERENCE),
        use_trace=True,
    )
    volume = torch.randn(2, 2, 9, 14, 11)
    traced = torch.jit.load(tmp_path / "model.ts")
    torch.testing.assert_close(traced(volume), load_model(model)(volume), rtol=1e-4, atol=1e-4)


def test_metadata_and_readme_name_the_model(bundle, model):
    said = json.loads((bundle / METADATA).read_text())
    assert said["network_data_format"]["inputs"]["image"]["channel_def"] == {"0": "FLAIR", "1": "T1w"}
    assert said["network_data_format"]["inputs"]["image"]["spatial_shape"] == [16, 12, 20]
    assert said["rsanet"]["spacing"] == [1.2, 1.0, 1.1]
    readme = (bundle / "docs" / "README.md").read_text()
    assert said["rsanet"]["model_sha256"] in readme
    assert "takes FLAIR T1w, in this order" in readme
    assert "Research use only" in readme


def test_the_command_says_where_the_bundle_is_and_replaces_nothing_unasked(model, tmp_path, rsanet):
    out = tmp_path / "bundle"
    code, said, err = rsanet("export-bundle", model, out)
    assert (code, err) == (0, "")
    assert said == f"The bundle is {out}. docs/README.md in it says how to run it.\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]
    (out / "eval").mkdir()
    (out / "LICENSE").write_text("mine")
    code, _, err = rsanet("export-bundle", model, out)
    assert (code, err) == (1, f"rsanet: {out} holds a bundle: give another folder, or --overwrite to replace it.\n")
    assert (out / "LICENSE").read_text() == "mine"
    assert rsanet("export-bundle", model, out, "--overwrite")[0] == 0
    assert (out / "eval").is_dir()
    assert "rsanet grants no licence" in (out / "LICENSE").read_text()


def test_a_folder_that_is_no_bundle_is_left_alone(model, tmp_path, rsanet):
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "FLAIR.nii.gz").touch()
    (tmp_path / "file").touch()
    for out, reason in (("scans", "holds something else"), ("file", "is a file")):
        code, _, err = rsanet("export-bundle", model, tmp_path / out, "--overwrite")
        assert code == 1
        assert err.startswith("rsanet: ")
        assert reason in err
        assert len(err.splitlines()) == 1
    assert [path.name for path in (tmp_path / "scans").iterdir()] == ["FLAIR.nii.gz"]


def test_a_bundle_that_cannot_be_finished_leaves_nothing(model, tmp_path, rsanet, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundles.torch, "save", full)
    code, _, err = rsanet("export-bundle", model, tmp_path / "bundle")
    assert (code, err) == (1, f"rsanet: {tmp_path / 'bundle'}: no space left on device.\n")
    assert list(tmp_path.iterdir()) == []
