"""Keep the figures of a study: `python -m tests.bench.study DIR [COMMIT]`.

DIR is from `cp-plugin study`, which may still be at work in it; COMMIT is what it ran at, if not
the one here. The figures of finished cells go to
`results/<name of the study>_<hardware>_<date>.json`, small crafted poisons to files beside it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from cp_plugin.apps.report.costs import image_passes
from cp_plugin.apps.study.state import PLAN_FILE
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.attack.poison_file import Poison
from cp_plugin.attack.rounding import encode
from cp_plugin.util.run_files import POISON_FILE
from tests.bench.provenance import provenance, write

PACKAGES = ("torch", "torchvision", "lightly", "timm", "lightning", "faiss-cpu", "scikit-image")
KEPT = (
    *("poison", "surrogate", "victim", "backbone", "surrogate_backbone", "defence", "seed"),
    *("banks", "control", "control_curve"),
)
FACTS = ("steps", "epochs", "surrogate_steps", "seconds", "train_loss", "knn", "eps", "granularity")

LARGEST_POISON = 100_000
"""Bytes of a poison that is kept."""

Cell = dict[str, Any]


def main(folder: Path, ran_at: str | None = None) -> None:
    """Write settings, figures and curves of all finished cells into one result file."""
    planned = json.loads((folder / PLAN_FILE).read_text())
    files = sorted((folder / "cells").glob("*.json"))
    states = {file.stem: json.loads(file.read_text()) for file in files}
    names = dict.fromkeys([*(cell["name"] for cell in planned["cells"]), *states])
    finished = (name for name in names if states.get(name, {}).get("status") == "finished")
    cells = {name: states[name] for name in finished}
    left = {name: states.get(name, {}).get("status", "not begun") for name in names}
    name = planned["settings"]["name"]
    versions = provenance(PACKAGES)
    on_gpu = "threads" not in versions["hardware"]
    kept = {
        "provenance": versions
        | {"command": f"cp-plugin study {name}", "commit": ran_at or versions["commit"]},
        "name": name,
        "settings": planned["settings"],
        "unfinished": {name: status for name, status in left.items() if name not in cells},
        "seconds": round(sum(cell.get("seconds_in_all", 0) for cell in cells.values())),
        "rows": [
            _row(folder, cells, cell, on_gpu) for cell in cells.values() if cell["kind"] != "craft"
        ],
        "cells": [_cell(cell) for cell in cells.values()],
    }
    path = write(name, kept)
    print(path)
    for cell in cells.values():
        if cell["kind"] == "craft":
            _keep_poison(Poison.load(folder / cell["folder"] / POISON_FILE), path, cell["name"])


def _keep_poison(poison: Poison, result: Path, name: str) -> None:
    """Write a small poison, its rows in float16, beside the result file."""
    if poison.perturbation.stored.numel() * 2 > LARGEST_POISON:
        return
    file = result.with_name(f"{result.stem}_{name}.safetensors")
    file.unlink(missing_ok=True)
    deltas = poison.perturbation.gather(torch.arange(len(poison.perturbation)))
    rows = Perturbation(encode(deltas, poison.eps, torch.float16), poison.eps)
    print(replace(poison, perturbation=rows).save(file))


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
        "backbone": cell["backbone"],
        "surrogate_backbone": cell.get("surrogate_backbone"),
        "own_classifier": banks["clean"].get("classifier"),
        "granularity": result["granularity"],
        "eps": result["eps"],
        **{
            f"{measure}_{bank}_bank": banks.get(bank, {}).get(measure, {}).get(key)
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
    cfg: Any = OmegaConf.load(run / "config.yaml")
    return image_passes(Poison.load(run / POISON_FILE), cfg)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
