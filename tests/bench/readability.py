"""Does readability order poisons as victims do? `python -m tests.bench.readability DIR`.

DIR is from `cp-plugin study tests/bench/results/readability.yaml`, which may still be at work in
it. Every poison that is there is read by fresh surrogates of the victims' own configuration, and
what was read is kept in DIR, so that the same call goes on. Beside it stands what finished victims
lost: on the clean bank against the clean run of their seed, on the poisoned bank against the
control. Rank correlations come with the interval of a bootstrap over poisons.
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


def poison_of(folder: Folder, cell: Cell) -> Path | None:
    """Return the file that a victim is trained on, None where it is not there yet."""
    if cell["file"]:
        return folder.given / str(cell["file"])
    made = folder.plan()[cell["needs"].get("poison", cell["name"])]
    state = folder.state(made)
    return folder.path / state["folder"] / POISON_FILE if "folder" in state else None


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


def configuration(folder: Folder) -> Any:
    """Return the victims' own, without poison, monitor and defence."""
    clean = next(cell for cell in folder.plan().values() if cell.kind == CLEAN)
    cfg: Any = OmegaConf.load(folder.path / folder.state(clean)["folder"] / CONFIG_FILE)
    for group in GROUPS:
        cfg.pop(group, None)
    return check(cfg)[1]


def losses(folder: Folder, cfg: Any, steps: int, seeds: int) -> dict[str, list[float]]:
    """Return the losses of fresh surrogates by poison, seed by seed; of clean images as well."""
    kept = folder.path / f"readability-{steps}.json"
    found: dict[str, list[float]] = json.loads(kept.read_text()) if kept.exists() else {}
    cells = {cell.poison: cell for cell in folder.plan().values() if cell.kind == "victim"}
    files = {name: poison_of(folder, cell.plain()) for name, cell in cells.items()}
    files = {name: file for name, file in files.items() if file is not None}
    for seed in range(seeds):
        for name in (CLEAN, *files):
            kind = name if name in (CLEAN, RANDOM) else POISON
            read = found.setdefault(name, [])
            if len(read) == seed:
                # Clean images are those of any poison, with delta left out.
                poison = Poison.load(files.get(name, next(iter(files.values()))))
                read.append(loss_of(cfg, kind, poison, steps, seed))
                print(name, seed, read[-1], flush=True)
                kept.write_text(json.dumps(found))
    return {name: read[:seeds] for name, read in found.items()}


def measure(given: argparse.Namespace) -> Cell:
    """Read every poison and return the result."""
    quiet()
    folder = Folder(given.folder)
    cfg = configuration(folder)
    read = losses(folder, cfg, given.steps, given.seeds)
    rows = []
    for name, cells in victims(given.folder).items():
        drops = [clean - one for clean, one in zip(read[CLEAN], read[name], strict=True)]
        rows.append(
            {
                "poison": name,
                "losses": read[name],
                "drops": drops,
                "readability": statistics.fmean(drops),
                "victims": len(cells),
                "lost": {
                    key: statistics.fmean(cell["lost"][key] for cell in cells) for key in LOST
                },
            }
        )
    return {
        "provenance": provenance(PACKAGES),
        "steps": given.steps,
        "batch_size": int(cfg.optimizer.batch_size),
        "seeds": given.seeds,
        "victim_epochs": int(cfg.max_epochs),
        "clean_losses": read[CLEAN],
        "rows": rows,
        "correlations": [correlation(rows, lost) for lost in LOST],
    }


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=1)
    print(write("readability_of", measure(parser.parse_args())))


if __name__ == "__main__":
    main()
