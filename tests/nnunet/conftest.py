"""nnU-Net in a folder of its own: a small data set in its raw format, and its commands, kept short and on the CPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIMS = Path(__file__).parent / "shims"
DATASET = "Dataset501_Lesions"

# nnU-Net's own commands and trainers, but they need no GPU and few processes, and a training is one short epoch that is
# the same every time. Processes that these start import this file, too, and find nothing to import in it.
COMMANDS = {
    "nnUNetv2_plan_and_preprocess": """
    from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import plan_and_preprocess_entry as main

    sys.argv += ["-npfp", "1", "-np", "1"]
""",
    "nnUNetv2_train": """
    import os, random
    import numpy, torch
    from nnunetv2.run.run_training import run_training_entry as main
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    whole = nnUNetTrainer.run_training

    def briefly(self):
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 12, 1
        whole(self)

    nnUNetTrainer.run_training = briefly
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(0)
    os.environ["nnUNet_n_proc_DA"] = "0"  # what is augmented in this process follows the seeds
    sys.argv += ["-device", "cpu"]
""",
    "nnUNetv2_predict": """
    from nnunetv2.inference.predict_from_raw_data import predict_entry_point as main

    sys.argv += ["-device", "cpu", "-npp", "1", "-nps", "1", "--disable_tta"]
""",
}


def write_case(folder, name, seed, labelled):
    """A FLAIR phantom of voxels of 1×1×2 mm, turned in space, with bright lesions; and its mask."""
    import nibabel as nib
    import numpy as np

    rng = np.random.default_rng(seed)
    shape = (32, 32, 16)
    axes = np.indices(shape)
    centre, radius = (np.array(shape) - 1) / 2, np.array(shape) / 2 - 1
    head = sum(((axes[i] - centre[i]) / radius[i]) ** 2 for i in range(3)) < 1
    mask = np.zeros(shape, bool)
    for _ in range(6):
        spot = centre + rng.uniform(-0.6, 0.6, 3) * radius
        mask |= sum((axes[i] - spot[i]) ** 2 for i in range(3)) < rng.uniform(4, 12)
    mask &= head
    cos, sin = np.cos(0.2), np.sin(0.2)
    affine = np.array([[-1, 0, 0, 30], [0, cos, -2 * sin, -20], [0, sin, 2 * cos, 5], [0, 0, 0, 1.0]])
    image = head * (100 + 120 * mask + 6 * rng.standard_normal(shape))
    nib.save(nib.Nifti1Image(image.astype(np.float32), affine), folder / f"images{labelled}" / f"{name}_0000.nii.gz")
    nib.save(nib.Nifti1Image(mask.astype(np.uint8), affine), folder / f"labels{labelled}" / f"{name}.nii.gz")


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """An empty folder but for ``raw``, with a data set that nnU-Net has not seen."""
    folder = tmp_path_factory.mktemp("nnunet")
    data = folder / "raw" / DATASET
    for part in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (data / part).mkdir(parents=True)
    for number in range(5):
        write_case(data, f"case_{number}", number, "Tr")
    write_case(data, "case_9", 9, "Ts")
    description = {
        "channel_names": {"0": "FLAIR"},
        "labels": {"background": 0, "lesion": 1},
        "numTraining": 5,
        "file_ending": ".nii.gz",
    }
    (data / "dataset.json").write_text(json.dumps(description))
    commands = folder / "bin"
    commands.mkdir()
    for name, lines in COMMANDS.items():
        script = f"#!{sys.executable}\nimport sys\n\nif __name__ == '__main__':{lines}    main()\n"
        (commands / name).write_text(script)
        (commands / name).chmod(0o755)
    return folder


@pytest.fixture(scope="session")
def bash(workshop):
    """Runs lines of bash in the workshop; returns what they print. A line that fails ends them and the test."""

    def run(lines):
        paths = os.pathsep.join([str(SHIMS), os.environ.get("PYTHONPATH", "")])
        path = os.pathsep.join([str(workshop / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {**os.environ, "PATH": path, "PYTHONPATH": paths, "nnUNet_def_n_proc": "1"}
        environment.pop("nnUNet_extTrainer", None)
        done = subprocess.run(
            ["bash", "-ec", lines],
            cwd=workshop,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    return run


@pytest.fixture(scope="session")
def tutorial(bash):
    """Runs the commands of a chapter of the tutorial, with the variables that its chapter on data sets."""
    chapters = {}
    for chapter in (ROOT / "docs" / "tutorials" / "nnunet.md").read_text(encoding="utf-8").split("\n## ")[1:]:
        blocks = re.findall(r"^```sh\n(.*?)^```", chapter, re.DOTALL | re.MULTILINE)
        chapters[chapter.splitlines()[0]] = "".join(blocks)
    variables = next(line for line in chapters["The data"].splitlines() if line.startswith("export nnUNet_raw"))

    def run(title):
        return bash(f"{variables}\n{chapters[title]}")

    return run


@pytest.fixture(scope="session")
def planned(tutorial, workshop):
    """The folder of nnU-Net's plans and preprocessed data."""
    tutorial("The data")
    return workshop / "preprocessed" / DATASET
