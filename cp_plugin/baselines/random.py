"""Random noise: what any poison has to beat."""

from __future__ import annotations

from typing import Any

import torch

from cp_plugin.baseline_config import RandomConfig
from cp_plugin.baselines.images import Images
from cp_plugin.perturbation import Perturbation
from cp_plugin.poison import Poison


def random_poison(dataset: Any, image_size: int | None, config: RandomConfig, seed: int) -> Poison:
    """Draw noise in [-eps, eps] for the images or the classes of a data set.

    Uniform, or Gaussian with standard deviation eps, clipped at eps.

    Args:
        dataset: a map-style data set of images.
        image_size: side of delta in pixels; None keeps the images' own.
        config: eps, distribution, granularity, fraction and seed.
        seed: used where the configuration has none.

    Raises:
        UserError: class granularity on a data set without labels.
    """
    seed = seed if config.seed is None else config.seed
    generator = torch.Generator().manual_seed(seed)
    images = Images.read(dataset, image_size)
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
