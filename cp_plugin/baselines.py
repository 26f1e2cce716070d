"""Poisons that are not optimised: what any other has to beat."""

from __future__ import annotations

import json
from typing import Any

import torch

from cp_plugin.config import RandomConfig, UserError
from cp_plugin.data import Opened, class_names
from cp_plugin.perturbation import Perturbation
from cp_plugin.poison import Poison
from cp_plugin.provenance import versions


def random_poison(dataset: Any, image_size: int | None, config: RandomConfig, seed: int) -> Poison:
    """Draw uniform noise in [-eps, eps] for the images or the classes of a data set.

    Args:
        dataset: a map-style data set of images.
        image_size: side of delta in pixels; None keeps the images' own.
        config: eps, granularity and seed.
        seed: used where the configuration has none.

    Raises:
        UserError: class granularity on a data set without labels.
    """
    seed = seed if config.seed is None else config.seed
    generator = torch.Generator().manual_seed(seed)
    opened = Opened(dataset, image_size)
    channels, height, width = opened[0].image.shape
    keys, classes = None, None
    if config.granularity == "sample":
        keys = torch.tensor(sorted({opened[row].key for row in range(len(opened))}))
    else:
        classes = class_names(dataset)
        if classes is None:
            raise UserError(
                "poison.granularity=class needs labelled images and this data set has no labels; "
                "use poison.granularity=sample."
            )
    count = len(keys) if keys is not None else len(classes or ())
    perturbation = Perturbation.uniform(
        count, (channels, height, width), config.eps, generator=generator
    )
    info = {"host": "none", "method": "random", "seed": str(seed)}
    info["versions"] = json.dumps(versions())
    return Poison(perturbation, config.granularity, keys, classes, info)
