"""Training a lesion segmentation network: one call, one run folder."""

import json
import logging
import math
import random
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from monai.data import CacheDataset, DataLoader, list_data_collate
from monai.losses import DiceCELoss
from torch import Tensor
from torch.utils.data import RandomSampler
from tqdm import tqdm

from rsanet.checkpoints import save_model
from rsanet.network import RSANet
from rsanet.segment.data import training_transforms, validation_transforms
from rsanet.segment.datasets import Case, find_cases
from rsanet.segment.environment import (
    MEMORY_FORMAT,
    Precision,
    attention_backend,
    describe_device,
    package_versions,
    pick_device,
    pick_precision,
)
from rsanet.segment.files import write_csv, write_text
from rsanet.segment.metrics import dice
from rsanet.segment.prediction import MODEL_NAME, lesion_probability
from rsanet.segment.recipe import Recipe

WARM_UP = 0.05


def split_cases(cases: Sequence[Case], val_fraction: float, seed: int) -> tuple[list[Case], list[Case]]:
    """Divides cases at random into those to train on and those held out, each in their order."""
    count = round(val_fraction * len(cases)) or (1 if val_fraction else 0)
    if count >= len(cases):
        raise ValueError(
            f"{len(cases)} case{'s' if len(cases) > 1 else ''} cannot be split into training and held-out cases: "
            "give more cases, or --val-fraction 0."
        )
    held_out = set(random.Random(seed).sample(range(len(cases)), count))
    return (
        [case for index, case in enumerate(cases) if index not in held_out],
        [case for index, case in enumerate(cases) if index in held_out],
    )


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over the first steps, then polynomial decay to zero, as a factor on the peak rate."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return max(0.0, 1 - (step - warm_up) / max(1, steps - warm_up)) ** 0.9


class LesionSegmentation(pl.LightningModule):
    """Loss, optimizer, patches and validation of a network that labels each voxel background or lesion."""

    def __init__(
        self,
        network: RSANet,
        recipe: Recipe,
        training: Sequence[Case],
        held_out: Sequence[Case],
        precision: Precision,
    ) -> None:
        super().__init__()
        self.network = network
        self.recipe = recipe
        self.arithmetic = precision
        self.loss = DiceCELoss(softmax=True, to_onehot_y=True, include_background=False, batch=True)
        self.training_data = CacheDataset(
            training, training_transforms(recipe.patch, recipe.spacing), progress=False, copy_cache=False
        )
        self.held_out_data = CacheDataset(
            held_out, validation_transforms(recipe.spacing), progress=False, copy_cache=False
        )
        self.held_out_dice: dict[str, float] = {}

    def train_dataloader(self) -> Iterable[dict[str, Any]]:
        """The patches up to the next validation; their randomness is a function of the seed and the step."""
        seed = self.recipe.seed + self.global_step
        steps = min(self.recipe.steps_between_validations, self.recipe.steps - self.global_step)
        order = torch.Generator().manual_seed(seed)  # MONAI seeds the transforms from it as well
        return DataLoader(
            self.training_data,
            batch_size=self.recipe.batch,
            sampler=RandomSampler(self.training_data, num_samples=steps * self.recipe.batch, generator=order),
            num_workers=self.recipe.workers,
            collate_fn=list_data_collate,
            generator=order,
        )

    def val_dataloader(self) -> Iterable[dict[str, Any]]:
        """The held-out cases, one whole volume at a time."""
        return DataLoader(self.held_out_data, batch_size=1, collate_fn=list_data_collate)

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        """Dice + cross-entropy of a batch of patches."""
        logits = self.network(batch["image"].contiguous(memory_format=MEMORY_FORMAT))
        loss = self.loss(logits.float(), batch["mask"])
        if not torch.isfinite(loss):
            raise ValueError(
                f"The loss is {loss.item()} at step {self.global_step + 1} on {', '.join(batch['case'])}: "
                "check the images of these cases, or give a lower --lr."
            )
        return loss

    def validation_step(self, batch: dict[str, Any], index: int) -> None:
        """Dice of a whole held-out volume, predicted as `rsanet predict` does."""
        probability = lesion_probability(self.network, batch["image"], self.recipe.patch, self.arithmetic)
        self.held_out_dice[batch["case"][0]] = dice(probability > 0.5, batch["mask"] > 0)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with warm-up and polynomial decay."""
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.recipe.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, self.recipe.steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class RunRecord(pl.Callback):
    """Keeps the best weights and ``log.csv`` in the run folder, and tells how the training goes."""

    def __init__(self, run: Path, recipe: Recipe, extra: dict[str, Any]) -> None:
        self.run = run
        self.recipe = recipe
        self.extra = extra
        self.best = -math.inf
        self.losses: list[float] = []
        self.rows: list[dict[str, Any]] = []
        self.bar: tqdm | None = None
        self.started = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: LesionSegmentation) -> None:
        """Starts the clock and, on a terminal, the progress bar."""
        self.started = time.perf_counter()
        self.bar = tqdm(total=self.recipe.steps, desc="train", unit="step", disable=not sys.stderr.isatty())

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: LesionSegmentation, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes the loss of a step."""
        self.losses.append(float(outputs["loss"]))
        self.bar.set_postfix_str(self._state(self.losses[-20:]), refresh=False)
        self.bar.update()

    def on_train_epoch_end(self, trainer: pl.Trainer, module: LesionSegmentation) -> None:
        """Logs one row, and saves the weights if none before did better on the held-out cases."""
        scores = list(module.held_out_dice.values())
        score = sum(scores) / len(scores) if scores else None
        self.rows.append(
            {
                "step": trainer.global_step,
                "loss": round(sum(self.losses) / len(self.losses), 5),
                "dice": "" if score is None else round(score, 5),
                "lr": f"{trainer.optimizers[0].param_groups[0]['lr']:.3g}",
                "seconds": round(time.perf_counter() - self.started, 1),
            }
        )
        write_csv(self.run / "log.csv", self.rows)
        better = score is None or score > self.best
        if better:
            if not all(torch.isfinite(parameter).all() for parameter in module.network.parameters()):
                raise ValueError(f"The weights are not finite at step {trainer.global_step}: give a lower --lr.")
            self.best = -math.inf if score is None else score
            save_model(module.network, self.run / MODEL_NAME, self.extra)
        row = self.rows[-1]
        note = f"  held-out Dice {score:.3f}{' (best, saved)' if better else ''}" if scores else ""
        tqdm.write(
            f"step {row['step']:>5}/{self.recipe.steps}  loss {row['loss']:.3f}{note}  {row['seconds']:.0f} s",
            file=sys.stdout,
        )
        sys.stdout.flush()
        self.losses.clear()
        module.held_out_dice.clear()

    def on_train_end(self, trainer: pl.Trainer, module: LesionSegmentation) -> None:
        """Closes the progress bar."""
        self.bar.close()

    def _state(self, losses: list[float]) -> str:
        state = f"loss {sum(losses) / len(losses):.3f}"
        return (
            f"{state}, held-out Dice {self.rows[-1]['dice']:.3f}"
            if self.rows and self.rows[-1]["dice"] != ""
            else state
        )


def train(data: str | Path, run: str | Path, recipe: Recipe, contrasts: Sequence[str] | None = None) -> Path:
    """Trains a network on the cases of a data set.

    Args:
        data: the data set.
        run: folder to create, with ``model.safetensors``, ``config.json`` and ``log.csv``.
        recipe: the settings.
        contrasts: contrasts in channel order; None takes every contrast that occurs.

    Returns:
        The model file.
    """
    run = Path(run)
    if (run / MODEL_NAME).exists():
        raise ValueError(
            f"{run} already holds {MODEL_NAME}, of a finished or an interrupted run: give another folder to -o."
        )
    device = pick_device(recipe.device)
    precision = pick_precision(recipe.precision, device)
    cases = find_cases(data, contrasts, require_mask=True)
    contrasts = list(cases[0].images)
    training, held_out = split_cases(cases, recipe.val_fraction, recipe.seed)
    silence_lightning()
    pl.seed_everything(recipe.seed, verbose=False)
    network = RSANet(
        len(contrasts),
        2,
        recipe.channels,
        dropout=recipe.dropout,
        attention=None if recipe.attention == "none" else recipe.attention,
        scale=recipe.attention_scale,
    ).to(memory_format=MEMORY_FORMAT)
    backend = attention_backend(network, recipe.patch, device, precision)
    run.mkdir(parents=True, exist_ok=True)
    print(
        f"Training on {len(training)} case{'s' if len(training) > 1 else ''} ({', '.join(contrasts)}), "
        f"{len(held_out)} held out: "
        f"{describe_device(device)}, attention backend {backend}, precision {precision}, "
        f"patch {'×'.join(map(str, recipe.patch))}, batch {recipe.batch}, seed {recipe.seed}.",
        flush=True,
    )
    config = {
        "recipe": asdict(recipe),
        "contrasts": contrasts,
        "device": str(device),
        "precision": precision.name,
        "versions": package_versions(),
        "data": str(data),
        "training": [case.id for case in training],
        "held_out": [case.id for case in held_out],
    }
    write_text(run / "config.json", json.dumps(config, indent=2) + "\n")
    extra = {"contrasts": contrasts, "roi": list(recipe.patch), "spacing": recipe.spacing}
    record = RunRecord(run, recipe, extra)
    trainer = pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=[device.index or 0] if device.type == "cuda" else 1,
        precision="bf16-mixed" if precision.name == "bf16" else "32-true",
        max_steps=recipe.steps,
        max_epochs=-1,
        reload_dataloaders_every_n_epochs=1,
        limit_val_batches=1.0 if held_out else 0,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        callbacks=[record],
        default_root_dir=run,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(LesionSegmentation(network, recipe, training, held_out, precision))
    return run / MODEL_NAME


def silence_lightning() -> None:
    """A run prints its own lines: no tips, no device listing, no advice on workers."""
    for name in (
        "lightning",
        "lightning.pytorch",
        "lightning.fabric",
        "lightning.pytorch.utilities.rank_zero",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(lightning|monai)\.")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
