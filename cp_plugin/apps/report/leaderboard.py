"""Poisons in the order of what they leave in the worst case, with what they cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cp_plugin.apps.report.rows import MEASURES, Row
from cp_plugin.apps.report.tables import Spread, ordered, spread
from cp_plugin.apps.study.settings import NONE

RANDOM = "random"
ERRORS = 2.0
"""Standard errors of a difference of means up to which it counts as scatter."""


@dataclass(frozen=True)
class Place:
    """One poison on the leaderboard, for one backbone of victims."""

    poison: str
    backbone: str
    undefended: float
    """Percent: the highest mean accuracy left over victims without a defence."""
    undefended_victim: str
    victims: int
    worst: float
    """Percent: the highest mean accuracy left over victims and defences, none among them."""
    worst_victim: str
    worst_defence: str
    defences: int
    """That it was measured under, none not counted."""
    against_random: str
    """Whether it leaves less than random noise of the same study."""
    image_passes: int | None
    craft_minutes: float | None


@dataclass(frozen=True)
class Leaderboard:
    """Poisons in order, the one that leaves least first; a clean run stands among them."""

    title: str
    """What was measured."""
    places: tuple[Place, ...]


Cells = Mapping[tuple[str, str], Spread]
"""By victim and defence."""


def leaderboard(rows: Sequence[Row]) -> Leaderboard:
    """Return the order of the poisons by the first of `MEASURES` that was taken.

    Args:
        rows: clean runs and victims.
    """
    measure = next(name for name in MEASURES if any(name in row.accuracies for row in rows))
    measured = [row for row in rows if measure in row.accuracies]
    places = []
    for backbone in ordered(row.backbone for row in measured):
        of_backbone = [row for row in measured if row.backbone == backbone]
        noise = next((row.label for row in of_backbone if _is_random(row)), None)
        cells = {
            label: _cells([row for row in of_backbone if row.label == label], measure)
            for label in ordered(row.label for row in of_backbone)
        }
        for label, own in cells.items():
            first = next(row for row in of_backbone if row.label == label)
            told = _against(label, own, None if noise is None else (noise, cells[noise]))
            places.append(_place(first, own, told))
    places.sort(key=lambda place: place.undefended)
    return Leaderboard(MEASURES[measure], tuple(places))


def _is_random(row: Row) -> bool:
    return RANDOM in (row.poison, row.facts.get("poison"))


def _cells(rows: Sequence[Row], measure: str) -> Cells:
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        values.setdefault((row.victim, row.defence), []).append(row.accuracies[measure])
    return {key: spread(found) for key, found in values.items()}


def _place(row: Row, cells: Cells, against_random: str) -> Place:
    plain = {key: cell for key, cell in cells.items() if key[1] == NONE} or cells
    undefended = max(plain, key=lambda key: plain[key].mean)
    worst = max(cells, key=lambda key: cells[key].mean)
    return Place(
        poison=row.label,
        backbone=row.backbone,
        undefended=plain[undefended].mean,
        undefended_victim=undefended[0],
        victims=len({victim for victim, _ in plain}),
        worst=cells[worst].mean,
        worst_victim=worst[0],
        worst_defence=worst[1],
        defences=len({defence for _, defence in cells} - {NONE}),
        against_random=against_random,
        image_passes=row.facts.get("image_passes"),
        craft_minutes=row.facts.get("craft_minutes"),
    )


def _against(label: str, cells: Cells, noise: tuple[str, Cells] | None) -> str:
    """Say of how many undefended victims a poison takes more than random noise and chance do."""
    if noise is None:
        return "no random noise was measured"
    if label in (NONE, noise[0]):
        return ""
    pairs = [
        (cell, noise[1][key]) for key, cell in cells.items() if key[1] == NONE and key in noise[1]
    ]
    errors = [(other.mean - own.mean, _standard_error(own, other)) for own, other in pairs]
    known = [(gap, error) for gap, error in errors if error is not None]
    if not known:
        return "one seed: scatter is not known" if pairs else "no victim of random noise is its own"
    below = sum(gap > ERRORS * error for gap, error in known)
    if below == 0:
        return f"within scatter on {_victims(len(known))}"
    return f"below it on {below} of {_victims(len(known))}"


def _victims(count: int) -> str:
    return f"{count} victim{'' if count == 1 else 's'}"


def _standard_error(own: Spread, other: Spread) -> float | None:
    """Return that of the difference of two means; None where either is of a single seed."""
    if own.deviation is None or other.deviation is None:
        return None
    return math.sqrt(own.deviation**2 / own.n + other.deviation**2 / other.n)
