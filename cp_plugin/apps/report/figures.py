"""The pictures of a report, as data URIs: curves, images, spectra, maps of features."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from cp_plugin.apps.report.rows import Row
from cp_plugin.apps.report.tables import ordered
from cp_plugin.attack.poison_file import Poison
from cp_plugin.evaluation.spectra import Array

mpl.use("Agg")
INK = "#1c2330"
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "cp-plugin",
    "svg.fonttype": "path",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a92a0",
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
LINES = {"knn_clean_bank": "-", "knn_poisoned_bank": "--", "knn_control": ":"}
"""Of curves over training."""


def colours(labels: Sequence[str]) -> dict[str, str]:
    """Return a colour for each label, the same in all pictures; clean runs are black."""
    poisons = [label for label in labels if label != "none"]
    found = {label: _hex("tab10", number) for number, label in enumerate(poisons)}
    return found | {"none": INK}


def curves(rows: Sequence[Row], colour: Mapping[str, str]) -> str | None:
    """Draw kNN accuracy over a victim's training, means over seeds.

    Solid: clean bank; dashed: poisoned bank; dotted: the control, a clean encoder on that bank.

    Returns:
        An SVG as data URI; None if nothing was monitored more than once.
    """
    if not any(len(mean_curve([row], "knn_clean_bank")[0]) > 1 for row in rows):
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 4.1), layout="constrained")
        axis = figure.subplots()
        for label in ordered(row.label for row in rows):
            own = [row for row in rows if row.label == label]
            for key, style in LINES.items():
                steps, means = mean_curve(own, key)
                name = label if key == "knn_clean_bank" else None
                axis.plot(steps, means, style, color=colour[label], label=name, linewidth=1.8)
        axis.set_xlabel("steps of the victim")
        axis.set_ylabel("kNN accuracy, percent")
        axis.grid(color="#e4e7ec")
        figure.legend(fontsize=9, frameon=False, ncols=3, loc="outside lower center")
        return _svg(figure)


def mean_curve(rows: Sequence[Row], key: str) -> tuple[list[float], list[float]]:
    """Return the steps at which all of the runs were evaluated, and the mean accuracies there."""
    points = [
        {entry["step"]: entry[key] for entry in row.curve if entry.get(key) is not None}
        for row in rows
    ]
    steps = sorted(set.intersection(*map(set, points))) if points else []
    return steps, [float(np.mean([one[step] for one in points])) for step in steps]


def pictures(poison: Poison, clean_BCHW: Tensor, rows_B: Tensor) -> str:
    """Draw original images, their perturbation (-eps black, +eps white) and the poisoned images.

    Args:
        poison: the poison.
        clean_BCHW: uint8 images.
        rows_B: the rows of delta that belong to them.

    Returns:
        A PNG as data URI.
    """
    delta = poison.perturbation.gather(rows_B) / (2 * poison.eps) + 0.5
    lines = {
        "original": clean_BCHW.float() / 255,
        "perturbation": delta,
        "poisoned": poison.apply(clean_BCHW, rows_B).float() / 255,
    }
    figure = Figure(figsize=(0.95 * len(clean_BCHW) + 0.2, 3.1), dpi=110, layout="constrained")
    axes = figure.subplots(len(lines), len(clean_BCHW), squeeze=False)
    for line, (name, images) in zip(axes, lines.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            _bare(axis)
        line[0].set_ylabel(name, fontsize=9, color=INK)
    return _png(figure)


def common_limits(powers: Sequence[Array]) -> tuple[float, float]:
    """Return the colour scale, in decibel, on which several spectra can be compared."""
    values = np.concatenate([_decibel(power).ravel() for power in powers])
    lowest, highest = np.percentile(values, [1, 99.9])
    return float(lowest), float(highest)


def spectrum(power_HW: Array, limits: tuple[float, float]) -> str:
    """Draw a spectrum on a logarithmic scale; a PNG as data URI."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.0, 2.6), dpi=110, layout="constrained")
        axis = figure.subplots()
        shown = axis.imshow(_decibel(power_HW), "viridis", vmin=limits[0], vmax=limits[1])
        figure.colorbar(shown, label="decibel", shrink=0.85)
        _bare(axis)
        axis.set_xlabel("low frequencies in the middle", fontsize=9)
        return _png(figure)


def profiles(found: Mapping[str, Array], colour: Mapping[str, str]) -> str:
    """Draw the radial profiles of several spectra; an SVG as data URI."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.7), layout="constrained")
        axis = figure.subplots()
        for label, profile in found.items():
            axis.plot(profile, color=colour[label], label=label, linewidth=1.8)
        axis.set_yscale("log")
        axis.set_xlabel("spatial frequency, cycles an image")
        axis.set_ylabel("mean power")
        axis.grid(color="#e4e7ec")
        axis.legend(fontsize=9, frameon=False)
        return _svg(figure)


def feature_map(plane: Array, labels: Array, classes: Sequence[str]) -> str:
    """Draw points of a plane, float (N, 2), coloured by their classes, int (N).

    Returns:
        A PNG as data URI.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.6, 3.4), dpi=120, layout="constrained")
        axis = figure.subplots()
        for label in range(len(classes)):
            points = plane[labels == label]
            axis.scatter(points[:, 0], points[:, 1], s=7, color=_hex("tab20", label), linewidths=0)
        _bare(axis)
        return _png(figure)


def saliency(poisoned_BCHW: Tensor, delta_BHW: Tensor, gradient_BHW: Tensor) -> str:
    """Draw poisoned images, the magnitude of delta, and that of the gradient, each to its largest.

    Returns:
        A PNG as data URI.
    """
    lines: dict[str, Sequence[Tensor]] = {
        "poisoned": list(poisoned_BCHW.permute(0, 2, 3, 1)),
        "|delta|": list(delta_BHW / delta_BHW.max().clamp(min=1e-12)),
        "|gradient|": [one / one.max().clamp(min=1e-30) for one in gradient_BHW],
    }
    count = len(poisoned_BCHW)
    figure = Figure(figsize=(0.95 * count + 0.2, 3.1), dpi=110, layout="constrained")
    axes = figure.subplots(len(lines), count, squeeze=False)
    for line, (name, images) in zip(axes, lines.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image.squeeze(-1).numpy(), "magma", interpolation="nearest")
            _bare(axis)
        line[0].set_ylabel(name, fontsize=9, color=INK)
    return _png(figure)


def class_key(classes: Sequence[str]) -> list[tuple[str, str]]:
    """Return each class with its colour on the maps of features."""
    return [(name, _hex("tab20", label)) for label, name in enumerate(classes)]


def _hex(palette: str, number: int) -> str:
    colours_there = mpl.colormaps[palette]
    return mpl.colors.to_hex(colours_there(number % colours_there.N))


def _decibel(power: Array) -> Array:
    decibel: Array = 10 * np.log10(power + 1e-12)
    return decibel


def _bare(axis: Axes) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)


def _svg(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return _uri("image/svg+xml", file)


def _png(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return _uri("image/png", file)


def _uri(kind: str, file: io.BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
