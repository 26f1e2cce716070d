"""Loaders of images before augmentation, and their batches on a device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from cp_plugin.data import RawDataset
from cp_plugin.data.batch import Batch
from cp_plugin.data.slots import rebuilt


def moved(batch: Batch, device: Any) -> Batch:
    """Return a batch on a device; which rows it has is asked on the CPU and stays there."""

    def move(value: Any) -> Any:
        return value.to(device, non_blocking=True) if hasattr(value, "to") else value

    images = batch.images.to(device, non_blocking=True)
    return batch._replace(images=images, sample=rebuilt(batch.sample, move))


def raw_loader(loader: DataLoader[Any], raw: RawDataset) -> DataLoader[Any]:
    """Return a copy of a loader that brings raw batches of its raw data set."""
    own = copy.copy(loader)
    object.__setattr__(own, "dataset", raw)
    own.collate_fn = Collate(raw, loader.collate_fn)
    own._iterator = None
    return own


class Collate:
    """`RawDataset.collate` with the host's own collate function; a class, for the workers' sake."""

    def __init__(self, raw: RawDataset, host_collate: Callable[[Any], Any]) -> None:
        self._raw, self._host_collate = raw, host_collate

    def __call__(self, items: Any) -> Batch:
        """Collate the items of raw data sets."""
        return self._raw.collate(items, self._host_collate)


def endless(loader: DataLoader[Any]) -> Iterator[Any]:
    """Yield the loader's batches, epoch after epoch, apart from any other use of the loader."""
    own = copy.copy(loader)  # persistent workers serve one iteration at a time
    own._iterator = None
    while True:
        yield from own
