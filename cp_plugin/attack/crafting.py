"""What is crafted and how far: rows of delta for the images of a data set, schedule, poison.

The shell around the attack that the Lightning callback and the plain loop share.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cp_plugin.attack.inject import check_unpoisoned
from cp_plugin.attack.loop import Attack, Schedule
from cp_plugin.attack.poison_file import ATTACHED, MEMBERS, Poison
from cp_plugin.attack.record import record
from cp_plugin.attack.start import start
from cp_plugin.attack.stream_rows import ClassRows
from cp_plugin.attack.stream_start import start_on_stream
from cp_plugin.config.settings import EPOCH, AlternationConfig, UserError
from cp_plugin.data import RawDataset, RawStream, labels, names_or_numbers
from cp_plugin.data.batch import Batch
from cp_plugin.data.canonical import aspects
from cp_plugin.data.labels import cluster_name
from cp_plugin.hosts.module import ModuleHost
from cp_plugin.hosts.protocol import LossRequests, answer
from cp_plugin.mirror import Mirror
from cp_plugin.util.timing import told

log = logging.getLogger("cp_plugin")

CHECK_EVERY = 100
"""Gradients of noise phases between two checks that the loss reads no labels."""
CLEAN_SHARE = 0.2
"""Part of a craft by cluster that comes before there are clusters, on clean images."""
DEVICE_BYTES = 4 << 30
"""Rows up to this size are kept where the model is while they are crafted."""
SECONDS_BETWEEN_LINES = 60.0
"""Of the log in a long noise phase, while training makes no step."""


class Crafting:
    """One poison in the making."""

    kind = "cp"
    """Which poison it is, as the file says."""

    def __init__(
        self,
        host: ModuleHost,
        view_mirror: Mirror,
        raw: RawDataset | RawStream,
        config: AlternationConfig,
        seed: int,
        folder: Path,
        resumed: Mapping[str, Any] | None = None,
    ) -> None:
        """Make the rows of delta and bind them to a host.

        Args:
            host: the surrogate.
            view_mirror: the mirror of the data set's transform.
            raw: the data set or stream without its transform.
            config: the settings.
            seed: of start and augmentations.
            folder: where a perturbation too large for memory is.
            resumed: what `state` gave, with `tensors`.

        Raises:
            UserError: class granularity without labels, images that carry a poison already, or a
                start that does not fit.
        """
        check_unpoisoned(raw.dataset)
        self.host, self.mirror, self.raw = host, view_mirror, raw
        self.config, self.seed, self.folder = config, seed, folder
        self.labels = None if isinstance(raw, RawStream) else labels(raw.dataset)
        """int64 (N), by row; None where there are none, or where samples alone tell them."""
        self._steps_done = int(resumed["steps_done"]) if resumed else 0
        self._chosen: Tensor | None = None
        begun = (
            start_on_stream(raw, config, seed, folder, resumed)
            if isinstance(raw, RawStream)
            else start(raw, self.labels, config, seed, folder, resumed)
        )
        self._images, self._parts_before = begun.images, begun.parts
        self._in_part = begun.chosen
        self._attached: dict[str, Tensor] = {}
        self.facts: dict[str, str] = {}
        """Of a poison by cluster, text that the poison file carries beside what is known of all."""
        if begun.perturbation.nbytes <= DEVICE_BYTES:
            begun.perturbation.move(host.device)
        of_images = None
        if config.fit == "cover" and isinstance(raw, RawDataset):
            of_images = aspects(raw)
        self.attack = Attack(
            host, view_mirror, begun.perturbation, begun.rows, config, seed, of_images
        )
        if resumed:
            self.regroup(resumed["tensors"], resumed.get("facts", {}))
        self._bound = list(host.momentum_modules())
        host.branch.dual = config.uses_dual_branch
        self._gradients_since_check = 0
        self._model_loss: Tensor | None = None
        """The last loss of a model step."""
        self.schedule = self._schedule(1, 1)

    def plan(self, batches: float, accumulated: int = 1, steps: float = math.inf) -> None:
        """Turn `epoch` into numbers of steps.

        Args:
            batches: of an epoch; infinity where they are not known.
            accumulated: batches an optimiser step.
            steps: optimiser steps after which the host's own training ends.

        Raises:
            UserError: an epoch is asked for and its number of batches is not known.
        """
        if batches == math.inf and EPOCH in (self.config.model_steps, self.config.noise_steps):
            raise UserError(
                f"poison.model_steps={self.config.model_steps} and "
                f"poison.noise_steps={self.config.noise_steps} ask for whole epochs, and "
                f"{type(self.raw.dataset).__name__} streams images without telling how many; set "
                "both to numbers, or give the stream __len__."
            )
        self.schedule = self._schedule(batches, accumulated)
        if self.config.granularity == "cluster":
            length = self.schedule.model_steps
            whole = int(min(self.schedule.total_steps, steps)) // length
            self.schedule.clean_steps = max(1, round(CLEAN_SHARE * whole)) * length

    @property
    def awaits_clusters(self) -> bool:
        """Whether the surrogate has just seen its last clean images: `group` is to be called."""
        done, clean = self.schedule.steps_done, self.schedule.clean_steps
        return clean > 0 and done == clean

    def group(
        self, clusters_N: Tensor, attached: Mapping[str, Tensor], facts: Mapping[str, str]
    ) -> None:
        """Give every image the row of its cluster; from here on images carry delta.

        Args:
            clusters_N: int64 (N), the cluster of each image of the data set.
            attached: further tensors for the poison file, which tell the cluster of a new image.
            facts: further text for the poison file.
        """
        rows = self.attack.rows
        rows.of_image = torch.where(self._in_part, clusters_N, -1)
        carry = rows.of_image >= 0
        keys = torch.tensor([self.raw[image].key for image in carry.nonzero().flatten().tolist()])
        self._attached = {**attached, MEMBERS: torch.stack([keys, rows.of_image[carry]], 1)}
        self.facts = dict(facts)

    def regroup(self, tensors: Mapping[str, Any], facts: Mapping[str, str]) -> None:
        """Put the images into the clusters of an earlier run's state, where it had any by then.

        Args:
            tensors: what `tensors` gave.
            facts: what `facts` was.

        Raises:
            UserError: it is the state of another data set.
        """
        if "clusters" not in tensors:
            return
        clusters, rows = tensors["clusters"], self.attack.rows
        if clusters.shape != rows.of_image.shape:
            raise UserError(
                f"the state tells the clusters of {len(clusters)} images, and this data set has "
                f"{len(rows.of_image)}; resume with the data set that it was made with, or start "
                "anew."
            )
        rows.of_image = clusters
        self._attached = {name: t for name, t in tensors.items() if name.startswith(ATTACHED)}
        self.facts = dict(facts)

    def labels_of(self, batch: Batch) -> Tensor | None:
        """Return the labels of a batch's images, int64 (B), None where there are none."""
        return batch.labels if self.labels is None else self.labels[batch.rows]

    def noise_requests(
        self, batches: Iterable[Batch], step: int, losses: list[Tensor]
    ) -> LossRequests:
        """Ask for the losses of a noise phase, see `Attack.noise_requests`.

        Raises:
            UserError: no batch had a loss, or one was not finite.
        """
        self._check_model_loss()
        self.rebind()
        left = iter(batches)
        if self._checks_labels():
            first = next(left)
            views = [view.detach() for view in self.attack.views(first, step)]
            yield from self.host.checking_labels(views, first, self.labels_of(first))
            left = itertools.chain([first], left)
        shown = told("noise phase", left, self.schedule.noise_steps, SECONDS_BETWEEN_LINES)
        yield from self.attack.noise_requests(shown, step, losses)
        if not losses:
            raise UserError(
                f"no batch of the noise phase after step {step} had a loss: {self.host.method} "
                "left all of them out, so the perturbation would stay as it started; return a loss "
                "from training_step, or give it to manual_backward, in eval mode too, or use "
                "longer noise phases (poison.noise_steps)."
            )
        mean = float(torch.stack(losses).mean())
        if not math.isfinite(mean):
            raise UserError(
                f"a loss of {self.host.method} in the noise phase after model step {step} was "
                f"{mean}, so the surrogate has diverged and no poison is written; lower its "
                "learning rate or train it in a higher precision."
            )

    def _checks_labels(self) -> bool:
        """Whether to look again for a term of the loss that reads labels: one may set in later.

        Every so many gradients, so that it costs next to nothing, and before the poison is written.
        """
        steps = self.schedule.noise_steps * self.schedule.pgd_steps
        self._gradients_since_check += steps
        due = self._gradients_since_check > CHECK_EVERY or self.schedule.finished
        if due:
            self._gradients_since_check = 0
        return due

    def noise_phase(self, batches: Iterable[Batch], step: int) -> Tensor:
        """Run a noise phase on the host's own loss; return the mean loss."""
        losses: list[Tensor] = []
        answer(self.noise_requests(batches, step, losses), self.host)
        return torch.stack(losses).mean()

    def rebind(self) -> None:
        """Take the modules of the momentum branch as they are now: hosts may replace them."""
        found = list(self.host.momentum_modules())
        if [id(module) for module in found] != [id(module) for module in self._bound]:
            old = self.attack
            self.attack = Attack(
                self.host,
                self.mirror,
                old.perturbation,
                old.rows,
                self.config,
                self.seed,
                old.aspects,
            )
            self.attack.scaled, self.attack.term = old.scaled, old.term
            self._bound = found

    def announce(self, batch_size: int, steps: float = math.inf) -> None:
        """Log what the whole craft costs.

        Args:
            batch_size: images a batch, of all processes.
            steps: optimiser steps after which the host's own training ends.
        """
        least = min(self.schedule.total_steps, steps)
        rounds = math.ceil(least / self.schedule.model_steps)
        passes = replace(self.schedule, rounds=rounds).image_passes(batch_size, self.mirror.views)
        epochs = ""
        with suppress(TypeError):  # of a stream that does not tell its length
            epochs = f", as many as {passes / (len(self.raw) * self.mirror.views):.1f} epochs"
        log.info(
            "crafting: %d rounds of %d + %d steps, %s image passes in all%s",
            rounds,
            self.schedule.model_steps,
            self.schedule.noise_steps,
            f"{passes:,}",
            epochs,
        )

    def check_steps(self, steps: float) -> None:
        """Check, before training starts, that it lasts until delta moves.

        Args:
            steps: optimiser steps that the training will have.

        Raises:
            UserError: it ends before the first noise phase.
        """
        noise = bool(self.schedule.noise_steps)
        first = self.schedule.clean_steps + (self.schedule.model_steps if noise else 1)
        if steps < first:
            what = "the first noise phase comes" if noise else "delta moves for the first time"
            raise UserError(
                f"training would end after {steps:.0f} optimiser steps, and {what} after {first}, "
                "so the perturbation would stay the noise that it starts from; train longer "
                "(max_epochs, max_steps, limit_train_batches) or set poison.model_steps to fewer."
            )

    def check_loss(self, loss: Tensor) -> None:
        """Check the loss of a model step; on an accelerator once a round, which it waits for.

        Raises:
            UserError: it is not finite, from where on nothing is learnt from it.
        """
        self._model_loss = loss.detach()
        if loss.device.type == "cpu":
            self._check_model_loss()

    def _check_model_loss(self) -> None:
        if self._model_loss is not None and not bool(torch.isfinite(self._model_loss).all()):
            raise UserError(
                f"the loss of {self.host.method} at model step {self.schedule.steps_done + 1} is "
                f"{float(self._model_loss.float().mean())}, so the surrogate has diverged and no "
                "poison is written; lower its learning rate or train it in a higher precision."
            )

    def finish(self) -> Poison:
        """Return the poison to be written; log how many rows it lacks or left as they started.

        Images that no batch has brought have no row in it, and its fraction says so.

        Raises:
            UserError: there was no noise phase, no gradient has moved any row, or the last loss was
                not finite.
        """
        self._check_model_loss()
        done, moved = self.schedule.noise_steps_done, self.attack.perturbation.moved
        if done == 0:
            raise UserError(
                f"training ended after {self.schedule.steps_done} model steps, before the first "
                f"noise phase after {self.schedule.model_steps}, so the perturbation is the noise "
                "that it started from and no poison is written; train longer, or set "
                "poison.model_steps to fewer."
            )
        if not bool(moved.any()):
            raise UserError(
                f"no row of the perturbation has moved in {done} noise steps, since every gradient "
                f"was zero or not a number, so no poison is written; check the loss of "
                f"{self.host.method} in eval mode, such as a square root at zero."
            )
        missing = self._count_missing()
        if missing:
            log.warning(
                "%d images were in no batch, as those are that drop_last leaves out of each epoch; "
                "they stay clean, and the poison's fraction says so",
                missing,
            )
        poison = self.poison()
        left = json.loads(poison.info["schedule"])["rows_not_moved"]
        if left:
            log.warning(
                "%d of %d rows were in no noise phase and are as they started; more rounds or "
                "longer noise phases (poison.noise_steps) reach them",
                left,
                len(poison.perturbation),
            )
        return poison

    def _count_missing(self) -> int:
        """Count the different images that are to be poisoned and that no batch has brought."""
        rows = self.attack.rows
        if rows.keys is None or isinstance(self.raw, RawStream):
            return 0
        brought, all_ = int((rows.keys != 0).sum()), int((self._all_keys(rows.keys) != 0).sum())
        if brought < all_ and self._images is None:
            self._images = all_
        return all_ - brought

    def _all_keys(self, keys_K: Tensor) -> Tensor:
        """Return the keys of all rows; a row stays without where an identical image has one."""
        of_image = self.attack.rows.of_image
        left = (of_image >= 0) & (keys_K[of_image] == 0)
        if not bool(left.any()):
            return keys_K
        keys_K, seen = keys_K.clone(), set(keys_K.tolist())
        for image in left.nonzero().flatten().tolist():
            key = self.raw[image].key
            if key not in seen:
                seen.add(key)
                keys_K[of_image[image]] = key
        return keys_K

    def tensors(self) -> dict[str, Tensor]:
        """Return which rows have moved, their keys, and the clusters where there are any.

        With delta they are what is needed to go on.
        """
        rows = self.attack.rows
        grouped = {"clusters": rows.of_image, **self._attached} if self._attached else {}
        return {"moved": self.attack.perturbation.moved, **rows.tensors(), **grouped}

    def poison(self, whole: bool = False) -> Poison:
        """Return the perturbation as it stands.

        Args:
            whole: with the rows of images that no batch has brought yet.
        """
        rows, perturbation, keys = self.attack.rows, self.attack.perturbation, None
        carried = torch.ones(len(perturbation), dtype=torch.bool)
        if rows.keys is not None:
            keys = self._all_keys(rows.keys) if whole else rows.keys
            carried = keys != 0
            keys = keys[carried]
        moved = perturbation.moved.cpu()[carried]
        shared, attached = self.config.granularity != "sample", self._attached
        classes = self._classes() if shared else None
        chosen = None
        if self.config.granularity == "cluster":
            classes = tuple(cluster_name(number) for number in range(len(perturbation)))
            attached = attached or {MEMBERS: torch.empty(0, 2, dtype=torch.int64)}
        elif shared and self.config.fraction < 1:
            chosen = self._chosen_keys()
        info = record(
            self.kind,
            self.host,
            self.mirror,
            self.config,
            self.schedule,
            self.seed,
            self._parts_before,
            int((~moved).sum()),
        )
        info |= self.facts
        carry = attached[MEMBERS][:, 0] if MEMBERS in attached else chosen if shared else keys
        if self._images and carry is not None:
            info |= {"fraction": repr(len(carry) / self._images), "images": str(self._images)}
        return Poison(
            perturbation.selected(carried.nonzero().flatten()),
            "class" if shared else "sample",
            keys,
            classes,
            info,
            chosen,
            attached,
        )

    def _classes(self) -> tuple[str, ...] | None:
        rows = self.attack.rows
        return rows.classes if isinstance(rows, ClassRows) else names_or_numbers(self.raw.dataset)

    def _chosen_keys(self) -> Tensor:
        """Return the keys of the images that carry the delta of their class."""
        if self._chosen is None:
            images = (self.attack.rows.of_image >= 0).nonzero().flatten().tolist()
            self._chosen = torch.tensor(sorted({self.raw[image].key for image in images}))
        return self._chosen

    def _schedule(self, batches: float, accumulated: int) -> Schedule:
        config = self.config
        whole = 1 if batches == math.inf else int(batches)
        an_epoch = max(1, -(-whole // accumulated))
        noise_steps = whole if config.noise_steps == EPOCH else config.noise_steps
        return Schedule(
            config.rounds * (config.restarts + 1),
            an_epoch if config.model_steps == EPOCH else config.model_steps,
            0 if config.joint else noise_steps,
            config.pgd_steps,
            self._steps_done,
        )
