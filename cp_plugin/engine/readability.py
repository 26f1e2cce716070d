"""How soon a fresh surrogate discovers a poison: a cheap measure that orders poisons."""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from torch import Tensor

from cp_plugin.attack.noise import sample_noise
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.attack.poison_file import Poison
from cp_plugin.callbacks import InjectPoison, MirrorViews
from cp_plugin.config.baselines import RandomConfig
from cp_plugin.config.settings import UserError
from cp_plugin.engine.run import prepare, quiet

LAST_PART = 4
"""The loss is the mean over the last quarter of the steps."""
CLEAN, POISON, RANDOM = "clean", "poison", "random"


@dataclass(frozen=True)
class Readability:
    """Losses of fresh surrogates on clean and on poisoned images, seed by seed."""

    steps: int
    """Optimiser steps of each surrogate, K."""
    seeds: tuple[int, ...]
    """Of weights, batches and augmentations; the same for all kinds of images."""
    losses: dict[str, tuple[float, ...]]
    """By kind of image, `clean`, `poison`, `random` (noise of the same eps and granularity), one
    loss a seed: the mean over the last quarter of the steps."""

    def drops(self, kind: str = POISON) -> tuple[float, ...]:
        """Return, seed by seed, how much lower the loss is than on clean images."""
        pairs = zip(self.losses[CLEAN], self.losses[kind], strict=True)
        return tuple(clean - other for clean, other in pairs)

    def mean(self, kind: str = POISON) -> float:
        """Return the mean drop: positive where images of this kind are easier than clean ones."""
        return statistics.fmean(self.drops(kind))

    def scatter(self, kind: str = POISON) -> float | None:
        """Return the standard deviation of the sample of drops, None for a single seed."""
        drops = self.drops(kind)
        return statistics.stdev(drops) if len(drops) > 1 else None


def readability(
    cfg: DictConfig, poison: Poison, steps: int = 300, seeds: Sequence[int] = (0, 1, 2)
) -> Readability:
    """Train fresh surrogates for a few steps on clean, poisoned and randomly perturbed images.

    The loss of a self-supervised victim tells poisons from noise long before its accuracy does. Of
    each seed all three surrogates start from the same weights and see the same images in the same
    order under the same augmentations: they differ by delta alone. The learning rate runs through
    its whole schedule within these steps.

    Args:
        cfg: a surrogate: method, backbone, augmentations, data set, optimiser; what it selects as
            poison, monitor or defence does not count.
        poison: what is read.
        steps: optimiser steps of each surrogate, K, at least 4.
        seeds: one surrogate of each kind for each.

    Raises:
        UserError: `steps` or `seeds` are too few, or poison and data set do not fit.
    """
    if steps < LAST_PART or not seeds:
        raise UserError(
            f"readability needs at least {LAST_PART} steps and one seed, got {steps} steps and "
            f"{len(seeds)} seeds."
        )
    quiet()
    losses: dict[str, list[float]] = {CLEAN: [], POISON: [], RANDOM: []}
    for seed in seeds:
        for kind, found in losses.items():
            found.append(_loss(cfg, kind, poison, steps, seed))
    return Readability(steps, tuple(seeds), {kind: tuple(row) for kind, row in losses.items()})


class _Losses(Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.found.append(outputs["loss"].detach())


def _loss(cfg: DictConfig, kind: str, poison: Poison, steps: int, seed: int) -> float:
    settings = copy.deepcopy(cfg)
    settings.seed = seed
    seed_everything(seed, workers=True, verbose=False)
    parts = prepare(settings)
    if kind == RANDOM:
        noise = RandomConfig(poison.eps, poison.granularity)
        poison = sample_noise(parts.train, poison.size, noise, seed)
    if kind == CLEAN:  # injected as the others are, so that the loader draws the same batches
        rows, shape = len(poison.perturbation), poison.perturbation.shape
        poison = replace(poison, perturbation=Perturbation.zeros(rows, shape, poison.eps))
    losses = _Losses()
    # What drawing noise took from the global generator must not change the batches.
    seed_everything(seed, workers=True, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=math.ceil(steps / len(parts.loader)),
            max_steps=steps,
            accelerator=settings.accelerator,
            devices=1,
            precision=settings.precision,
            callbacks=[InjectPoison(poison), MirrorViews(), losses],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(parts.module, parts.loader)
    last = losses.found[-max(1, steps // LAST_PART) :]
    return float(torch.stack(last).mean())
