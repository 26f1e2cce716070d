"""A poison for pictures: steps are timed, epochs planned, and the embedded engine crafts it."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig

from cp_plugin.apps.hydra_app import compose, pretrain
from cp_plugin.apps.protect.plan import Plan, Settings
from cp_plugin.apps.study.cell import quoted
from cp_plugin.callbacks.stopwatch import Stopwatch
from cp_plugin.config.settings import UserError
from cp_plugin.data.datasets import CACHED
from cp_plugin.data.picture_cache import CACHE
from cp_plugin.util.run_files import POISON_FILE

log = logging.getLogger("cp_plugin")

VIEW = 96
"""Side of the views in pixels, unless an override says otherwise: what a processor can afford."""
MEASURED_STEPS = 6
LATE = 1.1
"""A run is ended when it takes so many times the time that was planned for it."""
RUN, MEASURE = "run", "measure"
CLEAN = ("+poison=none", "+poison.fit=cover")
SAMPLE_STEP, CLUSTER_STEP = 0.05, 0.02
"""Of eps; a cluster's delta moves with each batch that shows it, a picture's once an epoch."""
CHECKPOINTS = 20
"""About how often a craft can be taken up again."""


def measured_plan(
    work: Path, settings: Settings, pictures: int, so_far: float, writing: float
) -> Plan:
    """Plan a craft; without given rounds a few steps are timed.

    Args:
        work: the folder with the prepared pictures.
        settings: of the call.
        pictures: how many there are.
        so_far: seconds that reading them has taken.
        writing: seconds that writing them will take.

    Raises:
        UserError: the pictures alone take all minutes.
    """
    if settings.rounds is not None:
        if settings.rounds < settings.least_rounds:
            raise UserError(
                f"--rounds {settings.rounds} leaves no epoch for a perturbation, since the first "
                "one tells the clusters; give at least 2, or --clusters 0."
            )
        return Plan(settings.rounds, pictures, None, so_far + writing)
    trial = Plan(MEASURED_STEPS, pictures, None, so_far + writing)
    folder, trial_settings = work / MEASURE, replace(settings, clusters=None)
    cache, poison = work / CACHE, _crafting(trial_settings, MEASURED_STEPS)
    cfg = configuration(cache, folder, trial_settings, trial.batch, MEASURED_STEPS, poison)
    a_step, start, taken = measured(cfg, folder)
    other = so_far + writing + start
    left = 60 * settings.minutes - other - taken
    an_epoch = a_step * trial.steps
    rounds = int(left / an_epoch)
    if rounds < settings.least_rounds:
        needed = (60 * settings.minutes - left + settings.least_rounds * an_epoch) / 60
        raise UserError(
            f"{settings.minutes:g} minutes are too few for {pictures} pictures, which take "
            f"{needed:.1f} at least; give more --minutes, or fewer pictures."
        )
    return Plan(rounds, pictures, a_step, other)


class Measured(NamedTuple):
    """Seconds that a run takes."""

    a_step: float
    start: float
    """For all but the steps."""
    whole: float


def measured(cfg: DictConfig, folder: Path) -> Measured:
    """Time a few steps of a run; nothing of it stays.

    Args:
        cfg: of the run, of `MEASURED_STEPS` steps at least.
        folder: where it works.
    """
    log.info("measuring %d steps of training, to plan how many there is time for", MEASURED_STEPS)
    shutil.rmtree(folder, ignore_errors=True)
    watch = Stopwatch(steps=MEASURED_STEPS)
    began, before = time.perf_counter(), log.level
    log.setLevel(logging.ERROR)  # what is said of a run would be taken for that of the craft
    try:
        pretrain(cfg, [watch])
    finally:
        log.setLevel(before)
    shutil.rmtree(folder)
    whole = time.perf_counter() - began
    return Measured(watch.seconds_a_step, whole - (watch.times[-1] - watch.times[0]), whole)


def craft(work: Path, settings: Settings, plan: Plan) -> Path:
    """Craft a poison as planned, going on where an earlier call was interrupted.

    Returns:
        The poison file.
    """
    limit = None if plan.seconds is None else LATE * plan.seconds
    poison = _crafting(settings, plan.rounds)
    cfg = configuration(work / CACHE, work / RUN, settings, plan.batch, plan.rounds, poison)
    return trained(cfg, seconds=limit) / POISON_FILE


def trained(cfg: DictConfig, seconds: float | None = None) -> Path:
    """Run a configuration, for so many seconds at most; return its folder."""
    return Path(pretrain(cfg, [Stopwatch(seconds)])["folder"])


def _crafting(settings: Settings, rounds: int) -> list[str]:
    """Return the overrides that craft a poison."""
    by_cluster = settings.clusters is not None
    return [
        "+poison=cp",
        *(
            ["poison.granularity=cluster", f"poison.clusters={settings.clusters}"]
            if by_cluster
            else []
        ),
        f"poison.eps={settings.eps!r}",
        f"poison.image_size={settings.size}",
        "poison.fit=cover",
        f"poison.rounds={rounds}",
        "poison.schedule=joint",
        "poison.pgd_steps=1",
        f"poison.step_size={CLUSTER_STEP if by_cluster else SAMPLE_STEP}",
        "poison.dual_branch=False",
        f"poison.survive=[{','.join(settings.survive)}]",
    ]


def configuration(
    cache: Path,
    folder: Path,
    settings: Settings,
    batch: int,
    rounds: int,
    poison: Sequence[str] = CLEAN,
) -> DictConfig:
    """Return the configuration of a run on prepared pictures.

    Args:
        cache: the prepared pictures.
        folder: for the run.
        settings: method, seed and overrides are read from it.
        batch: pictures a step.
        rounds: epochs.
        poison: overrides that choose what is crafted or added; by default nothing.
    """
    overrides = [
        *poison,
        f"data.dataset={CACHED}",
        f"data.train_path={quoted(cache)}",
        "data.num_workers=0",
        "augmentations=cifar_paper",
        f"augmentations.0.crop_size={VIEW}",
        f"max_epochs={rounds}",
        f"optimizer.batch_size={batch}",
        "optimizer.name=adamw",
        "optimizer.lr=4e-3",
        "precision=16-mixed",
        f"seed={settings.seed}",
        f"checkpoint.dir={quoted(folder)}",
        f"checkpoint.frequency={max(1, rounds // CHECKPOINTS)}",
        "auto_resume.enabled=True",
        "name=protect",
    ]
    return compose(settings.method, [*overrides, *settings.overrides])
