"""A perturbation handed on to new surrogates within one training."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

log = logging.getLogger("cp_plugin")


class Restarts:
    """Begins a surrogate anew each time its steps are over: weights, optimizer, schedule.

    A young surrogate reads delta otherwise than one that was trained for long; a poison that was
    handed on through several outlasts more of a victim's training.
    """

    def __init__(
        self, trainer: Any, module: Any, count: int, initial: Mapping[str, Tensor] | None = None
    ) -> None:
        """Take the initial weights and prolong training; call in `on_fit_start`.

        Args:
            trainer: a Lightning trainer whose limits are those of one surrogate.
            module: the surrogate.
            count: how often it begins anew.
            initial: the initial state of the module, from a checkpoint; None: its present one.
        """
        self._trainer, self._module, self._count = trainer, module, count
        found = module.state_dict() if initial is None else initial
        self.initial = {name: value.clone() for name, value in found.items()}
        self.steps = int(trainer.estimated_stepping_batches)
        """Optimiser steps of one surrogate."""
        if hasattr(module, "schedule_steps"):
            module.schedule_steps = self.steps
        self._stretch(count + 1)

    def after_step(self) -> None:
        """Begin anew where a surrogate's steps are over; call after every optimiser step."""
        done = self._trainer.global_step
        if done % self.steps or done >= self.steps * (self._count + 1):
            return
        self._module.load_state_dict(self.initial)
        self._stretch(1 / (self._count + 1))  # the schedule of one surrogate asks for its length
        try:
            self._trainer.strategy.setup_optimizers(self._trainer)
        finally:
            self._stretch(self._count + 1)
        log.info("crafting: new surrogate after %d steps", done)

    def _stretch(self, factor: float) -> None:
        loop = self._trainer.fit_loop
        if loop.max_epochs is not None and loop.max_epochs > 0:
            loop.max_epochs = round(loop.max_epochs * factor)
        if loop.epoch_loop.max_steps > 0:
            loop.epoch_loop.max_steps = round(loop.epoch_loop.max_steps * factor)
