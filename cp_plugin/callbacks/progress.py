"""How far a run is: one bar for all epochs, or lines now and then where there is no terminal."""

from __future__ import annotations

import logging
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from cp_plugin.callbacks.base import Callback

SECONDS_BETWEEN_LINES = 15.0


class RunProgress(Callback):
    """Show steps, losses and accuracies of a run on standard error.

    Where the package's logger is set to warnings alone, nothing is shown.
    """

    def __init__(self, title: str) -> None:
        """Name the run."""
        super().__init__()
        self._title = title
        self.first_step = 0
        """Optimiser steps that an earlier, interrupted run had made."""
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._last_line = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the bar."""
        self.first_step = trainer.global_step
        self._total = int(trainer.estimated_stepping_batches)
        self._started = time.monotonic()
        self._shown = logging.getLogger("cp_plugin").level <= logging.INFO
        if self._shown and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total} steps"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[metrics]}"),
                console=self._console,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total, metrics="")

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the step."""
        step = trainer.global_step
        if self._bar is not None:
            self._bar.update(self._task, completed=step, metrics=_metrics(trainer))
        elif self._shown and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            line = f"{self._title}: step {step}/{self._total} {_metrics(trainer)}{self._left(step)}"
            self._console.print(line, highlight=False, soft_wrap=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Close the bar."""
        self._stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close the bar, so that the error stands alone."""
        self._stop()

    def _left(self, step: int) -> str:
        made = step - self.first_step
        if made < 2:  # the first takes longer than any other
            return ""
        seconds = (time.monotonic() - self._started) / made * (self._total - step)
        return f", {seconds:.0f} s left"

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _metrics(trainer: Any) -> str:
    names = {"train_loss": "loss", "cp_noise_loss": "noise loss"}
    metrics = trainer.callback_metrics
    shown = [f"{text} {float(metrics[key]):.3f}" for key, text in names.items() if key in metrics]
    for key, text in (("knn_clean_bank", "kNN"), ("knn_poisoned_bank", "kNN poisoned")):
        if key in metrics:
            shown.append(f"{text} {float(metrics[key]):.1f} %")
    return ", ".join(shown)
