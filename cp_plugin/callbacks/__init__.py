"""Lightning callbacks: craft a poison, train a victim or a clean baseline, watch a kNN."""

from cp_plugin.attack import inject as injection
from cp_plugin.callbacks.clusters import CraftUnlearnableClusters
from cp_plugin.callbacks.craft import CraftPoison
from cp_plugin.callbacks.defend import Defence
from cp_plugin.callbacks.inject import CanonicalImages, InjectPoison, MirrorViews
from cp_plugin.callbacks.monitor import KNNMonitor
from cp_plugin.callbacks.separable import CraftTue
from cp_plugin.callbacks.supervised import (
    CraftAap,
    CraftAue,
    CraftErrorMin,
    CraftPil,
    CraftSep,
    CraftTap,
)

inject = injection.inject
"""Bound last: importing the module of this name would put the module in its place."""

__all__ = [
    "CanonicalImages",
    "CraftAap",
    "CraftAue",
    "CraftErrorMin",
    "CraftPil",
    "CraftPoison",
    "CraftSep",
    "CraftTap",
    "CraftTue",
    "CraftUnlearnableClusters",
    "Defence",
    "InjectPoison",
    "KNNMonitor",
    "MirrorViews",
    "inject",
]
