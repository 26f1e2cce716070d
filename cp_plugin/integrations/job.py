"""One run of a foreign application with a poison, a defence or a monitor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cp_plugin.util.undo import Exchanges


@dataclass
class Job:
    """One run of a served application with a poison, a defence or a monitor."""

    callbacks: Callable[[], list[Any]] | None = None
    """Builds the callbacks; None until the application has read its configuration."""
    exchanged: Exchanges = field(default_factory=Exchanges)
    """What was exchanged in the application, put back when the job ends."""
    trainers: int = 0
    """How many trainers took the callbacks."""
