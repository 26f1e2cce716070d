"""The page itself: templates filled with tables and pictures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cp_plugin.apps.report import figures, scenes
from cp_plugin.apps.report.csv_file import as_csv
from cp_plugin.apps.report.deltas import deltas
from cp_plugin.apps.report.leaderboard import leaderboard
from cp_plugin.apps.report.projection import PROJECTIONS
from cp_plugin.apps.report.rows import Found, Row, find
from cp_plugin.apps.report.tables import markdown, ordered, tables
from cp_plugin.apps.study.settings import NONE
from cp_plugin.util.whole_files import write_text

TEMPLATES = Path(__file__).parent / "templates"
DASH = "\N{EN DASH}"


def write(folder: Path, out: Path, projection: str) -> tuple[Path, Path, Path]:
    """Write the files of a report; see `cp_plugin.apps.report.report`."""
    found = find(folder)
    table = out / "report.csv"
    write_text(table, as_csv(found.rows))
    content = _content(found, projection)
    written = []
    for name in ("report.html", "report.md"):
        file = out / name
        write_text(file, _render(f"{name}.j2", content))
        written.append(file)
    return written[0], written[1], table


def _render(template: str, content: dict[str, Any]) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["markdown"] = markdown
    environment.filters["figure"] = "{:.1f}".format
    environment.filters["grouped"] = "{:,}".format
    environment.filters["share"] = "{:.2f}".format
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|")
    return environment.get_template(template).render(content)


def _content(found: Found, projection: str) -> dict[str, Any]:
    rows = found.rows
    colour = figures.colours(ordered(row.label for row in rows))
    files = scenes.poisons(rows)
    spectra, profiles = scenes.spectra(files, colour)
    shared, own = scenes.settings(found.folders)
    maps = scenes.maps(rows, projection)
    perturbations, saliencies = deltas(rows, files)
    return {
        "found": found,
        "summary": _summary(found),
        "how": _how(rows),
        "leaderboard": leaderboard(rows),
        "tables": tables(rows),
        "curves": scenes.curves(rows, colour),
        "images": scenes.images(files),
        "spectra": spectra,
        "profiles": profiles,
        "deltas": perturbations,
        "saliencies": saliencies,
        "projection": PROJECTIONS[projection],
        "maps": maps.pictures,
        "classes": maps.classes,
        "steps": _steps(rows),
        "shared": shared,
        "own": own,
        "date": time.strftime("%Y-%m-%d"),
    }


def _summary(found: Found) -> str:
    rows = found.rows
    parts = [
        _count(len([row for row in rows if row.poison != NONE]), "victim"),
        _count(len([row for row in rows if row.poison == NONE]), "clean run"),
    ]
    axes = {
        "methods": ordered(row.victim for row in rows),
        "poisons": ordered(row.label for row in rows if row.poison != NONE),
        "backbones": ordered(row.backbone for row in rows),
        "defences": ordered(row.defence for row in rows if row.defence != NONE),
        "seeds": ordered(str(row.seed) for row in rows),
    }
    told = [f"{name}: {', '.join(values)}" for name, values in axes.items() if values]
    return f"{' and '.join(parts)}. {'; '.join(told)}."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _how(rows: Sequence[Row]) -> str:
    """Say how accuracies were measured."""
    keys = {
        "k": "k",
        "temperature": "T",
        "distance": "distance",
        "bank_size": "images in the bank",
        "probe": "protocol of the linear probe",
        "probe_epochs": "epochs of the linear probe",
        "probe_lr": "its learning rate",
    }
    told = []
    for key, name in keys.items():
        values = ordered(str(row.facts[key]) for row in rows if row.facts.get(key) is not None)
        if values:
            told.append(f"{name} = {', '.join(values)}")
    return "; ".join(told)


def _steps(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Return the steps of victims beside those of the surrogates, a line each that differs."""
    lines = []
    for row in rows:
        facts = row.facts
        line = {
            "poison": row.label,
            "victim": row.victim,
            "defence": row.defence,
            "steps": str(facts.get("steps", DASH)),
            "epochs": str(facts.get("epochs", DASH)),
            "surrogate_steps": str(facts.get("surrogate_steps") or DASH),
        }
        if line not in lines:
            lines.append(line)
    return lines
