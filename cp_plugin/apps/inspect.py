"""What is to be said of a poison file: what it holds, its budget, what delta is like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cp_plugin.apps.export import dataset_of
from cp_plugin.apps.pictures import picture_of_rows
from cp_plugin.attack.poison_file import Poison
from cp_plugin.evaluation.delta_statistics import delta_statistics, first_rows
from cp_plugin.evaluation.linear_separability import separability_of


def inspect(
    poison_file: Path, picture: Path | None, data: Path | None, separability: bool
) -> dict[str, Any]:
    """Return the facts of a poison by their names, and draw it.

    Args:
        poison_file: the poison.
        picture: the PNG to write; None: beside the poison.
        data: the folder of its images, for the separability; None: its own run's data set.
        separability: whether to fit linear classifiers to delta.

    Raises:
        UserError: the file cannot be used, or its images are not found and are needed.
    """
    found = Poison.load(poison_file)
    shape = " x ".join(map(str, found.perturbation.shape))
    largest = found.perturbation.largest()
    facts: dict[str, Any] = {
        "granularity": found.granularity,
        "rows": f"{len(found.perturbation)} of {shape}, {found.perturbation.dtype}",
        "budget": f"eps {255 * found.eps:.2f}/255, largest change {255 * largest:.2f}/255: kept",
        "classes": list(found.classes) if found.classes else "-",
        **found.info,
        **_statistics(found),
    }
    if separability:
        facts |= _separability(found, dataset_of(poison_file, data, by_class=True))
    drawn = picture_of_rows(found, picture or poison_file.with_suffix(".png"))
    return {**facts, "picture": str(drawn)}


def _statistics(poison: Poison) -> dict[str, Any]:
    found = delta_statistics(first_rows(poison), poison.eps)
    return {
        "rms / eps": round(found.rms, 3),
        "share of pixels at the bound": round(found.at_bound, 3),
        "share of energy common to all rows": round(found.common, 3),
        "share of energy without colour": round(found.grey, 3),
        "share of energy in the middle quarter": round(found.centre, 3),
        "share of energy below a quarter of Nyquist's frequency": round(found.low_frequencies, 3),
        "mean power by cycles an image": [float(f"{value:.3g}") for value in found.profile],
    }


def _separability(poison: Poison, dataset: Any) -> dict[str, Any]:
    found = separability_of(poison, dataset)
    return {
        "classes told from delta alone, held out": f"{found.held_out:.1f} %",
        "the same, on what it was fitted to": f"{found.fitted:.1f} %",
        "chance": f"{found.chance:.1f} % ({found.classes} classes, {found.rows} images)",
    }
