"""A data set with the host's transform taken off, so that images come before any augmentation."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, default_collate

from cp_plugin.config.settings import Fit, UserError
from cp_plugin.data import slots as markers
from cp_plugin.data import wrappers
from cp_plugin.data.batch import Batch
from cp_plugin.data.cache import Cache, CachedRows
from cp_plugin.data.image import Canonical, Size, image_key
from cp_plugin.data.kept import still_held
from cp_plugin.data.probe import Probe
from cp_plugin.data.raw_images import UNREADABLE, Item, RawImages, SampleError
from cp_plugin.util.random_state import random_state_kept


class RawDataset(RawImages, Dataset[Item]):
    """A map-style data set of images, read before its transform.

    Works on a shallow copy: the data set itself, and others that share its images, keep their
    transform. Data sets of torchvision, Lightly and solo-learn, subsets, joins and wrappers
    are followed to the object that has the attribute `transform`.

    Attributes:
        cache: all rows, once they are read (`read_once`); None: each is read when it is asked for.
    """

    def __init__(self, dataset: Any, image_size: int | Size | None, fit: Fit = "crop") -> None:
        """Take the transform off.

        Args:
            dataset: the host's data set.
            image_size: height and width of the canonical images in pixels, or the side of a
                square; None keeps each image's size.
            fit: as of `Canonical`.

        Raises:
            UserError: the data set streams, is empty, has no `transform`, or does not return what
                its transform makes; SampleError if the first image cannot be read.
        """
        wrappers.check_map_style(dataset)
        self.dataset = dataset
        self.transform = wrappers.pipeline_of(dataset)  # refuses what has none
        self.canonical = Canonical(image_size, fit)
        self._views: int | None = None
        self._probed = self._with_probe(None)
        self._process = os.getpid()
        self._check_kept(self._read_form(self._first))
        self.cache: Cache | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Item:
        """Return an image before augmentation, and the host's sample without its views.

        Raises:
            SampleError: the image cannot be read; its file is named where it is known.
        """
        row = range(len(self))[row]
        if self.cache is not None:
            key, image = int(self.cache.keys[row]), self.cache.images[row]
            return Item(row, key, image, self.cache.sample(row))
        sample = self._read(row)
        marks = markers.find(sample)
        if not marks:
            raise SampleError(transform_not_called(self.dataset, row))
        if len(marks) != self.places:
            raise SampleError(
                f"Row {row} of {self._name} returns {len(marks)} views, row 0 {self.places}; "
                "all samples must have the same form."
            )
        image = marks[0].image
        return Item(row, image_key(image), image, markers.with_placeholders(sample, marks))

    def __getitems__(self, rows: Sequence[int]) -> Sequence[Item] | CachedRows:
        """Return what `collate` makes a batch of; a loader calls this in place of each item."""
        return CachedRows(rows) if self.cache is not None else [self[row] for row in rows]

    def collate(
        self,
        items: Sequence[Item] | CachedRows,
        host_collate: Callable[[Any], Any] = default_collate,
    ) -> Batch:
        """Make a batch of items.

        Args:
            items: B items, or what `__getitems__` returned.
            host_collate: the host's own `collate_fn`, called on the samples.

        Returns:
            The batch; its `sample` waits for views (`with_views`).

        Raises:
            SampleError: images of different sizes.
        """
        if isinstance(items, CachedRows):
            assert self.cache is not None
            rows, cache = torch.tensor(items.rows, dtype=torch.int64), self.cache
            sample = self._collated([cache.sample(row) for row in items.rows], host_collate)
            return Batch(rows, cache.keys[rows], cache.images[rows], sample)
        return self._batch(items, host_collate)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the copy: another process makes its own."""
        return {**vars(self), "_probed": None, "given": None}

    def _with_probe(self, views: int | None) -> Any:
        probe = Probe(self.canonical, views)
        return wrappers.with_transform(self.dataset, probe.of)

    def _read(self, row: int) -> Any:
        if self._process != os.getpid() or self._probed is None:
            # Files that the copy has opened meanwhile (h5) are of no use in another process.
            self._probed, self._process = self._with_probe(self._views), os.getpid()
        return read(self._probed, row)

    def _first(self, views: int | None) -> Any:
        self._views, self._probed = views, self._with_probe(views)
        return self._read(0)

    def _check_kept(self, marks: Sequence[weakref.ref[Any]]) -> None:
        """Check that what was read through a copy of the data set has not stayed in the original.

        Raises:
            UserError: it has: the data set would give it to whoever reads it later.
        """
        self._probed = None  # what the copy keeps goes with it
        if not still_held(marks):
            return
        with random_state_kept():
            stayed = markers.find(read(self.dataset, 0))
        if stayed:
            raise UserError(
                f"{self._name} keeps its samples in a place that all its copies share (a global, "
                "a class attribute, a cache of another library), so clean and perturbed ones would "
                "be mixed up; keep them in a dictionary or list of the data set itself, or switch "
                "the cache off, and make the data set anew."
            )


def transform_not_called(dataset: Any, row: int) -> str:
    """Say that a data set has returned a sample that it kept from before."""
    return (
        f"{type(dataset).__name__} returned row {row} without calling its transform, as a data set "
        "does that keeps its samples, so its image cannot be reached; give it with an empty cache, "
        "or without one."
    )


def read(dataset: Any, row: int) -> Any:
    """Return `dataset[row]`.

    Raises:
        SampleError: the image cannot be read; its file is named where it is known.
    """
    try:
        return dataset[row]
    except UserError as error:
        file = wrappers.file_of(dataset, row) or f"row {row}"
        raise SampleError(f"{file}: {error}") from error
    except UNREADABLE as error:
        path = wrappers.file_of(dataset, row)
        where = f"{path} (row {row})" if path else f"row {row} of {type(dataset).__name__}"
        raise SampleError(
            f"Cannot read the image {where}: {error}; replace or remove the file."
        ) from error
