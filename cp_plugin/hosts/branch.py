"""The momentum branch of a method as far as it is known: guessed first, then seen in one step."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cp_plugin.config.settings import UserError
from cp_plugin.data.batch import Batch
from cp_plugin.hosts.checks import SMALLEST, checking_labels, distance, view_gradient
from cp_plugin.hosts.gradients import MomentumGradients, blank, momentum_gradients
from cp_plugin.hosts.momentum import confirmed_branch, find_momentum_modules
from cp_plugin.hosts.observe import Observation, named_networks, observing, units_in
from cp_plugin.hosts.paths import Use, following
from cp_plugin.hosts.protocol import LossRequests
from cp_plugin.util.internals import registered, tree_map, without_torch_functions
from cp_plugin.util.undo import Exchanges

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
        self.dual = True
        """Whether gradients are to flow through the branch."""
        self._readers: list[nn.Module] = []
        self._bare_readers: list[tuple[nn.Module, str]] = []
        self._blanks_readers = False
        """Whether classifiers read zeros: their loss is then the same whatever the branch gives."""
        self.known = False
        """Whether a step has shown what the branch is."""

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
            UserError: the gradient with respect to the views depends on the labels, or a path of
                the momentum branch to the loss cannot be followed.
        """
        seen = Observation()
        yield from observing(self.module, views, batch, seen)
        self.known = seen.shown
        if not self.known:
            return
        self._readers, self._bare_readers = seen.readers(self.module), seen.bare_readers
        if self.dual:
            self._check_borrowed(method, seen)
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
        yield from self._sparing_targets(views, batch)
        yield from self.checking_paths(method, views, batch)
        log.info("momentum branch of %s: %s", method, ", ".join(self.found) or "none")
        yield from self.checking_labels(method, views, batch, labels)

    def checking_paths(self, method: str, views: Sequence[Tensor], batch: Batch) -> LossRequests:
        """Check that gradients see all paths from the branch to the loss; one of choices is none.

        Args:
            method: its name, for log and errors.
            views: V views, each float (B, C, h, w).
            batch: what they were made of.

        Raises:
            UserError: a path cannot be followed.
        """
        if not (self.found and self.dual):
            return
        use = Use()
        networks = dict(zip(self.found, self.modules(), strict=True))
        self._blanks_readers = True
        try:
            yield from following(method, self._gradients, networks, views, batch, use)
        finally:
            self._blanks_readers = False
        if self._auto and use.only_picks:
            log.info("the momentum branch of %s only picks indices: no gradient", method)
            self.found = {}

    def checking_labels(
        self, method: str, views: Sequence[Tensor], batch: Batch, labels: Tensor | None
    ) -> LossRequests:
        """Check, on one batch, that labels stay outside; the arguments are those of `detecting`.

        Raises:
            UserError: the gradient with respect to the views depends on the labels.
        """
        return checking_labels(method, self._gradients, views, batch, labels)

    def _sparing_targets(self, views: Sequence[Tensor], batch: Batch) -> LossRequests:
        """Take from the readers those that make targets: the online branch's gradient shows it.

        A head on top of the momentum branch may train by a loss of its own (CAPI's clusters), as a
        classifier does, on what is cut from the views; only a classifier leaves the rest alone.
        """
        if not (self.found and self.dual and self._readers):
            return
        stock: list[Tensor] = []
        yield from view_gradient(momentum_gradients(self.module, ()), views, batch, stock)
        size = sum(float(gradient.norm()) for gradient in stock)
        readers, self._readers = self._readers, []
        for reader in readers:
            blanked: list[Tensor] = []
            hook = reader.register_forward_pre_hook(_blank, prepend=True, with_kwargs=True)
            try:
                request = view_gradient(momentum_gradients(self.module, ()), views, batch, blanked)
                yield from request
            finally:
                hook.remove()
            if distance(stock, blanked) <= SMALLEST * size:
                self._readers.append(reader)

    def _check_borrowed(self, method: str, seen: Observation) -> None:
        names = [
            name
            for name, network in named_networks(self.module).items()
            if any(id(unit) in seen.borrowed for unit in units_in(network))
        ]
        if names:
            raise UserError(
                f"{method} runs {names[0]} on weights that are not its own and get no gradient, as "
                "torch.func.functional_call does with a teacher kept as a dictionary of tensors; a "
                "dual-branch poison needs the momentum branch as modules: keep a copy.deepcopy of "
                "the network and call it, or set poison.dual_branch=false."
            )

    @contextmanager
    def readers_detached(self) -> Iterator[None]:
        """Keep the gradient out of classifiers, also where `momentum_gradients` would let it
        through."""
        cut = _blank if self._blanks_readers else _detached
        hooks = [
            reader.register_forward_pre_hook(cut, prepend=True, with_kwargs=True)
            for reader in self._readers
            if self.found
        ]
        with Exchanges() as exchanged:
            for hook in hooks:
                exchanged.callback(hook.remove)
            for owner, name in self._bare_readers if self.found else ():
                # A reader of zeros has no gradient for what it reads.
                zeros = torch.zeros_like(registered(owner)[0][name], requires_grad=False)
                exchanged.entry(registered(owner)[0], name, nn.Parameter(zeros, False))
            yield

    def _gradients(self) -> MomentumGradients:
        return momentum_gradients(self.module, self.modules() if self.dual else ())


def _blank(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    with without_torch_functions():
        blank_: tuple[Any, Any] = tree_map(blank, (args, kwargs))
    return blank_


def _detached(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    with without_torch_functions():
        detached: tuple[Any, Any] = tree_map(
            lambda value: value.detach() if isinstance(value, Tensor) else value, (args, kwargs)
        )
    return detached
