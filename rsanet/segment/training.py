"""Training a lesion segmentation network: one call, one run folder."""

import itertools
import json
import logging
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities import rank_zero_only
from monai.data import CacheDataset
from monai.losses import DiceCELoss, DiceFocalLoss, TverskyLoss
from monai.transforms import Compose
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from tqdm import tqdm

from rsanet.checkpoints import load_model, save_model
from rsanet.network import RSANet
from rsanet.segment.cases import Case
from rsanet.segment.checks import summary
from rsanet.segment.data import (
    common_spacing,
    patch_transforms,
    preparing_to_train,
    validation_transforms,
    voxel_sizes_of,
)
from rsanet.segment.datasets import find_cases, list_cases, reference_words
from rsanet.segment.environment import (
    MEMORY_FORMAT,
    Precision,
    attention_backend,
    available_memory,
    describe_device,
    gradients_are_wrong,
    package_versions,
    pick_device,
    pick_precision,
    refuse_wrong_gradients,
)
from rsanet.segment.metrics import dice
from rsanet.segment.patches import Patches, choose_patch, seed_of
from rsanet.segment.recipe import OF_THE_MACHINE, Recipe
from rsanet.segment.runs import Run, TensorBoard, resumed_recipe
from rsanet.segment.segmenter import lesion_probability
from rsanet.segment.splits import divide_cases
from rsanet.segment.volumes import DataWarning
from rsanet.segment.words import counted, sizes

WARM_UP = 0.05  # of the steps
LONGEST_GRADIENT = 1.0  # its norm is clipped there
SAVE_SECONDS = 300.0  # a kill loses no more work than this
HOPELESS = 0.05  # Dice of cases with lesions; marks at random come to about as much
SMALL_SCALE = 0.005  # of attention; what keeps it graded where larger ones may not
JUDGED = 3  # training cases that are looked at where no held-out case has a lesion

# Lesions are few voxels: each loss is of the whole batch, since a patch without any says nothing on its own.
CRITERIA: dict[str, Callable[[], nn.Module]] = {
    "dice_ce": lambda: DiceCELoss(softmax=True, to_onehot_y=True, include_background=False, batch=True),
    "dice_focal": lambda: DiceFocalLoss(softmax=True, to_onehot_y=True, include_background=False, batch=True),
    # A missed lesion costs more than a false one.
    "tversky": lambda: TverskyLoss(
        softmax=True, to_onehot_y=True, include_background=False, batch=True, alpha=0.3, beta=0.7
    ),
}


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over the first steps, then polynomial decay to zero, as a factor on the peak rate."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return max(0.0, 1 - (step - warm_up) / max(1, steps - warm_up)) ** 0.9


def make_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW, or nnU-Net's SGD with Nesterov momentum."""
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(network.parameters(), recipe.peak_rate, momentum=0.99, nesterov=True, weight_decay=3e-5)
    return torch.optim.AdamW(network.parameters(), lr=recipe.peak_rate)


def moving_average(network: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the weights that forgets its first steps sooner than its last."""

    @torch.no_grad()
    def update(averages: list[Tensor], weights: list[Tensor], updates: Tensor | int) -> None:
        seen = int(updates)
        torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + seen) / (10 + seen)))

    average = AveragedModel(network, multi_avg_fn=update)
    return average.requires_grad_(False)


class Score(NamedTuple):
    """What a network does on some cases.

    Attributes:
        dice: the mean; None without a case.
        found: the mean of the cases with lesions; None where there are none, and empty masks agree with nothing.
    """

    dice: float | None
    found: float | None


class LeftError(Exception):
    """A validation was left for the end that somebody asked for; whoever resumes does it."""


class Interruption:
    """Within it a first SIGINT or SIGTERM is noted in ``signum``, to be passed on at a good moment; a second acts.

    Args:
        words: what the first prints on stderr.
    """

    def __init__(self, words: str) -> None:
        self.words = words
        self.signum = 0
        self.process = os.getpid()
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            for signum in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(signum) not in (signal.SIG_IGN, None):
                    self.before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        self._release()

    def _note(self, signum: int, frame: Any) -> None:
        self._release()
        if os.getpid() != self.process:  # a forked worker does what it would do
            signal.raise_signal(signum)
            return
        self.signum = signum
        os.write(2, self.words.encode())  # print may be where the signal came

    def _release(self) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)
        self.before = {}

    def pass_on(self) -> None:
        """Does what the signal that was noted would have done."""
        self._release()
        signal.raise_signal(self.signum)


class Progress:
    """How far a run is: the losses since the last validation, the log, and the best score. Travels in a checkpoint."""

    def __init__(self) -> None:
        self.step = 0
        self.losses: list[float] = []
        self.rows: list[dict[str, Any]] = []
        self.best = -math.inf
        self.validations_since_best = 0
        self.found: float | None = None  # of the weights that are kept; see `Score`
        self.seconds = 0.0  # of the runs before this one
        self.started = time.perf_counter()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {**vars(self), "seconds": self.elapsed()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint."""
        vars(self).update(state, started=time.perf_counter())

    def elapsed(self) -> float:
        """Seconds of training, those before an interruption included."""
        return self.seconds + time.perf_counter() - self.started

    def log(self, scores: Mapping[str, float | None], rate: float) -> dict[str, Any]:
        """Adds a row, and says by ``validations_since_best`` whether it is the best."""
        score = max((score for score in scores.values() if score is not None), default=None)
        row = {
            "step": self.step,
            "loss": round(sum(self.losses) / len(self.losses), 5),
            **{name: "" if score is None else round(score, 5) for name, score in scores.items()},
            "lr": float(f"{rate:.3g}"),
            "seconds": round(self.elapsed(), 1),
        }
        self.rows.append(row)
        self.losses.clear()
        if score is None or score > self.best:
            self.best, self.validations_since_best = -math.inf if score is None else score, 0
        else:
            self.validations_since_best += 1
        return row

    def is_over(self, recipe: Recipe) -> bool:
        """Whether all steps are done, or the patience is at its end."""
        return self.step >= recipe.steps or bool(recipe.patience and self.validations_since_best >= recipe.patience)


def prepare(cases: Sequence[Case], transform: Compose, memory: float) -> CacheDataset:
    """Prepares the cases, and keeps as many of them as the memory holds; the others are prepared anew at each use."""
    kept = 0
    if cases:
        first = transform(cases[0])
        size = sum(value.nbytes for value in first.values() if hasattr(value, "nbytes"))
        kept = min(len(cases), int(memory / size))
    if kept < len(cases):
        warnings.warn(
            f"memory holds {kept} of {counted(len(cases), 'prepared case')}: the others are read at every use, which "
            "is slow; give a larger --spacing, or take a machine with more memory.",
            stacklevel=2,
        )
    return CacheDataset(
        cases,
        transform,
        cache_num=kept,
        num_workers=min(4, torch.get_num_threads()),
        progress=kept > 2 and sys.stderr.isatty(),
        copy_cache=False,
    )


@contextmanager
def hearing_of_others() -> Iterator[None]:
    """Within it the end of another process is said in words, not in those of its sockets."""
    try:
        yield
    except RuntimeError as error:
        if torch.distributed.is_initialized() and "onnection" in str(error):
            raise RuntimeError("Another process of this run has ended: its message says why.") from error
        raise


@hearing_of_others()
def train(
    data: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    resume: bool = False,
) -> Path:
    """Trains a network on the cases of a data set.

    The run folder gets ``model.safetensors``, the best weights, with ``last.safetensors`` and ``ema.safetensors``,
    ``config.yaml``, ``log.csv``, ``curve.png``, and ``checkpoint.pt``, from which a run that was ended goes on. On a
    CPU it comes to the same bits as one that was not.

    Args:
        data: the data set; see `rsanet.segment.datasets.list_cases`.
        out: run folder to create.
        recipe: the settings; the defaults if None, or with ``resume`` those of the run.
        resume: go on with the run in ``out``.

    Returns:
        The model file.

    Raises:
        ValueError: naming every case that cannot serve, or the setting or the step that is wrong.
        FileNotFoundError: there is no such data set, or no run to resume.
    """
    run = Run(out)
    begun: dict[str, Any] = {}
    if resume:
        begun = run.begun()
        recipe = resumed_recipe(run, recipe)
    elif leads():
        run.check_free()
    recipe = recipe or Recipe()
    device = pick_device(recipe.device)
    precision = pick_precision(recipe.precision, device)
    if leads():  # the processes of a run need not all read every file
        cases = find_cases(data, recipe.contrasts, require_mask=True, layout=recipe.layout, raters=recipe.raters)
        contrasts = list(cases[0].images)
    else:
        cases, contrasts = list_cases(data, recipe.contrasts, layout=recipe.layout, raters=recipe.raters)
    training, held_out = divide_cases(cases, recipe)
    divided = {"training": [case.id for case in training], "held_out": [case.id for case in held_out]}
    if resume and any(begun.get(part) != names for part, names in divided.items()):
        raise ValueError(f"{data} has other cases than {run.folder} was begun with: give the data set of that run.")

    silence_libraries()
    connected = torch.distributed.is_initialized()
    fabric = new_fabric(recipe, device, precision)
    fabric.launch()
    torch.manual_seed(recipe.seed)
    spacing, levels = recipe.spacing or common_spacing(cases), len(recipe.channels)
    memory = available_memory(torch.device("cpu")) / recipe.devices / 2
    volumes = prepare(training, preparing_to_train(spacing), memory)
    if not any(len(volume["mask_fg_indices"]) for volume in volumes):
        raise ValueError(f"None of the {counted(len(training), 'mask')} to train on has a lesion: give some that do.")
    whole = prepare(held_out[fabric.global_rank :: fabric.world_size], validation_transforms(spacing), memory / 2)

    patch = begun.get("patch") or recipe.patch
    if patch is None:
        shapes = [volumes[index]["image"].shape[1:] for index in range(max(1, min(volumes.cache_num, len(volumes))))]
        samples = recipe.batch // fabric.world_size
        room = available_memory(fabric.device) * 0.8 / (recipe.devices if device.type == "cpu" else 1)
        patch = choose_patch(shapes, recipe.channels, room, samples, device.type)
    patch = fabric.broadcast(tuple(patch))
    if min(patch) <= 2 ** (levels - 1) and fabric.is_global_zero:
        warnings.warn(
            f"a patch of {sizes(patch)} is one voxel wide at the coarsest of {levels} levels, where attention finds "
            f"nothing to attend to: give --channels one width less, or a --patch above {2 ** (levels - 1)}.",
            stacklevel=1,
        )
    if recipe.precision == "auto" and fabric.world_size == 1 and gradients_are_wrong(patch, levels, precision, device):
        precision = Precision("fp32", f"a patch of {patch[0]} slices has wrong gradients in this CPU's bf16")
        fabric = new_fabric(recipe, device, precision)
        fabric.launch()
    refuse_wrong_gradients(patch, levels, precision, device, recipe.compile)
    network = RSANet(
        len(contrasts),
        2,
        recipe.channels,
        dropout=recipe.dropout,
        attention=None if recipe.attention == "none" else recipe.attention,
        scale=recipe.attention_scale,
    ).to(memory_format=MEMORY_FORMAT)

    progress = Progress()
    size = spacing or tuple(np.median(voxel_sizes_of(cases), axis=0).tolist())
    looks = [volumes[index]["look"] for index in range(len(volumes)) if index < max(1, volumes.cache_num)]
    session = Session(
        fabric, recipe, run, network, patch, spacing, size, summary(looks), contrasts, whole, precision, progress
    )
    if resume and (state := run.load_checkpoint()):
        session.restore(state)
        if progress.rows and not run.model.is_file():
            raise ValueError(f"{run.model}, the best weights so far, is missing: put it back, or begin another run.")
    with session.interruption:
        if fabric.is_global_zero:
            if not resume:
                run.begin(
                    {
                        "recipe": asdict(recipe),
                        "data": str(data),
                        "contrasts": contrasts,
                        **divided,
                        "spacing": spacing,
                        "patch": patch,
                        "device": str(device),
                        "precision": precision.name,
                        "versions": package_versions(),
                    }
                )
            backend = attention_backend(network, patch, device, precision)
            drawn = f", masks: {words}" if (words := reference_words(cases, recipe.raters)) else ""
            many = f"{fabric.world_size} processes, " if fabric.world_size > 1 else ""
            print(
                f"{f'Resuming at step {progress.step}' if progress.step else 'Training'} on "
                f"{counted(len(training), 'case')} ({', '.join(contrasts)}), {len(held_out)} held out{drawn}: "
                f"{many}{describe_device(fabric.device)}, attention backend {backend}, precision {precision}, "
                f"patch {sizes(patch)}, batch {recipe.batch}, seed {recipe.seed}.",
                flush=True,
            )
        if not progress.is_over(recipe) or session.validation_is_due():
            session.fit(volumes)
            if fabric.is_global_zero:
                session.tell_remarks(volumes)
        elif fabric.is_global_zero:
            print(f"The run ended at step {progress.step}: there is nothing left to do.", flush=True)
    if session.interruption.signum:
        session.interruption.pass_on()
    if torch.distributed.is_initialized() and not connected:
        # The connection's threads may want the interpreter when it ends, and that aborts the process.
        fabric.barrier()
        torch.distributed.destroy_process_group()
    return run.model


def new_fabric(recipe: Recipe, device: torch.device, precision: Precision) -> Fabric:
    """What trains on one device or several."""
    return Fabric(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=[device.index or 0] if device.type == "cuda" and recipe.devices == 1 else recipe.devices,
        num_nodes=recipe.nodes,
        precision="bf16-mixed" if precision.name == "bf16" else "32-true",
    )


def leads() -> bool:
    """Whether this process is the first of a run, or its only one; known before the others are started."""
    return rank_zero_only.rank in (0, None)


def silence_libraries() -> None:
    """A run prints its own lines: no advice, and no remarks on how libraries call each other."""
    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in ("Grad strides do not match bucket view", "torch.distributed.nn.functional.all_gather"):
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", module=r"(lightning|monai)\.")


class Session:
    """The network, its optimizer and its average, through the steps of a run.

    Args:
        fabric: launched.
        recipe: the settings.
        run: where results go.
        network: to train.
        patch: voxels along z, y and x.
        spacing: mm along z, y and x that the volumes are brought to, or None for their own.
        voxel_size: mm along z, y and x that they have.
        trained_on: what the training images look like; see `rsanet.segment.checks`.
        contrasts: in channel order.
        held_out: this process's share of the prepared held-out cases.
        precision: what the network is computed in.
        progress: where the run is.
    """

    def __init__(
        self,
        fabric: Fabric,
        recipe: Recipe,
        run: Run,
        network: RSANet,
        patch: Sequence[int],
        spacing: Sequence[float] | None,
        voxel_size: Sequence[float],
        trained_on: Mapping[str, Any],
        contrasts: Sequence[str],
        held_out: Sequence[Mapping[str, Any]],
        precision: Precision,
        progress: Progress,
    ) -> None:
        self.fabric = fabric
        self.recipe = recipe
        self.run = run
        self.network = network
        self.patch = patch
        self.voxel_size = voxel_size
        self.extra = {
            "trained_on": trained_on,
            "contrasts": list(contrasts),
            "roi": list(patch),
            "spacing": spacing and list(spacing),
            "voxel_size": [float(f"{size:.4g}") for size in voxel_size],
        }
        self.held_out = held_out
        self.precision = precision
        self.progress = progress
        words = "rsanet: this step is finished and saved; Ctrl-C again ends at once, without.\n"
        self.interruption = Interruption(words if fabric.is_global_zero else "")
        self.criterion = CRITERIA[recipe.loss]()
        self.average = moving_average(network, recipe.ema).to(fabric.device) if recipe.ema else None
        if recipe.compile:
            network.compile()
        self.module, self.optimizer = fabric.setup(network, make_optimizer(network, recipe))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer.optimizer, lambda step: learning_rate_factor(step, recipe.steps)
        )

    def state(self) -> dict[str, Any]:
        """All that the next step depends on."""
        parts = {
            "settings": self.settings(),
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "progress": self.progress.state(),
        }
        return parts if self.average is None else {**parts, "average": self.average.state_dict()}

    def settings(self) -> str:
        """What decides the weights besides the data; ``auto`` may be another precision on another machine."""
        of_the_result = {name: value for name, value in asdict(self.recipe).items() if name not in OF_THE_MACHINE}
        return json.dumps(of_the_result | {"precision": self.precision.name, "patch": self.patch})

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint."""
        if state.get("settings", self.settings()) != self.settings():
            raise ValueError(
                f"{self.run.checkpoint} was made with other settings than {self.run.config} has, or in another "
                f"precision than {self.precision.name}: undo what was edited, or go on where the run was begun."
            )
        try:
            self.network.load_state_dict(state["network"])
            self.optimizer.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.progress.restore(state["progress"])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise ValueError(f"{self.run.checkpoint} is not of this run: begin another one.") from error

    def fit(self, volumes: Sequence[Mapping[str, Any]]) -> None:
        """Trains from where the run is to its end."""
        recipe, progress, fabric = self.recipe, self.progress, self.fabric
        steps = range(progress.step, recipe.steps)
        transform = patch_transforms(self.patch, augment=recipe.augment, spacing=self.voxel_size)
        patches = Patches(volumes, transform, recipe.seed, recipe.batch, steps, fabric.global_rank, fabric.world_size)
        workers = recipe.workers
        if workers is None:
            workers = min(8, torch.get_num_threads()) if fabric.device.type == "cuda" else 0
        loader = fabric.setup_dataloaders(
            DataLoader(patches, recipe.batch // fabric.world_size, num_workers=workers), use_distributed_sampler=False
        )
        saved = progress.started = time.perf_counter()
        board = TensorBoard(self.run.folder) if fabric.is_global_zero else None
        self.network.train()
        bar = tqdm(
            initial=progress.step,
            total=recipe.steps,
            desc="train",
            unit="step",
            disable=not (fabric.is_global_zero and sys.stderr.isatty()),
        )
        with bar:
            if self.validation_is_due():
                self.validate(board)
                self.save()
            for batch in loader:
                progress.losses.append(self.step(batch))
                progress.step += 1
                bar.set_postfix_str(self.words(), refresh=False)
                bar.update()
                if self.validation_is_due():
                    self.validate(board)
                elif time.perf_counter() - saved < SAVE_SECONDS and not self.interruption.signum:
                    continue
                self.save()
                saved = time.perf_counter()
                if progress.is_over(recipe):
                    break
        if progress.step < recipe.steps and fabric.is_global_zero:
            print(f"No better Dice in {counted(recipe.patience, 'validation')}: the training ends early.", flush=True)

    def validation_is_due(self) -> bool:
        """Whether the run is at a step to validate, and has not."""
        step, rows = self.progress.step, self.progress.rows
        at_one = step and (step % self.recipe.steps_between_validations == 0 or step == self.recipe.steps)
        return bool(at_one) and not (rows and rows[-1]["step"] == step)

    def save(self) -> None:
        """Saves the run, and ends it where somebody asked for that."""
        if self.fabric.is_global_zero:
            self.run.save_checkpoint(self.state())
        if self.interruption.signum:
            if self.fabric.is_global_zero:
                tqdm.write(f"Saved at step {self.progress.step} of {self.recipe.steps}.", file=sys.stdout)
                sys.stdout.flush()
            self.interruption.pass_on()

    def tell_remarks(self, volumes: Sequence[Mapping[str, Any]]) -> None:
        """Warns of a training that came to nothing, and notes that in the run's configuration."""
        remarks = list(filter(None, [self.doubt(volumes)]))
        self.run.note(remarks)
        for remark in remarks:
            warnings.warn(remark, DataWarning, stacklevel=1)

    def doubt(self, volumes: Sequence[Mapping[str, Any]]) -> str:
        """What speaks against the model that is kept, in a sentence; nothing where nothing does."""
        found, where = self.progress.found, f"of the {counted(len(self.run.begun()['held_out']), 'held-out case')}"
        if found is None:
            network = load_model(self.run.model).to(self.fabric.device, memory_format=MEMORY_FORMAT)
            shown = (volume for volume in map(volumes.__getitem__, range(len(volumes))) if (volume["mask"] > 0).any())
            judged = list(itertools.islice(shown, JUDGED))
            found = self.score(network, judged).found
            where = f"of {counted(len(judged), 'training case')}, no held-out case having any"
        large = self.recipe.attention != "none" and self.recipe.attention_scale > SMALL_SCALE
        scale = f"a smaller --attention-scale ({SMALL_SCALE}, for example), " if large else ""
        advice = (
            f"give more --steps, {scale}another --lr or a larger --patch, and look whether each mask fits its images"
        )
        if found < HOPELESS:
            return f"The model finds next to none of the lesions {where} (Dice {found:.3f}): {advice}."
        dices = [max(row[name] for name in ("dice", "dice_ema") if row.get(name, "") != "") for row in self.scored()]
        if len(dices) > 1 and max(dices[1:]) <= dices[0]:
            first = self.scored()[0]["step"]
            return f"The held-out Dice never rose above the {dices[0]:.3f} of step {first}: {advice}."
        return ""

    def scored(self) -> list[dict[str, Any]]:
        """The rows of the log that have a Dice."""
        return [row for row in self.progress.rows if row["dice"] != ""]

    def fail(self, reason: str) -> NoReturn:
        """Ends the run with a reason, which its configuration keeps."""
        if self.fabric.is_global_zero:
            self.run.note([reason])
        raise ValueError(reason)

    def step(self, batch: Mapping[str, Any]) -> float:
        """One step of the optimizer; returns the loss of the whole batch."""
        recipe, number = self.recipe, self.progress.step
        torch.manual_seed(seed_of(recipe.seed, number, self.fabric.global_rank, 1))  # dropout
        self.optimizer.zero_grad()
        logits = self.module(batch["image"].contiguous(memory_format=MEMORY_FORMAT)).float()
        loss = self.criterion(*self.of_all_processes(logits, batch["mask"]))
        self.check_finite(loss, "loss", batch["case"])
        self.fabric.backward(loss)
        norm = self.fabric.clip_gradients(
            self.module, self.optimizer, max_norm=LONGEST_GRADIENT, error_if_nonfinite=False
        )
        self.check_finite(norm, "gradient", batch["case"])
        self.optimizer.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.network)
        return loss.item()

    def of_all_processes(self, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The batch as one process would see it, so that the loss does not depend on their number."""
        if self.fabric.world_size == 1:
            return logits, mask
        logits = self.fabric.all_gather(logits, sync_grads=True)
        mask = self.fabric.all_gather(mask)
        return logits.flatten(0, 1), mask.flatten(0, 1)

    def check_finite(self, value: Tensor, what: str, cases: Sequence[str]) -> None:
        """Stops with the names of the cases where a number is not finite."""
        if torch.isfinite(value):
            return
        names = ", ".join(name for part in self.gathered(list(cases)) for name in part)
        self.fail(
            f"The {what} is {value.item()} at step {self.progress.step + 1} on {names}: "
            "check the images of these cases, or give a lower --lr."
        )

    def gathered(self, part: Any) -> list[Any]:
        """What each process has."""
        if self.fabric.world_size == 1:
            return [part]
        parts: list[Any] = [None] * self.fabric.world_size
        torch.distributed.all_gather_object(parts, part)
        return parts

    def validate(self, board: TensorBoard | None) -> None:
        """Scores the weights and their average on the held-out cases, and saves the log and all weights."""
        networks = {"dice": self.network}
        if self.average is not None:
            networks["dice_ema"] = self.average.module
        try:
            judged = {name: self.score(network, self.held_out) for name, network in networks.items()}
        except LeftError:
            return
        scores = {name: score.dice for name, score in judged.items()}
        row = self.progress.log(scores, self.optimizer.param_groups[0]["lr"])
        # The average lags behind the weights of a short run, and is ahead of them in a long one.
        better = max(networks, key=lambda name: -math.inf if scores[name] is None else scores[name])
        best = self.progress.validations_since_best == 0
        if best:
            self.progress.found = judged[better].found
        if board is None:
            return
        save_model(self.network, self.run.last, self.extra)
        if self.average is not None:
            save_model(self.average.module, self.run.average, self.extra)
        if best:
            save_model(networks[better], self.run.model, self.extra)
        self.run.write_log(self.progress.rows)
        board.add(row)
        note = "".join(
            f"{words} {scores[name]:.3f}"
            for name, words in (("dice", "  held-out Dice"), ("dice_ema", ", of the average"))
            if scores.get(name) is not None
        )
        left = row["seconds"] / row["step"] * (self.recipe.steps - row["step"])
        tqdm.write(
            f"step {row['step']:>5}/{self.recipe.steps}  loss {row['loss']:.3f}{note}"
            f"{' (best, saved)' if note and best else ''}  "
            f"{duration(row['seconds'])}{f', {duration(left)} left' if left else ''}",
            file=sys.stdout,
        )
        sys.stdout.flush()

    def score(self, network: RSANet, cases: Sequence[Mapping[str, Any]]) -> Score:
        """How a network does on whole volumes, predicted as `rsanet predict` does it.

        Raises:
            LeftError: somebody asks the run, of one process, to end.
        """
        for parameter in network.parameters():
            if not torch.isfinite(parameter).all():
                self.fail(f"The weights are not finite at step {self.progress.step}: give a lower --lr.")
        network.eval()
        scores, found = [], []
        for number in range(len(cases)):
            if self.interruption.signum and self.fabric.world_size == 1:
                self.network.train()
                raise LeftError
            case = cases[number]
            probability = lesion_probability(network, case["image"][None], self.patch, self.precision)
            marked, lesion = probability[0] > 0.5, case["mask"] > 0
            scores.append(dice(marked, lesion))
            if lesion.any():
                found.append(scores[-1])
        self.network.train()
        parts = self.gathered((scores, found)) if cases is self.held_out else [(scores, found)]
        means = []
        for values in zip(*parts, strict=True):
            every = [value for part in values for value in part]
            means.append(sum(every) / len(every) if every else None)
        return Score(*means)

    def words(self) -> str:
        """For the progress bar: the loss of the last steps, and the last Dice."""
        recent = self.progress.losses[-20:]
        scores = [row["dice"] for row in self.progress.rows if row["dice"] != ""]
        dice_words = f", held-out Dice {scores[-1]:.3f}" if scores else ""
        return f"loss {sum(recent) / len(recent):.3f}{dice_words}"


def duration(seconds: float) -> str:
    """``48 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
