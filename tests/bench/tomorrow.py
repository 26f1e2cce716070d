"""What a poison does on pictures that come later: `python -m tests.bench.tomorrow PICTURES`.

PICTURES/train and PICTURES/test hold one folder a class. Half of the training pictures are
protected by `cp-plugin protect` today; the other half, which comes tomorrow, is published as it is,
with random noise on the same grid, protected by today's poison (`--with`), or by one of its own.
A victim trains on what is published of both days; a clean run on the originals stands beside. Both
banks are those of both days.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cp_plugin.apps.evaluate_run import evaluate
from cp_plugin.apps.hydra_app import compose
from cp_plugin.apps.protect import protect, work_folder
from cp_plugin.apps.protect.plan import Settings
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.attack.poison_file import Poison
from cp_plugin.engine.run import run
from cp_plugin.util.run_files import POISON_FILE
from tests.bench.provenance import provenance, write

PACKAGES = ("torch", "torchvision", "pillow", "lightly", "timm", "lightning", "faiss-cpu")
ORIGINALS = "originals"
AS_IT_IS, RANDOM, WITH, FRESH = "as it is", "random noise", "--with", "a poison of its own"
BASE = (
    *("data=custom", "data.num_workers=0", "augmentations.0.crop_size=96"),
    *("optimizer.name=adamw", "optimizer.batch_size=64", "optimizer.lr=4e-3"),
    "precision=16-mixed",
)
"""Of victims; as `cp-plugin study protect` has it."""


def halves(source: Path, today: Path, tomorrow: Path) -> None:
    """Copy the pictures of each class in turn into two trees."""
    for number, file in enumerate(sorted(source.glob("*/*"))):
        place = (today if number % 2 else tomorrow) / file.parent.name
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)


def joined(trees: Sequence[Path], out: Path) -> Path:
    """Copy trees into one."""
    for tree in trees:
        shutil.copytree(tree, out, dirs_exist_ok=True)
    return out


def with_noise(poison: Poison, seed: int, file: Path) -> Path:
    """Write a poison that places pictures as the given one does, with random rows."""
    given = poison.perturbation
    drawn = torch.Generator().manual_seed(seed)
    noise = Perturbation.uniform(len(given), given.shape, poison.eps, "float32", drawn)
    return replace(poison, perturbation=noise).save(file)


def published(folder: Path, pictures: Path, settings: Settings) -> dict[str, Path]:
    """Return the trees that victims train on, by what was done to tomorrow's pictures."""
    today, tomorrow = folder / "today", folder / "tomorrow"
    halves(pictures / "train", today, tomorrow)
    protect([today], folder / "protected", settings)
    file = work_folder(folder / "protected") / POISON_FILE
    noise = with_noise(Poison.load(file), settings.seed, folder / "noise.safetensors")
    protect([tomorrow], folder / RANDOM, settings, noise)
    protect([tomorrow], folder / WITH, settings, file)
    protect([tomorrow], folder / FRESH, settings)
    second = {AS_IT_IS: tomorrow, **{name: folder / name for name in (RANDOM, WITH, FRESH)}}
    trees = {
        name: joined([folder / "protected", tree], folder / f"all {name}")
        for name, tree in second.items()
    }
    return {ORIGINALS: joined([today, tomorrow], folder / "all"), **trees}


def rows_of(folder: Path, pictures: Path, settings: Settings, epochs: int) -> list[dict[str, Any]]:
    """Train and measure the victims of one seed; accuracies in percent."""
    trees, test = published(folder, pictures, settings), pictures / "test"
    rows, clean = [], Path()
    for number, (name, tree) in enumerate(trees.items()):
        place = [f"data.train_path={tree}", f"data.val_path={test}"]
        place += [f"checkpoint.dir={folder}/runs-{number}", f"seed={settings.seed}"]
        made = run(compose("simclr", [*BASE, *place, f"max_epochs={epochs}"]))
        trained = Path(made["folder"])
        clean = trained if name == ORIGINALS else clean
        row = {"tomorrow": name, "seed": settings.seed, "steps": made["steps"]}
        sides = {"clean": (trained, trees[ORIGINALS])}
        if name != ORIGINALS:
            sides |= {"published": (trained, tree), "control": (clean, tree)}
        for bank, (encoder, images) in sides.items():
            (found,) = evaluate(encoder, data=images, test=test)
            row |= {f"knn_{bank}": found["knn"]["accuracy"]}
            row |= {f"linear_{bank}": found["linear"]["last"]}
        rows.append(row)
    return rows


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=12)
    given = parser.parse_args()
    began, rows = time.process_time(), []
    for seed in given.seeds:  # a seed takes long, so each is kept as it comes
        settings = Settings(rounds=given.rounds, seed=seed)
        with tempfile.TemporaryDirectory() as name:
            rows += rows_of(Path(name), given.pictures, settings, given.epochs)
        result = {
            "provenance": provenance(PACKAGES),
            "rounds": given.rounds,
            "epochs": given.epochs,
            "pictures": len(list((given.pictures / "train").glob("*/*"))),
            "clusters": settings.clusters,
            "cpu_seconds": time.process_time() - began,
            "rows": rows,
        }
        print(write("tomorrow", result), flush=True)


if __name__ == "__main__":
    main()
