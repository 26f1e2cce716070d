"""Pictures of a poison: rows of delta, and images before and after."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from cp_plugin.attack.poison_file import Poison

mpl.use("Agg")
SHOWN = 10


def picture_of_rows(poison: Poison, path: Path) -> Path:
    """Draw the first rows of delta, scaled so that -eps is black and +eps is white."""
    rows = torch.arange(min(SHOWN, len(poison.perturbation)))
    scaled = poison.perturbation.gather(rows) / (2 * poison.eps) + 0.5
    titles = poison.classes[: len(rows)] if poison.classes else [str(row) for row in rows.tolist()]
    levels = 255 * poison.eps
    return _grid([scaled], [f"delta, ±{levels:.0f}/255 as black to white"], titles, path)


def picture_of_images(poison: Poison, clean: Tensor, rows: Tensor, path: Path) -> Path:
    """Draw clean images, their perturbation (scaled) and the poisoned images.

    Args:
        poison: the poison.
        clean: uint8 (B, C, H, W).
        rows: int64 (B), see `Poison.rows`.
        path: the PNG file to write.
    """
    poisoned = poison.apply(clean, rows)
    delta = poison.perturbation.gather(rows) / (2 * poison.eps) + 0.5
    labels = ["clean", "perturbation, scaled", "poisoned"]
    return _grid([clean.float() / 255, delta, poisoned.float() / 255], labels, None, path)


def _grid(
    lines: list[Tensor], labels: list[str], titles: object, path: Path, scale: float = 1.1
) -> Path:
    columns = len(lines[0])
    figure = Figure(figsize=(scale * columns + 0.4, 1.25 * scale * len(lines) + 0.3), dpi=120)
    axes = figure.subplots(len(lines), columns, squeeze=False)
    for line, images in enumerate(lines):
        for column, image in enumerate(images):
            axis = axes[line][column]
            pixels = np.asarray(image.permute(1, 2, 0).clamp(0, 1))
            axis.imshow(pixels, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if isinstance(titles, (list, tuple)) and line == 0:
                axis.set_title(str(titles[column]), fontsize=7)
        axes[line][0].text(
            0, -0.08, labels[line], transform=axes[line][0].transAxes, fontsize=7, va="top"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight")
    return path
