"""Keep the figures of demo runs: `python -m tests.bench.demo DIR …`, a folder a seed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.bench.provenance import portable, provenance, write

PACKAGES = ("torch", "torchvision", "lightly", "timm", "lightning", "faiss-cpu", "scikit-image")


def main(folders: list[str]) -> None:
    """Write the rows of all folders into one result file."""
    results = [json.loads((Path(folder) / "result.json").read_text()) for folder in folders]
    kept = {
        "provenance": provenance(PACKAGES)
        | {"command": portable(results[0]["command"]), "hardware": results[0]["hardware"]},
        "data": results[0]["data"],
        "seconds": [result["seconds"] for result in results],
        "rows": [row for result in results for row in result["rows"]],
    }
    print(write("demo", kept))


if __name__ == "__main__":
    main(sys.argv[1:])
