"""What a Lightning trainer feeds to its module: images before augmentation, views made by the mirror.

The user's loader stays the user's own, with its sampler, batch size and workers; only the data set
it fetches from and the function it collates by are exchanged while a run lasts, and put back after.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from cp_plugin.config import UserError
from cp_plugin.data import Opened
from cp_plugin.host import Batch

Views = Callable[[Batch], list[Tensor]]


def training_loader(trainer: Any) -> DataLoader[Any]:
    """Return the trainer's one training loader.

    Raises:
        UserError: there are several, or it is no `DataLoader`, or it is made anew while training.
    """
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader):
        raise UserError(
            f"expected one torch DataLoader for training, got {type(loader).__name__}; a poison "
            "belongs to one data set."
        )
    if trainer.reload_dataloaders_every_n_epochs:
        raise UserError(
            "reload_dataloaders_every_n_epochs makes new loaders while training, but every image "
            "needs a fixed row to keep its perturbation; set it to 0."
        )
    return loader


class Exchange:
    """Another data set and collate function in a trainer's loader, until `restore`."""

    def __init__(
        self, trainer: Any, dataset: Any, collate: Callable[[Any], Any] | None = None
    ) -> None:
        """Exchange them; call in `on_train_start`.

        Args:
            trainer: a Lightning trainer.
            dataset: of the same length as the loader's own.
            collate: None keeps the loader's own.
        """
        self._loader = training_loader(trainer)
        self._before = (self._loader.dataset, self._loader.collate_fn)
        self._set(dataset, collate or self._loader.collate_fn)
        # Lightning has made the first epoch's iterator before any callback could see the loader.
        iter(trainer.fit_loop._data_fetcher)

    def restore(self) -> None:
        """Put the loader's own data set and collate function back."""
        self._set(*self._before)

    def _set(self, dataset: Any, collate: Callable[[Any], Any]) -> None:
        # A loader refuses a new data set once it is made, since its sampler counts the old one's
        # rows; ours has the same rows.
        object.__setattr__(self._loader, "dataset", dataset)
        self._loader.collate_fn = collate
        self._loader._iterator = None  # persistent workers hold the data set they began with


class Feed:
    """Raw batches in the loader, mirrored views for the module."""

    def __init__(self, trainer: Any, module: Any, opened: Opened, views: Views) -> None:
        """Start feeding; call in `on_train_start`.

        Args:
            trainer: a Lightning trainer.
            module: its module; the hook `on_after_batch_transfer` is wrapped on the instance.
            opened: the loader's data set without its transform.
            views: makes the views of a batch.
        """
        self.opened = opened
        self._module = module
        host_collate = training_loader(trainer).collate_fn
        self._exchange = Exchange(trainer, opened, _Collate(opened, host_collate))
        own_hook = module.on_after_batch_transfer

        def on_after_batch_transfer(batch: Any, dataloader_idx: int) -> Any:
            if isinstance(batch, Batch) and trainer.training:
                batch = opened.with_views(batch.sample, views(batch))
            return own_hook(batch, dataloader_idx)

        module.on_after_batch_transfer = on_after_batch_transfer

    def stop(self) -> None:
        """Give the module and the loader their own back."""
        del self._module.on_after_batch_transfer
        self._exchange.restore()


class _Collate:
    """`Opened.collate` with the host's own collate function; a class, so that workers can have it."""

    def __init__(self, opened: Opened, host_collate: Callable[[Any], Any]) -> None:
        self._opened, self._host_collate = opened, host_collate

    def __call__(self, items: Any) -> Batch:
        return self._opened.collate(items, self._host_collate)


def endless(loader: DataLoader[Any]) -> Iterator[Any]:
    """Yield the loader's batches, epoch after epoch, apart from any other use of the loader."""
    own = copy.copy(loader)  # persistent workers serve one iteration at a time
    own._iterator = None
    while True:
        yield from own
