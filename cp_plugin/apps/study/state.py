"""The folder of a study: its plan, one JSON file a cell, and who is at work in it.

`study.json` has the settings and the cells, `cells/<name>.json` the state of a cell and, when it is
finished, its result; `runs/` holds the runs' own folders.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cp_plugin.apps.study.plan import Cell
from cp_plugin.util.whole_files import write_text

PLAN_FILE = "study.json"
FINISHED, RUNNING, FAILED, CRASHED = "finished", "running", "failed", "crashed"


@dataclass(frozen=True)
class Folder:
    """Where everything of a study lies."""

    path: Path

    @property
    def runs(self) -> Path:
        """The runs' own folders."""
        return self.path / "runs"

    @property
    def given(self) -> Path:
        """Copies of the poison files that the study's file names, each called by its digest."""
        return self.path / "poisons"

    @property
    def log(self) -> Path:
        """What the launcher and the cells print."""
        return self.path / "study.log"

    def lock(self, name: str | None = None) -> FileLock:
        """Return the lock of a cell, or of the whole study.

        The system opens it when its holder ends, however it ends.
        """
        folder = self.path / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{name or 'study'}.lock")

    def plan(self) -> dict[str, Cell]:
        """Return the cells by name, as the last call wrote them."""
        found = read(self.path / PLAN_FILE) or {}
        return {
            node["name"]: Cell(**{**node, "overrides": tuple(node["overrides"])})
            for node in found["cells"]
        }

    def state(self, cell: Cell) -> dict[str, Any]:
        """Return what is known of a cell; nothing, if it was never begun with these settings."""
        found = read(self._file(cell.name)) or {}
        return found if found.get("digest") == cell.digest else {}

    def status(self, cell: Cell, call: str) -> str | None:
        """Return a cell's status in this call; None: still to be run."""
        state = self.state(cell)
        if state.get("status") == FINISHED or state.get("call") == call:
            return str(state["status"])
        return None

    def note(self, cell: Cell, status: str, call: str, **more: Any) -> None:
        """Write the state of a cell."""
        state = {**cell.plain(), "status": status, "call": call, "time": time.time(), **more}
        write(self._file(cell.name), state)

    def is_locked(self, cell: Cell) -> bool:
        """Tell whether a process, perhaps of an earlier call, is at work on a cell."""
        lock = self.lock(cell.name)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        lock.release()
        return False

    def _file(self, name: str) -> Path:
        return self.path / "cells" / f"{name}.json"


def read(path: Path) -> dict[str, Any] | None:
    """Return the content of a JSON file, None where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that is either whole or as it was."""
    write_text(path, json.dumps(content, indent=1))
