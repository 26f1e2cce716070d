"""What a trainer feeds to its module: images before augmentation, views made by the mirror.

The user's loader stays the user's own, with its sampler, batch size and workers; only the data set
it fetches from and the function it collates by are exchanged while a run lasts, and put back after.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from cp_plugin.config.settings import UserError
from cp_plugin.data import RawDataset
from cp_plugin.data.batch import Batch
from cp_plugin.data.loading import Collate, moved

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


class LoaderHooks:
    """Raw batches in the loader, mirrored views for the module."""

    def __init__(self, trainer: Any, module: Any, raw: RawDataset, views: Views) -> None:
        """Start feeding; call in `on_train_start`.

        Args:
            trainer: a Lightning trainer.
            module: its module; its hooks around the transfer of a batch are wrapped on the
                instance, so that they see their own batches only.
            raw: the loader's data set without its transform.
            views: makes the views of a batch.
        """
        self.raw = raw
        self._module = module
        host_collate = training_loader(trainer).collate_fn
        self._exchange = Exchange(trainer, raw, Collate(raw, host_collate))
        before, move, after = (getattr(module, name) for name in HOOKS)

        def on_before_batch_transfer(batch: Any, dataloader_idx: int) -> Any:
            return batch if isinstance(batch, Batch) else before(batch, dataloader_idx)

        def transfer_batch_to_device(batch: Any, device: Any, dataloader_idx: int) -> Any:
            if isinstance(batch, Batch):
                return moved(batch, device)
            return move(batch, device, dataloader_idx)

        def on_after_batch_transfer(batch: Any, dataloader_idx: int) -> Any:
            if isinstance(batch, Batch) and trainer.training:
                sample = raw.with_views(batch.sample, views(batch))
                batch = before(sample, dataloader_idx)
            return after(batch, dataloader_idx)

        hooks = (on_before_batch_transfer, transfer_batch_to_device, on_after_batch_transfer)
        vars(module).update(zip(HOOKS, hooks, strict=True))

    def stop(self) -> None:
        """Give the module and the loader their own back."""
        for name in HOOKS:
            vars(self._module).pop(name, None)
        self._exchange.restore()
