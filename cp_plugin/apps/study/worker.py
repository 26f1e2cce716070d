"""The process that hands a study's cells to a Hydra launcher, group by group.

Cells may bring down the process that they run in; `cp_plugin.apps.study.watch` then starts another.
Everything that it has to know stands in the study's folder.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import warnings
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf.errors import OmegaConfBaseException

from cp_plugin.apps.study.cell import RunCell, quoted
from cp_plugin.apps.study.plan import Cell, by_level
from cp_plugin.apps.study.settings import Overrides
from cp_plugin.apps.study.state import CRASHED, FINISHED, Folder
from cp_plugin.config.settings import UserError
from cp_plugin.util.internals import hydra_callbacks
from cp_plugin.util.paths import shipped

SECONDS_BETWEEN_LOOKS = 0.5


class Task:
    """A job's body: ends with the process that started it, so that nothing runs on unseen."""

    def __init__(self, run: RunCell) -> None:
        """Take what a job does."""
        self._run = run

    def __call__(self, cfg: object) -> None:
        """Run one job."""
        end_with_parent()
        _log_plainly()
        self._run(cfg)  # type: ignore[arg-type]


def main(folder: Path, call: str, launcher: Overrides) -> None:
    """Launch all cells of a study that are still to be run.

    Args:
        folder: of the study, absolute.
        call: the mark of this call of `cp-plugin study`.
        launcher: overrides for Hydra itself.
    """
    end_with_parent()
    place = Folder(folder)
    cells = place.plan()
    with hydra.initialize_config_dir(
        str(shipped("configs") / "pretrain"), version_base="1.3", job_name="study"
    ):
        made = launcher_of(folder, call, launcher)
        number = 0
        for group in by_level(cells):
            ready = [cell for cell in group if _ready(place, cells, cell)]
            fresh = [cell for cell in ready if place.status(cell, call) is None]
            # One of these brought its process down: each gets a launch of its own.
            suspects = [cell for cell in ready if place.status(cell, call) == CRASHED]
            for batch in [fresh, *([cell] for cell in suspects)]:
                if batch:
                    made.launch([[f"+cell={cell.name}"] for cell in batch], number)
                    number += len(batch)


def launcher_of(folder: Path, call: str, overrides: Overrides) -> Launcher:
    """Return the launcher that overrides select; Hydra must have been initialised.

    Raises:
        UserError: there is no such launcher, or a setting of it is unknown.
    """
    common = [
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
        "hydra.output_subdir=null",
        f"hydra.sweep.dir={quoted(folder / 'jobs')}",
    ]
    try:
        cfg = hydra.compose(None, [*common, *overrides], return_hydra_config=True)
        context = HydraContext(
            config_loader=GlobalHydra.instance().config_loader(), callbacks=hydra_callbacks()
        )
        task = Task(RunCell(folder, call))
        return Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=task, config=cfg
        )
    except (HydraException, OmegaConfBaseException) as error:
        text = " ".join(str(error).split())
        raise UserError(
            f"the study's launcher cannot be had: {text} The launchers joblib, submitit_local and "
            "submitit_slurm come with `pip install 'cp-plugin[launchers]'`."
        ) from error


def end_with_parent() -> None:
    """End this process as soon as its parent has ended."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    names = {thread.name for thread in threading.enumerate()}
    if watch.__qualname__ not in names:
        threading.Thread(target=watch, name=watch.__qualname__, daemon=True).start()


def _log_plainly() -> None:
    """Write the project's own messages to standard error, which is the study's log."""
    own = logging.getLogger("cp_plugin")
    if not own.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        own.addHandler(handler)
        own.setLevel(logging.INFO)
        own.propagate = False
    warnings.filterwarnings("ignore", module="lightning")


def _ready(place: Folder, cells: dict[str, Cell], cell: Cell) -> bool:
    needed = (cells[name] for name in cell.needs.values())
    return all(place.state(other).get("status") == FINISHED for other in needed)


if __name__ == "__main__":
    # By its own name: other processes would not find a class of `__main__`.
    from cp_plugin.apps.study import worker

    worker.main(Path(sys.argv[1]), sys.argv[2], tuple(sys.argv[3:]))
