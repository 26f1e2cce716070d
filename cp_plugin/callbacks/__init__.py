"""Lightning callbacks: craft a poison, train a victim on one, watch a kNN."""

from cp_plugin.attack.inject import inject
from cp_plugin.callbacks.craft import CraftPoison
from cp_plugin.callbacks.defend import Defence
from cp_plugin.callbacks.inject import InjectPoison, MirrorViews
from cp_plugin.callbacks.monitor import KNNMonitor
from cp_plugin.callbacks.supervised import CraftErrorMin, CraftTap

__all__ = [
    "CraftErrorMin",
    "CraftPoison",
    "CraftTap",
    "Defence",
    "InjectPoison",
    "KNNMonitor",
    "MirrorViews",
    "inject",
]
