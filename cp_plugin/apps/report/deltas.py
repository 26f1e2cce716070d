"""What the perturbations of a report are like by themselves, and what encoders make of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cp_plugin.apps.engine_runs import load_run
from cp_plugin.apps.report import figures
from cp_plugin.apps.report.rows import Row
from cp_plugin.apps.report.scenes import IMAGES_SHOWN, Picture, data_of
from cp_plugin.apps.study.settings import NONE
from cp_plugin.apps.timing import timed
from cp_plugin.attack.poison_file import Poison
from cp_plugin.config.settings import UserError
from cp_plugin.data import RawDataset, labels, names_or_numbers
from cp_plugin.data.batch import Batch
from cp_plugin.engine.pipeline import build_pipeline
from cp_plugin.evaluation.delta_statistics import (
    DeltaStatistics,
    delta_statistics,
    first_rows,
)
from cp_plugin.evaluation.linear_separability import LinearSeparability, separability_of
from cp_plugin.evaluation.saliency import Saliency, saliency
from cp_plugin.hosts.lightning import LightningHost
from cp_plugin.mirror import mirror
from cp_plugin.mirror.channels import with_channels

log = logging.getLogger("cp_plugin")

IMAGES = 32
"""That gradients are computed for."""
DRAWS = 4
"""Augmentations of each."""


@dataclass(frozen=True)
class DeltaLine:
    """One poison in the table of perturbations."""

    poison: str
    statistics: DeltaStatistics
    separability: LinearSeparability | None
    """None: the data set has no labels, or is not found."""
    victim: str
    """The method whose loss is differentiated."""
    by_clean: float | None
    """Alignment of delta with the gradient of the encoder that was trained on clean images; None:
    there is no such checkpoint."""
    by_victim: float | None
    """The same of the victim's own encoder."""


def deltas(
    rows: Sequence[Row], found: Mapping[str, tuple[Row, Poison]]
) -> tuple[list[DeltaLine], list[Picture]]:
    """Return a line of figures and a picture of saliency for each poison.

    Args:
        rows: all of the report.
        found: a poison of each label and the victim that it is in, see `scenes.poisons`.
    """
    lines, pictures = [], []
    for label, (row, poison) in timed("perturbations", found.items(), len(found)):
        clean = next((one for one in rows if one.poison == NONE and _alike(one, row)), None)
        seen = _tried(label, lambda row=row, poison=poison: _Shown.of(row, poison))
        of_victim = _tried(label, lambda seen=seen, row=row: seen and seen.by(row))
        of_clean = _tried(label, lambda seen=seen, run=clean: seen and run and seen.by(run))
        lines.append(
            DeltaLine(
                label,
                delta_statistics(first_rows(poison), poison.eps),
                _tried(
                    label, lambda row=row, poison=poison: separability_of(poison, data_of(row)[0])
                ),
                row.victim,
                of_clean.alignment if of_clean else None,
                of_victim.alignment if of_victim else None,
            )
        )
        if seen and of_victim:
            caption = f"loss of {row.victim}, trained on the poison; seed {row.seed}"
            pictures.append(Picture(label, seen.drawn(of_victim), caption))
    return lines, pictures


@dataclass(frozen=True)
class _Shown:
    """Images of a poison's data set."""

    poison: Poison
    batch: Batch
    raw: RawDataset
    rows: torch.Tensor
    """int64 (B), the rows of delta of the images."""

    @classmethod
    def of(cls, row: Row, poison: Poison) -> _Shown:
        train, _ = data_of(row)
        raw = RawDataset(train, poison.size, poison.fit)
        known, names = labels(train), names_or_numbers(train)
        drawn = torch.randperm(len(raw), generator=torch.Generator().manual_seed(0))[:IMAGES]
        items = [raw[image] for image in drawn.tolist()]
        targets = torch.full((len(items),), -1) if known is None else known[drawn]
        classes = [names[y] if names and y >= 0 else None for y in targets.tolist()]
        keys = [item.key for item in items]
        images = torch.stack([item.image for item in items])
        batch = Batch(drawn, torch.tensor(keys), images, targets)
        return cls(poison, batch, raw, poison.rows(keys, classes))

    def by(self, run: Row) -> Saliency:
        """Return the gradient of a run's loss, by its last checkpoint."""
        module, cfg = load_run(run.folder)
        host = LightningHost(module, lambda targets, views: (list(views), targets), ())
        view_mirror = with_channels(mirror(build_pipeline(cfg)), self.raw)
        delta = self.poison.perturbation.gather(self.rows)
        return saliency(host, view_mirror, self.batch, delta, self.poison.eps, DRAWS, 0)

    def drawn(self, found: Saliency) -> str:
        few = self.rows[:IMAGES_SHOWN]
        shown = self.poison.apply(self.batch.images[:IMAGES_SHOWN], few)
        size = self.poison.perturbation.gather(few).abs().mean(1)
        return figures.saliency(shown, size, found.map_BHW[:IMAGES_SHOWN])


def _alike(row: Row, other: Row) -> bool:
    return (row.victim, row.backbone) == (other.victim, other.backbone)


def _tried(label: str, make: Any) -> Any:
    """Return what is made; where data or checkpoints are gone, say so and return None."""
    try:
        return make()
    except UserError as error:
        log.warning("of the perturbation of %s a figure is left out: %s", label, error)
        return None
