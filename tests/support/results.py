"""What an evaluation writes into a cell, with figures drawn at random."""

from __future__ import annotations

from typing import Any

import numpy as np


def bank(name: str, draw: np.random.Generator) -> dict[str, Any]:
    """Return the result on one bank, accuracies in percent."""
    near = {"accuracy": draw.uniform(20, 80), "k": 20, "temperature": 0.07}
    near |= {"distance": "cosine", "bank_size": 1800}
    linear = {"last": draw.uniform(20, 80), "best": 90.0, "epochs": 100, "lr": 1.0}
    return {"bank": name, "knn": near, "linear": linear}
