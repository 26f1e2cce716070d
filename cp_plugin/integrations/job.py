"""One run of a foreign application with a poison, a defence or a monitor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Job:
    """One run of a served application with a poison, a defence or a monitor."""

    callbacks: Callable[[], list[Any]] | None = None
    """Builds the callbacks; None until the application has read its configuration."""
    undo: list[Callable[[], Any]] = field(default_factory=list)
    """What puts the application back, last first."""
    trainers: int = 0
    """How many trainers took the callbacks."""
