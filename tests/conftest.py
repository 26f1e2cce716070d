"""Fixtures that several tests share: folders of real images, CIFAR-10 where it is at hand."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cp_plugin.apps import cli
from cp_plugin.data import Photos
from tests.support.applications import Ran, Stock, custom, ran

# One thread a process, here and in subprocesses: the tests themselves run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent


class Images(NamedTuple):
    """Labelled images in memory."""

    images: Tensor
    """uint8 (N, 3, H, W)."""
    labels: Tensor
    """int64 (N)."""
    classes: tuple[str, ...]


@pytest.fixture(scope="session")
def photos() -> Photos:
    """A few training patches of each photograph; treat as read-only."""
    return Photos(train=True, patches=8)


@pytest.fixture
def image_folder(tmp_path: Path, photos: Photos) -> Callable[..., Path]:
    """Factory of folders of PNG photographs."""

    def make(
        name: str = "images",
        classes: int = 3,
        per_class: int = 4,
        size: int | tuple[int, int] | None = None,
        flat: bool = False,
    ) -> Path:
        """Write `classes * per_class` images, in class subfolders unless flat.

        `size` is the side, or (width, height); None: 32 pixels, not resized.
        """
        sides = (size, size) if isinstance(size, int) else size
        for label, class_name in enumerate(photos.classes[:classes]):
            folder = tmp_path / name if flat else tmp_path / name / class_name
            folder.mkdir(parents=True, exist_ok=True)
            rows = [row for row, target in enumerate(photos.targets) if target == label]
            for number, row in enumerate(rows[:per_class]):
                image = Image.fromarray(photos.data[row])
                picture = image if sides is None else image.resize(sides)
                picture.save(folder / f"{class_name}_{number:03}.png")
        return tmp_path / name

    return make


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    """Factory of runs of `cp-plugin …`, in this process and an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: Any) -> Ran:
        monkeypatch.setattr(sys, "argv", ["cp-plugin", *map(str, arguments)])
        return ran(cli.main, capsys)

    return run


@pytest.fixture(scope="session")
def cifar() -> Callable[..., Images]:
    """Factory of parts of CIFAR-10 (JPEG quality 75); skips where the files are absent."""
    folder = Path(os.environ.get("CP_PLUGIN_CIFAR", ROOT.parent / "shared" / "data"))
    if not (folder / "cifar10_jpeg_train.npz").is_file():
        pytest.skip(f"no CIFAR-10 in {folder}: set CP_PLUGIN_CIFAR to cifar10_jpeg_*.npz's folder")

    def read(count: int, train: bool = True) -> Images:
        """Decode the first `count` images."""
        archive = np.load(folder / f"cifar10_jpeg_{'train' if train else 'test'}.npz")
        files, ends = archive["jpeg"], archive["offset"]
        decoded = [
            np.array(Image.open(io.BytesIO(files[ends[row] : ends[row + 1]].tobytes())))
            for row in range(count)
        ]
        return Images(
            torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).contiguous(),
            torch.from_numpy(archive["label"][:count].astype(np.int64)),
            tuple(str(name) for name in archive["classes"]),
        )

    return read


@pytest.fixture(scope="session")
def solo_learn() -> Path:
    """The folder of a solo-learn checkout; skips where there is none."""
    folder = Path(os.environ.get("SOLO_LEARN_ROOT", "~/solo-learn")).expanduser()
    if not (folder / "solo").is_dir():
        pytest.skip(
            "no solo-learn: `git clone https://github.com/vturrisi/solo-learn` and set "
            "SOLO_LEARN_ROOT to the folder"
        )
    return folder


@pytest.fixture
def stock(
    solo_learn: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> Stock:
    """solo-learn's applications, run in this process in an empty folder."""
    for requirement in ("wandb", "einops", "sklearn"):
        pytest.importorskip(requirement, reason=f"solo-learn needs {requirement}")
    monkeypatch.syspath_prepend(solo_learn)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Stock(solo_learn, monkeypatch, capsys)


@pytest.fixture
def solo_data(image_folder: Callable[..., Path]) -> tuple[str, ...]:
    """Overrides that name two small folders of images."""
    return custom(image_folder("train", 3, 8), image_folder("val", 3, 4))
