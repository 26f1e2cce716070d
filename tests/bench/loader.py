"""Images a second: the mirror on the CPU against Pillow in the data loader, one process each.

    python -m tests.bench.loader [--repeats N]

Both make the two views of Lightly's SimCLR transform for CIFAR (32 pixels, no blur) of the same
images, from memory; the loader decodes nothing, so what is compared is augmentation and collating.
Then what an injected poison costs a loader: images in memory at 32 pixels, JPEG files at 224.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightly.transforms.simclr_transform import SimCLRTransform
from lightning.pytorch import seed_everything
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder

from cp_plugin.attack.inject import inject
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.attack.poison_file import Poison
from cp_plugin.data import Photos, PreTransformDataset, RawDataset, wrappers
from cp_plugin.data.photos import photograph
from cp_plugin.mirror import mirror
from tests.bench.provenance import interleaved, provenance, write

BATCH = 256
BATCHES = 2
SIDE, FILES = 224, 128


def measure(repeats: int) -> dict[str, Any]:
    """Return the result: a row a way of making views."""
    transform = SimCLRTransform(input_size=32, gaussian_blur=0.0)
    photos = Photos(train=True, patches=-(-BATCH * BATCHES // 12), transform=transform)
    pillow = DataLoader(photos, batch_size=BATCH, drop_last=True)
    raw = RawDataset(photos, 32)
    raw = DataLoader(raw, batch_size=BATCH, drop_last=True, collate_fn=raw.collate)
    twin = mirror(transform)
    images = BATCH * len(pillow)

    def through_mirror() -> None:
        for batch in raw:
            twin(batch.images.float().div_(255))

    def through_pillow() -> None:
        for _ in pillow:
            pass

    rows = _rows({"mirror": through_mirror, "pillow": through_pillow}, repeats, images)
    with tempfile.TemporaryDirectory() as folder:
        files = ImageFolder(_files(Path(folder)), SimCLRTransform(input_size=SIDE))
        rows += _injected("memory, 32 px", photos, 32, repeats)
        rows += _injected(f"JPEG files, {SIDE} px", files, SIDE, repeats)
    return {
        "provenance": provenance(["torch", "torchvision", "lightly", "pillow"]),
        "what": "views of SimCLRTransform (32 px: no blur), batch 256 or 128 files, workers 0",
        "rows": rows,
    }


def _injected(name: str, dataset: Any, side: int, repeats: int) -> list[dict[str, Any]]:
    """Return a row of the poisoned loader, and one of a loader of images poisoned before."""
    raw = RawDataset(dataset, side)
    keys = torch.tensor(sorted({raw[row].key for row in range(len(raw))}))
    poison = Poison(Perturbation.uniform(len(keys), (3, side, side), 8 / 255), "sample", keys)

    def through(data: Any) -> Callable[[], None]:
        loader = DataLoader(data, batch_size=min(BATCH, len(data)), drop_last=True)

        def run() -> None:
            seed_everything(0, verbose=False)  # the same crops and blurs for both ways
            for _ in loader:
                pass

        return run

    injected = inject(dataset, poison)
    runs = {
        f"{name}, poisoned before": through(Replayed(injected)),
        f"{name}, injected": through(injected),
    }
    return _rows(runs, repeats, len(dataset) // BATCH * BATCH or len(dataset))


class Replayed(Dataset[Any]):
    """Reads the clean image and gives the transform the poisoned one, made before."""

    def __init__(self, injected: PreTransformDataset) -> None:
        self.transform = injected.transform
        self.clean = wrappers.with_transform(injected.dataset, lambda _: _nothing)
        injected.transform = _same
        self.images = [injected[row][0] for row in range(len(injected))]
        injected.transform = self.transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Any:
        """Return the views of the poisoned image."""
        return self.transform(self.images[row]), self.clean[row][1]


def _nothing(image: Any) -> None:
    """Make nothing of an image."""


def _same(image: Any) -> Any:
    return image


def _rows(runs: dict[str, Callable[[], None]], repeats: int, images: int) -> list[dict[str, Any]]:
    return [
        {
            "way": way,
            "images": images,
            "views": 2,
            "images_per_second": 1e3 * images / time["median"],
            "images_per_cpu_second": 1e3 * images / time["cpu"],
            **time,
        }
        for way, time in interleaved(runs, repeats).items()
    ]


def _files(folder: Path) -> Path:
    """Write photographs as JPEG files of poisons' size."""
    for number, name in enumerate(("astronaut", "cat", "coffee", "rocket") * (FILES // 4)):
        (folder / name).mkdir(exist_ok=True)
        left = number
        picture = photograph(name).crop((left, 0, left + 290, 290)).resize((SIDE, SIDE))
        picture.save(folder / name / f"{number}.jpg", quality=90)
    return folder


def main() -> None:
    """Measure, write the JSON, print a line a way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    torch.set_num_threads(1)
    result = measure(parser.parse_args().repeats)
    print(write("loader", result))
    for row in result["rows"]:
        print(f"{row['way']:30} {row['images_per_second']:8.0f} images a second")


if __name__ == "__main__":
    main()
