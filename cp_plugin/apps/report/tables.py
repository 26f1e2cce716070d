"""Tables of accuracies: mean and deviation over seeds, mean and worst case over victims."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cp_plugin.apps.report.rows import MEASURES, Row
from cp_plugin.apps.study.settings import NONE


@dataclass(frozen=True)
class Spread:
    """Accuracies of several seeds, in percent."""

    mean: float
    deviation: float | None
    """Of the sample (divided by n - 1); None for a single seed."""
    n: int

    def __str__(self) -> str:
        """Return `61.2 ± 1.3`, or the bare figure of a single seed."""
        if self.deviation is None:
            return f"{self.mean:.1f}"
        return f"{self.mean:.1f} ± {self.deviation:.1f}"


@dataclass(frozen=True)
class Line:
    """One poison in a table."""

    poison: str
    cells: tuple[Spread | None, ...]
    """One a victim; None: not measured."""
    mean: float
    """Over the victims that were measured."""
    worst: float
    """The highest accuracy left over the victims: what an owner has to reckon with."""
    worst_victim: str


@dataclass(frozen=True)
class Table:
    """One measure, for one defence and one backbone."""

    measure: str
    title: str
    victims: tuple[str, ...]
    lines: tuple[Line, ...]


def spread(values: Sequence[float]) -> Spread:
    """Return mean and sample deviation of at least one value."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Spread(mean, None, 1)
    squares = math.fsum((value - mean) ** 2 for value in values)
    return Spread(mean, math.sqrt(squares / (len(values) - 1)), len(values))


def tables(rows: Sequence[Row]) -> list[Table]:
    """Return the tables of a report: by measure, for each defence and backbone.

    Args:
        rows: clean runs and victims, in the order in which names are to appear.
    """
    made = []
    for defence in ordered(row.defence for row in rows):
        for backbone in ordered(row.backbone for row in rows):
            part = [row for row in rows if (row.defence, row.backbone) == (defence, backbone)]
            for measure, title in MEASURES.items():
                if any(measure in row.accuracies for row in part):
                    made.append(_table(part, measure, _title(rows, title, defence, backbone)))
    return made


def markdown(table: Table) -> str:
    """Return a table as Markdown, without its title."""
    head = ("poison", *table.victims, "mean over victims", "worst case over victims")
    lines = [head, ("---",) * len(head)]
    for line in table.lines:
        cells = ("\N{EN DASH}" if cell is None else str(cell) for cell in line.cells)
        lines.append(
            (line.poison, *cells, f"{line.mean:.1f}", f"{line.worst:.1f} ({line.worst_victim})")
        )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct names in the order of their first appearance."""
    return tuple(dict.fromkeys(names))


def _title(rows: Sequence[Row], title: str, defence: str, backbone: str) -> str:
    parts = [title]
    if len({row.defence for row in rows}) > 1:
        parts.append("no defence" if defence == NONE else f"defence {defence}")
    if len({row.backbone for row in rows}) > 1:
        parts.append(backbone)
    return ", ".join(parts)


def _table(rows: Sequence[Row], measure: str, title: str) -> Table:
    measured = [row for row in rows if measure in row.accuracies]
    victims = ordered(row.victim for row in measured)
    return Table(
        measure,
        title,
        victims,
        tuple(
            _line(measured, measure, victims, label)
            for label in ordered(row.label for row in measured)
        ),
    )


def _line(rows: Sequence[Row], measure: str, victims: Sequence[str], label: str) -> Line:
    cells = []
    for victim in victims:
        values = [
            row.accuracies[measure] for row in rows if (row.label, row.victim) == (label, victim)
        ]
        cells.append(spread(values) if values else None)
    means = {
        victim: cell.mean for victim, cell in zip(victims, cells, strict=True) if cell is not None
    }
    worst = max(means, key=lambda victim: means[victim])
    return Line(label, tuple(cells), math.fsum(means.values()) / len(means), means[worst], worst)
