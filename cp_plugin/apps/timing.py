"""How far a loop is and how long it will take: a bar, or lines where there is no terminal."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger("cp_plugin")

SECONDS_BETWEEN_LINES = 15.0
T = TypeVar("T")


def timed(title: str, items: Iterable[T], total: int) -> Iterator[T]:
    """Yield items, and show on standard error how many there were and how much time is left."""
    console = Console(stderr=True)
    if console.is_terminal:
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        with bar:
            yield from bar.track(items, total, description=title)
        return
    began = last = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last > SECONDS_BETWEEN_LINES:
            last = now
            left = (now - began) / number * (total - number)
            log.info("%s: %d of %d, %.0f s left", title, number, total, left)
