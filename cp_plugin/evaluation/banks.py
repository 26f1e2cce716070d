"""Labelled banks for kNN and probe: the training images clean, or as a victim has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cp_plugin.attack.poison_file import Poison
from cp_plugin.config.settings import UserError
from cp_plugin.data import RawDataset, class_names, clean_dataset, labels
from cp_plugin.evaluation.metrics import features

IN_MEMORY_BYTES = 1 << 30
"""Larger sets of images are read from their data set each time."""


@dataclass(frozen=True)
class Bank:
    """N images in canonical form, with labels."""

    images: Tensor | Dataset[Tensor]
    """uint8 (N, C, H, W), or a data set of uint8 (C, H, W)."""
    labels: Tensor
    """int64 (N); negative: unlabelled."""
    keys: Tensor | None
    """int64 (N), hashes of the clean images; None where images are read each time."""
    classes: tuple[str, ...] | None
    """Names of the classes."""

    @classmethod
    def clean(cls, dataset: Any, image_size: int | None) -> Bank:
        """Read the images of a data set before its transform, and before any poison or defence.

        Args:
            dataset: a map-style data set of labelled images, changed by this package or not.
            image_size: side in pixels; None keeps the images' own.

        Raises:
            UserError: the data set has no labels.
        """
        dataset = clean_dataset(dataset)
        known = labels(dataset)
        if known is None or not bool((known >= 0).any()):
            raise UserError(
                "kNN and linear probe need labelled images and this data set has no labels; "
                "leave the monitor out or give labelled data."
            )
        raw = RawDataset(dataset, image_size)
        first = raw[0].image
        names = class_names(dataset)
        if len(raw) * first.numel() > IN_MEMORY_BYTES:
            return cls(_Images(raw), known, None, names)
        items = [raw[row] for row in range(len(raw))]
        keys = torch.tensor([item.key for item in items])
        return cls(torch.stack([item.image for item in items]), known, keys, names)

    def poisoned(self, poison: Poison) -> Bank:
        """Return the bank as a victim of the poison has it; images without a row stay clean."""
        if isinstance(self.images, Tensor) and self.keys is not None:
            rows = poison.rows(self.keys.tolist(), self._class_of(self.labels))
            parts = zip(torch.split(self.images, 1024), torch.split(rows, 1024), strict=True)
            return replace(self, images=torch.cat([poison.apply(*part) for part in parts]))
        return replace(self, images=_PoisonedImages(self, poison))

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


class _Images(Dataset[Tensor]):
    """The images of an raw data set, alone."""

    def __init__(self, raw: RawDataset) -> None:
        self.raw = raw

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, row: int) -> Tensor:
        return self.raw[row].image


class _PoisonedImages(Dataset[Tensor]):
    """The images of a bank, poisoned as they are read."""

    def __init__(self, bank: Bank, poison: Poison) -> None:
        self._bank, self._poison = bank, poison

    def __len__(self) -> int:
        return len(self._bank.labels)

    def __getitem__(self, row: int) -> Tensor:
        images = self._bank.images
        assert isinstance(images, _Images)
        item = images.raw[row]
        rows = self._poison.rows([item.key], self._bank._class_of(self._bank.labels[row : row + 1]))
        return self._poison.apply(item.image[None], rows)[0]
