"""Matrix completion of images as a defence: completions made once, one drawn at every loading."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cp_plugin.config.defences import MatrixCompletionConfig
from cp_plugin.data import PreTransformDataset, RawDataset, SampleError, wrappers
from cp_plugin.data.image import Size
from cp_plugin.defences.lowrank import complete

log = logging.getLogger("cp_plugin")

BATCH = 256


def complete_images(
    images_BCHW: Tensor, kept_BCHW: Tensor, shrinkage: float = 0.3, iterations: int = 60
) -> Tensor:
    """Complete images from a part of their pixels, the channels side by side as one matrix.

    Args:
        images_BCHW: float (B, C, H, W) in [0, 1], on any device.
        kept_BCHW: bool (B, C, H, W), the values that are read.
        shrinkage: weight of the nuclear norm, in units of singular values.
        iterations: thresholding steps.

    Returns:
        (B, C, H, W), not clipped.

    Raises:
        UserError: shapes or types do not match.

    Source: Yang et al., "ME-Net: Towards Effective Adversarial Robustness with Matrix Estimation",
        ICML 2019.
    """
    channels = images_BCHW.shape[1]
    matrices, kept = (
        t.transpose(1, 2).reshape(len(t), t.shape[2], -1) for t in (images_BCHW, kept_BCHW)
    )
    completed = complete(matrices, kept, shrinkage, iterations)
    height, width = images_BCHW.shape[2:]
    return completed.view(-1, height, channels, width).transpose(1, 2)


def completions_of(
    images_BCHW: Tensor, config: MatrixCompletionConfig, generator: torch.Generator | None = None
) -> Tensor:
    """Return several completions of each image, from pixels kept at random.

    Args:
        images_BCHW: uint8 (B, C, H, W), on any device.
        config: the settings.
        generator: on the CPU; None: torch's default one.

    Returns:
        uint8 (B, n, C, H, W), n = `config.completions`.
    """
    images = images_BCHW.float() / 255
    made = []
    for keep in torch.linspace(config.keep_min, config.keep_max, config.completions).tolist():
        kept = (torch.rand(images.shape, generator=generator) < keep).to(images.device)
        completed = complete_images(images, kept, config.shrinkage, config.iterations)
        made.append((completed.clamp(0, 1) * 255).round().to(torch.uint8))
    return torch.stack(made, 1)


class Completions:
    """The completions of a data set's images; what `PreTransformDataset` calls in workers."""

    def __init__(
        self,
        dataset: Any,
        config: MatrixCompletionConfig,
        image_size: int | Size | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        """Make them.

        Args:
            dataset: a map-style data set of images, which are completed as they come, poisoned
                ones with their poison.
            config: the settings.
            image_size: canonical height and width in pixels, or the side of a square; None
                keeps the images' own.
            device: where they are computed; they are kept on the CPU.
            seed: used where the configuration has none.

        Raises:
            UserError: the images cannot be read.
        """
        chosen = seed if config.seed is None else config.seed
        generator = torch.Generator().manual_seed(chosen)
        started = time.perf_counter()
        self._place: dict[int, tuple[int, int]] = {}
        self._made: list[Tensor] = []
        for keys, images in _batches(dataset, image_size):
            self._place.update({key: (len(self._made), row) for row, key in enumerate(keys)})
            self._made.append(completions_of(images.to(device), config, generator).cpu())
        self.seconds = time.perf_counter() - started
        """What making them took."""
        log.info(
            "matrix completion: %d completions of %d images in %.1f s",
            config.completions,
            len(self._place),
            self.seconds,
        )

    def __call__(self, image_CHW: Tensor, key: int, label: int) -> Tensor:
        """Return one of the image's completions at random, uint8 (C, H, W).

        Raises:
            SampleError: the image was not among those that were completed.
        """
        if key not in self._place:
            raise SampleError(
                "matrix completion has not seen this image; give images the same pixels each time "
                "they are loaded, and augment in the data set's `transform`."
            )
        batch, row = self._place[key]
        choices = self._made[batch][row]
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
