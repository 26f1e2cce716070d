"""How long a poison for pictures is crafted: a number of epochs, planned from measured steps."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from cp_plugin.apps.hydra_app import compose, pretrain
from cp_plugin.apps.study.cell import quoted
from cp_plugin.callbacks.stopwatch import Stopwatch
from cp_plugin.config.settings import Granularity, UserError
from cp_plugin.data.datasets import CACHED
from cp_plugin.util.run_files import POISON_FILE

BATCH = 64
"""Pictures a batch, at least: batches are so large that an epoch leaves out next to none."""
VIEW = 96
"""Side of the views in pixels, unless an override says otherwise: what a processor can afford."""
MEASURED_STEPS = 6
LATE = 1.1
"""A run is ended when it takes so many times the time that was planned for it."""
CACHE, RUN, MEASURE = "pictures", "run", "measure"
CHECKPOINTS = 20
"""About how often a craft can be taken up again."""


@dataclass(frozen=True)
class Settings:
    """What a call asks for; those that shape the poison stay as they were in the first call."""

    eps: float = 8 / 255
    """Largest change of a pixel, in [0, 1]."""
    size: int = 224
    """Side of the grid of delta in pixels."""
    granularity: Granularity = "sample"
    rounds: int | None = None
    """Epochs over the pictures; None: as many as fit into the minutes."""
    minutes: float = 20
    """For everything: reading, crafting and writing."""
    method: str = "simclr"
    seed: int = 0
    overrides: tuple[str, ...] = ()
    """For Hydra, such as `backbone.name=timm/convnext_atto`."""


@dataclass(frozen=True)
class Plan:
    """What a craft will do."""

    rounds: int
    """Epochs over the pictures."""
    pictures: int
    seconds_a_step: float | None
    """None: not measured, since the rounds were given."""
    other_seconds: float
    """For reading and writing the pictures."""

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
    watch = Stopwatch(steps=MEASURED_STEPS)
    folder = work / MEASURE
    shutil.rmtree(folder, ignore_errors=True)
    pretrain(_configuration(work, folder, settings, trial), [watch])
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

    Returns:
        The poison file.
    """
    limit = None if plan.seconds is None else LATE * plan.seconds
    cfg = _configuration(work, work / RUN, settings, plan)
    result = pretrain(cfg, [Stopwatch(seconds=limit)])
    return Path(result["folder"]) / POISON_FILE


def _configuration(work: Path, folder: Path, settings: Settings, plan: Plan) -> DictConfig:
    overrides = [
        "+poison=cp",
        f"poison.eps={settings.eps!r}",
        f"poison.image_size={settings.size}",
        "poison.fit=cover",
        f"poison.rounds={plan.rounds}",
        "poison.schedule=joint",
        "poison.pgd_steps=1",
        "poison.step_size=0.05",
        "poison.dual_branch=False",
        f"data.dataset={CACHED}",
        f"data.train_path={quoted(work / CACHE)}",
        "data.num_workers=0",
        "augmentations=cifar_paper",
        f"augmentations.0.crop_size={VIEW}",
        f"max_epochs={plan.rounds}",
        f"optimizer.batch_size={plan.batch}",
        "optimizer.name=adamw",
        "optimizer.lr=4e-3",
        "precision=16-mixed",
        f"seed={settings.seed}",
        f"checkpoint.dir={quoted(folder)}",
        f"checkpoint.frequency={max(1, plan.rounds // CHECKPOINTS)}",
        "auto_resume.enabled=True",
        "name=protect",
    ]
    return compose(settings.method, [*overrides, *settings.overrides])
