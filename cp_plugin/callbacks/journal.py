"""What the kNN monitor found, as lines and as a file in the run's folder."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

from cp_plugin.callbacks.base import Callback, run_folder
from cp_plugin.callbacks.monitor import KNNMonitor

log = logging.getLogger("cp_plugin")

JOURNAL_FILE = "knn.csv"
BANKS = {"knn_clean_bank": "clean bank", "knn_poisoned_bank": "poisoned bank"}


class Journal(Callback):
    """Write each evaluation of a monitor down as it comes; stands after the monitor."""

    def __init__(self, monitor: KNNMonitor, folder: str | Path | None = None) -> None:
        """Take the monitor, and a folder in place of the run's."""
        super().__init__()
        self._monitor, self._folder = monitor, folder
        self._written = 0

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Write what is new."""
        self._write(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write what is new."""
        self._write(trainer)

    def _write(self, trainer: Any) -> None:
        new = self._monitor.results[self._written :]
        self._written += len(new)
        if not new or not trainer.is_global_zero:
            return
        path = Path(self._folder or run_folder(trainer)) / JOURNAL_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not path.exists()
        with path.open("a", newline="", encoding="utf8") as file:
            writer = csv.DictWriter(file, new[0])
            if fresh:
                writer.writeheader()
            writer.writerows(new)
        for row in new:
            found = [f"{text} {row[name]:.1f} %" for name, text in BANKS.items() if name in row]
            log.info("step %d: kNN (k=%d) %s", row["step"], row["k"], ", ".join(found))
