"""The call of `cp-plugin study`: keeps a process at the cells, shows how far they are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from cp_plugin.apps.study.cell import RunCell
from cp_plugin.apps.study.plan import Cell
from cp_plugin.apps.study.settings import Overrides
from cp_plugin.apps.study.state import CRASHED, FAILED, FINISHED, RUNNING, Folder
from cp_plugin.config.settings import UserError

SECONDS_BETWEEN_LOOKS = 0.3
LOG_LINES_SHOWN = 15


class Watch:
    """Runs all cells that are not finished, and outlives the processes that run them."""

    def __init__(self, folder: Folder, cells: Mapping[str, Cell], launcher: Overrides) -> None:
        """Take the study's folder, its cells and Hydra's overrides."""
        self._folder, self._cells, self._launcher = folder, cells, launcher
        self._call = f"{os.getpid()}-{time.time_ns()}"
        self._console = Console(stderr=True)
        self._said: set[str] = set()

    def run(self) -> None:
        """Run the cells.

        Raises:
            UserError: the launcher itself fails, so that no cell is even begun.
        """
        before = self.counts()[FINISHED]
        if before:
            self._say(f"{before} of {len(self._cells)} cells are finished; going on with the rest")
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} cells, {task.fields[failed]} failed"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[now]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        ) as progress:
            bar = progress.add_task("study", total=len(self._cells), failed=0, now="")
            while self._unfinished():
                tried = self._tried()
                code = self._attend(progress, bar)
                if code == 0:
                    break
                self._take_result(code)
                if self._tried() == tried:
                    raise UserError(
                        f"the study's launcher ended with exit code {code} before a cell was "
                        f"begun; {self._folder.log} ends with: {self._end_of_log()}"
                    )
            self._show(progress, bar)

    def counts(self) -> Counter[str | None]:
        """Return how many cells have which status; None: not run in this call, nor before."""
        return Counter(self._folder.status(cell, self._call) for cell in self._cells.values())

    def shortfalls(self) -> dict[str, str]:
        """Return the cells that are not finished, with the reason."""
        reasons = {}
        for name, cell in self._cells.items():
            state = self._folder.state(cell)
            if state.get("status") == FINISHED:
                continue
            if state.get("call") == self._call and "reason" in state:
                reasons[name] = str(state["reason"])
            else:
                missing = [other for other in cell.needs.values() if not self._is_finished(other)]
                reasons[name] = f"needs {' and '.join(missing) or 'another call'}"
        return reasons

    def _attend(self, progress: Progress, bar: TaskID) -> int:
        """Start a process for the cells that are left, and look after it until it ends."""
        command = [sys.executable, "-m", "cp_plugin.apps.study.worker", str(self._folder.path)]
        with self._folder.log.open("a", encoding="utf8") as log:
            process = self._start([*command, self._call, *self._launcher], log)
            try:
                while process.poll() is None:
                    self._show(progress, bar)
                    time.sleep(SECONDS_BETWEEN_LOOKS)
            finally:
                process.kill()
                process.wait()
        return process.returncode

    @staticmethod
    def _start(command: list[str], log: IO[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, text=True
        )

    def _take_result(self, code: int) -> None:
        """Give every cell that was running when its process ended another chance, or none."""
        dead = [
            cell
            for cell in self._cells.values()
            if self._folder.status(cell, self._call) == RUNNING and not self._folder.is_locked(cell)
        ]
        for cell in dead:
            # With one cell at work there is no doubt; otherwise each is tried once more, alone.
            status = FAILED if len(dead) == 1 else CRASHED
            reason = f"its process ended {_how(code)}, see {self._folder.log.name}"
            self._folder.note(cell, status, self._call, reason=reason)

    def _show(self, progress: Progress, bar: TaskID) -> None:
        statuses = {
            name: self._folder.status(cell, self._call) for name, cell in self._cells.items()
        }
        counts = Counter(statuses.values())
        running = [name for name, status in statuses.items() if status == RUNNING]
        progress.update(
            bar, completed=counts[FINISHED], failed=counts[FAILED], now=", ".join(running[:2])
        )
        for name, status in statuses.items():
            if status not in (FINISHED, FAILED) or name in self._said:
                continue
            self._said.add(name)
            state = self._folder.state(self._cells[name])
            if state["call"] == self._call:
                tail = f": {state['reason']}" if status == FAILED else ""
                number = f"[{counts[FINISHED] + counts[FAILED]}/{len(statuses)}]"
                self._say(f"{number} {name} {status}{tail}")

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _is_finished(self, name: str) -> bool:
        return self._folder.state(self._cells[name]).get("status") == FINISHED

    def _unfinished(self) -> bool:
        return any(not self._is_finished(name) for name in self._cells)

    def _tried(self) -> dict[str, str | None]:
        """Return the statuses: a process that changes none of them is no use starting again."""
        statuses = {
            name: self._folder.status(cell, self._call) for name, cell in self._cells.items()
        }
        return {name: status for name, status in statuses.items() if status is not None}

    def _end_of_log(self) -> str:
        lines = self._folder.log.read_text(encoding="utf8", errors="replace").splitlines()
        told = [line.strip() for line in lines[-LOG_LINES_SHOWN:] if line.strip()]
        return told[-1] if told else "nothing"


class WatchHere(Watch):
    """Runs the cells in this process, where each shows its own progress."""

    def run(self) -> None:
        """Run each cell whose needs are met, after those that others need."""
        run = RunCell(self._folder.path, self._call)
        for number, (name, cell) in enumerate(self._cells.items(), start=1):
            if all(self._is_finished(other) for other in cell.needs.values()):
                self._console.rule(f"{number} of {len(self._cells)}: {name}", align="left")
                run(OmegaConf.create({"cell": name}))


def _how(code: int) -> str:
    if code >= 0:
        return f"with exit code {code}"
    try:
        return f"by {signal.Signals(-code).name}"
    except ValueError:
        return f"by signal {-code}"


def absolute(path: Path) -> Path:
    """Return the path that the study's other processes know it by."""
    return path.expanduser().resolve()
