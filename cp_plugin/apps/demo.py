"""The whole job on embedded photographs: craft, inject and measure, without GPU or download."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cp_plugin.apps.evaluate_run import evaluate, poison_of
from cp_plugin.apps.hydra_app import compose
from cp_plugin.apps.pictures import picture_of_images
from cp_plugin.attack.poison_file import Poison
from cp_plugin.config.settings import UserError
from cp_plugin.data import Photos, RawDataset, class_names
from cp_plugin.engine.run import run
from cp_plugin.util.provenance import command, hardware, versions
from cp_plugin.util.run_files import POISON_FILE, RESULT_FILE
from cp_plugin.util.seed import derived_seed

EPOCHS = 11
"""Of each victim and of the clean model."""
SURROGATES = 15
"""CP-C is handed from one new surrogate to the next. Each is as young as a victim of the demo; a
poison made on a single old surrogate did less to victims that train so briefly."""
STEP = 0.005
"""Of CP-C, in units of eps: the paper's, 20 times as large, would fit delta to the last alone."""
CP_CLASS = ("+poison=cp_class", f"poison.step_size={STEP}", "poison.rounds=10", "max_epochs=1000")
MONITOR = ("+monitor=knn", "monitor.every_n_epochs=1000")
CP_SAMPLE = ("+poison=cp", "poison.rounds=6", "poison.pgd_steps=1", "max_epochs=1000")


@dataclass(frozen=True)
class Stage:
    """One training run of the demo."""

    name: str
    title: str
    overrides: tuple[str, ...]
    crafts: str | None = None
    """The poison that the run makes or goes on making."""


def demo(out: Path, seed: int) -> dict[str, Any]:
    """Craft CP-C and CP-S, train a victim on each, on random noise and on clean images.

    Args:
        out: a new or empty folder; `result.json`, poisons, pictures and runs go there.
        seed: of everything.

    Returns:
        What is in `result.json`.

    Raises:
        UserError: the folder is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; choose another folder with --out.")
    console, started = Console(stderr=True), time.perf_counter()
    runs: dict[str, dict[str, Any]] = {}
    stages = _stages(out, seed)
    poison: Path | None = None
    for number, stage in enumerate(stages, start=1):
        console.rule(f"{number} of {len(stages)}: {stage.title}", align="left")
        start = [f"poison.init={poison}"] if stage.crafts and poison else []
        overrides = [*_common(out, seed), *stage.overrides, *start]
        runs[stage.name] = run(compose("simclr", overrides))
        if stage.crafts:
            poison = Path(runs[stage.name]["folder"]) / POISON_FILE
            _publish(poison, out, stage.crafts)
    rows = [_row(name, runs, seed) for name in ("none", "random", "cp_class", "cp_sample")]
    result = {
        "rows": rows,
        "seconds": round(time.perf_counter() - started, 1),
        "data": "photographs of scikit-image, 32x32 patches",
        "hardware": hardware(),
        "versions": versions(),
        "command": command(),
    }
    (out / RESULT_FILE).write_text(json.dumps(result, indent=1), encoding="utf8")
    _show(Console(), rows, out)
    return result


def _common(out: Path, seed: int) -> list[str]:
    return [
        f"seed={seed}",
        f"checkpoint.dir={out / 'runs'}",
        f"max_epochs={EPOCHS}",
        "optimizer.batch_size=64",
        "augmentations=crops",  # colour jitter hides a perturbation from networks so young
        "optimizer.name=adamw",
        "optimizer.lr=4e-3",
        "precision=16-mixed",
        "+backbone.kwargs.stem_stride=2",
        "data.num_workers=0",
    ]


def _stages(out: Path, seed: int) -> list[Stage]:
    return [
        Stage("none", "a model on clean images", ("+poison=none", *MONITOR)),
        Stage("random", "a victim of random noise", ("+poison=random", *MONITOR)),
        *(
            Stage(
                f"cp_class-{number}",
                f"crafting CP-C, one delta a class, surrogate {number} of {SURROGATES}",
                (*CP_CLASS, f"seed={derived_seed(seed, 'cp_class', number)}"),
                crafts="cp_class",
            )
            for number in range(1, SURROGATES + 1)
        ),
        _victim("cp_class", "a victim of CP-C", out),
        Stage(
            "cp_sample-1",
            "crafting CP-S, one delta an image, from CP-C",
            (*CP_SAMPLE, f"seed={derived_seed(seed, 'cp_sample', 1)}"),
            crafts="cp_sample",
        ),
        _victim("cp_sample", "a victim of CP-S", out),
    ]


def _victim(name: str, title: str, out: Path) -> Stage:
    poison = out / f"{name}.safetensors"
    return Stage(name, title, ("+poison=inject", f"poison.path={poison}", *MONITOR))


def _publish(file: Path, out: Path, name: str) -> None:
    """Copy a crafted poison out of its run's folder, with a picture of what it does."""
    poison = Poison.load(file)
    shutil.copyfile(file, out / f"{name}.safetensors")
    photos = Photos(train=True)
    raw, names = RawDataset(photos, poison.size), class_names(photos) or ()
    each = len(photos) // len(names)
    items = [raw[row * each] for row in range(min(10, len(names)))]
    rows = poison.rows([item.key for item in items], names[: len(items)])
    clean = torch.stack([item.image for item in items])
    picture_of_images(poison, clean, rows, out / f"{name}.png")


def _row(name: str, runs: dict[str, dict[str, Any]], seed: int) -> dict[str, Any]:
    victim = runs[name]
    crafts = _crafts(name, runs)
    control = None
    if name != "none":
        poison = poison_of(Path(victim["folder"]))
        banks = evaluate(Path(runs["none"]["folder"]), poison, probe="none")
        control = next(row["knn"]["accuracy"] for row in banks if row["bank"] == "poisoned")
    return {
        "poison": name,
        "granularity": victim["granularity"],
        "victim": victim["method"],
        "eps": victim["eps"],
        "seed": seed,
        "knn_clean_bank": victim["knn_clean_bank"],
        "knn_poisoned_bank": victim.get("knn_poisoned_bank"),
        "knn_poisoned_bank_clean_encoder": control,
        "k": victim["k"],
        "temperature": victim["temperature"],
        "distance": "cosine",
        "victim_steps": victim["steps"],
        "victim_epochs": victim["epochs"],
        "surrogates": len(crafts) or None,
        "surrogate_steps": sum(craft["steps"] for craft in crafts) or None,
        "surrogate_loss": crafts[-1]["train_loss"] if crafts else None,
        "victim_loss": victim["train_loss"],
        "seconds": round(sum(each["seconds"] for each in (victim, *crafts)), 1),
    }


def _crafts(name: str, runs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the runs that shaped a poison; CP-S goes on from CP-C."""
    shaped_by = {"cp_class": ("cp_class-",), "cp_sample": ("cp_class-", "cp_sample-")}
    return [made for stage, made in runs.items() if stage.startswith(shaped_by.get(name, ("?",)))]


def _show(console: Console, rows: list[dict[str, Any]], out: Path) -> None:
    table = Table(
        "poison",
        "kNN, clean bank",
        "kNN, poisoned bank",
        "control: clean encoder, poisoned bank",
        "victim's steps",
        "surrogate's steps",
        "seconds",
        title="kNN accuracy in percent of SimCLR on embedded photographs",
        caption=f"k = {rows[0]['k']}, T = {rows[0]['temperature']}, cosine, seed {rows[0]['seed']}",
    )
    for row in rows:
        keys = ("knn_clean_bank", "knn_poisoned_bank", "knn_poisoned_bank_clean_encoder")
        accuracies = ["-" if row[key] is None else f"{row[key]:.1f}" for key in keys]
        steps = [
            "-" if row[key] is None else str(row[key])
            for key in ("victim_steps", "surrogate_steps")
        ]
        table.add_row(row["poison"], *accuracies, *steps, f"{row['seconds']:.0f}")
    console.print(table)
    console.print(f"pictures: {out}/cp_class.png, {out}/cp_sample.png")
    console.print(f"poisons:  {out}/cp_class.safetensors, {out}/cp_sample.safetensors")
    console.print(f"figures:  {out}/result.json    runs: {out}/runs")
