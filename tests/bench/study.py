"""Keep the figures of a study: `python -m tests.bench.study DIR [COMMIT]`.

DIR is from `cp-plugin study`, COMMIT is what it ran at, if not the one here. The figures go to
`results/<name of the study>_<hardware>_<date>.json`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from cp_plugin.attack.loop import Schedule
from cp_plugin.attack.poison_file import Poison
from tests.bench.provenance import portable, provenance, write

PACKAGES = ("torch", "torchvision", "lightly", "timm", "lightning", "faiss-cpu", "scikit-image")
KEPT = (
    *("poison", "surrogate", "victim", "backbone", "defence", "seed"),
    *("banks", "control", "control_curve"),
)
FACTS = ("steps", "epochs", "surrogate_steps", "seconds", "train_loss", "knn", "eps", "granularity")

Cell = dict[str, Any]


def main(folder: Path, ran_at: str | None = None) -> None:
    """Write settings, figures and curves of all cells into one result file."""
    result = json.loads((folder / "result.json").read_text())
    cells = {cell["name"]: cell for cell in result["cells"] if cell.get("status") == "finished"}
    versions = provenance(PACKAGES)
    on_gpu = "threads" not in versions["hardware"]
    kept = {
        "provenance": versions
        | {"command": portable(result["command"]), "commit": ran_at or versions["commit"]},
        "name": result["name"],
        "settings": result["settings"],
        "unfinished": result["unfinished"],
        "seconds": round(sum(cell.get("seconds_in_all", 0) for cell in result["cells"])),
        "rows": [
            _row(folder, cells, cell, on_gpu) for cell in cells.values() if cell["kind"] != "craft"
        ],
        "cells": [_cell(cell) for cell in cells.values()],
    }
    print(write(result["name"], kept))


def _cell(cell: Cell) -> Cell:
    kept = {key: cell[key] for key in ("name", "kind", *KEPT) if key in cell}
    return kept | {"result": {key: cell["result"].get(key) for key in FACTS}}


def _row(folder: Path, cells: dict[str, Cell], cell: Cell, on_gpu: bool) -> Cell:
    """Return a victim with the fields of the demo's rows, and what its poison cost."""
    banks = {bank["bank"]: bank for bank in cell["banks"]}
    control = next((bank["knn"]["accuracy"] for bank in cell.get("control", ())), None)
    result, crafts = cell["result"], list(_crafts(cells, cell))
    crafted = sum(made["result"]["seconds"] for made in crafts)
    seconds = crafted + result["seconds"]
    return {
        **{key: cell[key] for key in ("poison", "surrogate", "victim", "defence", "seed")},
        "granularity": result["granularity"],
        "eps": result["eps"],
        **{
            f"{measure}_{bank}_bank": banks[bank][measure][key] if bank in banks else None
            for measure, key in (("knn", "accuracy"), ("linear", "last"))
            for bank in ("clean", "poisoned")
        },
        "knn_poisoned_bank_clean_encoder": control,
        "victim_steps": result["steps"],
        "victim_epochs": result["epochs"],
        "surrogate_steps": sum(made["result"]["steps"] for made in crafts) or None,
        "image_passes": sum(_image_passes(folder / made["folder"]) for made in crafts) or None,
        "craft_seconds": round(crafted, 1) if crafts else None,
        "seconds": round(seconds, 1),
        "gpu_minutes": round(seconds / 60, 1) if on_gpu else None,
    }


def _crafts(cells: dict[str, Cell], cell: Cell) -> Iterator[Cell]:
    """Yield the crafts that shaped a victim's poison, the last one first."""
    while "poison" in cell["needs"]:
        cell = cells[cell["needs"]["poison"]]
        yield cell


def _image_passes(run: Path) -> int:
    """Return how many images went forward and backward through a surrogate."""
    made = json.loads(Poison.load(run / "poison.safetensors").info["schedule"])
    cfg = OmegaConf.load(run / "config.yaml")
    rounds = made["surrogate_steps_done"] // made["model_steps"]
    steps = (made[key] for key in ("model_steps", "noise_steps", "pgd_steps"))
    views = sum(node.num_crops for node in cfg.augmentations)
    return Schedule(rounds, *steps).image_passes(cfg.optimizer.batch_size, views)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
