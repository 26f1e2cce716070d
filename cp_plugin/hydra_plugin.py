"""The groups `poison` and `monitor` for every Hydra application on the machine.

Hydra imports this module whenever any of its applications starts, so it imports nothing heavy.
"""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from cp_plugin.paths import shipped


class CpPluginSearchPath(SearchPathPlugin):
    """Appends `configs/` to the search path, after all that the application brings."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add the folder by its `file://` address, since editable installs hide package data."""
        search_path.append(provider="cp-plugin", path=f"file://{shipped('configs')}")
