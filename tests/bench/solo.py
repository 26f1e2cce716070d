"""Clean, random noise and CP-C through stock solo-learn: kNN on both banks, with the control.

    python -m tests.bench.solo IMAGES [--seeds 0 1 2] [--epochs N] [--rounds N] [--work DIR]

IMAGES holds `train/` and `test/`, a folder a class. Every run is `main_pretrain.py` of the checkout
at `$SOLO_LEARN_ROOT` or `~/solo-learn`, with its own `scripts/pretrain/cifar/simclr.yaml`; the
overrides stand in the result.
"""

from __future__ import annotations

import argparse
import csv
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cp_plugin.apps.evaluate_run import evaluate
from cp_plugin.attack.poison_file import Poison
from tests.bench.provenance import provenance, write

ROOT = Path(os.environ.get("SOLO_LEARN_ROOT", Path.home() / "solo-learn"))
CPU = (
    *("accelerator=cpu", 'devices="1"', "strategy=auto", "precision=32", "sync_batchnorm=False"),
    *("wandb.enabled=False", "data.num_workers=0", "auto_resume.enabled=False"),
)
SMALL = (
    "backbone.name=timm/resnet18",
    "+backbone.kwargs={layers:[1,1,1,1],channels:[16,32,64,128],stem_type:deep,stem_width:8,"
    "stem_stride:2}",
    "optimizer.batch_size=128",
    "+scheduler.warmup_epochs=0",
    "+check_val_every_n_epoch=9999",  # of the online classifier
)
VICTIM = ("+monitor=knn", "+augment=mirror")


def pretrain(work: Path, images: Path, *overrides: str) -> list[str]:
    """Run `main_pretrain.py` in a folder of its own; return the command."""
    own = work.resolve()
    command = [
        *("main_pretrain.py", "--config-path", "scripts/pretrain/cifar", "--config-name", "simclr"),
        *CPU,
        *SMALL,
        *("data.dataset=custom", "data.train_path=IMAGES/train", "data.val_path=IMAGES/test"),
        *overrides,
    ]
    given = [part.replace("IMAGES", str(images.resolve())) for part in command[1:]]
    given[1] = str(ROOT / command[2])
    own.mkdir(parents=True)
    with (own / "log.txt").open("w") as log:
        done = subprocess.run(
            [sys.executable, str(ROOT / command[0]), *given, f"checkpoint.dir={own}"],
            cwd=own,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        sys.exit(f"{shlex.join(command)} failed:\n{(own / 'log.txt').read_text()[-2000:]}")
    return command


def curve(work: Path) -> list[dict[str, Any]]:
    """Return what the monitor wrote: one row an evaluation."""
    (file,) = work.rglob("knn.csv")
    with file.open() as lines:
        return list(csv.DictReader(lines))


def measured(name: str, work: Path, seed: int, seconds: float) -> dict[str, Any]:
    """Return the row of a run that trained on clean or poisoned images."""
    points = curve(work)
    last = points[-1]
    return {
        "poison": name,
        "seed": seed,
        "knn_clean_bank": float(last["knn_clean_bank"]),
        "knn_poisoned_bank": float(last["knn_poisoned_bank"])
        if last.get("knn_poisoned_bank")
        else None,
        "knn_poisoned_bank_clean_encoder": None,
        "k": int(last["k"]),
        "temperature": float(last["temperature"]),
        "distance": "cosine",
        "victim_epochs": int(last["epoch"]) + 1,
        "victim_steps": int(last["step"]),
        "curve": points,
        "seconds": round(seconds, 1),
    }


def control(clean: Path, poison: Path, work: Path) -> float:
    """Return the clean encoder's accuracy on the poisoned bank."""
    sys.path[:] = [str(ROOT), *(part for part in sys.path if part != str(ROOT))]
    (checkpoint,) = (clean / "simclr").glob("*/*.ckpt")
    banks = evaluate(checkpoint, Poison.load(poison), probe=False)
    return float(next(row["knn"]["accuracy"] for row in banks if row["bank"] == "poisoned"))


def one_seed(
    images: Path, work: Path, seed: int, epochs: int, rounds: int
) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """Return the rows of clean, random and CP-C, and the commands."""
    common = (f"+seed={seed}", f"max_epochs={epochs}")
    every = f"monitor.every_n_epochs={max(1, epochs // 4)}"
    craft = ("+poison=cp_class", f"poison.rounds={rounds}", "poison.dir=POISON", "max_epochs=9999")
    poison = work / "poison"
    stages = {
        "none": (*common, "+poison=none", *VICTIM, every),
        "random": (*common, "+poison=random", *VICTIM, every),
        "craft": (f"+seed={seed + 1000}", *craft),
        "cp_class": (
            *(*common, "+poison=inject", "poison.path=POISON/poison.safetensors"),
            *(*VICTIM, every),
        ),
    }
    rows: list[dict[str, Any]] = []
    commands = {}
    for name, overrides in stages.items():
        started = time.perf_counter()
        real = [part.replace("POISON", str(poison)) for part in overrides]
        command = pretrain(work / name, images, *real)
        commands[name] = [part.replace(str(poison), "POISON") for part in command]
        seconds = time.perf_counter() - started
        if name == "craft":
            crafted = seconds
            continue
        rows.append(measured(name, work / name, seed, seconds))
        file = {"random": next((work / name).rglob("*.safetensors"), None)}.get(name)
        if name == "cp_class":
            file = poison / "poison.safetensors"
            rows[-1]["surrogate_steps"] = 20 * rounds
            rows[-1]["craft_seconds"] = round(crafted, 1)
        if file is not None:
            rows[-1]["knn_poisoned_bank_clean_encoder"] = control(work / "none", file, work)
        print({key: rows[-1][key] for key in rows[-1] if key != "curve"}, flush=True)
    return rows, commands


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--what", default="CIFAR-10 (JPEG q75)", help="what the images are")
    given = parser.parse_args()
    work = given.work or Path(tempfile.mkdtemp())
    result: dict[str, Any] = {"provenance": provenance(["torch", "lightning", "timm", "faiss-cpu"])}
    result["provenance"]["command"] = shlex.join(
        ["python", "-m", "tests.bench.solo", "IMAGES", *sys.argv[2:]]
    )
    count = sum(1 for file in (given.images / "train").rglob("*") if file.is_file())
    result["what"] = f"{given.what}, {count} training images, solo-learn's simclr.yaml"
    result["rows"] = []
    for seed in given.seeds:
        rows, result["commands"] = one_seed(
            given.images, work / str(seed), seed, given.epochs, given.rounds
        )
        result["rows"] += rows
    print(write("solo", result))


if __name__ == "__main__":
    main()
