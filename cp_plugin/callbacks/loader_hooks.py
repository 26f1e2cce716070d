"""What a trainer gives to its module: images before augmentation, views made by the mirror.

The user's loader stays the user's own, with its sampler, batch size and workers; only the data set
it fetches from and the function it collates by are exchanged while a run lasts, and put back after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cp_plugin.config.settings import UserError
from cp_plugin.data import RawDataset, RawStream
from cp_plugin.data.batch import Batch
from cp_plugin.data.loading import Collate, LoaderStart, check_batched, moved, renew_iterators
from cp_plugin.data.order import Order
from cp_plugin.hosts.lightning import BATCH_HOOKS, batch_hooks, converter, hook_owner
from cp_plugin.util.internals import (
    before_epochs,
    finish_epoch,
    forget_iterators,
    remake_fetcher,
    training_source,
)
from cp_plugin.util.undo import Exchanges

Views = Callable[[Batch], list[Tensor]]
EXCHANGED = "_cp_plugin_exchanged"
"""Where a loader keeps what gives it its own data set and collate function back."""
START = "_cp_plugin_start"
"""Where a trainer keeps how its training loader began."""


def note_start(trainer: Any) -> None:
    """Let a trainer note the random state in which its training loader begins; call in `setup`.

    A run that goes on from the end of an epoch begins the next one, see `finish_epoch`.
    """
    source = training_source(trainer)
    own = type(source).dataloader

    def dataloader() -> Any:
        del vars(source)["dataloader"]
        loader = own(source)
        vars(trainer)[START] = LoaderStart(loader)
        return loader

    vars(source)["dataloader"] = dataloader
    before_epochs(trainer, lambda: finish_epoch(trainer))


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
    check_batched(loader)
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
        self, trainer: Any, dataset: Any = None, collate: Callable[[Any], Any] | None = None
    ) -> None:
        """Exchange them; call in `on_train_start`.

        Several callbacks may exchange; whichever ends first puts back what came before them all.

        Args:
            trainer: a Lightning trainer.
            dataset: of the same length as the loader's own; None keeps it.
            collate: None keeps the loader's own.
        """
        self._loader = loader = training_loader(trainer)
        exchanged: Exchanges | None = vars(loader).get(EXCHANGED)
        if exchanged is None:
            exchanged = Exchanges()
            forget_iterators(loader)
            exchanged.callback(_drop_iterators, vars(loader), dict(vars(loader)))
            exchanged.entry(vars(loader), EXCHANGED, exchanged)
        self._exchanged = exchanged
        self._counted = Counted(collate or loader.collate_fn, loader.num_workers > 0)
        if dataset is not None:
            # A loader refuses a new data set once it is made, since its sampler counts the old
            # one's rows; ours has the same rows.
            exchanged.entry(vars(loader), "dataset", dataset)
        exchanged.entry(vars(loader), "collate_fn", self._counted)
        renew(trainer, loader)

    def check(self) -> None:
        """Check that batches come from what was put in; call when the first one has come.

        Raises:
            UserError: the loader goes on with what it was made with.
        """
        if not self._counted.batches:
            raise UserError(stale(self._loader))

    def restore(self) -> None:
        """Give the loader its own back."""
        self._exchanged.close()


class Counted:
    """A collate function that counts its batches, those of worker processes too."""

    def __init__(self, collate: Callable[[Any], Any], shared: bool) -> None:
        self._collate = collate
        self._count = torch.zeros(1, dtype=torch.int64)
        if shared:
            self._count.share_memory_()  # type: ignore[no-untyped-call]

    def __call__(self, samples: Any) -> Any:
        """Collate and count."""
        self._count += 1
        return self._collate(samples)

    @property
    def batches(self) -> int:
        """Number of batches so far."""
        return int(self._count)


def stale(loader: DataLoader[Any]) -> str:
    """Return what to say of a loader that brings batches of the data set it was made with."""
    return (
        f"{type(loader).__name__} brings batches of the data set that it was made with, though "
        "another one was put in: it keeps an iterator of its own. Poisons need a loader that makes "
        "its iterator when an epoch starts; use torch.utils.data.DataLoader for this run."
    )


def renew(trainer: Any, loader: DataLoader[Any]) -> None:
    """Let a trainer fetch from a loader as it is now, in the order in which it would have.

    Iterators that it keeps are remade, from the random state in which they were made.
    """

    vars(trainer)[START].replay(lambda: remake(trainer, loader))


def remake(trainer: Any, loader: DataLoader[Any]) -> None:
    """Make the iterators anew that a trainer and its loader keep."""
    renew_iterators(loader)
    remake_fetcher(trainer)


def _drop_iterators(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Take iterators from a loader that were made meanwhile: they hold the exchanged data set."""
    made = [n for n, v in now.items() if isinstance(v, Iterator) and before.get(n) is not v]
    for name in made:
        if name in before:
            now[name] = before[name]
        else:
            del now[name]


class LoaderHooks:
    """Raw batches in the loader, mirrored views for the module."""

    def __init__(
        self, trainer: Any, module: Any, raw: RawDataset | RawStream, views: Views
    ) -> None:
        """Start feeding; call in `on_train_start`.

        Args:
            trainer: a Lightning trainer.
            module: its module; the hooks around the transfer of a batch, its own or its
                DataModule's, are exchanged on the instance, so that they see their own batches
                only.
            raw: the loader's data set without its transform.
            views: makes the views of a batch.
        """
        self.raw = raw
        self._exchanged = Exchanges()
        loader = training_loader(trainer)
        host_collate = loader.collate_fn
        owners = [hook_owner(trainer, module, name) for name in BATCH_HOOKS]
        before, move, after = (
            getattr(owner, name) for owner, name in zip(owners, BATCH_HOOKS, strict=True)
        )
        own, convert = batch_hooks(trainer, module), converter(trainer)

        def on_before_batch_transfer(batch: Any, dataloader_idx: int) -> Any:
            if isinstance(batch, Batch):
                return batch
            if trainer.training:
                raise UserError(stale(loader))
            return before(batch, dataloader_idx)

        def transfer_batch_to_device(batch: Any, device: Any, dataloader_idx: int) -> Any:
            if isinstance(batch, Batch):
                return moved(batch, device)
            return move(batch, device, dataloader_idx)

        def on_after_batch_transfer(batch: Any, dataloader_idx: int) -> Any:
            if not isinstance(batch, Batch) or not trainer.training:
                return after(batch, dataloader_idx)
            sample = raw.with_views(batch.sample, [convert(view) for view in views(batch)])
            for hook in own.values():
                sample = hook(sample)
            return sample

        hooks = (on_before_batch_transfer, transfer_batch_to_device, on_after_batch_transfer)
        for owner, name, hook in zip(owners, BATCH_HOOKS, hooks, strict=True):
            self._exchanged.entry(vars(owner), name, hook)
        self.order = Order(loader)
        self._exchanged.entry(vars(loader), "batch_sampler", self.order)
        self._exchanged.callback(Exchange(trainer, raw, Collate(raw, host_collate)).restore)

    def stop(self) -> None:
        """Give the module and the loader their own back."""
        self._exchanged.close()
