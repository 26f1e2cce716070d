"""The cells of a study side by side on one machine, each as soon as what it needs is there."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from omegaconf import OmegaConf
from rich.progress import Progress, TaskID

from cp_plugin.apps.study.plan import Cell
from cp_plugin.apps.study.state import FAILED, RUNNING, Folder
from cp_plugin.apps.study.watch import SECONDS_BETWEEN_LOOKS, Watch

MOST = 2
"""Cells at once: a chain of crafts and one victim after the other beside it. A small network keeps
one core busy better than it does two."""
SECONDS_BETWEEN_LINES = 15.0


class WatchSideBySide(Watch):
    """Runs cells in a few processes that share this machine's cores; one where there is a GPU."""

    def __init__(self, folder: Folder, cells: Mapping[str, Cell]) -> None:
        """Take the study's folder and its cells."""
        super().__init__(folder, cells, ())
        self._last_lines = time.monotonic()

    def run(self) -> None:
        """Run each cell whose needs are met; those that others need first."""
        threads = torch.get_num_threads()
        jobs = 1 if torch.cuda.is_available() else min(MOST, threads)
        # Processes of their own, since a copy of one in which torch has threads may hang.
        pool = ProcessPoolExecutor(
            jobs, multiprocessing.get_context("spawn"), _begin, (max(1, threads // jobs),)
        )
        try:
            with self._progress() as (progress, bar):
                self._run_in(pool, progress, bar)
        except BrokenProcessPool:
            self._take_broken()
        finally:
            # Also after Ctrl-C: what is at work would hold this process until it is through.
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.kill()

    def _run_in(self, pool: ProcessPoolExecutor, progress: Progress, bar: TaskID) -> None:
        waiting = [name for name in self._cells if not self._is_finished(name)]
        running: set[Future[None]] = set()
        while True:
            for name in [name for name in waiting if self._is_ready(name)]:
                waiting.remove(name)
                running.add(pool.submit(_work, self._folder.path, self._call, name))
            if not running:
                break
            ended, running = wait(running, SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
            for future in ended:
                future.result()
            self._show(progress, bar)
        self._show(progress, bar)

    def _is_ready(self, name: str) -> bool:
        return all(self._is_finished(other) for other in self._cells[name].needs.values())

    def _take_broken(self) -> None:
        for cell in self._cells.values():
            if self._folder.status(cell, self._call) == RUNNING:
                reason = f"a process was ended from outside, see {_log_of(self._folder, cell.name)}"
                self._folder.note(cell, FAILED, self._call, reason=reason)

    def _show(self, progress: Progress, bar: TaskID) -> None:
        super()._show(progress, bar)
        now = {
            name: _last_line(_log_of(self._folder, name))
            for name, cell in self._cells.items()
            if self._folder.status(cell, self._call) == RUNNING
        }
        progress.update(bar, now="; ".join(line for line in now.values() if line))
        told = time.monotonic() - self._last_lines < SECONDS_BETWEEN_LINES
        if self._console.is_terminal or told:
            return
        self._last_lines = time.monotonic()
        for name, line in now.items():
            self._say(f"{name}: {line}")


def _begin(threads: int) -> None:
    """Make a process ready for cells."""
    from cp_plugin.apps.study.worker import end_with_parent, log_plainly

    end_with_parent()
    log_plainly()
    torch.set_num_threads(threads)


def _work(folder: Path, call: str, name: str) -> None:
    """Run a cell; what it prints goes to a file of its own."""
    from cp_plugin.apps.study.cell import RunCell

    path = _log_of(Folder(folder), name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf8") as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())
        RunCell(folder, call)(OmegaConf.create({"cell": name}))


def _log_of(folder: Folder, name: str) -> Path:
    return folder.path / "jobs" / f"{name}.log"


def _last_line(path: Path) -> str:
    """Return what was printed last; the end of the file is read alone."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 500))
            lines = file.read().decode("utf8", errors="replace").splitlines()
    except OSError:
        return ""
    told = [line.strip() for line in lines if line.strip()]
    return told[-1] if told else ""
