"""A craft that compares module and trainer before and after each noise phase."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from cp_plugin import CraftPoison
from tests.support.lightly_suite import state_of

BACKWARD = Tensor.backward


def everything(trainer: Any, module: Any) -> dict[str, Any]:
    """Return copies of all that a noise phase might change in a module and its trainer."""
    optimizers = [*trainer.strategy._lightning_optimizers, *trainer.optimizers]
    schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
    return {
        "module": state_of(module),
        "names": [sorted(vars(o)) for o in (module, trainer.strategy, *optimizers, *schedules)],
        "optimizers": copy.deepcopy([o.state_dict() for o in trainer.optimizers]),
        "schedules": copy.deepcopy([schedule.state_dict() for schedule in schedules]),
        "gradients": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
        "steps": trainer.global_step,
    }


class Watched(CraftPoison):
    """Compares module and trainer before and after each noise phase."""

    phases = 0

    def _noise_phase(self, trainer: Any, pl_module: Any) -> Tensor:
        before = everything(trainer, pl_module)
        loss = super()._noise_phase(trainer, pl_module)
        after = everything(trainer, pl_module)
        for name in before:
            for was, now in zip(tree_leaves(before[name]), tree_leaves(after[name]), strict=True):
                assert torch.equal(was, now) if isinstance(was, Tensor) else was == now, name
        assert Tensor.backward is BACKWARD
        self.phases += 1
        return loss
