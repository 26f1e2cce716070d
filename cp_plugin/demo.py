"""The whole job on embedded photographs: craft, inject and measure, without GPU or download."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cp_plugin.callbacks.craft import POISON_FILE
from cp_plugin.checkpoints import evaluate, poison_of
from cp_plugin.config import UserError
from cp_plugin.data import Opened, Photos, class_names
from cp_plugin.hydra_app import compose
from cp_plugin.pictures import picture_of_images
from cp_plugin.poison import Poison
from cp_plugin.pretrain import run
from cp_plugin.provenance import command, hardware, versions

VICTIM_EPOCHS = 22
CRAFT = {
    "cp_class": ["+poison=cp_class", "max_epochs=1000", "poison.rounds=40"],
    "cp_sample": ["+poison=cp", "max_epochs=1000", "poison.rounds=6", "poison.pgd_steps=1"],
}


@dataclass(frozen=True)
class Stage:
    """One training run of the demo."""

    name: str
    title: str
    overrides: tuple[str, ...]


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
    stages = _stages(out)
    for number, stage in enumerate(stages, start=1):
        console.rule(f"{number} of {len(stages)}: {stage.title}", align="left")
        runs[stage.name] = run(compose("simclr", [*_common(out, seed), *stage.overrides]))
        if stage.name.endswith("-craft"):
            _publish(Path(runs[stage.name]["folder"]), out, stage.name.removesuffix("-craft"))
    rows = [_row(name, runs, seed) for name in ("none", "random", "cp_class", "cp_sample")]
    result = {
        "rows": rows,
        "seconds": round(time.perf_counter() - started, 1),
        "data": "photographs of scikit-image, 32x32 patches",
        "hardware": hardware(),
        "versions": versions(),
        "command": command(),
    }
    (out / "result.json").write_text(json.dumps(result, indent=1), encoding="utf8")
    _show(Console(), rows, out)
    return result


def _common(out: Path, seed: int) -> list[str]:
    return [
        f"seed={seed}",
        f"checkpoint.dir={out / 'runs'}",
        f"max_epochs={VICTIM_EPOCHS}",
        "data.num_workers=0",
        "+backbone.kwargs.stem_stride=2",
        "+monitor=knn",
        "monitor.every_n_epochs=1000",
    ]


def _stages(out: Path) -> list[Stage]:
    poison = {name: out / f"{name}.safetensors" for name in CRAFT}
    start = f"poison.init={poison['cp_class']}"
    return [
        Stage("none", "a model on clean images", ("+poison=none",)),
        Stage("random", "a victim of random noise", ("+poison=random",)),
        Stage("cp_class-craft", "crafting CP-C, one delta a class", tuple(CRAFT["cp_class"])),
        _victim("cp_class", "a victim of CP-C", poison["cp_class"]),
        Stage(
            "cp_sample-craft",
            "crafting CP-S, one delta an image, from CP-C",
            (*CRAFT["cp_sample"], start),
        ),
        _victim("cp_sample", "a victim of CP-S", poison["cp_sample"]),
    ]


def _victim(name: str, title: str, poison: Path) -> Stage:
    return Stage(name, title, ("+poison=inject", f"poison.path={poison}"))


def _publish(folder: Path, out: Path, name: str) -> None:
    """Copy a crafted poison out of its run's folder, with a picture of what it does."""
    poison = Poison.load(folder / POISON_FILE)
    poison.save(out / f"{name}.safetensors")
    photos = Photos(train=True)
    opened, names = Opened(photos, poison.image_size), class_names(photos) or ()
    each = len(photos) // len(names)
    items = [opened[row * each] for row in range(min(10, len(names)))]
    rows = poison.rows([item.key for item in items], names[: len(items)])
    clean = torch.stack([item.image for item in items])
    picture_of_images(poison, clean, rows, out / f"{name}.png")


def _row(name: str, runs: dict[str, dict[str, Any]], seed: int) -> dict[str, Any]:
    victim = runs[name]
    craft = runs.get(f"{name}-craft", {})
    control = None
    if name != "none":
        poison = poison_of(Path(victim["folder"]))
        banks = evaluate(Path(runs["none"]["folder"]), poison, probe=False)
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
        "surrogate_steps": craft.get("steps"),
        "surrogate_loss": craft.get("train_loss"),
        "victim_loss": victim["train_loss"],
        "seconds": round(victim["seconds"] + craft.get("seconds", 0), 1),
    }


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
