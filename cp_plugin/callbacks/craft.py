"""Crafting a poison inside the host's own training."""

from __future__ import annotations

import itertools
import logging
import os
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from cp_plugin.attack import snapshot
from cp_plugin.attack.crafting import Crafting
from cp_plugin.attack.images import raw_and_mirror
from cp_plugin.attack.loop import Attack, Schedule, Term
from cp_plugin.attack.poison_file import Poison
from cp_plugin.callbacks.base import POISON, VIEWS, Callback, prepare_fit, run_folder
from cp_plugin.callbacks.loader_hooks import LoaderHooks, check_batches, training_loader
from cp_plugin.callbacks.lost import tell_lost
from cp_plugin.callbacks.restart import Restarts
from cp_plugin.callbacks.resumption import Resumption
from cp_plugin.config.settings import (
    EPOCH,
    AlternationConfig,
    CacheMode,
    CraftConfig,
    UserError,
    cache_mode,
    given,
)
from cp_plugin.data import RawDataset, RawStream, streams
from cp_plugin.data.batch import Batch
from cp_plugin.data.loading import batch_size_of, batches_of, moved
from cp_plugin.data.order import Endless
from cp_plugin.data.read_once import read_once
from cp_plugin.evaluation.clusters import Placing, put_into_clusters
from cp_plugin.hosts import adapt
from cp_plugin.hosts.by_hand import by_hand
from cp_plugin.hosts.lightning import LightningHost
from cp_plugin.util.random_state import random_state_kept
from cp_plugin.util.run_files import POISON_FILE
from cp_plugin.util.seed import run_seed

log = logging.getLogger("cp_plugin")


class CraftPoison(Callback):
    """Craft a contrastive poison while a LightningModule trains as the surrogate.

    The module's own `training_step` computes the loss, on views that the mirror of the data set's
    own transform makes. When training ends the poison is written to `dir`.

    Example:
        >>> trainer = Trainer(callbacks=[CraftPoison(granularity="class", rounds=1000)])
        >>> trainer.fit(module, loader)  # writes poison.safetensors

    Source: He, Zha, Katabi, "Indiscriminate Poisoning Attacks on Unsupervised Contrastive
    Learning", ICLR 2023.
    """

    config_class: type[AlternationConfig] = CraftConfig
    kind = "cp"
    """What the poison file calls the poison."""
    serves_streams = True
    """Whether a stream can be crafted on, whose images have no rows."""
    acts_on_images = (POISON, VIEWS)

    def __init__(
        self,
        config: AlternationConfig | None = None,
        cache: CacheMode = "auto",
        **settings: Any,
    ) -> None:
        """Take the settings.

        Args:
            config: a `config_class`; None: made of `settings`.
            cache: whether images are read once, see `cp_plugin.data.read_once`.
            settings: those of `config_class`, by name.

        Raises:
            UserError: an unknown name or a value out of range.
        """
        super().__init__()
        self.config = given(self.config_class, config, settings)
        self._cache = cache_mode(cache)
        self._resumed: dict[str, Any] | None = None
        self._restarts: Restarts | None = None
        self._longest: int | None = None
        """The user's own `max_steps`, below 0 for none, where training ends by ours; else None."""
        self.placed: Placing | None = None
        """What a poison by cluster carries to tell the cluster of a new image; None: nothing."""
        self._run_folder: Path | None = None
        self._parent = os.getppid()
        self._surplus = 0
        """How many more steps the optimizers have made than there were model steps."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """End training, and with it the learning-rate schedule, after a surrogate's last round."""
        if stage != "fit":
            return
        prepare_fit(trainer)
        self._trainer = trainer
        loop, rounds = trainer.fit_loop, self.config.rounds
        if self.config.model_steps == EPOCH:
            loop.max_epochs = _least(loop.max_epochs, rounds)
        else:
            theirs = loop.epoch_loop.max_steps
            loop.epoch_loop.max_steps = _least(theirs, rounds * self.config.model_steps)
            if loop.epoch_loop.max_steps != theirs:
                self._longest = theirs * (self.config.restarts + 1)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Prolong training by further surrogates, and by what the optimizers are ahead.

        Not sooner, since the first one's schedule is as long as one surrogate is trained, and not
        later, since a run that is resumed past the first surrogate's end would be taken as over.
        """
        if self.config.restarts:
            initial = (self._resumed or {}).get("initial")
            self._restarts = Restarts(trainer, pl_module, self.config.restarts, initial)
        self._prolong((self._resumed or {}).get("surplus", 0))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the data set, build the attack and start feeding poisoned, mirrored views."""
        self._start(trainer, pl_module)
        self._resumption.on_train_start((self._resumed or {}).get("resumption"))

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Let the first epoch after a resume begin as it would have."""
        self._resumption.on_train_epoch_start()

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask for the run's folder once, which a host's own callbacks name as training starts.

        Not as an epoch starts: a run that goes on in mid-epoch passes that over.
        """
        if self._run_folder is None:
            self._run_folder = run_folder(trainer)

    @random_state_kept()
    def _start(self, trainer: Any, pl_module: Any) -> None:
        self._run_folder = None
        if self.path.exists() and self._resumed is None and not trainer.fast_dev_run:
            raise UserError(
                f"{self.path} exists and a poison is never overwritten; set poison.dir to another "
                "folder."
            )
        loader = training_loader(trainer)
        self._check_stream(loader.dataset)
        raw, view_mirror = raw_and_mirror(loader.dataset, self.config)
        read_once(raw, self._cache, loader)
        view_mirror = view_mirror.to(pl_module.device)
        host = self.adapted(trainer, pl_module, raw)
        host.check(view_mirror.views)
        self._host = host
        seed = run_seed() if self.config.seed is None else self.config.seed
        self.crafting = Crafting(
            host, view_mirror, raw, self.config, seed, self.folder, self._resumed
        )
        self.crafting.kind = self.kind
        scaler = getattr(trainer.precision_plugin, "scaler", None)  # of precision=16-mixed
        if scaler is not None:
            self.attack.scaled = scaler.scale
        self.attack.term = self.term()
        self.plan(trainer, loader)
        batch_size = batch_size_of(loader) * trainer.world_size
        self.crafting.announce(batch_size, trainer.estimated_stepping_batches)
        self._check_length(trainer)
        self._momentum_known = False
        self._steps_seen = trainer.global_step
        self._hooks = LoaderHooks(trainer, pl_module, raw, self._views_of(trainer))
        self._batches = Endless(loader)
        self._resumption = Resumption(trainer, loader, self._hooks.order, self._batches)

    def _check_stream(self, dataset: Any) -> None:
        """Check that the poison can be made of a stream, where the data set is one.

        Raises:
            UserError: it cannot.
        """
        if streams(dataset) and not self.serves_streams:
            raise UserError(
                f"poison={self.kind} looks up the label of each image by its row, and "
                f"{type(dataset).__name__} streams its images; craft +poison=cp_class or "
                "+poison=cp on it, or use a map-style data set."
            )

    def adapted(self, trainer: Any, pl_module: Any, raw: RawDataset | RawStream) -> LightningHost:
        """Return the surrogate behind the protocol that the attack sees.

        Raises:
            UserError: it does not fit.
        """
        assert isinstance(self.config, CraftConfig)
        context = trainer.precision_plugin.train_step_context
        return adapt(pl_module, raw.with_views, self.config.momentum_modules, context, trainer)

    def term(self) -> Term | None:
        """Return what is minimised of the perturbation itself; None: nothing is."""
        return None

    def plan(self, trainer: Any, loader: DataLoader[Any]) -> None:
        """Turn `epoch` into numbers of steps."""
        batches = min(batches_of(loader), trainer.num_training_batches)  # less than all, if so told
        self.crafting.plan(
            batches, trainer.accumulate_grad_batches, trainer.estimated_stepping_batches
        )

    def _check_length(self, trainer: Any) -> None:
        """Check that training lasts until a noise phase."""
        self.crafting.check_steps(trainer.estimated_stepping_batches)

    @property
    def folder(self) -> Path:
        """Where poison and snapshots go; the run's folder may be known only as training starts.

        From then on a process need not ask the others for it.
        """
        if self.config.dir:
            return Path(self.config.dir)
        return run_folder(self._trainer) if self._run_folder is None else self._run_folder

    @property
    def path(self) -> Path:
        """The poison file."""
        return self.folder / POISON_FILE

    @property
    def attack(self) -> Attack:
        """The perturbation and what moves it."""
        return self.crafting.attack

    @property
    def schedule(self) -> Schedule:
        """How far crafting is."""
        return self.crafting.schedule

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count model steps; when a model phase is over, run the noise phase.

        Raises:
            UserError: the loss of the step is not finite.
        """
        found = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(found, Tensor):
            self.crafting.check_loss(found)
        if not self._model_step_done(pl_module):
            return
        if isinstance(found, Tensor):
            pl_module.log("cp_model_loss", found.detach(), prog_bar=True, batch_size=1)
        self.attack.check_moved(f"{type(pl_module).__name__}.training_step")
        if self.schedule.model_step():
            noise_loss = self._noise_phase(trainer, pl_module)
            pl_module.log("cp_noise_loss", noise_loss, prog_bar=True, batch_size=1)
        if self.crafting.awaits_clusters:
            put_into_clusters(self.crafting, self.placed)
        if self._restarts is not None:
            self._restarts.after_step(self.schedule.steps_done)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the poison."""
        self._hooks.stop()
        if trainer.fast_dev_run:
            log.info("fast_dev_run has tried crafting; no poison is written")
            return
        # A run that is resumed after its poison was written keeps what it wrote.
        if trainer.is_global_zero and not self.path.exists():
            self.crafting.finish().save(self.path)
            log.info("poison written to %s", self.path)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Say so where there was nothing to train on.

        A run that was killed between its last checkpoint and the poison has nothing left to train,
        so that training never starts; its poison is written all the same.

        Raises:
            UserError: the training loader brings no batch.
        """
        check_batches(trainer)
        if self._resumed is not None and not hasattr(self, "crafting"):
            self._start(trainer, pl_module)
            self.on_train_end(trainer, pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Remove the file of a large perturbation that no checkpoint needs any more."""
        ended = stage == "fit" and hasattr(self, "crafting")
        if ended and trainer.is_global_zero and self.path.exists():
            snapshot.remove_unnamed(self.folder)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give module and loader their own back when training breaks off."""
        if hasattr(self, "_hooks"):
            self._hooks.stop()
        tell_lost(trainer, exception, self._parent)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Write delta beside the checkpoint and the rest of the state into it."""
        resumption = self._resumption.state()  # all processes say what they have seen
        if not trainer.is_global_zero:  # only the first one writes the checkpoint
            return
        checkpoint["cp_plugin"] = {
            "steps_done": self.schedule.steps_done,
            "facts": self.crafting.facts,
            "surplus": self._surplus,
            "resumption": resumption,
            "snapshot": snapshot.save(
                self.folder,
                trainer.global_step,
                self.attack.perturbation,
                self.crafting.tensors(),
                [self._run_folder or self.folder, *_checkpoint_folders(trainer)],
            ),
        }
        if self._restarts is not None:
            checkpoint["cp_plugin"]["initial"] = self._restarts.initial

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
        return self.crafting.poison()

    def _views_of(self, trainer: Any) -> Any:
        def views(batch: Batch) -> list[Tensor]:
            made = self.attack.views(batch, trainer.fit_loop.total_batch_idx)
            if not self._momentum_known:
                # Not before: hooks of the module may freeze or build networks as training starts.
                self._momentum_known = self._host.detect_momentum(
                    [view.detach() for view in made], batch, self.crafting.labels_of(batch)
                )
                self.crafting.rebind()
            return made

        return views

    def _noise_phase(self, trainer: Any, pl_module: Any) -> Tensor:
        raw = itertools.islice(self._batches, self.schedule.noise_steps)
        on_device = (moved(batch, pl_module.device) for batch in raw)
        return self.crafting.noise_phase(on_device, self.schedule.steps_done)

    def _model_step_done(self, pl_module: Any) -> bool:
        """Whether the batch that is over was a model step, and not one of several of a step.

        A module that optimises by hand has several optimizers step in one batch, or none: each of
        its training steps is a model step.
        """
        steps = self._trainer.global_step - self._steps_seen
        if steps == 0 and not by_hand(pl_module):  # gradients are still being accumulated
            return False
        self._steps_seen += steps
        self._prolong(steps - 1)
        return True

    def _prolong(self, surplus: int) -> None:
        """Let training last longer by optimiser steps that are no model steps of their own."""
        self._surplus += surplus
        if surplus and self._longest is not None:
            loop = self._trainer.fit_loop.epoch_loop
            loop.max_steps = _least(self._longest, loop.max_steps + surplus)


def _checkpoint_folders(trainer: Any) -> list[Path]:
    """Return where the checkpoints of a run are, as far as its callbacks say."""
    said = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    return [Path(folder) for folder in said if folder]


def _least(limit: int | None, ours: int) -> int:
    """Return the smaller limit; Lightning writes `no limit` as -1 or None."""
    return ours if limit is None or limit < 0 else min(limit, ours)
