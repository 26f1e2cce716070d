"""How far a long loop is, in lines of the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

log = logging.getLogger("cp_plugin")

T = TypeVar("T")


def told(title: str, items: Iterable[T], total: int, seconds: float) -> Iterator[T]:
    """Yield items, and log now and then how many are done and how much time is left.

    Args:
        title: what the lines begin with.
        items: of the loop.
        total: how many there will be.
        seconds: between two lines; a loop that is over sooner has none.
    """
    began = last = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last > seconds:
            last = now
            left = (now - began) / number * max(0, total - number)
            log.info("%s: %d of %d, %.0f s left", title, number, total, left)
