"""How well a linear classifier tells the classes of images from their perturbations alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cp_plugin.attack.poison_file import Poison
from cp_plugin.config.settings import UserError
from cp_plugin.data import RawDataset, labels, names_or_numbers
from cp_plugin.evaluation.metrics import linear_probe

MOST_ROWS = 4_096
"""Perturbations that classifiers are fitted to and tested on, at most."""
MOST_VALUES = 1 << 26
"""Pixels of all of them, at most: 256 MiB."""


@dataclass(frozen=True)
class LinearSeparability:
    """Accuracies in percent, 0 to 100, of classifiers that see delta and no image."""

    held_out: float
    """On the half of the rows that the classifier was not fitted to."""
    fitted: float
    """On the rows that it was fitted to, all of them; noise is fitted too where a row has more
    pixels than there are rows."""
    chance: float
    """Share of the largest class in the half that was held out."""
    rows: int
    classes: int


def separability_of(poison: Poison, dataset: Any, seed: int = 0) -> LinearSeparability:
    """Return how well classes are told from a poison's delta, see `linear_separability`.

    Every image counts with the delta that it carries; images are drawn where there are many.

    Args:
        poison: of any granularity.
        dataset: the labelled data set that it was made for.
        seed: of the images that are drawn, too.

    Raises:
        UserError: the data set has no labels, or other images than those of the poison.
    """
    known, names = labels(dataset), names_or_numbers(dataset)
    if known is None or names is None:
        raise UserError(
            "linear separability tells classes apart and this data set has no labels; give the "
            "labelled data set of the poison."
        )
    raw = RawDataset(dataset, poison.size, poison.fit)
    pixels = poison.perturbation.shape[0] * poison.size[0] * poison.size[1]
    most = max(4, min(MOST_ROWS, MOST_VALUES // pixels))
    drawn = torch.randperm(len(raw), generator=torch.Generator().manual_seed(seed))[:most]
    chosen = known[drawn]
    classes = [names[label] if label >= 0 else None for label in chosen.tolist()]
    rows = poison.rows([raw[image].key for image in drawn.tolist()], classes)
    carried = rows >= 0
    if not bool(carried.any()):
        raise UserError(
            "the poison has no row for any of the images that were looked at; give the data set "
            "that it was made for."
        )
    return linear_separability(poison.perturbation.gather(rows[carried]), chosen[carried], seed)


def linear_separability(delta_NCHW: Tensor, labels_N: Tensor, seed: int = 0) -> LinearSeparability:
    """Fit linear classifiers, by `linear_probe`, to perturbations of images.

    Args:
        delta_NCHW: float, one an image.
        labels_N: int64; images with a negative label are left out.
        seed: of the split into halves and of the order in fitting.

    Raises:
        UserError: fewer than two classes, or too few rows to hold any out.

    Source: Yu et al., "Availability Attacks Create Shortcuts", KDD 2022, section 3, which gives the
        accuracy on the rows that the classifier is fitted to.
    """
    known = labels_N >= 0
    names, labels = torch.unique(labels_N[known], return_inverse=True)
    if len(names) < 2 or len(labels) < 4:
        raise UserError(
            "linear separability needs perturbations of two labelled classes or more, got "
            f"{len(labels)} of {len(names)}; give the labelled data set of the poison."
        )
    delta_ND = delta_NCHW[known].flatten(1).float()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    fit, test = order[: len(order) // 2], order[len(order) // 2 :]
    held_out = linear_probe(delta_ND[fit], labels[fit], delta_ND[test], labels[test], seed=seed)
    fitted = linear_probe(delta_ND, labels, delta_ND, labels, seed=seed)
    largest = int(torch.bincount(labels[test]).max())
    return LinearSeparability(
        held_out.last, fitted.last, 100 * largest / len(test), len(labels), len(names)
    )
