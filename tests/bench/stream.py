"""Crafting on streams that are generated on the fly: `python -m tests.bench.stream`.

    python -m tests.bench.stream [--images 1000000] [--rows 50000] [--folder FOLDER]

Every figure is of a process of its own, since a peak of memory is. A class-wise craft passes once
over streams of 10,000 and of many images without a length; a sample-wise one over a stream that
finds its rows by key, and over the same images by row, whose poisons are compared value by value.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightly.loss import NTXentLoss
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from cp_plugin import CraftPoison, Poison
from tests.bench.provenance import provenance, write
from tests.bench.store import SIDE, Numbered, peak

PACKAGES = ("torch", "torchvision", "lightning", "lightly")
FEW, CLASSES = 10_000, 10
BATCH = 500
MODEL_STEPS, NOISE_STEPS = 20, 2
"""Of a round of the class-wise craft: its model phases pass once over the stream."""
ROUNDS = 2
"""Of the sample-wise craft, over whose images both phases pass once."""


class NumberedStream(IterableDataset[Any]):
    """The images of `Numbered`, one after another, their labels beside them."""

    def __init__(self, images: Numbered, labelled: bool) -> None:
        self.images, self.transform, self.labelled = images, images.transform, labelled

    def __iter__(self) -> Iterator[Any]:
        """Yield the samples of an epoch."""
        for number in range(self.images.count):
            views = self.transform(self.images.image(number))
            yield (views, number % CLASSES) if self.labelled else (views, f"{number}.png")


class KeyedStream(NumberedStream):
    """One that tells its length, so that its rows start from the noise of the craft by row."""

    def __len__(self) -> int:
        return self.images.count


class Unlabelled(Numbered):
    """The images by row, with their names."""

    def __getitem__(self, row: int) -> Any:
        """Return views and the image's name."""
        return self.transform(self.image(row)), f"{row}.png"


class Small(LightningModule):
    """SimCLR on a very small network, in Lightly's style."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 4, 4, 4), nn.Tanh(), nn.AdaptiveAvgPool2d(4), nn.Flatten()
        )
        self.criterion = NTXentLoss(0.5)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of two views."""
        (x0, x1), _ = batch
        loss: Tensor = self.criterion(self.backbone(x0), self.backbone(x1))
        return loss

    def configure_optimizers(self) -> Any:
        """Return the optimizer."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(dataset: Any, folder: Path, **settings: Any) -> Poison:
    """Craft by the callback and return the poison."""
    callback = CraftPoison(cache="false", seed=0, dir=str(folder), **settings)
    trainer = Trainer(
        **{"accelerator": "cpu", "max_epochs": 1000, "logger": False},
        **{"enable_checkpointing": False, "enable_progress_bar": False},
        **{"enable_model_summary": False, "default_root_dir": folder},
        callbacks=[callback],
    )
    trainer.fit(Small(), DataLoader(dataset, batch_size=BATCH))
    return Poison.load(folder / "poison.safetensors")


def by_class(images: int, folder: Path) -> dict[str, Any]:
    """Craft class-wise on a stream without a length."""
    steps = {"model_steps": MODEL_STEPS, "noise_steps": NOISE_STEPS, "pgd_steps": 1}
    rounds = images // BATCH // MODEL_STEPS
    stream = NumberedStream(Numbered(images, SIDE), labelled=True)
    poison = fit(stream, folder, granularity="class", rounds=rounds, **steps)
    return {"classes": len(poison.perturbation), "schedule": json.loads(poison.info["schedule"])}


def by_key(images: int, folder: Path) -> dict[str, Any]:
    """Craft sample-wise on a stream."""
    return _sample_wise(KeyedStream(Numbered(images, SIDE), labelled=False), folder)


def by_row(images: int, folder: Path) -> dict[str, Any]:
    """Craft sample-wise on the same images, each asked for by its row."""
    return _sample_wise(Unlabelled(images, SIDE), folder)


def _sample_wise(dataset: Any, folder: Path) -> dict[str, Any]:
    count = len(dataset) // BATCH // ROUNDS
    steps = {"model_steps": count, "noise_steps": count, "pgd_steps": 1, "dtype": "int8"}
    poison = fit(dataset, folder, rounds=ROUNDS, **steps)
    return {"rows": len(poison.perturbation), "schedule": json.loads(poison.info["schedule"])}


CASES = {one.__name__: one for one in (by_class, by_key, by_row)}


def child(case: str, images: int, folder: Path) -> None:
    """Run one case in this process and print its figures."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    began, worked = time.perf_counter(), time.process_time()
    found = CASES[case](images, folder)
    timed = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - worked}
    print(json.dumps({"case": case, "images": images, "peak_megabytes": peak(), **timed, **found}))


def measured(case: str, images: int, folder: Path) -> dict[str, Any]:
    """Run one case in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.stream", "--case", case]
    command += ["--images", str(images), "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(found, flush=True)
    return found


def differing(first: Path, other: Path) -> int:
    """Return how many values of two sample poisons differ, row by row of the same image.

    Rows of an image that only one of them knows differ as a whole.
    """
    poisons = [Poison.load(folder / "poison.safetensors") for folder in (first, other)]
    found = [one.keys for one in poisons if one.keys is not None]
    keys = torch.unique(torch.cat(found)).tolist()
    count = 0
    for start in range(0, len(keys), 1000):
        part = keys[start : start + 1000]
        rows = [one.rows(keys=part) for one in poisons]
        found = [one.perturbation.gather(r) for one, r in zip(poisons, rows, strict=True)]
        same = (found[0] == found[1]) & ((rows[0] < 0) == (rows[1] < 0)).view(-1, 1, 1, 1)
        count += int((~same).sum())
    return count


def main() -> None:
    """Measure every case, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--folder", type=Path, help="where the poisons are meanwhile")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        child(given.case, given.images, given.folder)
        return
    found = []
    with tempfile.TemporaryDirectory(dir=given.folder) as whole:
        folders = {case: Path(whole, case) for case in ("by_key", "by_row")}
        found += [measured(case, given.rows, folder) for case, folder in folders.items()]
        different = differing(*folders.values())
        for count in (FEW, given.images):
            found.append(measured("by_class", count, Path(whole, f"class{count}")))
    result = {
        "provenance": provenance(PACKAGES),
        "what": f"SimCLR on one convolution, {SIDE} px, batches of {BATCH}, one thread; images are "
        "made as they are asked for",
        "rows": found,
        "values_that_differ_between_by_key_and_by_row": different,
    }
    print(write("stream", result))


if __name__ == "__main__":
    main()
