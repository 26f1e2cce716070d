"""Finished runs read back from their folders, whichever application made them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig

from cp_plugin.apps.engine_runs import EngineRun
from cp_plugin.apps.solo_runs import SoloRun
from cp_plugin.hosts.lightning import LightningHost


class Run(Protocol):
    """What a folder tells about the run that lies in it."""

    def configuration(self) -> DictConfig | None:
        """Return the run's configuration, None where its folder holds none."""

    def trained(self, checkpoint: Path) -> tuple[LightningHost, Any, DictConfig]:
        """Return the trained encoder on the CPU, the augmentation pipeline, the configuration.

        Args:
            checkpoint: a `.ckpt` file of the run, or its folder.

        Raises:
            UserError: it is missing, damaged, or of another kind.
        """

    def training_images(self, cfg: DictConfig) -> Any:
        """Return the run's training images, without its transform.

        Raises:
            UserError: they are not where they were.
        """


def run_in(folder: Path) -> Run:
    """Return the run in a folder, by the files that it has left there."""
    return SoloRun(folder) if SoloRun.left_in(folder) else EngineRun(folder)
