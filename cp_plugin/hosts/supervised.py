"""A supervised module as a surrogate: its loss reads labels, as poisons made on it may."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cp_plugin.config.settings import UserError
from cp_plugin.data.batch import Batch
from cp_plugin.hosts.plain import PlainHost
from cp_plugin.hosts.protocol import LossRequest


class SupervisedHost(PlainHost):
    """A LightningModule whose `training_step` takes `(views, labels)` and compares no views.

    Its labels are meant to count.
    """


class AdversarialHost(SupervisedHost):
    """A trained classifier that a perturbation is to mislead: minimising what it shows does.

    Source: Fowl et al., "Adversarial Examples Make Strong Poisons", NeurIPS 2021, section 3.
    """

    target_classes: int | None = None
    """Number of classes, for the cross-entropy with another class; None: away from the own one."""
    shift = 1
    """How many classes on that other class is; the last ones are followed by the first."""

    def show(self, request: LossRequest) -> None:
        """Show the cross-entropy with the other class, or the own class's with a minus."""

        def misleads(
            loss: Tensor, weight: Tensor | None = None, retain_graph: bool = False
        ) -> None:
            request.on_loss(-loss, weight, retain_graph)

        away = self.target_classes is None
        super().show(request._replace(on_loss=misleads) if away else request)

    def _own_batch(self, views: Sequence[Tensor], batch: Batch) -> Any:
        own = super()._own_batch(views, batch)
        if self.target_classes is None:
            return own
        if not isinstance(own, (list, tuple)) or len(own) < 2 or not isinstance(own[1], Tensor):
            raise UserError(
                f"poison.targeted expected batches (views, labels) for {self.method}, got "
                f"{type(own).__name__}; set poison.targeted=false."
            )
        following = (own[1] + self.shift) % self.target_classes
        return [own[0], following.where(own[1] >= 0, own[1]), *own[2:]]


class EnsembleHost(AdversarialHost):
    """The checkpoints of one training, which a perturbation is to mislead all together.

    Source: Chen et al., "Self-Ensemble Protection", ICLR 2023, section 3.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """Wrap a module; see `LightningHost`."""
        super().__init__(*arguments, **named)
        self.states: list[dict[str, Tensor]] = []
        """What the module's `state_dict` was at each checkpoint."""

    def show(self, request: LossRequest) -> None:
        """Show the mean of the checkpoints' losses, one after the other.

        The module is left in the last one's state; whoever asks puts it back.
        """

        def of_one(loss: Tensor, weight: Tensor | None = None, retain_graph: bool = False) -> None:
            request.on_loss(loss / len(self.states), weight, retain_graph=True)

        for state in self.states:
            with torch.no_grad():
                self.module.load_state_dict(state)
            super().show(request._replace(on_loss=of_one))


class LinearisingHost(SupervisedHost):
    """A trained classifier that is to tell nothing of images and their class of delta alone.

    What it shows is its cross-entropy with the uniform distribution, which differs from the
    divergence of its output from that by a constant; `shortcut` is the other term. The module has
    to take labels as distributions, float (B, K), as torch's cross-entropy does.

    Source: Liu, Chen, Zhang, "Perturbation-Induced Linearization", ICLR 2026, section 3.
    """

    classes = 2
    """K."""
    weight = 0.9
    """Of the term `shortcut`; the rest is that of the loss shown."""
    _views = 1
    _tells_nothing = True

    def check(self, views: int) -> None:
        """Check the module, and take the number of views; see `SupervisedHost`."""
        super().check(views)
        self._views = views

    def show(self, request: LossRequest) -> None:
        """Show the weighted cross-entropy of the views with the uniform distribution."""

        def weighted(
            loss: Tensor, weight: Tensor | None = None, retain_graph: bool = False
        ) -> None:
            request.on_loss((1 - self.weight) * loss, weight, retain_graph)

        super().show(request._replace(on_loss=weighted))

    def shortcut(
        self, delta_BCHW: Tensor, batch: Batch, normalize: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return the weighted cross-entropy of what the module makes of -delta with the labels.

        Args:
            delta_BCHW: perturbations, of the size of the views.
            batch: the images that they belong to.
            normalize: what pixels go through on their way into views; an affine function.
        """
        nothing = torch.zeros_like(delta_BCHW)
        alone = normalize(-delta_BCHW) - normalize(nothing)
        self._tells_nothing = False
        try:
            loss = self.loss([alone] * self._views, batch)
        finally:
            self._tells_nothing = True
        if loss is None:
            raise UserError(
                f"poison=pil needs a loss of every batch, and {self.method} left one out; return "
                "it from training_step."
            )
        return self.weight * loss

    def _own_batch(self, views: Sequence[Tensor], batch: Batch) -> Any:
        own = super()._own_batch(views, batch)
        if not self._tells_nothing:
            return own
        if not isinstance(own, (list, tuple)) or len(own) < 2 or not isinstance(own[1], Tensor):
            raise UserError(
                f"poison=pil expected batches (views, labels) for {self.method}, got "
                f"{type(own).__name__}."
            )
        uniform = torch.full((len(own[1]), self.classes), 1 / self.classes, device=own[1].device)
        return [own[0], uniform, *own[2:]]
