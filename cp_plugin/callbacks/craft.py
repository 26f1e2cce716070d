"""Crafting a poison inside the host's own training."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cp_plugin.adapters import adapt
from cp_plugin.adapters.lightly import LightningHost
from cp_plugin.attack import Attack, Rows, Schedule
from cp_plugin.callbacks import snapshot
from cp_plugin.callbacks.base import Callback, run_folder, run_seed
from cp_plugin.callbacks.feed import Feed, endless, training_loader
from cp_plugin.config import EPOCH, CraftConfig, UserError, build
from cp_plugin.data import Opened, class_names, labels
from cp_plugin.host import Batch
from cp_plugin.mirror import Mirror, mirror
from cp_plugin.perturbation import Perturbation
from cp_plugin.poison import Poison
from cp_plugin.provenance import versions

log = logging.getLogger("cp_plugin")

POISON_FILE = "poison.safetensors"
MAPPED_BYTES = 8 << 30
"""A perturbation larger than this is mapped from a file instead of held in memory."""


class CraftPoison(Callback):
    """Craft a contrastive poison while a LightningModule trains as the surrogate.

    The module's own `training_step` computes the loss, on views that the mirror of the data set's own
    transform makes. When training ends the poison is written to `dir`.

    Example:
        >>> trainer = Trainer(callbacks=[CraftPoison(granularity="class", rounds=1000)])
        >>> trainer.fit(module, loader)  # writes poison.safetensors

    Source: He, Zha, Katabi, "Indiscriminate Poisoning Attacks on Unsupervised Contrastive Learning",
    ICLR 2023.
    """

    def __init__(self, **settings: Any) -> None:
        """Take the settings.

        Args:
            settings: those of `cp_plugin.config.CraftConfig`, by name.

        Raises:
            UserError: an unknown name or a value out of range.
        """
        super().__init__()
        self.config = build(CraftConfig, settings)
        self._resumed: dict[str, Any] | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """End training, and with it the learning-rate schedule, after the last round."""
        if stage != "fit":
            return
        self.folder = Path(self.config.dir) if self.config.dir else run_folder(trainer)
        if (self.folder / POISON_FILE).exists():
            raise UserError(
                f"{self.folder / POISON_FILE} exists and a poison is never overwritten; "
                "set poison.dir to another folder."
            )
        loop, rounds = trainer.fit_loop, self.config.rounds
        if self.config.model_steps == EPOCH:
            loop.max_epochs = _least(loop.max_epochs, rounds)
        else:
            steps = _least(loop.epoch_loop.max_steps, rounds * self.config.model_steps)
            loop.epoch_loop.max_steps = steps

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the data set, build the attack and start feeding poisoned, mirrored views."""
        loader = training_loader(trainer)
        pipeline = Opened(loader.dataset, None).transform
        twin = mirror(pipeline).to(pl_module.device)
        self._opened = Opened(loader.dataset, self.config.image_size or twin.crop_size)
        host = adapt(
            pl_module,
            self._opened.with_views,
            self.config.momentum_modules,
            trainer.precision_plugin.train_step_context,
        )
        if host.momentum_names:
            log.info("momentum branch of %s: %s", host.method, ", ".join(host.momentum_names))
        self._pipeline = repr(pipeline)
        self.attack = self._attack(host, twin, loader.dataset)
        self.schedule = self._schedule(trainer, len(loader))
        self._announce(loader, twin)
        self._steps_seen = trainer.global_step
        self._feed = Feed(trainer, pl_module, self._opened, self._views_of(trainer))
        self._batches = endless(loader)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count optimiser steps; when a model phase is over, run the noise phase."""
        if trainer.global_step == self._steps_seen:  # gradients are still being accumulated
            return
        self._steps_seen = trainer.global_step
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            pl_module.log("cp_model_loss", loss.detach(), prog_bar=True, batch_size=1)
        if self.schedule.model_step():
            noise_loss = self._noise_phase(trainer, pl_module)
            pl_module.log("cp_noise_loss", noise_loss, prog_bar=True, batch_size=1)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the poison."""
        self._feed.stop()
        self.path = self.folder / POISON_FILE
        if trainer.is_global_zero:
            self._complete_keys()
            self.poison().save(self.path)
            log.info("poison written to %s", self.path)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give module and loader their own back when training breaks off."""
        if hasattr(self, "_feed"):
            self._feed.stop()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Write delta beside the checkpoint and the rest of the state into it."""
        tensors = {"delta": self.attack.perturbation.stored}
        if self.attack.rows.keys is not None:
            tensors["keys"] = self.attack.rows.keys
        checkpoint["cp_plugin"] = {
            "steps_done": self.schedule.steps_done,
            "snapshot": snapshot.save(self.folder, trainer.global_step, tensors),
        }

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Take up where the checkpoint was saved.

        Raises:
            UserError: the checkpoint is not of a crafting run, or its snapshot is gone.
        """
        if "cp_plugin" not in checkpoint:
            raise UserError(
                "the checkpoint was saved without a poison being crafted; resume it without "
                "CraftPoison, or start anew."
            )
        saved = checkpoint["cp_plugin"]
        folders = [self.folder]
        if trainer.ckpt_path:
            folders.append(Path(trainer.ckpt_path).parent)
        self._resumed = {**saved, "tensors": snapshot.load(folders, saved["snapshot"])}

    def poison(self) -> Poison:
        """Return the perturbation as it stands; images not seen yet have no row in it."""
        perturbation, rows = self.attack.perturbation, self.attack.rows
        keys = None
        if rows.keys is not None:
            seen = rows.keys != 0
            perturbation = Perturbation(perturbation.stored[seen], perturbation.eps)
            keys = rows.keys[seen]
        return Poison(perturbation, self.config.granularity, keys, self._classes, self._info())

    def _attack(self, host: LightningHost, twin: Mirror, dataset: Any) -> Attack:
        config = self.config
        seed = run_seed() if config.seed is None else config.seed
        self._seed = seed
        generator = torch.Generator().manual_seed(seed)
        targets, names = labels(dataset), class_names(dataset)
        self._classes = names if config.granularity == "class" else None
        chosen = choose(targets, len(self._opened), config.fraction, generator)
        if config.granularity == "class":
            if targets is None or names is None or not bool((targets >= 0).any()):
                raise UserError(
                    "poison.granularity=class needs labelled images and this data set has no "
                    "labels; use labelled data or a sample poison (+poison=cp)."
                )
            rows, count = Rows.of_classes(targets, chosen), len(names)
        else:
            rows = Rows.of_samples(chosen)
            count = int(chosen.sum())
        shape = tuple(self._opened[0].image.shape)
        perturbation = self._start(count, shape, generator)
        if self._resumed:
            perturbation = Perturbation(self._resumed["tensors"]["delta"], config.eps)
            if rows.keys is not None:
                rows.restore(self._resumed["tensors"]["keys"])
        elif config.init != "random":
            self._start_from(Poison.load(config.init), perturbation, rows, targets)
        return Attack(host, twin, perturbation, rows, config, seed)

    def _start(self, count: int, shape: Any, generator: torch.Generator) -> Perturbation:
        config = self.config
        bytes_ = count * shape[0] * shape[1] * shape[2] * 4
        file = self.folder / "delta.rows" if bytes_ > MAPPED_BYTES else None
        return Perturbation.uniform(count, shape, config.eps, config.dtype, generator, file)

    def _start_from(
        self, poison: Poison, perturbation: Perturbation, rows: Rows, targets: Tensor | None
    ) -> None:
        """Start from a poison file: rows of its classes, or of the same images, are taken over."""
        if poison.perturbation.shape != perturbation.shape:
            raise UserError(
                f"poison.init has deltas of shape {poison.perturbation.shape}, this run needs "
                f"{perturbation.shape}; use a poison of the same image size."
            )
        names = class_names(self._opened.dataset)
        poison.check_classes(names)
        for images in torch.arange(len(self._opened)).split(1024):
            own = rows.of_image[images]
            if poison.granularity == "class":
                known = [None] * len(images) if targets is None else targets[images].tolist()
                labels_ = [names[y] if names and y is not None and y >= 0 else None for y in known]
                theirs = poison.rows(classes=labels_)
            else:
                theirs = poison.rows(keys=[self._opened[int(i)].key for i in images])
            use = (own >= 0) & (theirs >= 0)
            perturbation.write(own[use], poison.perturbation.gather(theirs[use]))

    def _schedule(self, trainer: Any, batches: int) -> Schedule:
        config = self.config
        an_epoch = max(1, -(-batches // trainer.accumulate_grad_batches))
        return Schedule(
            config.rounds,
            an_epoch if config.model_steps == EPOCH else config.model_steps,
            batches if config.noise_steps == EPOCH else config.noise_steps,
            config.pgd_steps,
            self._resumed["steps_done"] if self._resumed else 0,
        )

    def _announce(self, loader: Any, twin: Mirror) -> None:
        passes = self.schedule.image_passes(loader.batch_size, twin.views)
        epochs = passes / (len(self._opened) * twin.views)
        log.info(
            "crafting: %d rounds of %d + %d steps, %s image passes in all, as many as %.1f epochs",
            self.schedule.rounds,
            self.schedule.model_steps,
            self.schedule.noise_steps,
            f"{passes:,}",
            epochs,
        )

    def _views_of(self, trainer: Any) -> Any:
        def views(batch: Batch) -> list[Tensor]:
            number = trainer.fit_loop.total_batch_idx
            return self.attack.views(batch, number)

        return views

    def _noise_phase(self, trainer: Any, pl_module: Any) -> Tensor:
        raw = itertools.islice(self._batches, self.schedule.noise_steps)
        moved = (pl_module.transfer_batch_to_device(batch, pl_module.device, 0) for batch in raw)
        losses = list(self.attack.noise_phase(moved, trainer.global_step))
        return torch.stack(losses).mean()

    def _complete_keys(self) -> None:
        """Find the keys of rows whose images no batch has brought; a duplicate's row stays without."""
        rows = self.attack.rows
        if rows.keys is None:
            return
        for image, row in enumerate(rows.of_image.tolist()):
            if row >= 0 and rows.keys[row] == 0:
                rows.claim(self._opened[image].key, row)

    def _info(self) -> dict[str, str]:
        host = self.attack.host
        backbone = getattr(host.module, "backbone_name", None)
        return {
            "host": host.framework,
            "method": host.method,
            "backbone": str(backbone or type(host.encoder()).__name__),
            "augmentations": self._pipeline,
            "schedule": json.dumps(
                {
                    "rounds": self.schedule.rounds,
                    "model_steps": self.schedule.model_steps,
                    "noise_steps": self.schedule.noise_steps,
                    "pgd_steps": self.schedule.pgd_steps,
                    "step_size": self.config.step_size,
                    "dual_branch": self.config.dual_branch,
                    "surrogate_steps_done": self.schedule.steps_done,
                }
            ),
            "fraction": str(self.config.fraction),
            "seed": str(self._seed),
            "versions": json.dumps(versions()),
        }


def choose(
    targets: Tensor | None, count: int, fraction: float, generator: torch.Generator
) -> Tensor:
    """Return which images are poisoned, bool (N): the same part of each class where there are labels."""
    chosen = torch.zeros(count, dtype=torch.bool)
    groups = torch.zeros(count, dtype=torch.int64) if targets is None else targets
    for group in groups.unique():
        members = (groups == group).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=generator)
        chosen[members[order[: max(1, round(fraction * len(members)))]]] = True
    return chosen


def _least(limit: int | None, ours: int) -> int:
    """Return the smaller limit; Lightning writes `no limit` as -1 or None."""
    return ours if limit is None or limit < 0 else min(limit, ours)
