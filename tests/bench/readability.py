"""Does readability order poisons as victims do? `python -m tests.bench.readability DIR`.

DIR is from `cp-plugin study tests/bench/results/readability.yaml`. Every poison that a finished
victim was trained on is read by fresh surrogates of the victims' own configuration; beside it
stands what the victims lost: on the clean bank against the clean run of their seed, on the poisoned
bank against the control. Rank correlations come with the interval of a bootstrap over poisons.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from scipy.stats import bootstrap, spearmanr

from cp_plugin.apps.study.state import Folder
from cp_plugin.attack.poison_file import Poison
from cp_plugin.config.selection import GROUPS
from cp_plugin.engine.readability import CLEAN, POISON, RANDOM, loss_of
from cp_plugin.engine.run import check, quiet
from cp_plugin.util.run_files import CONFIG_FILE, POISON_FILE
from tests.bench.provenance import provenance, write

PACKAGES = ("torch", "torchvision", "lightly", "timm", "lightning", "faiss-cpu", "scipy")
LOST = ("linear_clean", "knn_clean", "knn_poisoned")
"""What victims lost, in points: clean banks against the clean run, the poisoned one against the
control."""
Cell = dict[str, Any]


def victims(folder: Path) -> dict[str, list[Cell]]:
    """Return finished victims by poison, each with what it `lost`."""
    cells = [json.loads(file.read_text()) for file in sorted(folder.glob("cells/*.json"))]
    done = [cell for cell in cells if cell["status"] == "finished" and cell["victim"]]
    clean = {cell["seed"]: _banks(cell)["clean"] for cell in done if cell["kind"] == CLEAN}
    found: dict[str, list[Cell]] = {}
    for cell in done:
        if cell["kind"] == CLEAN or cell["seed"] not in clean:
            continue
        banks, untouched = _banks(cell), clean[cell["seed"]]
        control = cell["control"][0]["knn"]["accuracy"]
        lost = {
            "linear_clean": untouched["linear"]["last"] - banks["clean"]["linear"]["last"],
            "knn_clean": untouched["knn"]["accuracy"] - banks["clean"]["knn"]["accuracy"],
            "knn_poisoned": control - banks["poisoned"]["knn"]["accuracy"],
        }
        found.setdefault(cell["poison"], []).append(cell | {"lost": lost})
    return found


def _banks(cell: Cell) -> dict[str, Cell]:
    return {bank["bank"]: bank for bank in cell["banks"]}


def poison_of(folder: Folder, cell: Cell) -> Path:
    """Return the file that a victim was trained on."""
    if cell["file"]:
        return folder.given / str(cell["file"])
    if "poison" in cell["needs"]:
        crafted = json.loads(
            (folder.path / "cells" / f"{cell['needs']['poison']}.json").read_text()
        )
        return folder.path / str(crafted["folder"]) / POISON_FILE
    return folder.path / str(cell["folder"]) / POISON_FILE


def correlation(rows: list[Cell], lost: str) -> Cell:
    """Return Spearman's rank correlation of readability with a loss of victims, over poisons."""
    read = np.array([row["readability"] for row in rows])
    points = np.array([row["lost"][lost] for row in rows])

    def of(index: np.ndarray) -> float:
        return float(spearmanr(read[index], points[index]).statistic)

    everything = np.arange(len(rows))
    drawn = bootstrap(
        (everything,), of, vectorized=False, method="percentile", n_resamples=5000, rng=0
    )
    low, high = drawn.confidence_interval
    return {"lost": lost, "poisons": len(rows), "spearman": of(everything), "interval": [low, high]}


def measure(given: argparse.Namespace) -> Cell:
    """Read every poison and return the result."""
    folder, found = Folder(given.folder), victims(given.folder)
    first = next(iter(found.values()))[0]
    cfg: Any = OmegaConf.load(given.folder / first["folder"] / CONFIG_FILE)
    for group in GROUPS:
        cfg.pop(group, None)
    cfg = check(cfg)[1]
    quiet()
    seeds, rows, losses = range(given.seeds), [], {}
    for name, cells in found.items():
        poison = Poison.load(poison_of(folder, cells[0]))
        if not losses:  # of the images that all poisons are compared with
            losses = {CLEAN: [loss_of(cfg, CLEAN, poison, given.steps, seed) for seed in seeds]}
        kind = RANDOM if name == RANDOM else POISON
        losses[name] = [loss_of(cfg, kind, poison, given.steps, seed) for seed in seeds]
        drops = [clean - one for clean, one in zip(losses[CLEAN], losses[name], strict=True)]
        row = {
            "poison": name,
            "granularity": poison.granularity,
            "losses": losses[name],
            "drops": drops,
            "readability": statistics.fmean(drops),
            "victims": len(cells),
            "lost": {key: statistics.fmean(cell["lost"][key] for cell in cells) for key in LOST},
        }
        print(row, flush=True)
        rows.append(row)
    return {
        "provenance": provenance(PACKAGES),
        "steps": given.steps,
        "batch_size": int(cfg.optimizer.batch_size),
        "seeds": given.seeds,
        "victim_steps": first["result"]["steps"],
        "clean_losses": losses[CLEAN],
        "rows": rows,
        "correlations": [correlation(rows, lost) for lost in LOST],
    }


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    print(write("readability_of", measure(parser.parse_args())))


if __name__ == "__main__":
    main()
