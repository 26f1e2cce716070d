"""Keep the figures of a study: `python -m tests.bench.study DIR [COMMIT [FILE]]`.

DIR is from `cp-plugin study`, which may still be at work in it, here or on another machine; COMMIT
is what it ran at, if not the one here; FILE is its YAML, if it is none of those that are shipped.
The figures of finished cells, and the curves so far of those under way, go to
`results/<name>_<hardware>_<date>.json`, small crafted poisons to files beside it.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from cp_plugin.apps.report.costs import image_passes
from cp_plugin.apps.study.settings import read
from cp_plugin.apps.study.state import PLAN_FILE
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.attack.poison_file import Poison
from cp_plugin.attack.rounding import encode
from cp_plugin.util.run_files import KNN_FILE, POISON_FILE
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


def main(folder: Path, ran_at: str | None = None, file: str | None = None) -> None:
    """Write settings, figures and curves of a study's cells into one result file."""
    planned = json.loads((folder / PLAN_FILE).read_text())
    files = sorted((folder / "cells").glob("*.json"))
    states = {file.stem: json.loads(file.read_text()) for file in files}
    names = dict.fromkeys([*(cell["name"] for cell in planned["cells"]), *states])
    finished = (name for name in names if states.get(name, {}).get("status") == "finished")
    cells = {name: states[name] for name in finished}
    left = {name: states.get(name, {}).get("status", "not begun") for name in names}
    name = read(file).name if file else planned["settings"]["name"]
    ran = provenance(PACKAGES) | _elsewhere(cells.values())
    on_gpu = "threads" not in ran["hardware"]
    kept = {
        "provenance": ran
        | {"command": f"cp-plugin study {file or name}", "commit": ran_at or ran["commit"]},
        "name": name,
        "settings": planned["settings"],
        "unfinished": {name: status for name, status in left.items() if name not in cells},
        "under_way": [
            {**{key: cell[key] for key in KEPT if key in cell}, "name": cell["name"], "knn": curve}
            for cell in planned["cells"]
            if cell["name"] not in cells and (curve := _curve_so_far(folder, cell["name"]))
        ],
        "seconds": round(sum(cell.get("seconds_in_all", 0) for cell in cells.values())),
        "rows": [
            _row(folder, cells, cell, on_gpu) for cell in cells.values() if cell["kind"] != "craft"
        ],
        "cells": [_cell(cell) for cell in cells.values()],
    }
    path = write(name, kept)
    print(path)
    for cell in cells.values():
        made = folder / cell["folder"] / POISON_FILE
        if cell["kind"] == "craft" and made.exists():  # a large one stays where it was made
            _keep_poison(Poison.load(made), path, cell["name"])


def _elsewhere(cells: Iterable[Cell]) -> Cell:
    """Return what to say of the GPU's machine that all cells ran on, where there was one."""
    results = [cell["result"] for cell in cells]
    machines = {result["hardware"] for result in results}
    gpu = machines.pop().rpartition(" cores, ")[2] if len(machines) == 1 else ""
    if not gpu or gpu.endswith("cores"):
        return {}
    versions = dict(results[0]["versions"])
    told = {"hardware": gpu, "python": versions.pop("python"), "versions": versions}
    return told | {"threads": None, "load_before": None}


def _curve_so_far(folder: Path, name: str) -> list[Cell]:
    """Return what the monitor of a run that has not ended has written."""
    entries: list[Cell] = []
    for file in sorted(folder.glob(f"runs/*/{name}-*/{KNN_FILE}")):
        with file.open(encoding="utf8") as lines:
            entries += [
                {key: json.loads(value) for key, value in entry.items() if value}
                for entry in csv.DictReader(lines)
            ]
    return entries


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
