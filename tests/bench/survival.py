"""What is left of a perturbation after JPEG and rescaling: `python -m tests.bench.survival`.

`cp-plugin protect` crafts on pictures cut out of scikit-image's photographs, with and without
`--survive jpeg,resize`, for as many epochs; random noise on the same grid stands beside. Original
and protected picture then go through the same processing, and their difference is compared with the
one that was published. What a network still reads in it is not measured here.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from cp_plugin.apps.protect import protect, work_folder
from cp_plugin.apps.protect.plan import Settings
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.attack.poison_file import Poison
from cp_plugin.util.run_files import POISON_FILE
from tests.bench.provenance import provenance, write
from tests.support.mixed_pictures import photographs

PACKAGES = ("torch", "torchvision", "pillow", "lightly", "timm", "lightning", "faiss-cpu")
PICTURES, SIZE = 64, (400, 300)
CRAFTS: dict[str, tuple[str, ...]] = {"plain": (), "survive": ("jpeg", "resize")}


def write_pictures(folder: Path) -> None:
    """Cut pictures out of photographs, without enlarging any."""
    draw, (width, height) = np.random.default_rng(0), SIZE
    folder.mkdir()
    for number in range(PICTURES):
        photo = photographs()[number % len(photographs())]
        left = int(draw.integers(0, photo.width - width + 1))
        top = int(draw.integers(0, photo.height - height + 1))
        cut = photo.convert("RGB").crop((left, top, left + width, top + height))
        cut.save(folder / f"{number:02d}.png")


def through_jpeg(image: Image.Image, quality: int) -> Image.Image:
    """Return an image as JPEG has it, colours at half the resolution, as is usual."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def halved(image: Image.Image, then: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Make an image half as large, do something with it, and make it large again."""
    small = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
    return then(small).resize(image.size, Image.Resampling.BICUBIC)


PROCESSINGS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "PNG": lambda image: image,
    "JPEG 95": lambda image: through_jpeg(image, 95),
    "JPEG 85": lambda image: through_jpeg(image, 85),
    "JPEG 75": lambda image: through_jpeg(image, 75),
    "half size": lambda image: halved(image, lambda small: small),
    "half size, JPEG 85": lambda image: halved(image, lambda small: through_jpeg(small, 85)),
}


def pixels(image: Image.Image) -> NDArray[np.float64]:
    """Return the levels of an image."""
    return np.asarray(image.convert("RGB"), dtype=np.float64)


def measured(originals: Path, protected: Path, name: str) -> list[dict[str, Any]]:
    """Return a row a processing: means over the pictures, and the least correlation."""
    rows = []
    for title, process in PROCESSINGS.items():
        figures = []
        for file in sorted(originals.iterdir()):
            before, after = Image.open(file), Image.open(protected / file.name)
            meant = pixels(after) - pixels(before)
            found = pixels(process(after)) - pixels(process(before))
            alike = np.corrcoef(meant.ravel(), found.ravel())[0, 1]
            figures.append((alike, np.sqrt((found**2).mean() / (meant**2).mean())))
        correlations, sizes = np.array(figures).T
        rows.append(
            {
                "craft": name,
                "processing": title,
                "correlation": correlations.mean(),
                "least_correlation": correlations.min(),
                "size": sizes.mean(),
            }
        )
    return rows


def measure(rounds: int) -> dict[str, Any]:
    """Craft, protect, process and compare."""
    began, rows = time.process_time(), []
    settings = Settings(rounds=rounds)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder / "in")
        for craft, survive in CRAFTS.items():
            protect([folder / "in"], folder / craft, replace(settings, survive=survive))
            rows += measured(folder / "in", folder / craft, craft)
        plain = Poison.load(work_folder(folder / "plain") / POISON_FILE)
        drawn = torch.Generator().manual_seed(0)
        noise = Perturbation.uniform(
            len(plain.perturbation), plain.perturbation.shape, plain.eps, "float32", drawn
        )
        file = replace(plain, perturbation=noise).save(folder / "noise.safetensors")
        protect([folder / "in"], folder / "random", settings, file)
        rows += measured(folder / "in", folder / "random", "random")
    what = (
        f"{PICTURES} pictures of {SIZE[0]} x {SIZE[1]} pixels, {settings.clusters} clusters, "
        f"{rounds} epochs, a fifth of them for the encoder, seed {settings.seed}"
    )
    return {
        "what": what,
        "rounds": rounds,
        "cpu_seconds": time.process_time() - began,
        "rows": rows,
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    rounds = parser.parse_args().rounds
    result = {"provenance": provenance(PACKAGES), **measure(rounds)}
    print(write("survival", result))


if __name__ == "__main__":
    main()
