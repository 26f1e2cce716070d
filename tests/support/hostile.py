"""Objects that a hostile file may hold."""

from __future__ import annotations

from typing import Any


class WritesWhenUnpickled:
    """Runs code where it is unpickled: writes a file."""

    def __init__(self, file: str) -> None:
        """Take the file's path."""
        self.file = file

    def __reduce__(self) -> Any:
        """Return the call that unpickling makes."""
        return (open, (self.file, "w"))
