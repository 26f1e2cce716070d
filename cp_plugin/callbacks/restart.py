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
        self._single = self._limits
        self._limits = tuple(_times(count + 1, limit) for limit in self._single)

    def after_step(self, done: int) -> None:
        """Begin anew where a surrogate's steps are over; call after every model step.

        Args:
            done: model steps so far, of all surrogates.
        """
        if done % self.steps or done >= self.steps * (self._count + 1):
            return
        self._module.load_state_dict(self.initial)
        whole, self._limits = self._limits, self._single  # a schedule asks for its length
        try:
            self._trainer.strategy.setup_optimizers(self._trainer)
        finally:
            self._limits = whole
        log.info("crafting: new surrogate after %d steps", done)

    @property
    def _limits(self) -> tuple[int | None, ...]:
        """The trainer's limits: epochs and optimiser steps; below 1 or None: none."""
        loop = self._trainer.fit_loop
        return loop.max_epochs, loop.epoch_loop.max_steps

    @_limits.setter
    def _limits(self, limits: tuple[int | None, ...]) -> None:
        loop = self._trainer.fit_loop
        loop.max_epochs, loop.epoch_loop.max_steps = limits


def _times(factor: int, limit: int | None) -> int | None:
    return limit * factor if limit is not None and limit > 0 else limit
