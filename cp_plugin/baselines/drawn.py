"""The poison that a configuration draws."""

from __future__ import annotations

from typing import Any

from cp_plugin.baseline_config import RandomConfig, SyntheticConfig
from cp_plugin.baselines.random import random_poison
from cp_plugin.baselines.synthetic import synthetic_poison
from cp_plugin.poison import Poison

DrawConfig = RandomConfig | SyntheticConfig


def draw(dataset: Any, image_size: int | None, config: DrawConfig, seed: int) -> Poison:
    """Draw random or synthetic noise, see `random_poison` and `synthetic_poison`.

    Raises:
        UserError: the data set has no labels and the noise needs them.
    """
    if isinstance(config, SyntheticConfig):
        return synthetic_poison(dataset, image_size, config, seed)
    return random_poison(dataset, image_size, config, seed)
