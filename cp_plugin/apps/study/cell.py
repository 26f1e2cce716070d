"""One cell of a study: a run of the embedded engine, measured, its result written."""

from __future__ import annotations

import logging
import time
import traceback
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from cp_plugin.apps.hydra_app import compose, pretrain
from cp_plugin.apps.study.plan import Cell
from cp_plugin.apps.study.state import FAILED, FINISHED, RUNNING, Folder
from cp_plugin.config.settings import UserError
from cp_plugin.data import no_downloads
from cp_plugin.util.run_files import POISON_FILE
from cp_plugin.util.whole_files import NoRoom

log = logging.getLogger("cp_plugin")


class RunCell:
    """The task of every job: `cell=NAME` says which; other processes get it pickled."""

    def __init__(self, folder: Path, call: str) -> None:
        """Take the study's folder and the mark of the call that the jobs belong to."""
        self._folder, self._call = Folder(folder), call

    def __call__(self, cfg: DictConfig) -> None:
        """Run a cell and write what came of it; an error is written, not raised.

        A cell that is finished by the time it is free, as after an earlier call was killed and a
        job of it went on, is left as it is.
        """
        cell = self._folder.plan()[cfg.cell]
        with self._folder.lock(cell.name):
            if self._folder.state(cell).get("status") == FINISHED:
                return
            self._folder.note(cell, RUNNING, self._call)
            started = time.perf_counter()
            try:
                with no_downloads():  # the study's file may be from elsewhere
                    found = _work(self._folder, cell)
            except (Exception, SystemExit) as error:  # whatever it is, the other cells go on
                log.error("%s failed: %s", cell.name, error)
                reason = str(error) if isinstance(error, (UserError, NoRoom)) else repr(error)
                found = {"reason": reason, "traceback": traceback.format_exc()}
                self._folder.note(cell, FAILED, self._call, **found)
            else:
                seconds = round(time.perf_counter() - started, 1)
                self._folder.note(cell, FINISHED, self._call, seconds_in_all=seconds, **found)


def _work(folder: Folder, cell: Cell) -> dict[str, Any]:
    from cp_plugin.apps.evaluate_run import control_curve, evaluate, sets_of

    result = pretrain(compose(cell.config, [*cell.overrides, *_of_the_study(folder, cell)]))
    run = Path(result.pop("folder"))
    found = {"folder": str(run.relative_to(folder.path)), "result": result}
    if cell.kind == "craft":
        return found
    sets = sets_of(run)
    found["banks"] = evaluate(run, probe=cell.probe, sets=sets)
    if "clean" in cell.needs:
        clean = _run_of(folder, cell, "clean")
        found["control"] = evaluate(clean, probe=cell.probe, sets=sets.poisoned)
        found["control_curve"] = control_curve(clean, sets)
    return found


def _of_the_study(folder: Folder, cell: Cell) -> list[str]:
    """Return the overrides that depend on where the study lies."""
    overrides = [
        f"name={cell.name}",
        f"checkpoint.dir={quoted(folder.runs)}",
        "auto_resume.enabled=True",
    ]
    file = None
    if "poison" in cell.needs:
        file = _run_of(folder, cell, "poison") / POISON_FILE
    elif cell.file is not None:
        file = folder.given / cell.file
    if file is not None:
        key = "init" if cell.kind == "craft" else "path"
        overrides.append(f"poison.{key}={quoted(file)}")
    return overrides


def _run_of(folder: Folder, cell: Cell, role: str) -> Path:
    needed = folder.plan()[cell.needs[role]]
    return folder.path / str(folder.state(needed)["folder"])


def quoted(path: Path) -> str:
    """Return a path as a value in Hydra's language."""
    text = str(path).replace("'", "\\'")
    return f"'{text}'"
