"""A training taken up where its checkpoint was saved, to the bit: random numbers, order of images.

Lightning saves neither. What differs between the processes of one run is left to their samplers.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

from torch.utils.data import DataLoader

from cp_plugin.callbacks.loader_hooks import remake
from cp_plugin.data.order import Endless, Order
from cp_plugin.util.internals import iterates_anew
from cp_plugin.util.random_state import RandomState

log = logging.getLogger("cp_plugin")

NOT_RESUMABLE = "You're resuming from a checkpoint that ended before the epoch ended"
"""How Lightning's warning begins that the rest of the epoch brings other images."""


class Resumption:
    """What a checkpoint needs of the random numbers and the loader, and what takes it up again."""

    def __init__(
        self, trainer: Any, loader: DataLoader[Any], order: Order, noise: Endless | None = None
    ) -> None:
        """Bind the parts.

        Args:
            trainer: a Lightning trainer.
            loader: its training loader.
            order: of the training batches.
            noise: the batches of the noise phase, if there is one.
        """
        self._trainer, self._loader, self._order, self._noise = trainer, loader, order, noise
        self._saved: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        used = self._trainer.fit_loop.epoch_loop.batch_progress.current.ready
        used = 0 if used >= self._trainer.num_training_batches else used
        return {
            "random": RandomState([self._trainer.strategy.root_device]).plain(),
            **self._order.sources(),
            "used": used,
            "order": self._order.state(used),
            "noise": None if self._noise is None else self._noise.state(),
        }

    def on_train_start(self, saved: dict[str, Any] | None) -> None:
        """Go on from a state; None where none was saved: nothing changes."""
        if saved is None:
            return
        self._restore(saved)
        if saved["order"] is not None:
            self._order.restore(saved["order"])
        elif saved["used"]:
            log.warning(
                "the checkpoint was saved after %d batches of an epoch, and in which order %s "
                "brings its batches cannot be restored: the rest of the epoch is drawn anew",
                saved["used"],
                type(self._loader).__name__,
            )
        remake(self._trainer, self._loader)
        if saved["used"]:
            self._restore(saved)  # the iterator was there already when the state was saved
        elif not self._trainer.fit_loop.restarted_mid_epoch:
            self._saved = saved
        if saved["noise"] is not None and self._noise is not None:
            self._noise.restore(saved["noise"])
        if saved["order"] is not None:
            warnings.filterwarnings("ignore", NOT_RESUMABLE)

    def on_train_epoch_start(self) -> None:
        """Let the first epoch begin with the random numbers with which it would have."""
        if self._saved is None:
            return
        self._restore(self._saved)
        if not iterates_anew(self._trainer):
            remake(self._trainer, self._loader)
        self._saved = None

    def _restore(self, saved: dict[str, Any]) -> None:
        RandomState.of(saved["random"]).restore()
        self._order.restore_sources(saved)
