"""A module taken as it is: it need not compare views, and has no momentum branch to be found."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cp_plugin.data.batch import Batch
from cp_plugin.hosts.checks import check_module
from cp_plugin.hosts.lightning import LightningHost
from cp_plugin.hosts.protocol import LossRequests


class PlainHost(LightningHost):
    """A LightningModule without the checks of a method that compares views and reads no labels."""

    def check(self, views: int) -> None:
        """Check that the module can be used apart from its training.

        Args:
            views: number of views of an image; one is enough.

        Raises:
            UserError: it reads its loader itself.
        """
        check_module(self.module)

    def detect_momentum(
        self, views: Sequence[Tensor], batch: Batch, labels: Tensor | None = None
    ) -> bool:
        """Take the module as it is: no gradient passes a momentum branch."""
        return True

    def checking_labels(
        self, views: Sequence[Tensor], batch: Batch, labels: Tensor | None
    ) -> LossRequests:
        """Check nothing of what becomes of labels."""
        return iter(())
