"""Labelled banks for kNN and probe: the training images clean, or as a victim has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cp_plugin.attack.poison_file import Poison
from cp_plugin.config.settings import UserError
from cp_plugin.data import Canonical, RawDataset, class_names, clean_dataset, image_key, labels
from cp_plugin.data.image import Size
from cp_plugin.data.labels import renumbered
from cp_plugin.evaluation.metrics import features

IN_MEMORY_BYTES = 1 << 30
"""Larger sets of images are read from their data set each time."""


@dataclass(frozen=True)
class Bank:
    """N images as an encoder is shown them, with labels."""

    images: Tensor | Dataset[Tensor]
    """uint8 (N, C, H, W), or a data set of uint8 (C, H, W)."""
    labels: Tensor
    """int64 (N); negative: unlabelled."""
    classes: tuple[str, ...] | None
    """Names of the classes."""
    raw: RawDataset
    """The images in canonical form, the one that delta is added to."""
    keys: Tensor | None = None
    """int64 (N), hashes of the canonical images; None where these are not what is shown, or images
    are read each time."""

    @classmethod
    def clean(
        cls, dataset: Any, view_size: int | Size | None, canonical_size: Size | None = None
    ) -> Bank:
        """Read the images of a data set before its transform, and before any poison or defence.

        Args:
            dataset: a map-style data set of labelled images, changed by this package or not.
            view_size: height and width that the encoder is shown, or the side of a square; None
                keeps the canonical size.
            canonical_size: that of a poison or of the run, see `cp_plugin.data.canonical`; None:
                `view_size`.

        Raises:
            UserError: the data set has no labels.
        """
        dataset = clean_dataset(dataset)
        known = labels(dataset)
        if known is None or not bool((known >= 0).any()):
            raise UserError(
                "kNN and linear probe need labelled images and this data set has no labels; "
                "give labelled ones (a class folder a class), or leave the monitor out."
            )
        show = Canonical(view_size)
        raw = RawDataset(dataset, canonical_size or view_size)
        names = class_names(dataset)
        shown = _Shown(raw, show)
        if len(raw) * shown[0].numel() > IN_MEMORY_BYTES:
            return cls(shown, known, names, raw)
        items = [raw[row] for row in range(len(raw))]
        images = torch.stack([show(item.image) for item in items])
        if images.shape[1:] != items[0].image.shape:
            return cls(images, known, names, raw)
        return cls(images, known, names, raw, torch.tensor([item.key for item in items]))

    def poisoned(self, poison: Poison) -> Bank:
        """Return the bank as a victim of the poison has it; images without a row stay clean."""
        images = self.images
        size = tuple(images[0].shape[1:])
        alike = size == poison.size and poison.fit == "crop"
        if isinstance(images, Tensor) and self.keys is not None and alike:
            rows = poison.rows(self.keys.tolist(), self._class_of(self.labels))
            parts = zip(torch.split(images, 1024), torch.split(rows, 1024), strict=True)
            return replace(self, images=torch.cat([poison.apply(*part) for part in parts]))
        show, classes = Canonical((size[0], size[1])), self._class_of(self.labels)
        if poison.fit == "cover":
            shown: _Shown = _ShownAtOwnSize(self.raw, show, poison, classes)
        else:
            shown = _Shown(RawDataset(self.raw.dataset, poison.size), show, poison, classes)
        if isinstance(images, Tensor):
            return replace(self, images=torch.stack([shown[row] for row in range(len(shown))]))
        return replace(self, images=shown)

    def numbered_as(self, other: Bank) -> Bank:
        """Return the bank with the label numbers of another one, its classes matched by name.

        Raises:
            UserError: it has images of a class that the other one lacks.
        """
        own = renumbered(self.labels, self.classes, other.classes)
        return self if own is self.labels else replace(self, labels=own, classes=other.classes)

    def features(
        self,
        encode: Callable[[Tensor], Tensor],
        normalize: Callable[[Tensor], Tensor],
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Return the features of all images, float32 (N, D), see `metrics.features`."""
        return features(encode, self.images, normalize, device=device)

    def _class_of(self, known: Tensor) -> list[str | None]:
        names = self.classes or tuple(str(number) for number in range(int(known.max()) + 1))
        return [names[label] if label >= 0 else None for label in known.tolist()]


class _Shown(Dataset[Tensor]):
    """Canonical images as an encoder is shown them, poisoned where there is a poison."""

    def __init__(
        self,
        raw: RawDataset,
        show: Canonical,
        poison: Poison | None = None,
        classes: Sequence[str | None] = (),
    ) -> None:
        self._raw, self._show, self._poison, self._classes = raw, show, poison, classes

    def __len__(self) -> int:
        return len(self._raw)

    def __getitem__(self, row: int) -> Tensor:
        item = self._raw[row]
        if self._poison is None:
            return self._show(item.image)
        rows = self._poison.rows([item.key], [self._classes[row]])
        return self._show(self._poison.apply(item.image[None], rows)[0])


class _ShownAtOwnSize(_Shown):
    """Images that carry delta at their own size, and are brought to canonical form after that."""

    def __init__(
        self, raw: RawDataset, show: Canonical, poison: Poison, classes: Sequence[str | None]
    ) -> None:
        super().__init__(RawDataset(raw.dataset, None), show, poison, classes)
        self._canonical, self._grid = raw.canonical, Canonical(poison.size, poison.fit)

    def __getitem__(self, row: int) -> Tensor:
        assert self._poison is not None
        image = self._raw[row].image
        rows = self._poison.rows([image_key(self._grid(image))], [self._classes[row]])
        return self._show(self._canonical(self._poison.apply(image[None], rows)[0]))
