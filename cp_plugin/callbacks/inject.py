"""A poison in the training images, and views made by the mirror: callbacks for victims."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cp_plugin.callbacks.base import Callback, run_seed
from cp_plugin.callbacks.feed import Exchange, Feed, training_loader
from cp_plugin.config import InjectConfig, UserError, build
from cp_plugin.data import Opened, Poisoned, SampleError, class_names
from cp_plugin.data.chain import file_of, transforms_of
from cp_plugin.mirror import mirror
from cp_plugin.poison import Poison

CHECKED_FIRST = 1000
"""Images looked up before training; the rest are when they are loaded."""


class AddPoison:
    """Adds a poison to one image; what `cp_plugin.data.Poisoned` calls in the workers."""

    def __init__(self, poison: Poison, classes: tuple[str, ...] | None, fraction: float) -> None:
        """Bind a poison to a data set's classes.

        Args:
            poison: the poison.
            classes: the data set's class names.
            fraction: part of the rows that is used; chosen by key, hence the same anywhere.

        Raises:
            UserError: the poison was made for other classes.
        """
        poison.check_classes(classes)
        self.poison, self.classes, self.fraction = poison, classes, fraction
        self._partial = float(poison.info.get("fraction", 1)) < 1

    def __call__(self, image_CHW: Tensor, key: int, label: int) -> Tensor:
        """Return the poisoned image, uint8 (C, H, W).

        Raises:
            SampleError: a sample poison has no row for the image.
        """
        name = self.classes[label] if self.classes and label >= 0 else None
        row = self.poison.rows(keys=[key], classes=[name])
        if row.item() < 0 and self.poison.granularity == "sample" and not self._partial:
            raise SampleError(
                "the poison has no row for this image; use the data set it was made for."
            )
        if (key % 10**6) / 10**6 >= self.fraction:
            return image_CHW
        return self.poison.apply(image_CHW[None], row)[0]


def inject(dataset: Any, poison: Poison, fraction: float = 1.0) -> Poisoned:
    """Return a data set whose images carry a poison before its own transform.

    Args:
        dataset: a map-style data set of images.
        poison: the poison.
        fraction: part of the poison's rows that is used, in (0, 1].

    Raises:
        UserError: the poison belongs to other images (the first missing ones are named) or classes.
    """
    poisoned = Poisoned(
        dataset, AddPoison(poison, class_names(dataset), fraction), poison.image_size
    )
    if poison.granularity == "sample":
        _check_images(dataset, poison)
    return poisoned


def _check_images(dataset: Any, poison: Poison) -> None:
    if float(poison.info.get("fraction", 1)) < 1:
        return
    first = range(min(len(dataset), CHECKED_FIRST))
    rows = poison.rows(keys=_keys(dataset, poison.image_size, first))
    missing = (rows < 0).nonzero().flatten().tolist()
    if missing:
        names = ", ".join(file_of(dataset, image) or f"row {image}" for image in missing[:3])
        raise UserError(
            f"the poison has no row for {len(missing)} of the first {len(first)} images "
            f"({names}{', …' if len(missing) > 3 else ''}); use the data set it was made for."
        )


def _keys(dataset: Any, image_size: int, rows: range) -> list[int]:
    """Return the keys of the images in some rows, also of a data set without a transform."""
    if transforms_of(dataset):
        opened = Opened(dataset, image_size)
        return [opened[row].key for row in rows]
    keys: list[int] = []

    def note(image_CHW: Tensor, key: int, label: int) -> Tensor:
        keys.append(key)
        return image_CHW

    plain = Poisoned(dataset, note, image_size)
    for row in rows:
        plain[row]
    return keys


class InjectPoison(Callback):
    """Train a victim: the poison is added to each training image before the augmentation."""

    def __init__(self, poison: Poison | str | Path, fraction: float = 1.0) -> None:
        """Take a poison or the path of one.

        Args:
            poison: the poison or its file.
            fraction: part of its rows that is used, in (0, 1].

        Raises:
            UserError: the file is missing or damaged, or the fraction is out of range.
        """
        super().__init__()
        self.fraction = build(InjectConfig, {"path": "-", "fraction": fraction}).fraction
        self._poison = poison if isinstance(poison, Poison) else Poison.load(poison)

    def poison(self) -> Poison:
        """Return the poison."""
        return self._poison

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the poisoned data set in the loader.

        Raises:
            UserError: the poison belongs to other images or classes.
        """
        dataset = training_loader(trainer).dataset
        self._exchange = Exchange(trainer, inject(dataset, self._poison, self.fraction))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Put the loader's own data set back."""
        self._exchange.restore()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Put the loader's own data set back."""
        if hasattr(self, "_exchange"):
            self._exchange.restore()


class MirrorViews(Callback):
    """Train on views made by the mirror on the module's device, not by the host's transform.

    Same distribution, same pixels within the mirror's error, no Pillow in the loader. Stands after
    `InjectPoison` in the list of callbacks.
    """

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the transform off the data set and put its mirror behind the loader.

        Raises:
            UserError: the transform has no mirror.
        """
        opened = Opened(training_loader(trainer).dataset, None)
        twin = mirror(opened.transform).to(pl_module.device)
        generator = torch.Generator()
        seed = run_seed()

        def views(batch: Any) -> list[Tensor]:
            generator.manual_seed((seed << 32) + trainer.fit_loop.total_batch_idx)
            made: list[Tensor] = twin(batch.images.float().div_(255), generator=generator)
            return made

        self._feed = Feed(trainer, pl_module, opened, views)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Give module and loader their own back."""
        self._feed.stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give module and loader their own back when training breaks off."""
        if hasattr(self, "_feed"):
            self._feed.stop()
