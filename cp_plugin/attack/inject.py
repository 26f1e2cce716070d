"""A poison added to the images of a data set, before its own transform."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cp_plugin.attack.own_images import (
    EXPECTED,
    canonical_images,
    check_images,
    check_not_carried,
    of_others,
)
from cp_plugin.attack.poison_file import Poison
from cp_plugin.config.settings import UserError
from cp_plugin.data import (
    PreTransformDataset,
    PreTransformStream,
    SampleError,
    changes_in,
    labels,
    names_or_numbers,
    stream_classes,
    streams,
)


class AddPoison:
    """Adds a poison to one image; what `PreTransformDataset` calls in the workers."""

    def __init__(self, poison: Poison, classes: tuple[str, ...] | None) -> None:
        """Bind a poison to a data set's classes.

        Args:
            poison: the poison.
            classes: the data set's class names.

        Raises:
            UserError: the poison was made for other classes.
        """
        poison.check_classes(classes)
        self.poison, self.classes = poison, classes
        self._partial = poison.fraction < 1
        self.reads_labels = poison.needs_labels

    def __call__(self, image_CHW: Tensor, key: int, label: int) -> Tensor:
        """Return the poisoned image, uint8 (C, H, W).

        Raises:
            SampleError: a poison of single images or of clusters has no row for the image.
        """
        return self.many(image_CHW[None], [key], [label])[0]

    def many(self, images_BCHW: Tensor, keys: Sequence[int], labels: Sequence[int]) -> Tensor:
        """Return poisoned images, uint8 (B, C, H, W).

        Raises:
            SampleError: a poison of single images or of clusters has no row for an image.
        """
        return self.poison.apply(images_BCHW, self._rows(keys, labels))

    def changes(self, key: int, label: int) -> bool:
        """Tell whether an image carries a perturbation, as one outside a part of a poison does not.

        Raises:
            SampleError: a poison of single images or of clusters has no row for it.
        """
        return bool(self._rows([key], [label])[0] >= 0)

    def row(self, key: int, label: int) -> Tensor:
        """Return the delta of one image, float32 (C, h, w), zero where it carries none.

        Raises:
            SampleError: a poison of single images or of clusters has no row for it.
        """
        return self.poison.perturbation.gather(self._rows([key], [label]))[0]

    def _rows(self, keys: Sequence[int], labels: Sequence[int]) -> Tensor:
        if self.classes and max(labels, default=-1) >= len(self.classes):
            raise SampleError(
                f"an image has the label {max(labels)}, and the data set has "
                f"{len(self.classes)} classes; give it labels from 0 on."
            )
        names = [self.classes[y] if self.classes and y >= 0 else None for y in labels]
        rows = self.poison.rows(keys=keys, classes=names)
        if not (self.poison.needs_labels or self._partial) and bool((rows < 0).any()):
            raise SampleError(
                "the poison has no row for this image; use the data set it was made for."
            )
        return rows


class AddToStream(AddPoison):
    """Adds a poison to the images of a stream, none of which could be looked up before."""

    _seen = 0
    _carried = False

    def many(self, images_BCHW: Tensor, keys: Sequence[int], labels: Sequence[int]) -> Tensor:
        """Return poisoned images, uint8 (B, C, H, W).

        Raises:
            SampleError: a poison for a part of the images has carried none of so many that they
                are others.
        """
        if self._partial and not self._carried:
            self._seen += len(keys)
            self._carried = bool((self._rows(keys, labels) >= 0).any())
            if not self._carried and self._seen >= EXPECTED / self.poison.fraction:
                raise SampleError(of_others(self.poison, self._seen, 0))
        return super().many(images_BCHW, keys, labels)


def inject(
    dataset: Any, poison: Poison, fraction: float = 1.0
) -> PreTransformDataset | PreTransformStream:
    """Return a data set whose images carry a poison before its own transform.

    Args:
        dataset: a data set of images, or a stream of samples with images.
        poison: the poison.
        fraction: part of the poisoned images that stays so, see `part`.

    Raises:
        UserError: the poison belongs to other images (the first missing ones are named) or classes.
    """
    return added(dataset, part(dataset, poison, fraction))


def added(dataset: Any, poison: Poison) -> PreTransformDataset | PreTransformStream:
    """Return a data set whose images carry a poison that is known to fit."""
    if streams(dataset):
        add: AddPoison = AddToStream(poison, _classes_of_stream(dataset, poison))
        return PreTransformStream(dataset, add, poison.size, poison.fit)
    add = AddPoison(poison, _classes(dataset, poison))
    return PreTransformDataset(dataset, add, poison.size, add.many, poison.fit)


def part(dataset: Any, poison: Poison, fraction: float) -> Poison:
    """Return what a data set uses of a poison; a part is the same part of each class.

    Args:
        dataset: a data set of images; where fraction is less than 1, all are read once. Images of
            a stream are looked up as they come.
        poison: the poison.
        fraction: part of the poisoned images that stays so, in (0, 1].

    Raises:
        UserError: the poison belongs to other images (the first missing ones are named) or classes,
            or the images carry it already.
    """
    check_unpoisoned(dataset)
    if streams(dataset):
        return _of_stream(dataset, poison, fraction)
    classes = _classes(dataset, poison)
    poison.check_classes(classes)
    if poison.owned_keys is not None:
        check_images(dataset, poison)
    else:
        check_not_carried(dataset, poison, classes)
    if fraction == 1:
        return poison
    keys = torch.tensor([key for _, key in canonical_images(dataset, poison, range(len(dataset)))])
    return poison.part(fraction, keys, labels(dataset), classes)


def _classes(dataset: Any, poison: Poison) -> tuple[str, ...] | None:
    """Return the names of a data set's classes, where the poison asks for them."""
    return names_or_numbers(dataset) if poison.needs_labels else None


def _of_stream(stream: Any, poison: Poison, fraction: float) -> Poison:
    """Check what can be known of a stream that has not begun."""
    if fraction < 1:
        raise UserError(
            f"fraction={fraction:g} picks images among all, and {type(stream).__name__} streams "
            "them; write a part of the poison with a map-style data set, or craft with "
            "poison.fraction, and inject that file."
        )
    poison.check_classes(_classes_of_stream(stream, poison))
    return poison


def _classes_of_stream(stream: Any, poison: Poison) -> tuple[str, ...] | None:
    """Return the names of a stream's classes, where the poison asks for them.

    A poison of numbered classes has the numbers, where the stream tells no names.
    """
    if not poison.needs_labels:
        return None
    found = stream_classes(stream)
    if found is not None:
        return found
    own = poison.classes
    return own if own is not None and own == tuple(map(str, range(len(own)))) else None


def check_unpoisoned(dataset: Any) -> None:
    """Check that the images of a data set carry no poison yet: two would exceed the budget.

    Raises:
        UserError: they carry one.
    """
    own = [dataset.add] if isinstance(dataset, PreTransformStream) else changes_in(dataset)
    for add in own:
        if isinstance(add, AddPoison):
            raise UserError(
                f"the images of {type(dataset).__name__} carry a {add.poison.granularity} poison "
                "already, and a second one on top would exceed its budget; give the clean data set."
            )
