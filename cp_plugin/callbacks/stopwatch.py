"""How long the steps of a run take, and an end of the run when its time is over."""

from __future__ import annotations

import statistics
import time
from typing import Any

from cp_plugin.callbacks.base import Callback


class Stopwatch(Callback):
    """Measures steps of training with all that other callbacks do after each, as noise phases."""

    def __init__(self, seconds: float | None = None, steps: int | None = None) -> None:
        """Take what ends the run before its last epoch.

        Args:
            seconds: of training; None: no limit.
            steps: of training; None: no limit.
        """
        super().__init__()
        self._limit, self._steps = seconds, steps
        self.times: list[float] = []
        """When each step was over, in seconds of a clock of its own."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock."""
        self.times = [time.perf_counter()]

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the time; end the run if it is over."""
        self.times.append(time.perf_counter())
        late = self._limit is not None and self.times[-1] - self.times[0] >= self._limit
        if late or (self._steps is not None and len(self.times) > self._steps):
            trainer.should_stop = True

    @property
    def seconds_a_step(self) -> float:
        """The median of all steps but the first, which makes what later ones find made."""
        spans = [b - a for a, b in zip(self.times, self.times[1:], strict=False)]
        return statistics.median(spans[1:] or spans)
