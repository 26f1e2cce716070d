"""Lightning callbacks: craft a poison, train a victim on one, watch a kNN."""

from cp_plugin.callbacks.craft import CraftPoison
from cp_plugin.callbacks.inject import InjectPoison, MirrorViews, inject
from cp_plugin.callbacks.monitor import KNNMonitor

__all__ = ["CraftPoison", "InjectPoison", "KNNMonitor", "MirrorViews", "inject"]
