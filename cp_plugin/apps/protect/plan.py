"""What `cp-plugin protect` is asked for, and how long a poison is crafted: epochs and batches."""

from __future__ import annotations

from dataclasses import dataclass

BATCH = 64
"""Pictures a batch, at least: batches are so large that an epoch leaves out next to none."""


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

    @property
    def least_rounds(self) -> int:
        """Epochs at least: before there are clusters, one passes without a perturbation."""
        return 1 if self.clusters is None else 2


@dataclass(frozen=True)
class Plan:
    """What a craft will do."""

    rounds: int
    """Epochs over the pictures in all."""
    pictures: int
    seconds_a_step: float | None
    """None: not measured, since the rounds were given."""
    other_seconds: float
    """To start, and to read and write the pictures."""

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
            f"to start and to read and write them: {whole:.1f} minutes in all"
        )
