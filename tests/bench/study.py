"""Keep the figures of a study: `python -m tests.bench.study DIR`, DIR from `cp-plugin study`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.bench.passport import passport, write

PACKAGES = ("torch", "torchvision", "lightly", "timm", "lightning", "faiss-cpu", "scikit-image")
KEPT = ("poison", "surrogate", "victim", "backbone", "defence", "seed", "banks", "control")
FACTS = ("steps", "epochs", "surrogate_steps", "seconds", "train_loss", "knn", "eps", "granularity")


def main(folder: Path) -> None:
    """Write settings, figures and curves of all cells into one result file."""
    result = json.loads((folder / "result.json").read_text())
    kept = {
        "passport": passport(PACKAGES) | {"command": result["command"]},
        "name": result["name"],
        "settings": result["settings"],
        "unfinished": result["unfinished"],
        "seconds": round(sum(cell.get("seconds_in_all", 0) for cell in result["cells"])),
        "cells": [_cell(cell) for cell in result["cells"] if cell.get("status") == "finished"],
    }
    print(write("study", kept))


def _cell(cell: dict[str, Any]) -> dict[str, Any]:
    kept = {key: cell[key] for key in ("name", "kind", *KEPT) if key in cell}
    return kept | {"result": {key: cell["result"].get(key) for key in FACTS}}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
