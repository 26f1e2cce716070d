"""A poison in the training images, and views made by the mirror: callbacks for victims."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cp_plugin.callbacks.base import POISON_FILE, Callback, run_folder, run_seed
from cp_plugin.callbacks.feed import Exchange, Feed, check_batches, training_loader
from cp_plugin.config import InjectConfig, UserError, build
from cp_plugin.data import Opened, Poisoned, SampleError, chain, class_names, labels
from cp_plugin.mirror import mirror
from cp_plugin.poison import Poison

CHECKED = 1000
"""Images looked up before training, all over the data set; the rest are when they are loaded."""


class AddPoison:
    """Adds a poison to one image; what `cp_plugin.data.Poisoned` calls in the workers."""

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


def inject(dataset: Any, poison: Poison, fraction: float = 1.0) -> Poisoned:
    """Return a data set whose images carry a poison before its own transform.

    Args:
        dataset: a map-style data set of images.
        poison: the poison.
        fraction: part of the poisoned images that stays so, see `part`.

    Raises:
        UserError: the poison belongs to other images (the first missing ones are named) or classes.
    """
    return _added(dataset, part(dataset, poison, fraction))


def _added(dataset: Any, poison: Poison) -> Poisoned:
    add = AddPoison(poison, class_names(dataset))
    return Poisoned(dataset, add, poison.image_size, add.many)


def part(dataset: Any, poison: Poison, fraction: float) -> Poison:
    """Return what a data set uses of a poison; a part is the same part of each class.

    Args:
        dataset: a map-style data set of images; where fraction is less than 1, all are read once.
        poison: the poison.
        fraction: part of the poisoned images that stays so, in (0, 1].

    Raises:
        UserError: the poison belongs to other images (the first missing ones are named) or classes.
    """
    poison.check_classes(class_names(dataset))
    if poison.granularity == "sample":
        _check_images(dataset, poison)
    if fraction == 1:
        return poison
    keys = torch.tensor(_keys(dataset, poison.image_size, range(len(dataset))))
    return poison.part(fraction, keys, labels(dataset))


def _check_images(dataset: Any, poison: Poison) -> None:
    if poison.fraction < 1:
        return
    count = min(len(dataset), CHECKED)
    looked_up = torch.linspace(0, len(dataset) - 1, count).round().long()
    rows = poison.rows(keys=_keys(dataset, poison.image_size, looked_up.tolist()))
    missing = looked_up[rows < 0].tolist()
    if missing:
        names = ", ".join(chain.file_of(dataset, image) or f"row {image}" for image in missing[:3])
        raise UserError(
            f"the poison has no row for {len(missing)} of {count} images looked up "
            f"({names}{', …' if len(missing) > 3 else ''}); use the data set it was made for."
        )


def _keys(dataset: Any, image_size: int, rows: Sequence[int]) -> list[int]:
    """Return the keys of the images in some rows, also of a data set without a transform."""
    if chain.transforms_of(dataset):
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

    def __init__(
        self,
        poison: Poison | str | Path,
        fraction: float = 1.0,
        folder: str | Path | None = None,
    ) -> None:
        """Take a poison or the path of one.

        Args:
            poison: the poison or its file.
            fraction: part of the poisoned images that stays so, in (0, 1], the same part of each
                class; what is used of the poison is then written as a file of its own.
            folder: where; None: the run's folder.

        Raises:
            UserError: the file is missing or damaged, or the fraction is out of range.
        """
        super().__init__()
        self.fraction = build(InjectConfig, {"path": "-", "fraction": fraction}).fraction
        self._folder, self._writes = folder, self.fraction < 1
        self._whole = poison if isinstance(poison, Poison) else Poison.load(poison)
        self._poison = self._whole

    def poison(self) -> Poison:
        """Return what is used of the poison: all of it until training has started."""
        return self._poison

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the poisoned data set in the loader.

        Raises:
            UserError: the poison belongs to other images or classes.
        """
        dataset = training_loader(trainer).dataset
        self._poison = part(dataset, self._whole, self.fraction)
        self._exchange = Exchange(trainer, _added(dataset, self._poison))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Put the loader's own data set back; write what a part of a poison was used."""
        self._exchange.restore()
        path = Path(self._folder or run_folder(trainer)) / POISON_FILE
        if self._writes and trainer.is_global_zero and not path.exists():
            self.poison().save(path)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Say so where there was nothing to train on.

        Raises:
            UserError: the training loader brings no batch.
        """
        check_batches(trainer)

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
