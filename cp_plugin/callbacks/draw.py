"""Noise that is drawn, random or synthetic, as a poison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cp_plugin.baselines import DrawConfig, draw
from cp_plugin.callbacks.base import Callback, run_seed
from cp_plugin.callbacks.feed import training_loader
from cp_plugin.callbacks.inject import InjectPoison
from cp_plugin.data import Opened
from cp_plugin.mirror import mirror
from cp_plugin.poison import Poison


class DrawPoison(InjectPoison):
    """Draw random or synthetic noise for the training images and train a victim on it.

    When training ends the noise is written to the run's folder, as a crafted poison is.
    """

    def __init__(self, config: DrawConfig, folder: str | Path | None = None) -> None:
        """Take the settings.

        Args:
            config: a `RandomConfig` or a `SyntheticConfig`.
            folder: where the noise is written; None: the run's folder.
        """
        Callback.__init__(self)
        self.config = config
        self.fraction = 1.0
        self._folder, self._writes = folder, True
        self._drawn: Poison | None = None

    def poison(self) -> Poison:
        """Return the noise, once training has started."""
        assert self._drawn is not None
        return self._drawn

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Draw the noise and put the poisoned data set in the loader.

        Raises:
            UserError: the noise needs labels and there are none.
        """
        dataset = training_loader(trainer).dataset
        size = mirror(Opened(dataset, None).transform).crop_size
        self._drawn = self._whole = draw(dataset, size, self.config, run_seed())
        super().on_train_start(trainer, pl_module)
