"""Images of a data set changed once, before training, and found by key whenever one is loaded."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from cp_plugin.data import PreTransformDataset, RawDataset, SampleError, wrappers
from cp_plugin.data.image import Size

log = logging.getLogger("cp_plugin")

BATCH = 256


class Precomputed:
    """What was made of each image of a data set; what `PreTransformDataset` calls in workers."""

    name = "defence"
    """What made it, for messages."""

    def __init__(
        self,
        dataset: Any,
        make: Callable[[Tensor], Tensor],
        image_size: int | Size | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Make them.

        Args:
            dataset: a map-style data set of images, which are changed as they come, poisoned ones
                with their poison.
            make: from uint8 (B, C, H, W) to uint8 (B, n, C, H, W), n images to choose from.
            image_size: canonical height and width in pixels, or the side of a square; None
                keeps the images' own.
            device: where they are computed; they are kept on the CPU.

        Raises:
            UserError: the images cannot be read.
        """
        started = time.perf_counter()
        self._place: dict[int, tuple[int, int]] = {}
        self._made: list[Tensor] = []
        for keys, images in _batches(dataset, image_size):
            self._place.update({key: (len(self._made), row) for row, key in enumerate(keys)})
            self._made.append(make(images.to(device)).cpu())
        self.seconds = time.perf_counter() - started
        """What making them took."""
        log.info("%s: %d images in %.1f s", self.name, len(self._place), self.seconds)

    def __call__(self, image_CHW: Tensor, key: int, label: int) -> Tensor:
        """Return one of what was made of the image at random, uint8 (C, H, W).

        Raises:
            SampleError: the image was not among those that were changed.
        """
        if key not in self._place:
            raise SampleError(
                f"{self.name} has not seen this image; give images the same pixels each time "
                "they are loaded, and augment in the data set's `transform`."
            )
        batch, row = self._place[key]
        choices = self._made[batch][row]
        if len(choices) == 1:
            return choices[0]
        return choices[int(torch.randint(len(choices), ()))]


def _batches(dataset: Any, image_size: int | Size | None) -> Iterator[tuple[list[int], Tensor]]:
    """Yield the images of a data set once each by key, stacked where their sizes are equal."""
    seen: set[int] = set()
    waiting: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
    for key, image in canonical_images(dataset, image_size):
        if key in seen:
            continue
        seen.add(key)
        group = waiting.setdefault(tuple(image.shape), [])
        group.append((key, image))
        if len(group) == BATCH:
            yield _stacked(group)
            group.clear()
    for group in waiting.values():
        if group:
            yield _stacked(group)


def _stacked(group: list[tuple[int, Tensor]]) -> tuple[list[int], Tensor]:
    return [key for key, _ in group], torch.stack([image for _, image in group])


def canonical_images(dataset: Any, image_size: int | Size | None) -> Iterator[tuple[int, Tensor]]:
    """Yield key and canonical image, uint8 (C, H, W), of each row of a data set."""
    if wrappers.transforms_of(dataset):
        raw = RawDataset(dataset, image_size)
        for row in range(len(raw)):
            item = raw[row]
            yield item.key, item.image
        return
    found: list[tuple[int, Tensor]] = []

    def note(image_CHW: Tensor, key: int, label: int) -> Tensor:
        found.append((key, image_CHW))
        return image_CHW

    plain = PreTransformDataset(dataset, note, image_size)
    for row in range(len(plain)):
        plain[row]
        yield found.pop()
