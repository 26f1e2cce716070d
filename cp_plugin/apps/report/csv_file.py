"""Every measured run as a line of a CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from cp_plugin.apps.report.rows import MEASURES, Row

AXES = ("poison", "surrogate", "victim", "backbone", "defence", "seed")
FACTS = (
    *("granularity", "eps", "fraction", "dataset", "steps", "epochs", "surrogate_steps"),
    *("image_passes", "craft_minutes", "seconds"),
)
"""Of a run: `seconds` are its own, `image_passes` and `craft_minutes` those of its poison."""


def as_csv(rows: Sequence[Row]) -> str:
    """Return a line a run under a line of names; accuracies in percent, empty where not known."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*AXES, *MEASURES, *FACTS])
    for row in rows:
        axes = [getattr(row, name) for name in AXES]
        accuracies = [row.accuracies.get(name) for name in MEASURES]
        writer.writerow([*axes, *accuracies, *(row.facts.get(name) for name in FACTS)])
    return text.getvalue()
