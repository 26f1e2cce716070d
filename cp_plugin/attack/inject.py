"""A poison added to the images of a data set, before its own transform."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cp_plugin.attack.poison_file import Poison
from cp_plugin.config.settings import UserError
from cp_plugin.data import (
    PreTransformDataset,
    RawDataset,
    SampleError,
    changes_in,
    class_names,
    labels,
    wrappers,
)
from cp_plugin.data.image import Size

CHECKED = 1000
"""Images looked up before training, all over the data set; the rest are when they are loaded."""


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

    def __call__(self, image_CHW: Tensor, key: int, label: int) -> Tensor:
        """Return the poisoned image, uint8 (C, H, W).

        Raises:
            SampleError: a sample poison has no row for the image.
        """
        return self.many(image_CHW[None], [key], [label])[0]

    def many(self, images_BCHW: Tensor, keys: Sequence[int], labels: Sequence[int]) -> Tensor:
        """Return poisoned images, uint8 (B, C, H, W).

        Raises:
            SampleError: a sample poison has no row for an image.
        """
        names = [self.classes[y] if self.classes and y >= 0 else None for y in labels]
        rows = self.poison.rows(keys=keys, classes=names)
        if self.poison.granularity == "sample" and not self._partial and bool((rows < 0).any()):
            raise SampleError(
                "the poison has no row for this image; use the data set it was made for."
            )
        return self.poison.apply(images_BCHW, rows)


def inject(dataset: Any, poison: Poison, fraction: float = 1.0) -> PreTransformDataset:
    """Return a data set whose images carry a poison before its own transform.

    Args:
        dataset: a map-style data set of images.
        poison: the poison.
        fraction: part of the poisoned images that stays so, see `part`.

    Raises:
        UserError: the poison belongs to other images (the first missing ones are named) or classes.
    """
    return added(dataset, part(dataset, poison, fraction))


def added(dataset: Any, poison: Poison) -> PreTransformDataset:
    """Return a data set whose images carry a poison that is known to fit."""
    add = AddPoison(poison, class_names(dataset))
    return PreTransformDataset(dataset, add, poison.size, add.many)


def part(dataset: Any, poison: Poison, fraction: float) -> Poison:
    """Return what a data set uses of a poison; a part is the same part of each class.

    Args:
        dataset: a map-style data set of images; where fraction is less than 1, all are read once.
        poison: the poison.
        fraction: part of the poisoned images that stays so, in (0, 1].

    Raises:
        UserError: the poison belongs to other images (the first missing ones are named) or classes.
    """
    check_unpoisoned(dataset)
    poison.check_classes(class_names(dataset))
    if poison.granularity == "sample":
        _check_images(dataset, poison)
    if fraction == 1:
        return poison
    keys = torch.tensor(_keys(dataset, poison.size, range(len(dataset))))
    return poison.part(fraction, keys, labels(dataset))


def check_unpoisoned(dataset: Any) -> None:
    """Check that the images of a data set carry no poison yet: two would exceed the budget.

    Raises:
        UserError: they carry one.
    """
    for add in changes_in(dataset):
        if isinstance(add, AddPoison):
            raise UserError(
                f"the images of {type(dataset).__name__} carry a {add.poison.granularity} poison "
                "already, and a second one on top would exceed its budget; give the clean data set."
            )


def _check_images(dataset: Any, poison: Poison) -> None:
    if poison.fraction < 1:
        return
    count = min(len(dataset), CHECKED)
    looked_up = torch.linspace(0, len(dataset) - 1, count).round().long()
    rows = poison.rows(keys=_keys(dataset, poison.size, looked_up.tolist()))
    missing = looked_up[rows < 0].tolist()
    if missing:
        names = ", ".join(
            wrappers.file_of(dataset, image) or f"row {image}" for image in missing[:3]
        )
        raise UserError(
            f"the poison has no row for {len(missing)} of {count} images looked up "
            f"({names}{', …' if len(missing) > 3 else ''}); use the data set it was made for."
        )


def _keys(dataset: Any, image_size: Size, rows: Sequence[int]) -> list[int]:
    """Return the keys of the images in some rows, also of a data set without a transform."""
    if wrappers.transforms_of(dataset):
        raw = RawDataset(dataset, image_size)
        return [raw[row].key for row in rows]
    keys: list[int] = []

    def note(image_CHW: Tensor, key: int, label: int) -> Tensor:
        keys.append(key)
        return image_CHW

    plain = PreTransformDataset(dataset, note, image_size)
    for row in rows:
        plain[row]
    return keys
