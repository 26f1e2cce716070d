"""The momentum branch of a method as far as it is known: guessed first, then seen in one step."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from cp_plugin.data.batch import Batch
from cp_plugin.hosts.checks import Choice, checking_labels, choosing
from cp_plugin.hosts.gradients import MomentumGradients, momentum_gradients
from cp_plugin.hosts.momentum import confirmed_branch, find_momentum_modules
from cp_plugin.hosts.observe import LossRequests, Observation, named_networks, observing

log = logging.getLogger("cp_plugin")


class Branch:
    """Which networks of a method are its momentum branch, and which read labels."""

    def __init__(self, module: nn.Module, names: str | Sequence[str] = "auto") -> None:
        """Look at a method before it runs.

        Args:
            module: the method.
            names: dotted names of the branch's networks, or `auto`.

        Raises:
            UserError: a name is no network of the module.
        """
        self.module = module
        self.found = find_momentum_modules(module, names)
        self._auto = names == "auto"
        self._readers: list[nn.Module] = []

    def modules(self) -> list[nn.Module]:
        """Return the branch as it is now; a step may have replaced its modules."""
        networks = named_networks(self.module)
        return [networks.get(name, found) for name, found in self.found.items()]

    def detecting(
        self, method: str, views: Sequence[Tensor], batch: Batch, labels: Tensor | None
    ) -> LossRequests:
        """Watch a step, take over what it shows, and check that labels stay outside.

        Args:
            method: its name, for log and errors.
            views: V views, each float (B, C, h, w).
            batch: what they were made of.
            labels: int64 (B), the labels of the images, if there are any.

        Raises:
            UserError: the gradient with respect to the views depends on the labels.
        """
        seen = Observation()
        yield from observing(self.module, views, batch, seen)
        self._readers = seen.readers(self.module)
        if self._auto and seen.trained:
            idle = [name for name, network in self.found.items() if not seen.ran(network)]
            if idle:
                log.warning(
                    "%s of %s never ran, so no gradient flows through it; if it runs later on, "
                    "name it with momentum_modules=[…]",
                    ", ".join(idle),
                    method,
                )
            self.found = confirmed_branch(self.module, seen)
            if self.found:
                choice = Choice()
                yield from choosing(self._gradients(), views, batch, choice)
                if choice.only:
                    log.info("the momentum branch of %s only picks indices: no gradient", method)
                    self.found = {}
        log.info("momentum branch of %s: %s", method, ", ".join(self.found) or "none")
        yield from checking_labels(method, self._gradients, views, batch, labels)

    @contextmanager
    def readers_detached(self) -> Iterator[None]:
        """Keep the gradient out of classifiers, also where `momentum_gradients` would let it
        through."""
        hooks = [
            reader.register_forward_pre_hook(_detached, prepend=True, with_kwargs=True)
            for reader in self._readers
            if self.found
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _gradients(self) -> MomentumGradients:
        return momentum_gradients(self.module, self.modules())


def _detached(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    with torch._C.DisableTorchFunction():
        detached: tuple[Any, Any] = tree_map(
            lambda value: value.detach() if isinstance(value, Tensor) else value, (args, kwargs)
        )
    return detached
