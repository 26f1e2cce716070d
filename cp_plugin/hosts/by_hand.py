"""Modules that optimise by hand: what their step would train by is shown, and nothing trains.

Such a module (`automatic_optimization=False`) runs its backward passes and its optimizers inside
`training_step`. A noise phase needs the losses alone: while `handing_over` is open, what runs a
backward pass hands its loss over, and optimizers and schedules stand still.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cp_plugin.hosts.protocol import OnLoss
from cp_plugin.util.internals import trainer_of
from cp_plugin.util.undo import Exchanges


def by_hand(module: Any) -> bool:
    """Whether a LightningModule optimises by hand."""
    return not getattr(module, "automatic_optimization", True)


@contextmanager
def handing_over(module: Any, on_loss: OnLoss) -> Iterator[None]:
    """Let a step of a module that optimises by hand show its losses in place of training.

    A loss is shown the moment that `manual_backward` or `Tensor.backward` is given it, so that what
    the step does afterwards (an EMA step, weights that are clipped) cannot spoil its gradient.
    Hooks for a backward pass are not run, since there is none. A closure given to an optimizer's
    `step` is run once, without the step. `toggle_optimizer` does what it always does.

    Args:
        module: a LightningModule with its trainer.
        on_loss: what the losses are shown to; several add up.
    """

    def backward(
        loss: Tensor,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        on_loss(loss, gradient, True)  # all losses share the graph of the views

    def strategy_backward(loss: Tensor, _: Any, *args: Any, **kwargs: Any) -> None:
        backward(loss, *args, **kwargs)

    trainer: Any = trainer_of(module)
    with Exchanges() as exchanged:
        exchanged.attribute(Tensor, "backward", backward)
        exchanged.entry(vars(trainer.strategy), "backward", strategy_backward)
        exchanged.entry(vars(module), "clip_gradients", _nothing)
        for optimizer in (*_listed(module.optimizers()), *trainer.optimizers):
            exchanged.entry(vars(optimizer), "step", _closure_alone)
            exchanged.entry(vars(optimizer), "zero_grad", _nothing)
        for config in trainer.lr_scheduler_configs:
            exchanged.entry(vars(config.scheduler), "step", _nothing)
        yield


def _closure_alone(closure: Callable[[], Any] | None = None, **_: Any) -> Any:
    """Stand in for an optimizer's `step`."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _nothing(*_: Any, **__: Any) -> None:
    """Stand in for what would change gradients, or move a schedule."""


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
