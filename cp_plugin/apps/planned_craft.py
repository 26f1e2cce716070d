"""A poison for pictures: steps are timed, epochs planned, and the embedded engine crafts it."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import DictConfig

from cp_plugin.apps.craft_plan import Plan, Settings
from cp_plugin.apps.hydra_app import compose, pretrain
from cp_plugin.apps.runs import run_in
from cp_plugin.apps.study.cell import quoted
from cp_plugin.attack.poison_file import Poison
from cp_plugin.callbacks.stopwatch import Stopwatch
from cp_plugin.config.settings import UserError
from cp_plugin.data.datasets import CACHED
from cp_plugin.data.picture_cache import CACHE, PictureCache, Pixels
from cp_plugin.engine.clusters import clustered
from cp_plugin.engine.placement import Placement
from cp_plugin.util.run_files import POISON_FILE

log = logging.getLogger("cp_plugin")

VIEW = 96
"""Side of the views in pixels, unless an override says otherwise: what a processor can afford."""
MEASURED_STEPS = 6
LATE = 1.1
"""A run is ended when it takes so many times the time that was planned for it."""
RUN, ENCODER, MEASURE = "run", "encoder", "measure"
WHOLE = "whole.safetensors"
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
        return Plan(settings.rounds, pictures, None, so_far + writing)
    trial = Plan(MEASURED_STEPS, pictures, None, so_far + writing)
    watch = Stopwatch(steps=MEASURED_STEPS)
    folder = work / MEASURE
    shutil.rmtree(folder, ignore_errors=True)
    trial_settings = replace(settings, clusters=None)
    pretrain(_configuration(work, folder, trial_settings, trial, MEASURED_STEPS), [watch])
    shutil.rmtree(folder)
    other = so_far + writing
    left = 60 * settings.minutes - other - (watch.times[-1] - watch.times[0])
    an_epoch = watch.seconds_a_step * trial.steps
    rounds = int(left / an_epoch)
    if rounds < 1:
        needed = (60 * settings.minutes - left + an_epoch) / 60
        raise UserError(
            f"{settings.minutes:g} minutes are too few for {pictures} pictures, which take "
            f"{needed:.1f} at least; give more --minutes, or fewer pictures."
        )
    return Plan(rounds, pictures, watch.seconds_a_step, other)


def craft(work: Path, settings: Settings, plan: Plan) -> Path:
    """Craft a poison as planned, going on where an earlier call was interrupted.

    With clusters an encoder is trained on the pictures first, and travels in the poison.

    Returns:
        The poison file.
    """
    limit = None if plan.seconds is None else LATE * plan.seconds
    placement, rounds = None, plan.rounds
    if settings.clusters is not None:
        began = time.perf_counter()
        placement = _clustered(work, settings, plan)
        rounds = max(1, rounds - plan.encoder_rounds)
        limit = None if limit is None else max(1.0, limit - (time.perf_counter() - began))
    cfg = _configuration(work, work / RUN, settings, plan, rounds)
    made = Path(_trained(cfg, seconds=limit)) / POISON_FILE
    if placement is None:
        return made
    poison = Poison.load(made)
    whole = replace(poison, info={**poison.info, **placement.info()}, attached=placement.tensors())
    made.with_name(WHOLE).unlink(missing_ok=True)
    return whole.save(made.with_name(WHOLE))


def _clustered(work: Path, settings: Settings, plan: Plan) -> Placement:
    """Train an encoder on the pictures, and put them into clusters of its features."""
    cfg = _configuration(work, work / ENCODER, settings, plan, plan.encoder_rounds, CLEAN)
    folder = _trained(cfg)
    host, _, trained = run_in(folder).trained(folder)
    cache = PictureCache(work / CACHE)
    assert settings.clusters is not None
    placement, clusters = clustered(
        host.encoder(), trained, Pixels(cache), settings.clusters, settings.seed
    )
    cache.put_into_clusters(clusters)
    sizes = torch.bincount(clusters, minlength=settings.clusters).tolist()
    log.info("%d clusters of %s pictures", settings.clusters, ", ".join(map(str, sorted(sizes))))
    return placement


def _trained(cfg: DictConfig, seconds: float | None = None) -> Path:
    """Run a configuration; return its folder."""
    return Path(pretrain(cfg, [Stopwatch(seconds)])["folder"])


def _configuration(
    work: Path,
    folder: Path,
    settings: Settings,
    plan: Plan,
    rounds: int,
    poison: Sequence[str] | None = None,
) -> DictConfig:
    if poison is None:
        by_cluster = settings.clusters is not None
        poison = [
            "+poison=cp",
            f"poison.granularity={'class' if by_cluster else 'sample'}",
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
    overrides = [
        *poison,
        f"data.dataset={CACHED}",
        f"data.train_path={quoted(work / CACHE)}",
        "data.num_workers=0",
        "augmentations=cifar_paper",
        f"augmentations.0.crop_size={VIEW}",
        f"max_epochs={rounds}",
        f"optimizer.batch_size={plan.batch}",
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
