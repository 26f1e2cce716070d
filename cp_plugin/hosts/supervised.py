"""A supervised module as a surrogate: its loss reads labels, as poisons made on it may."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cp_plugin.config.settings import UserError
from cp_plugin.data.batch import Batch
from cp_plugin.hosts.checks import check_module
from cp_plugin.hosts.lightning import LightningHost
from cp_plugin.hosts.protocol import LossRequest, LossRequests


class SupervisedHost(LightningHost):
    """A LightningModule whose `training_step` takes `(views, labels)` and compares no views."""

    def check(self, views: int) -> None:
        """Check that the module's loss can be computed apart from its training.

        Args:
            views: number of views of an image; one is enough.

        Raises:
            UserError: it reads its loader itself, or masks its images.
        """
        check_module(self.module, max(2, views))

    def detect_momentum(
        self, views: Sequence[Tensor], batch: Batch, labels: Tensor | None = None
    ) -> bool:
        """Take the module as it is: it has no momentum branch, and labels are meant to count."""
        return True

    def checking_labels(
        self, views: Sequence[Tensor], batch: Batch, labels: Tensor | None
    ) -> LossRequests:
        """Check nothing: the labels are meant to count."""
        return iter(())


class AdversarialHost(SupervisedHost):
    """A trained classifier that a perturbation is to mislead: minimising what it shows does.

    Source: Fowl et al., "Adversarial Examples Make Strong Poisons", NeurIPS 2021, section 3.
    """

    target_classes: int | None = None
    """Number of classes, for the cross-entropy with the next class; None: away from the own one."""

    def show(self, request: LossRequest) -> None:
        """Show the cross-entropy with the next class, or the own class's with a minus."""

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
        following = (own[1] + 1) % self.target_classes
        return [own[0], following.where(own[1] >= 0, own[1]), *own[2:]]
