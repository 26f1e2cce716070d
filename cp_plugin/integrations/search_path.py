"""Shipped as module `hydra_plugins.cp_plugin`, where Hydra looks for plugins."""

from cp_plugin.integrations.hydra_plugin import CpPluginSearchPath

__all__ = ["CpPluginSearchPath"]
