"""Images a second: the mirror on the CPU against Pillow in the data loader, one process each.

    python -m tests.bench.loader [--repeats N]

Both make the two views of Lightly's SimCLR transform for CIFAR (32 pixels, no blur) of the same
images, from memory; the loader decodes nothing, so what is compared is augmentation and collating.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from lightly.transforms.simclr_transform import SimCLRTransform
from torch.utils.data import DataLoader

from cp_plugin.data import Opened, Photos
from cp_plugin.mirror import mirror
from tests.bench.passport import interleaved, passport, write

BATCH = 256
BATCHES = 2


def measure(repeats: int) -> dict[str, Any]:
    """Return the result: a row a way of making views."""
    transform = SimCLRTransform(input_size=32, gaussian_blur=0.0)
    photos = Photos(train=True, patches=-(-BATCH * BATCHES // 12), transform=transform)
    pillow = DataLoader(photos, batch_size=BATCH, drop_last=True)
    opened = Opened(photos, 32)
    raw = DataLoader(opened, batch_size=BATCH, drop_last=True, collate_fn=opened.collate)
    twin = mirror(transform)
    images = BATCH * len(pillow)

    def through_mirror() -> None:
        for batch in raw:
            twin(batch.images.float().div_(255))

    def through_pillow() -> None:
        for _ in pillow:
            pass

    times = interleaved({"mirror": through_mirror, "pillow": through_pillow}, repeats)
    rows = [
        {
            "way": way,
            "images": images,
            "views": 2,
            "images_per_second": 1e3 * images / time["median"],
            "images_per_cpu_second": 1e3 * images / time["cpu"],
            **time,
        }
        for way, time in times.items()
    ]
    return {
        "passport": passport(["torch", "torchvision", "lightly", "pillow"]),
        "what": "views of SimCLRTransform(input_size=32, gaussian_blur=0), batch 256, workers 0",
        "rows": rows,
    }


def main() -> None:
    """Measure, write the JSON, print a line a way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    torch.set_num_threads(1)
    result = measure(parser.parse_args().repeats)
    print(write("loader", result))
    for row in result["rows"]:
        print(f"{row['way']:8} {row['images_per_second']:8.0f} images a second")


if __name__ == "__main__":
    main()
