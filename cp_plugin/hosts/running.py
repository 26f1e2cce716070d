"""Queue and momentum branch that go on during a noise phase, as in the authors' released code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cp_plugin.config.settings import UserError
from cp_plugin.util.internals import NormBase


class RunningMomentum:
    """What a noise step leaves in a host: keys in its queue, a momentum branch one EMA step on.

    Everything else that a step changes is put back by `preserve_state`, around which this works.
    Buffers but for those of norm layers count as queues.
    """

    def __init__(self, host: Any) -> None:
        """Look at a host.

        Args:
            host: behind the protocol of `cp_plugin.hosts.protocol.Host`; its `move_momentum`, where
                it has one, makes the EMA step. Without, `training_step` has to make it.
        """
        self._host = host
        self._momentum = list(host.momentum_modules())
        self._values: dict[str, Tensor] = {}
        self._before = {name: tensor.clone() for name, tensor in self._weights()}
        self._checked = not self._momentum

    def kept(self, restore: Callable[[], None]) -> Callable[[], None]:
        """Return a `restore` for use after each noise step, which keeps what goes on.

        Args:
            restore: puts back all that the step has changed.

        Raises:
            UserError: when called, if nothing moves the momentum branch.
        """

        def restore_but_keep() -> None:
            self._values = {name: tensor.detach().clone() for name, tensor in self._running()}
            restore()
            self.put()
            move = getattr(self._host, "move_momentum", None)
            moved = bool(move()) if move is not None else False
            if not self._checked:
                self._checked = True
                if not moved and not self._moved_by_the_step():
                    raise UserError(
                        "poison.momentum_during_noise=running found nothing that moves the "
                        f"momentum branch of {self._host.method} in its training_step; move the "
                        "update there, give the module a method move_momentum(), or set "
                        "poison.momentum_during_noise=frozen."
                    )

        return restore_but_keep

    @torch.no_grad()
    def put(self) -> None:
        """Write what the last step left; to be called again once the noise phase is over."""
        for name, tensor in self._running():
            value = self._values.get(name)
            if value is not None and value.shape == tensor.shape:
                tensor.copy_(value)

    @torch.no_grad()
    def take(self) -> None:
        """Note the state as it is, the last EMA step included."""
        if self._values:
            self._values = {name: tensor.clone() for name, tensor in self._running()}

    def _moved_by_the_step(self) -> bool:
        return any(
            not torch.equal(tensor, self._before[name])
            for name, tensor in self._weights()
            if name in self._before
        )

    def _running(self) -> Iterator[tuple[str, Tensor]]:
        module: nn.Module = self._host.module
        for prefix, child in module.named_modules():
            if isinstance(child, NormBase):
                continue
            for name, buffer in child.named_buffers(recurse=False):
                yield f"buffer {prefix}.{name}", buffer
        yield from self._weights()

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        for number, network in enumerate(self._momentum):
            for name, weight in network.named_parameters():
                yield f"momentum {number}.{name}", weight
