"""Grids of runs: surrogate x poison x victim x backbone x defence x seed, resumable."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import Timeout

from cp_plugin.apps.study.plan import Cell, check, plan
from cp_plugin.apps.study.settings import StudySettings, folder_of
from cp_plugin.apps.study.settings import read as read_study
from cp_plugin.apps.study.state import PLAN_FILE, Folder
from cp_plugin.apps.study.state import write as write_json
from cp_plugin.config.settings import UserError
from cp_plugin.util.run_files import RESULT_FILE
from cp_plugin.util.whole_files import clear_partial, written_whole

__all__ = ["run_here", "study"]


def study(config: str, out: Path | None = None, launcher: Sequence[str] = ()) -> dict[str, Any]:
    """Run the cells of a study that are not finished.

    Args:
        config: a YAML file, or the name of a study that comes with the package.
        out: the study's folder; None: `cp-study-<name>`. An earlier call's is gone on with.
        launcher: overrides for Hydra itself, after those of the study.

    Returns:
        What is in `result.json`: the settings, every cell with its result, and `unfinished`, the
        reasons why cells have none.

    Raises:
        UserError: a mistake in the study, before anything is trained; or another process is at
            work in the folder.
    """
    settings = read_study(config)
    overrides = _for_hydra([*settings.launcher, *launcher])
    return _run(settings, out, overrides, here=False, beside=folder_of(config))


def run_here(settings: StudySettings, out: Path | None = None) -> dict[str, Any]:
    """Run the cells of a study in this process, one after the other; else as `study` does."""
    return _run(settings, out, (), here=True)


def _run(
    settings: StudySettings,
    out: Path | None,
    launcher: Sequence[str],
    here: bool,
    beside: Path | None = None,
) -> dict[str, Any]:
    cells = plan(settings)
    check(cells)
    # After the check, which is the quicker one to fail.
    from cp_plugin.apps.study.watch import Watch, WatchHere, absolute
    from cp_plugin.util.provenance import command, hardware, versions

    folder = Folder(absolute(out or Path(f"cp-study-{settings.name}")))
    try:
        lock = folder.lock().acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"another process is at work in {folder.path}; wait for it, or choose another --out."
        ) from None
    with lock:
        clear_partial(folder.path)
        started = time.time()
        _write_plan(folder, settings, cells)
        for poison in settings.poisons.values():
            if poison.file is not None and beside is not None:
                folder.given.mkdir(exist_ok=True)
                with written_whole(folder.given / f"{poison.digest}.safetensors") as copy:
                    shutil.copyfile(beside / poison.file, copy)
        watch = (WatchHere if here else Watch)(folder, cells, tuple(launcher))
        watch.run()
        result = {
            "name": settings.name,
            "unfinished": watch.shortfalls(),
            "seconds_of_this_call": round(time.time() - started, 1),
            "hardware": hardware(),
            "versions": versions(),
            "command": command(),
            "settings": dataclasses.asdict(settings),
            "cells": [folder.state(cell) or cell.plain() for cell in cells.values()],
        }
        write_json(folder.path / RESULT_FILE, result)
    return result


def _for_hydra(overrides: Sequence[str]) -> tuple[str, ...]:
    for override in overrides:
        if not override.lstrip("+~").startswith("hydra"):
            raise UserError(
                "a study takes overrides for Hydra alone, such as hydra/launcher=joblib; got "
                f"{override}: what is trained stands in the study's file."
            )
    return tuple(overrides)


def _write_plan(folder: Folder, settings: StudySettings, cells: dict[str, Cell]) -> None:
    content = {
        "settings": dataclasses.asdict(settings),
        "cells": [cell.plain() for cell in cells.values()],
    }
    write_json(folder.path / PLAN_FILE, content)
