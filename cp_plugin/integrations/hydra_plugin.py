"""The groups `poison` and `monitor` for every Hydra application on the machine.

Hydra imports this module whenever any of its applications starts, so it imports nothing heavy.
"""

from __future__ import annotations

from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.experimental.callback import Callback
from hydra.plugins.search_path_plugin import SearchPathPlugin

from cp_plugin.util.paths import shipped


class CpPluginSearchPath(SearchPathPlugin):
    """Appends `configs/` to the search path, after all that the application brings."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add the folder by its `file://` address, since editable installs hide package data."""
        search_path.append(provider="cp-plugin", path=f"file://{shipped('configs')}")


class Activation(Callback):
    """Makes a selected poison or monitor act; the files of both groups name it."""

    def on_job_start(self, config: Any, **kwargs: Any) -> None:
        """Prepare the application before its `main` runs, see `activation.start`."""
        from cp_plugin.integrations.activation import start

        start(config, kwargs["task_function"])

    def on_job_end(self, config: Any, job_return: Any, **kwargs: Any) -> None:
        """Put the application back, see `activation.finish`."""
        from cp_plugin.integrations.activation import finish

        finish(job_return)
