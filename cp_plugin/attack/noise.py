"""Poisons that are sampled, not optimised: random noise and linearly separable noise."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.attack.poison_file import Poison
from cp_plugin.config.baselines import RandomConfig, SyntheticConfig
from cp_plugin.config.settings import Fit, Granularity, UserError
from cp_plugin.data import (
    RawDataset,
    RawStream,
    labels,
    names_or_numbers,
    stream_classes,
    streams,
)
from cp_plugin.data.image import Size
from cp_plugin.util.provenance import versions

NoiseConfig = RandomConfig | SyntheticConfig


@dataclass(frozen=True)
class Images:
    """The images of a data set as a poison addresses them."""

    dataset: Any
    shape: tuple[int, int, int]
    """(C, H, W) of a canonical image."""
    keys: Tensor
    """int64 (N)."""
    labels: Tensor | None
    """int64 (N), negative where unlabelled."""
    fit: Fit = "crop"
    """How delta and images come together."""

    @classmethod
    def read(cls, dataset: Any, image_size: int | Size | None, config: NoiseConfig) -> Images:
        """Read every image once; of a stream an epoch, or its beginning where that is enough.

        Args:
            dataset: a data set of images, or a stream of them.
            image_size: canonical height and width in pixels, or the side of a square; None
                keeps the images' own.
            config: granularity, fit and fraction are read from it.
        """
        fit = config.fit
        if streams(dataset):
            return cls._of_stream(dataset, image_size, config)
        raw = RawDataset(dataset, image_size, fit)
        channels, height, width = raw[0].image.shape
        keys = torch.tensor([raw[row].key for row in range(len(raw))])
        return cls(dataset, (channels, height, width), keys, labels(dataset), fit)

    @classmethod
    def _of_stream(cls, stream: Any, image_size: int | Size | None, config: NoiseConfig) -> Images:
        raw = RawStream(stream, image_size, config.fit, reads_labels=True)
        whole = config.granularity == "sample" or config.fraction < 1
        channels, height, width = raw.first()[0].image.shape
        found = [(item.key, item.label) for item in (raw if whole else raw.first())]
        keys, labels = torch.tensor(found).unbind(1)
        known = labels if bool((labels >= 0).any()) else None
        return cls(stream, (channels, height, width), keys, known, config.fit)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes.

        Raises:
            UserError: the data set has no labels, or a stream does not name its classes.
        """
        if streams(self.dataset):
            names = stream_classes(self.dataset)
            if names is None and self.labels is not None:
                raise UserError(
                    f"{type(self.dataset).__name__} streams its images and does not name its "
                    "classes, so how many there are is not known before it ends; give it an "
                    "attribute `classes` with their names in the order of the labels."
                )
        else:
            names = names_or_numbers(self.dataset)
        if names is None or self.labels is None:
            raise UserError(
                "poison.granularity=class needs labelled images and this data set has no labels; "
                "use labelled data or +poison=random with poison.granularity=sample."
            )
        return names

    def poison(
        self,
        perturbation: Perturbation,
        granularity: Granularity,
        keys: Tensor | None,
        fraction: float,
        info: Mapping[str, str],
    ) -> Poison:
        """Return rows as a poison of these images, or of a part of them."""
        different = len(torch.unique(self.keys))
        facts = {"host": "none", **info, "versions": json.dumps(versions())}
        if self.fit != "crop":
            facts["fit"] = self.fit
        if keys is not None and len(keys) < different:  # unlabelled images have no row
            facts |= {"fraction": repr(len(keys) / different), "images": str(different)}
        classes = self.classes if granularity == "class" else None
        whole = Poison(perturbation, granularity, keys, classes, facts)
        return whole if fraction == 1 else whole.part(fraction, self.keys, self.labels)


def random_poison(
    dataset: Any, image_size: int | Size | None, config: RandomConfig, seed: int
) -> Poison:
    """Draw noise in [-eps, eps] for the images or the classes of a data set.

    Uniform, or Gaussian with standard deviation eps, clipped at eps.

    Args:
        dataset: a data set of images, or a stream of them.
        image_size: canonical height and width in pixels, or the side of a square; None keeps
            the images' own.
        config: eps, distribution, granularity, fraction and seed.
        seed: used where the configuration has none.

    Raises:
        UserError: class granularity on a data set without labels.
    """
    seed = seed if config.seed is None else config.seed
    generator = torch.Generator().manual_seed(seed)
    images = Images.read(dataset, image_size, config)
    keys = torch.unique(images.keys) if config.granularity == "sample" else None
    count = len(images.classes) if keys is None else len(keys)
    if config.distribution == "uniform":
        rows = Perturbation.uniform(count, images.shape, config.eps, generator=generator)
    else:
        rows = Perturbation.zeros(count, images.shape, config.eps)
        for start in range(0, count, 4096):
            part = torch.arange(start, min(start + 4096, count))
            size = (len(part), *images.shape)
            rows.write(part, config.eps * torch.randn(size, generator=generator))
    info = {"method": "random", "distribution": config.distribution, "seed": str(seed)}
    return images.poison(rows, config.granularity, keys, config.fraction, info)


DRAWS = 1000
"""How often a class's centre is sampled anew when it lies too close to another's."""


def synthetic_poison(
    dataset: Any, image_size: int | Size | None, config: SyntheticConfig, seed: int
) -> Poison:
    """Draw noise that tells the classes apart by a linear function of the pixels.

    Every class has a centre, a corner of a cube; a point is the centre plus Gaussian noise of
    deviation 1, one coordinate a square patch of a channel. A row is a point whose values fill
    their patches, scaled so that its largest pixel is eps.

    Args:
        dataset: a data set of labelled images, or a stream of them.
        image_size: canonical height and width in pixels, or the side of a square; None keeps
            the images' own.
        config: eps, granularity, patch, separation, fraction and seed.
        seed: used where the configuration has none.

    Raises:
        UserError: no labels, or more classes than patches this large can tell apart.

    Source: Yu, Zhang, Chen, Yin, Liu, "Availability Attacks Create Shortcuts", KDD 2022.
    """
    seed = seed if config.seed is None else config.seed
    generator = torch.Generator().manual_seed(seed)
    images = Images.read(dataset, image_size, config)
    if images.labels is None:
        raise UserError(
            "+poison=synthetic draws noise that tells classes apart and this data set has no "
            "labels; use labelled data, +poison=cp or +poison=random."
        )
    channels, height, width = images.shape
    grid = (channels, math.ceil(height / config.patch), math.ceil(width / config.patch))
    centres = _corners(len(images.classes), math.prod(grid), generator) * config.separation
    keys, labels = None, torch.arange(len(centres))
    if config.granularity == "sample":
        keys, labels = _labelled_keys(images.keys, images.labels)
    rows = Perturbation.zeros(len(labels), images.shape, config.eps)
    for part in torch.split(torch.arange(len(labels)), 4096):
        points = centres[labels[part]]
        points = points + torch.randn(points.shape, generator=generator)
        rows.write(part, _patches(points.view(-1, *grid), config)[..., :height, :width])
    info = {
        "method": "synthetic",
        "patch": str(config.patch),
        "separation": repr(config.separation),
        "seed": str(seed),
    }
    return images.poison(rows, config.granularity, keys, config.fraction, info)


def _corners(classes: int, axes: int, generator: torch.Generator) -> Tensor:
    """Return corners of the cube [-1, 1]^axes, (classes, axes), no two of them close.

    Any two differ in a fifth of the coordinates at least, so that no class's cloud reaches into
    another's half space.
    """
    found = torch.empty(0, axes)
    least = max(1, axes // 5)
    for _ in range(classes):
        for _ in range(DRAWS):
            corner = torch.randint(0, 2, (axes,), generator=generator) * 2.0 - 1
            if not len(found) or int((found != corner).sum(1).min()) >= least:
                found = torch.cat([found, corner[None]])
                break
        else:
            raise UserError(
                f"poison.patch is too large: {axes} patches cannot hold {classes} classes apart; "
                "set poison.patch to half."
            )
    return found


def _patches(points: Tensor, config: SyntheticConfig) -> Tensor:
    """Return points (B, C, h, w) as images of squares, the largest pixel of each eps."""
    largest = points.abs().amax((1, 2, 3), keepdim=True)
    values = points * (config.eps / largest)
    return values.repeat_interleave(config.patch, 2).repeat_interleave(config.patch, 3)


def _labelled_keys(keys_N: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keys of the labelled images, each once, and their labels."""
    labelled = labels_N >= 0
    label_of = dict(zip(keys_N[labelled].tolist(), labels_N[labelled].tolist(), strict=True))
    keys = sorted(label_of)
    return torch.tensor(keys), torch.tensor([label_of[key] for key in keys])


def sample_noise(
    dataset: Any, image_size: int | Size | None, config: NoiseConfig, seed: int
) -> Poison:
    """Draw random or synthetic noise, see `random_poison` and `synthetic_poison`.

    Raises:
        UserError: the data set has no labels and the noise needs them.
    """
    if isinstance(config, SyntheticConfig):
        return synthetic_poison(dataset, image_size, config, seed)
    return random_poison(dataset, image_size, config, seed)
