"""Poisons that are drawn, not optimised: random and synthetic noise."""

from cp_plugin.baselines.drawn import DrawConfig, draw
from cp_plugin.baselines.random import random_poison
from cp_plugin.baselines.synthetic import synthetic_poison

__all__ = ["DrawConfig", "draw", "random_poison", "synthetic_poison"]
