"""How far a long noise phase is: a line a minute, since no step of training is made meanwhile."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator

from cp_plugin.data.batch import Batch

log = logging.getLogger("cp_plugin")

SECONDS_BETWEEN_LINES = 60.0


def told(batches: Iterable[Batch], total: int) -> Iterator[Batch]:
    """Yield the batches of a noise phase, and log how many are done and how much time is left.

    Args:
        batches: of one noise phase.
        total: how many there will be.
    """
    began = last = time.monotonic()
    for number, batch in enumerate(batches, 1):
        yield batch
        now = time.monotonic()
        if now - last > SECONDS_BETWEEN_LINES:
            last = now
            left = (now - began) / number * max(0, total - number)
            log.info("noise phase: batch %d of %d, %.0f s left", number, total, left)
