"""The study `demo` on embedded photographs, run in this process: poisons, victims and a table."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cp_plugin.apps.pictures import picture_of_images
from cp_plugin.apps.study import run_here
from cp_plugin.apps.study.settings import NONE, read
from cp_plugin.apps.study.state import write
from cp_plugin.attack.poison_file import Poison
from cp_plugin.config.settings import UserError
from cp_plugin.data import Photos, RawDataset, class_names
from cp_plugin.util.run_files import POISON_FILE, RESULT_FILE

STUDY = "demo"
SHOWN = (
    "It shows a poisoned bank under crops and flips: features of victims trained on poisoned "
    "photographs. It does not show the paper's drop on clean images under colour jitter."
)
Cell = dict[str, Any]
"""A finished cell of the study, as its file has it."""


def demo(out: Path, seed: int) -> dict[str, Any]:
    """Craft CP-C and CP-S, train a victim on each, on random noise and on clean images.

    Args:
        out: a new or empty folder; `result.json`, poisons, pictures and runs go there.
        seed: of everything.

    Returns:
        What is in `result.json`: that of the study, with the table's `rows`.

    Raises:
        UserError: the folder is not empty, or a run failed.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; choose another folder with --out.")
    settings = read(STUDY)
    grid = tuple(replace(axes, seeds=(seed,)) for axes in settings.grid)
    result = run_here(replace(settings, grid=grid), out)
    for name, reason in result["unfinished"].items():
        raise UserError(f"the demo's run {name} failed: {reason}")
    cells = {cell["name"]: cell for cell in result["cells"]}
    measured = [cell for cell in cells.values() if cell["victim"] is not None]
    result |= {
        "rows": [_row(cell, _crafts(cell, cells)) for cell in measured],
        "seconds": result["seconds_of_this_call"],
        "data": "photographs of scikit-image, 32x32 patches",
    }
    write(out / RESULT_FILE, result)
    last = {cell["poison"]: cell["folder"] for cell in cells.values() if cell["kind"] == "craft"}
    for name, folder in last.items():
        _publish(out / folder / POISON_FILE, out, name)
    _show(Console(), result["rows"], out)
    return result


def _crafts(cell: Cell, cells: dict[str, Cell]) -> list[Cell]:
    """Return the crafts that shaped a victim's poison, first to last."""
    made: list[Cell] = []
    while "poison" in cell["needs"]:
        cell = cells[cell["needs"]["poison"]]
        made.insert(0, cell)
    return made


def _row(cell: Cell, crafts: list[Cell]) -> dict[str, Any]:
    result, banks = cell["result"], {row["bank"]: row["knn"] for row in cell["banks"]}
    control = {row["bank"]: row["knn"]["accuracy"] for row in cell.get("control", ())}
    made = [craft["result"] for craft in crafts]
    poisoned = cell["poison"] != NONE
    return {
        "poison": cell["poison"],
        "granularity": result["granularity"],
        "victim": cell["victim"],
        "eps": result["eps"],
        "seed": cell["seed"],
        "knn_clean_bank": banks["clean"]["accuracy"],
        "knn_poisoned_bank": banks["poisoned"]["accuracy"] if poisoned else None,
        "knn_poisoned_bank_clean_encoder": control.get("poisoned"),
        "k": banks["clean"]["k"],
        "temperature": banks["clean"]["temperature"],
        "distance": banks["clean"]["distance"],
        "victim_steps": result["steps"],
        "victim_epochs": result["epochs"],
        "surrogates": sum(craft["surrogates"] for craft in made) or None,
        "surrogate_steps": sum(craft["steps"] for craft in made) or None,
        "surrogate_loss": made[-1]["train_loss"] if made else None,
        "victim_loss": result["train_loss"],
        "seconds": round(sum(each["seconds"] for each in (result, *made)), 1),
    }


def _publish(file: Path, out: Path, name: str) -> None:
    """Copy a crafted poison out of its run's folder, with a picture of what it does."""
    poison = Poison.load(file)
    shutil.copyfile(file, out / f"{name}.safetensors")
    photos = Photos(train=True)
    raw, names = RawDataset(photos, poison.size), class_names(photos) or ()
    each = len(photos) // len(names)
    items = [raw[row * each] for row in range(min(10, len(names)))]
    rows = poison.rows([item.key for item in items], names[: len(items)])
    clean = torch.stack([item.image for item in items])
    picture_of_images(poison, clean, rows, out / f"{name}.png")


def _show(console: Console, rows: list[dict[str, Any]], out: Path) -> None:
    console.print(SHOWN)
    table = Table(
        "poison",
        "kNN, clean bank",
        "kNN, poisoned bank",
        "control: clean encoder, poisoned bank",
        "victim's steps",
        "surrogate's steps",
        "seconds",
        title="kNN accuracy in percent of SimCLR on embedded photographs",
        caption=f"k = {rows[0]['k']}, T = {rows[0]['temperature']}, cosine, seed {rows[0]['seed']}",
    )
    for row in rows:
        keys = ("knn_clean_bank", "knn_poisoned_bank", "knn_poisoned_bank_clean_encoder")
        accuracies = ["-" if row[key] is None else f"{row[key]:.1f}" for key in keys]
        steps = [
            "-" if row[key] is None else str(row[key])
            for key in ("victim_steps", "surrogate_steps")
        ]
        table.add_row(row["poison"], *accuracies, *steps, f"{row['seconds']:.0f}")
    console.print(table)
    console.print(f"pictures: {out}/cp_class.png, {out}/cp_sample.png")
    console.print(f"poisons:  {out}/cp_class.safetensors, {out}/cp_sample.safetensors")
    console.print(f"figures:  {out}/result.json    runs: {out}/runs")
