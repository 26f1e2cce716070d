"""How far a loop is and how long it will take: a bar, or lines where there is no terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cp_plugin.util.timing import told

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
    yield from told(title, items, total, SECONDS_BETWEEN_LINES)
