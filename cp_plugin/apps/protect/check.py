"""`cp-plugin protect --check`: what protection does to one pair of small networks.

One is trained on the originals and one on the protected pictures as they lie in OUT, from the same
weights, on the same batches, for as many steps; both then tell held-out originals apart. Pictures
are labelled by their folders, else by the clusters of the poison, else by their colours.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cp_plugin.apps.protect.craft import MEASURED_STEPS, configuration, measured, trained
from cp_plugin.apps.protect.plan import BATCH, Settings
from cp_plugin.apps.protect.split import (
    ORIGINALS,
    PROTECTED,
    QUERIES,
    Split,
    filled,
    labels_of,
)
from cp_plugin.apps.runs import run_in
from cp_plugin.attack.poison_file import Poison
from cp_plugin.config.settings import UserError
from cp_plugin.data.picture_cache import Pixels
from cp_plugin.engine.clusters import placement
from cp_plugin.evaluation.metrics import knn, linear_probe
from cp_plugin.util.provenance import command, hardware, versions
from cp_plugin.util.run_files import RESULT_FILE
from cp_plugin.util.seed import derived_seed

log = logging.getLogger("cp_plugin")

CHECK, PLAN = "check", "plan.json"
BACKWARD = 3
"""A step costs about as much as so many forward passes of its views."""


def check(split: Split, work: Path, settings: Settings, poison: Poison, minutes: float) -> Any:
    """Train both networks, compare them, and keep what was found in `check.json`.

    An interrupted check goes on where it was; a finished one is read.

    Args:
        split: the pictures.
        work: the folder beside OUT.
        settings: method, size, seed and overrides are read from it; the seed of these networks is
            another than that of the craft.
        poison: that the pictures carry.
        minutes: for everything.

    Raises:
        UserError: the minutes are too few.
    """
    place = work / f"{CHECK}.json"
    if place.is_file():
        log.info("%s is there already; delete it to check again", place)
        return json.loads(place.read_text(encoding="utf8"))
    began, folder = time.perf_counter(), work / CHECK
    seed = derived_seed(settings.seed, "check")
    settings = replace(settings, seed=seed, size=poison.size[0])
    caches = filled(split, folder, settings.size)
    epochs, batch = _planned(
        folder,
        settings,
        len(split.training),
        len(split.held_out),
        time.perf_counter() - began,
        minutes,
    )
    runs = {
        name: trained(configuration(folder / name, folder / f"run-{name}", settings, batch, epochs))
        for name in (ORIGINALS, PROTECTED)
    }
    shown = {name: Pixels(cache) for name, cache in caches.items()}
    labels, by = labels_of(split, shown, poison, settings.seed)
    rows = _rows(runs, shown, labels, settings.seed)
    results = [json.loads((run / RESULT_FILE).read_text(encoding="utf8")) for run in runs.values()]
    found = {
        "labels": by,
        "groups": len(torch.cat(list(labels.values())).bincount().nonzero()),
        "largest_group": _largest(labels[QUERIES]),
        "training": len(split.training),
        "held_out": len(split.held_out),
        "epochs": epochs,
        "steps": [result["steps"] for result in results],
        "seed": settings.seed,
        "method": settings.method,
        "rows": rows,
        **judged(rows, len(split.held_out)),
        "minutes": (time.perf_counter() - began) / 60,
        "minutes_given": minutes,
        "hardware": hardware(),
        "versions": versions(),
        "command": command(),
    }
    partial = place.with_name(f".{place.name}")
    partial.write_text(json.dumps(found, indent=1), encoding="utf8")
    partial.replace(place)
    shutil.rmtree(folder)
    return found


def sentence(found: Any) -> str:
    """Return in words what a check has found, and what it has not."""
    clean, protected = found["rows"][0]["knn"], found["rows"][2]["knn"]
    text = (
        f"kNN names the {found['labels']} of held-out originals in {clean:.1f} % of cases with the "
        f"network trained on originals and in {protected:.1f} % with the one trained on protected "
        f"pictures (always the largest one: {found['largest_group']:.1f} %). "
    )
    spread = f"{found['difference']:+.1f} points, chance with {found['held_out']} pictures "
    spread += f"± {2 * found['scatter']:.1f}"
    if clean - found["largest_group"] <= 2 * found["scatter"]:
        text += "The first has learnt too little for a loss to show. "
    if found["stands_out"]:
        return (
            f"{text}The difference ({spread}) stands out. It is that of one pair of small "
            "networks; others may differ."
        )
    return (
        f"{text}No effect stands out ({spread}): this pair of networks does not show one. Longer "
        "training (--check-minutes) or more pictures might."
    )


def _planned(
    folder: Path, settings: Settings, training: int, held_out: int, so_far: float, minutes: float
) -> tuple[int, int]:
    """Return the epochs that there is time for, and pictures a step; say so.

    Raises:
        UserError: there is no time for any.
    """
    place = folder / PLAN
    steps = training // BATCH
    batch = training // steps
    if place.is_file():
        epochs = int(json.loads(place.read_text(encoding="utf8")))
        return epochs, batch
    trial = configuration(folder / ORIGINALS, folder / "measure", settings, batch, MEASURED_STEPS)
    a_step, start, taken = measured(trial, folder / "measure")
    # Both networks encode both banks and the queries: single pictures, without a backward pass.
    encoding = 2 * (2 * training + held_out) * a_step / (2 * batch * BACKWARD)
    left = 60 * minutes - so_far - taken - 2 * start - encoding
    epochs = int(left / (2 * steps * a_step))
    if epochs < 1:
        needed = (60 * minutes - left + 2 * steps * a_step) / 60
        raise UserError(
            f"{minutes:g} minutes are too few to check {training + held_out} pictures, which takes "
            f"{needed:.1f} at least; give more --check-minutes."
        )
    log.info(
        "check: two networks, %d epochs of %d steps each, %.2f s a step: %.1f minutes in all",
        epochs,
        steps,
        a_step,
        (60 * minutes - left + 2 * epochs * steps * a_step) / 60,
    )
    place.write_text(json.dumps(epochs), encoding="utf8")
    return epochs, batch


def _rows(
    runs: dict[str, Path], shown: dict[str, Pixels], labels: dict[str, Tensor], seed: int
) -> list[dict[str, Any]]:
    """Measure both networks on both banks; accuracies in percent."""
    rows = []
    for victim, folder in runs.items():
        host, _, cfg = run_in(folder).trained(folder)
        encoder = placement(host.encoder(), cfg)
        queries = encoder.features(shown[QUERIES])
        for bank in (ORIGINALS, PROTECTED):
            sides = (encoder.features(shown[bank]), labels[ORIGINALS], queries, labels[QUERIES])
            near = knn(*sides)
            probe = linear_probe(*sides, seed=seed)
            rows.append(
                {
                    "trained_on": victim,
                    "bank": bank,
                    "knn": near.accuracy,
                    "k": near.k,
                    "linear": probe.last,
                }
            )
    return rows


def judged(rows: list[dict[str, Any]], count: int) -> dict[str, Any]:
    """Return by how much the victim's kNN is lower, and whether that is more than chance.

    Both on the originals as bank: what a network is worth elsewhere. The scatter is that of two
    shares of `count` pictures, a success and a failure added to each so that it is never zero.
    """
    clean, protected = (rows[number]["knn"] for number in (0, 2))
    shares = [(count * accuracy / 100 + 1) / (count + 2) for accuracy in (clean, protected)]
    scatter = 100 * math.sqrt(sum(share * (1 - share) / count for share in shares))
    difference = protected - clean
    return {
        "difference": difference,
        "scatter": scatter,
        "stands_out": abs(difference) > 2 * scatter,
    }


def _largest(labels: Tensor) -> float:
    """Return the share of the largest group, in percent."""
    return 100 * float(torch.bincount(labels).max()) / len(labels)
