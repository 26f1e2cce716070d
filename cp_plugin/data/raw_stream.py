"""A stream with the host's transform taken off, so that images come before any augmentation."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import IterableDataset, default_collate

from cp_plugin.config.settings import Fit, UserError
from cp_plugin.data import slots as markers
from cp_plugin.data import wrappers
from cp_plugin.data.batch import Batch
from cp_plugin.data.image import Canonical, Size, image_key
from cp_plugin.data.labels import UNLABELLED
from cp_plugin.data.probe import Probe
from cp_plugin.data.raw_images import UNREADABLE, Item, RawImages, SampleError
from cp_plugin.data.stream import PASSED_ON, label_in

NO_ROW = -1
"""The row of an image that is known by its pixels or its label alone."""
LOOKED_AT = 64
"""Samples that are read to learn the size of the images and whether they have labels."""


class RawStream(RawImages, IterableDataset[Item]):
    """A stream of images, read before its transform.

    Works on a shallow copy: the stream itself keeps its transform. It is read anew in each epoch,
    and whatever order it then has is right, since no image is known by its place.
    """

    def __init__(
        self,
        stream: Any,
        image_size: int | Size | None,
        fit: Fit = "crop",
        reads_labels: bool = False,
    ) -> None:
        """Take the transform off.

        Args:
            stream: anything whose `__iter__` gives the samples of an epoch.
            image_size: height and width of the canonical images in pixels, or the side of a
                square; None keeps each image's size.
            fit: as of `Canonical`.
            reads_labels: whether the label that stands in each sample is looked for.

        Raises:
            UserError: the stream can be read only once, is empty, has no `transform`, or does not
                return what its transform makes.
        """
        super().__init__()
        if iter(stream) is stream:
            raise UserError(
                f"{type(stream).__name__} is an iterator, which can be read only once, and each "
                "epoch and each noise phase read it anew; give an IterableDataset whose __iter__ "
                "begins again."
            )
        self.dataset = stream
        self.transform = wrappers.pipeline_of(stream)  # refuses what has none
        self.canonical = Canonical(image_size, fit)
        self._reads_labels = reads_labels
        self._views: int | None = None
        self._probed: Any = None
        self._process = os.getpid()
        self._read_form(self._first)

    def __iter__(self) -> Iterator[Item]:
        """Yield the images of an epoch, each with the host's sample without its views.

        Raises:
            SampleError: an image cannot be read, or a sample holds no label that is sure.
        """
        try:
            for sample in self._opened():
                yield self._item(sample)
        except UNREADABLE as error:
            raise SampleError(
                f"Cannot read an image of {self._name}: {error}; replace or leave out its file."
            ) from error

    def __getattr__(self, name: str) -> Any:
        if name not in PASSED_ON or "dataset" not in vars(self):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        """Return the images of an epoch.

        Raises:
            TypeError: the stream does not tell.
        """
        return len(self.dataset)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the copy: another process makes its own."""
        return {**vars(self), "_probed": None, "given": None}

    def first(self) -> list[Item]:
        """Return the first images of the stream."""
        return list(itertools.islice(self, LOOKED_AT))

    def collate(
        self, items: Sequence[Item], host_collate: Callable[[Any], Any] = default_collate
    ) -> Batch:
        """Make a batch of items, which carries the labels where they are read.

        Args:
            items: B items.
            host_collate: the host's own `collate_fn`, called on the samples.

        Raises:
            SampleError: images of different sizes.
        """
        batch = self._batch(items, host_collate)
        if not self._reads_labels:
            return batch
        return batch._replace(labels=torch.tensor([item.label for item in items]))

    def _item(self, sample: Any) -> Item:
        marks = markers.find(sample)
        if len(marks) != self.places:
            raise SampleError(
                f"a sample of {self._name} holds {len(marks)} views and the first one "
                f"{self.places}; let the transform make each of them, and all samples alike."
            )
        image = marks[0].image
        label = label_in(sample) if self._reads_labels else UNLABELLED
        left = markers.with_placeholders(sample, marks)
        return Item(NO_ROW, image_key(image), image, left, label)

    def _opened(self) -> Any:
        """The copy that is read: what a stream counts, such as its epochs, goes on in it."""
        if self._probed is None or self._process != os.getpid():
            # Files that the copy has opened meanwhile are of no use in another process.
            self._probed, self._process = self._with_probe(), os.getpid()
        return self._probed

    def _with_probe(self) -> Any:
        return wrappers.with_transform(self.dataset, Probe(self.canonical, self._views).of)

    def _first(self, views: int | None) -> Any:
        self._views, self._process, self._probed = views, os.getpid(), None
        for sample in self._with_probe():
            return sample
        raise UserError(
            f"{self._name} is empty: its __iter__ gave no sample, or not a second time; check its "
            "files, and let __iter__ begin again whenever it is called."
        )
