"""Traps in what stock solo-learn loads: archives, negative labels, stale labels."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cp_plugin.attack.inject import inject
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.attack.poison_file import Poison
from cp_plugin.data import Photos, RawDataset, class_names, labels, load
from tests.support.applications import CRAFT, Stock, only

# Stock solo-learn, timm and Lightning warn of their own uses of what is deprecated.
pytestmark = [pytest.mark.filterwarnings("ignore")]

NAMES = [f"class {number}" for number in range(10)]


def cifar_archive(root: Path, photos: Photos) -> None:
    """Write files in the form of CIFAR-10's: 5 batches of 8 images, 8 test images."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": NAMES}))
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        pixels = photos.data[8 * number : 8 * number + 8].transpose(0, 3, 1, 2).reshape(8, -1)
        content = {"data": pixels, "labels": [(number + row) % 10 for row in range(8)]}
        (folder / name).write_bytes(pickle.dumps(content))


def stl10_archive(root: Path, photos: Photos) -> None:
    """Write files in the form of STL-10's: 8 training, 8 unlabelled and 8 test images."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    (folder / "class_names.txt").write_text("\n".join(NAMES) + "\n")
    (folder / "fold_indices.txt").write_text("\n")
    for number, name in enumerate(("train", "unlabeled", "test")):
        small = photos.data[8 * number : 8 * number + 8]
        large = small.repeat(3, axis=1).repeat(3, axis=2)
        large.transpose(0, 3, 2, 1).tofile(folder / f"{name}_X.bin")  # columns first
        if name != "unlabeled":
            (np.arange(8, dtype=np.uint8) % 10 + 1).tofile(folder / f"{name}_y.bin")


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision compares checksums with those of the real files."""
    for name in ("cifar", "stl10"):
        monkeypatch.setattr(
            f"torchvision.datasets.{name}.check_integrity",
            lambda path, md5=None: Path(path).is_file(),
        )


ARCHIVES: dict[str, tuple[Callable[[Path, Photos], None], int, int]] = {
    "cifar10": (cifar_archive, 40, 32),
    "stl10": (stl10_archive, 16, 96),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_is_crafted_on_and_injected_into(
    stock: Stock,
    photos: Photos,
    tmp_path: Path,
    name: str,
) -> None:
    write, count, size = ARCHIVES[name]
    write(tmp_path / "archive", photos)
    data = (f"data.dataset={name}", f"data.train_path={tmp_path}/archive")
    data = (*data, f"data.val_path={tmp_path}/archive", "augmentations.0.crop_size=32")
    ran = stock.pretrain(
        *("cifar/simclr", *data, "+poison=cp_class", *CRAFT, "poison.rounds=1"),
        *("poison.image_size=" + str(size), "checkpoint.dir=made"),
    )
    assert ran.code == 0, ran.err
    poison = Poison.load(only(tmp_path / "made", "poison.safetensors"))
    assert poison.perturbation.shape == (3, size, size)
    assert poison.classes == tuple(NAMES)
    train, _ = load(name, tmp_path / "archive")
    known = labels(train)
    assert known is not None
    assert len(known) == count
    assert (int((known < 0).sum()) == 8) == (name == "stl10")
    victim = stock.pretrain(
        *("cifar/simclr", *data, "+poison=inject", "checkpoint.dir=victim"),
        f"poison.path={only(tmp_path / 'made', 'poison.safetensors')}",
    )
    assert victim.code == 0, victim.err
    check_pixels(train, poison, known.tolist())


def check_pixels(dataset: Any, poison: Poison, known: list[int]) -> None:
    """Each image is off by its own class's delta, an unlabelled one by nothing."""
    dataset.transform = None
    clean, poisoned = RawDataset(dataset, None), inject(dataset, poison)
    changed = RawDataset(poisoned, None)
    for row, label in enumerate(known):
        image = clean[row].image
        rows = torch.tensor([label])
        assert torch.equal(changed[row].image, poison.apply(image[None], rows)[0])
        assert torch.equal(changed[row].image, image) == (label < 0)


def test_labels_are_right_where_a_fraction_leaves_targets_stale(
    solo_learn: Path, image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn", reason="solo-learn's data.fraction needs it")
    monkeypatch.syspath_prepend(solo_learn)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loading = pytest.importorskip("solo.data.pretrain_dataloader")
    dataset = loading.prepare_datasets(
        "custom", None, train_data_path=image_folder("train", 3, 8), data_fraction=0.5
    )
    truth = [label for _, label in dataset.samples]
    assert dataset.targets[: len(truth)] != truth
    found = labels(dataset)
    assert found is not None
    assert found.tolist() == truth
    names = class_names(dataset)
    noise = Perturbation.uniform(3, (3, 32, 32), 8 / 255, generator=torch.manual_seed(0))
    check_pixels(dataset, Poison(noise, "class", None, names), truth)
