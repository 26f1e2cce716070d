"""What a trainer feeds to its module: images before augmentation, views made by the mirror.

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
from cp_plugin.data.markers import rebuilt
from cp_plugin.host import Batch

Views = Callable[[Batch], list[Tensor]]
OWN = "_cp_plugin_own"
"""Where a loader keeps its own data set and collate function meanwhile."""
HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


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


def check_batches(trainer: Any) -> None:
    """Check that there was something to train on; Lightning passes over an empty loader in silence.

    Raises:
        UserError: the training loader brings no batch.
    """
    if trainer.num_training_batches == 0:
        loader = training_loader(trainer)
        raise UserError(
            f"nothing was trained: {len(loader.dataset)} images make no batch of "  # type: ignore[arg-type]
            f"{loader.batch_size}; set a smaller batch size or check the folder of the images."
        )


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
        # Several callbacks may exchange; whichever ends first puts back what came before them all.
        vars(self._loader).setdefault(OWN, (self._loader.dataset, self._loader.collate_fn))
        self._set(dataset, collate or self._loader.collate_fn)
        # Lightning has made the first epoch's iterator before any callback could see the loader.
        iter(trainer.fit_loop._data_fetcher)

    def restore(self) -> None:
        """Put the loader's own data set and collate function back."""
        own = vars(self._loader).pop(OWN, None)
        if own is not None:
            self._set(*own)

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
            module: its module; its hooks around the transfer of a batch are wrapped on the
                instance, so that they see their own batches only.
            opened: the loader's data set without its transform.
            views: makes the views of a batch.
        """
        self.opened = opened
        self._module = module
        host_collate = training_loader(trainer).collate_fn
        self._exchange = Exchange(trainer, opened, _Collate(opened, host_collate))
        before, move, after = (getattr(module, name) for name in HOOKS)

        def on_before_batch_transfer(batch: Any, dataloader_idx: int) -> Any:
            return batch if isinstance(batch, Batch) else before(batch, dataloader_idx)

        def transfer_batch_to_device(batch: Any, device: Any, dataloader_idx: int) -> Any:
            if isinstance(batch, Batch):
                return moved(batch, device)
            return move(batch, device, dataloader_idx)

        def on_after_batch_transfer(batch: Any, dataloader_idx: int) -> Any:
            if isinstance(batch, Batch) and trainer.training:
                sample = opened.with_views(batch.sample, views(batch))
                batch = before(sample, dataloader_idx)
            return after(batch, dataloader_idx)

        hooks = (on_before_batch_transfer, transfer_batch_to_device, on_after_batch_transfer)
        vars(module).update(zip(HOOKS, hooks, strict=True))

    def stop(self) -> None:
        """Give the module and the loader their own back."""
        for name in HOOKS:
            vars(self._module).pop(name, None)
        self._exchange.restore()


def moved(batch: Batch, device: Any) -> Batch:
    """Return a batch on a device; which rows it has is asked on the CPU and stays there."""

    def move(value: Any) -> Any:
        return value.to(device, non_blocking=True) if hasattr(value, "to") else value

    images = batch.images.to(device, non_blocking=True)
    return batch._replace(images=images, sample=rebuilt(batch.sample, move))


def opened_loader(loader: DataLoader[Any], opened: Opened) -> DataLoader[Any]:
    """Return a copy of a loader that brings raw batches of its opened data set."""
    own = copy.copy(loader)
    object.__setattr__(own, "dataset", opened)
    own.collate_fn = _Collate(opened, loader.collate_fn)
    own._iterator = None
    return own


class _Collate:
    """`Opened.collate` with the host's own collate function; a class, for the workers' sake."""

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
