"""Random noise as a poison: what any other has to beat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cp_plugin.baselines import random_poison
from cp_plugin.callbacks.base import run_folder, run_seed
from cp_plugin.callbacks.craft import POISON_FILE
from cp_plugin.callbacks.feed import training_loader
from cp_plugin.callbacks.inject import InjectPoison
from cp_plugin.config import RandomConfig, build
from cp_plugin.data import Opened
from cp_plugin.mirror import mirror
from cp_plugin.poison import Poison


class DrawPoison(InjectPoison):
    """Draw uniform noise for the training images and train a victim on it.

    When training ends the noise is written to the run's folder, as a crafted poison is.
    """

    def __init__(self, folder: str | Path | None = None, **settings: Any) -> None:
        """Take the settings.

        Args:
            folder: where the noise is written; None: the run's folder.
            settings: those of `cp_plugin.config.RandomConfig`, by name.

        Raises:
            UserError: an unknown name or a value out of range.
        """
        self.config = build(RandomConfig, settings)
        self.fraction = 1.0
        self._folder = folder
        self._drawn: Poison | None = None

    def poison(self) -> Poison:
        """Return the noise, once training has started."""
        assert self._drawn is not None
        return self._drawn

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Draw the noise and put the poisoned data set in the loader.

        Raises:
            UserError: noise a class is asked for and there are no labels.
        """
        dataset = training_loader(trainer).dataset
        size = mirror(Opened(dataset, None).transform).crop_size
        self._drawn = self._poison = random_poison(dataset, size, self.config, run_seed())
        super().on_train_start(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the noise; put the loader's own data set back."""
        super().on_train_end(trainer, pl_module)
        path = Path(self._folder or run_folder(trainer)) / POISON_FILE
        if trainer.is_global_zero and not path.exists():
            self.poison().save(path)
