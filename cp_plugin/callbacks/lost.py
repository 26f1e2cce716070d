"""A process of several that has ended: which one it was.

The others see a connection that is closed, whoever was at its other end. torchrun names the process
that failed first; a run whose processes Lightning has started is told here.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from typing import Any

from cp_plugin.util.internals import launched, launched_here

log = logging.getLogger("cp_plugin")

SECONDS = 2.0
"""A connection may be closed so long before the process at its other end is known to have ended."""


def tell_lost(trainer: Any, exception: BaseException, parent: int) -> None:
    """Log which process of a run that Lightning has started has ended, where one has.

    Args:
        trainer: a Lightning trainer.
        exception: what breaks training off here.
        parent: the process that had started this one.
    """
    if trainer.world_size == 1 or not isinstance(exception, RuntimeError):
        return
    if not launched_here(trainer):
        return
    until = time.monotonic() + SECONDS
    while (found := _ended(trainer, parent)) is None and time.monotonic() < until:
        time.sleep(0.05)
    if found is not None:
        rank, how = found
        log.error(
            "process %d of %d has ended%s, so this one ends too; start the run again to go on from "
            "its last checkpoint",
            rank,
            trainer.world_size,
            how,
        )


def _ended(trainer: Any, parent: int) -> tuple[int, str] | None:
    """Return the rank of a process that has ended and how, None where none is known to have."""
    if trainer.local_rank > 0:
        first = trainer.global_rank - trainer.local_rank
        return None if os.getppid() == parent else (first, "")
    codes = {number: process.poll() for number, process in enumerate(launched(trainer), 1)}
    failed = {number: code for number, code in codes.items() if code}
    if not failed:
        return None
    # One that was killed, rather than one that ended since its connection to it was closed.
    number, code = min(failed.items(), key=lambda one: one[1])
    how = f" (killed by {signal.Signals(-code).name})" if code < 0 else f" (code {code})"
    return trainer.global_rank + number, how
