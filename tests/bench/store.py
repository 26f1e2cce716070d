"""Memory of a craft by its number of rows, and a store of ImageNet's size: `-m tests.bench.store`.

    python -m tests.bench.store [--rows 1000000] [--folder FOLDER]

Every figure is of a process of its own, since a peak of memory is. Crafts over 1,000 and over many
rows of 3 x 32 x 32 in int8, kept in a file and drawn at random, visit some of them and write their
poison. Then 1,281,167 rows of 3 x 224 x 224: a craft that visits some of them and
saves its state, and a poison file of all, with holes where rows are zero, that a victim reads.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightly.loss import NTXentLoss
from lightly.transforms.multi_view_transform import MultiViewTransform
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from cp_plugin import PoisonLoop
from cp_plugin.attack import start, tensor_file
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.attack.poison_file import Poison
from cp_plugin.data.image import image_key
from tests.bench.provenance import provenance, write

PACKAGES = ("torch", "torchvision", "safetensors", "lightly")
IMAGENET, LARGE_SIDE, SIDE = 1_281_167, 224, 32
FEW = 1000
BATCH, LARGE_BATCH = 250, 50
VISITED = 100_000
STEPS = 20
"""Of the craft on images of ImageNet's size; its state is saved after each half of them."""


class Numbered(Dataset[Any]):
    """Images that are made as they are asked for: a pattern, and the image's number in it."""

    def __init__(self, count: int, side: int) -> None:
        self.count = count
        generator = np.random.default_rng(0)
        self.pattern = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
        flips = transforms.Compose([transforms.RandomHorizontalFlip(), transforms.ToTensor()])
        self.transform: Any = MultiViewTransform([flips, flips])

    def __len__(self) -> int:
        return self.count

    def image(self, row: int) -> Image.Image:
        """Return an image without augmentation."""
        pixels = self.pattern.copy()
        pixels[0, :3, 0] = (row & 255, row >> 8 & 255, row >> 16)
        return Image.fromarray(pixels)

    def __getitem__(self, row: int) -> Any:
        """Return views and the row's number."""
        return self.transform(self.image(row)), row


def crafting(dataset: Numbered, batch: int, folder: Path, **settings: Any) -> Any:
    """Return a craft, and what runs it through its steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Tanh(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
    poison = PoisonLoop(
        DataLoader(dataset, batch, shuffle=True),
        model,
        **{"schedule": "joint", "model_steps": 1, "dtype": "int8", "seed": 0},
        **{"dir": str(folder), "cache": "false", **settings},
    )
    optimizer, criterion = torch.optim.SGD(model.parameters(), lr=0.1), NTXentLoss(0.5)

    def run() -> None:
        for (x0, x1), _ in poison:
            poison.backward(criterion(model(x0), model(x1)))
            optimizer.step()
            optimizer.zero_grad()

    return poison, run


def craft(rows: int, folder: Path) -> dict[str, Any]:
    """Draw all rows, visit as many as `VISITED` and write the poison of these."""
    steps = min(rows, VISITED) // BATCH
    poison, run = crafting(Numbered(rows, SIDE), BATCH, folder, rounds=steps)
    begun, drawn = peak(), on_disk(folder)
    run()
    visited = poison._crafting.poison()  # the others' images would be read for their keys
    file = visited.save(folder / "poison.safetensors")
    return {
        "peak_before_training_megabytes": begun,
        "row_bytes": drawn,
        "visited": steps * BATCH,
        "poison_bytes": file.stat().st_size,
    }


def large_craft(rows: int, folder: Path) -> dict[str, Any]:
    """Visit some rows of very many, and save the state twice."""
    data = Numbered(rows, LARGE_SIDE)
    poison, _ = crafting(data, LARGE_BATCH, folder, rounds=STEPS, init="zero")
    seconds, sizes = [], []
    batches = iter(poison)
    for step in range(1, STEPS + 1):
        (x0, x1), _ = next(batches)
        poison.backward((x0.mean((2, 3)) - x1.mean((2, 3))).square().sum())
        if step % (STEPS // 2) == 0:
            before = on_disk(folder)
            began = time.perf_counter()
            torch.save(poison.state_dict(), folder / "state.pt")
            seconds.append(time.perf_counter() - began)
            sizes.append(on_disk(folder) - before)
    return {
        "addressed_bytes": rows * 3 * LARGE_SIDE**2,
        "on_disk_bytes": on_disk(folder),
        "visited": STEPS * LARGE_BATCH,
        "save_seconds": seconds,
        "save_bytes": sizes,
    }


def large_poison(rows: int, folder: Path) -> dict[str, Any]:
    """Write a poison file of so many rows, of which a few are not zero."""
    data = Numbered(rows, LARGE_SIDE)
    shape = (3, LARGE_SIDE, LARGE_SIDE)
    store = Perturbation.zeros(rows, shape, 8 / 255, "int8", folder / "some.rows")
    some = torch.linspace(0, rows - 1, 50).round().long()
    store.write(some, torch.full((len(some), *shape), 8 / 255))
    keys = torch.arange(rows) - rows  # of no image, but of those that are read
    for row in some.tolist():
        keys[row] = image_key(torch.from_numpy(np.array(data.image(row))).permute(2, 0, 1))
    began = time.perf_counter()
    file = Poison(store, "sample", keys).save(folder / "poison.safetensors")
    seconds = time.perf_counter() - began
    size = file.stat()
    return {
        "poison_bytes": size.st_size,
        "on_disk_bytes": 512 * size.st_blocks,
        "write_seconds": seconds,
    }


def large_victim(rows: int, folder: Path) -> dict[str, Any]:
    """Read some rows of the poison file."""
    began = time.perf_counter()
    poison = Poison.load(folder / "poison.safetensors")
    assert poison.keys is not None
    some = torch.linspace(0, rows - 1, 50).round().long()
    found = poison.offsets(poison.rows(poison.keys[some].tolist()))
    assert bool((found == 8).all())
    return {"open_and_read_seconds": time.perf_counter() - began}


CASES = {one.__name__: one for one in (craft, large_craft, large_poison, large_victim)}


def peak() -> float:
    """Return the largest resident memory of the process so far, megabytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # what `getrusage` says is at least what the process had that began this
        (line,) = (one for one in status.read_text().splitlines() if one.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def on_disk(folder: Path) -> int:
    """Return how many bytes the files of a folder take."""
    return sum(512 * file.stat().st_blocks for file in folder.iterdir())


def child(case: str, rows: int, folder: Path) -> None:
    """Run one case in this process and print its figures."""
    torch.set_num_threads(1)
    start.LARGEST_IN_MEMORY, tensor_file.BY_ROWS = 0, 0
    began, worked = time.perf_counter(), time.process_time()
    found = CASES[case](rows, folder)
    timed = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - worked}
    print(json.dumps({"case": case, "rows": rows, "peak_megabytes": peak(), **timed, **found}))


def measured(case: str, rows: int, folder: Path) -> dict[str, Any]:
    """Run one case in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.store", "--case", case, "--rows", str(rows)]
    done = subprocess.run([*command, "--folder", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(found, flush=True)
    return found


def main() -> None:
    """Measure every case, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="on a file system that holds sparse files")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        child(given.case, given.rows, given.folder)
        return
    rows = []
    for count in (FEW, given.rows):
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            rows.append(measured("craft", count, Path(folder)))
    for cases in (("large_craft",), ("large_poison", "large_victim")):
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            rows += [measured(case, IMAGENET, Path(folder)) for case in cases]
    result = {
        "provenance": provenance(PACKAGES),
        "what": f"int8; {SIDE} px: batches of {BATCH}, visited once by a joint schedule; "
        f"{LARGE_SIDE} px: batches of {LARGE_BATCH}; images are made as they are asked for",
        "rows": rows,
    }
    print(write("store", result))


if __name__ == "__main__":
    main()
