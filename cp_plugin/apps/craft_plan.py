"""How long a poison for pictures is crafted: a number of epochs, planned from measured steps."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from omegaconf import DictConfig

from cp_plugin.apps.hydra_app import compose, pretrain
from cp_plugin.apps.study.cell import quoted
from cp_plugin.config.settings import UserError
from cp_plugin.data.datasets import CACHED
from cp_plugin.util.run_files import POISON_FILE

if TYPE_CHECKING:  # heavy: a poison that is there already needs no training
    from cp_plugin.engine.placement import Placement

log = logging.getLogger("cp_plugin")

BATCH = 64
"""Pictures a batch, at least: batches are so large that an epoch leaves out next to none."""
VIEW = 96
"""Side of the views in pixels, unless an override says otherwise: what a processor can afford."""
MEASURED_STEPS = 6
LATE = 1.1
"""A run is ended when it takes so many times the time that was planned for it."""
CACHE, RUN, ENCODER, MEASURE = "pictures", "run", "encoder", "measure"
WHOLE = "whole.safetensors"
CLEAN = ("+poison=none", "+poison.fit=cover")
SAMPLE_STEP, CLUSTER_STEP = 0.05, 0.02
"""Of eps; a cluster's delta moves with each batch that shows it, a picture's once an epoch."""
ENCODER_SHARE = 0.2
"""Part of the epochs in which the encoder is trained that tells clusters."""
CHECKPOINTS = 20
"""About how often a craft can be taken up again."""


@dataclass(frozen=True)
class Settings:
    """What a call asks for; those that shape the poison stay as they were in the first call."""

    eps: float = 8 / 255
    """Largest change of a pixel, in [0, 1]."""
    size: int = 224
    """Side of the grid of delta in pixels."""
    clusters: int | None = 10
    """Groups of like pictures, each of which shares one delta; None: every picture has its own."""
    rounds: int | None = None
    """Epochs over the pictures; None: as many as fit into the minutes."""
    minutes: float = 20
    """For everything: reading, crafting and writing."""
    method: str = "simclr"
    survive: tuple[str, ...] = ()
    """What the perturbation is crafted through, so that it lasts: `jpeg`, `resize`."""
    seed: int = 0
    overrides: tuple[str, ...] = ()
    """For Hydra, such as `backbone.name=timm/convnext_atto`."""


@dataclass(frozen=True)
class Plan:
    """What a craft will do."""

    rounds: int
    """Epochs over the pictures in all."""
    pictures: int
    seconds_a_step: float | None
    """None: not measured, since the rounds were given."""
    other_seconds: float
    """For reading and writing the pictures."""

    @property
    def encoder_rounds(self) -> int:
        """Of the encoder that tells clusters, where there are clusters."""
        return max(1, round(ENCODER_SHARE * self.rounds))

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return max(1, self.pictures // BATCH)

    @property
    def batch(self) -> int:
        """Pictures a step."""
        return self.pictures // self.steps

    @property
    def seconds(self) -> float | None:
        """Of the craft alone."""
        return (
            None if self.seconds_a_step is None else self.rounds * self.steps * self.seconds_a_step
        )

    def __str__(self) -> str:
        """Say what is planned."""
        text = f"{self.rounds} epochs of {self.steps} steps over {self.pictures} pictures"
        if self.seconds is None:
            return text
        whole = (self.seconds + self.other_seconds) / 60
        return (
            f"planned: {text}, {self.seconds_a_step:.2f} s a step, and {self.other_seconds:.0f} s "
            f"to read and write them: {whole:.1f} minutes in all"
        )


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
    from cp_plugin.callbacks.stopwatch import Stopwatch

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
    from cp_plugin.attack.poison_file import Poison

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
    from cp_plugin.apps.runs import run_in
    from cp_plugin.data.picture_cache import PictureCache, Pixels
    from cp_plugin.engine.placement import Placement

    cfg = _configuration(work, work / ENCODER, settings, plan, plan.encoder_rounds, CLEAN)
    folder = _trained(cfg)
    host, _, trained = run_in(folder).trained(folder)
    cache = PictureCache(work / CACHE)
    assert settings.clusters is not None
    placement, clusters = Placement.fitted(
        host.encoder(), trained, Pixels(cache), settings.clusters, settings.seed
    )
    cache.put_into_clusters(clusters)
    sizes = torch.bincount(clusters, minlength=settings.clusters).tolist()
    log.info("%d clusters of %s pictures", settings.clusters, ", ".join(map(str, sorted(sizes))))
    return placement


def _trained(cfg: DictConfig, seconds: float | None = None, steps: int | None = None) -> Path:
    """Run a configuration; return its folder."""
    from cp_plugin.callbacks.stopwatch import Stopwatch

    return Path(pretrain(cfg, [Stopwatch(seconds, steps)])["folder"])


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
