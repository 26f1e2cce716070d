"""Clean runs, noise and victims of one seed see the same batches, augmented by the same draws.

A poison of zeros is injected where views are compared: they then are the clean run's bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Sampler

from cp_plugin import InjectPoison, KNNMonitor, Poison
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.callbacks import CanonicalImages
from cp_plugin.callbacks.inject import NoisePoison
from cp_plugin.config.baselines import RandomConfig
from cp_plugin.data import RawDataset, load
from cp_plugin.engine.base import Method
from tests.support.applications import Ran, Stock
from tests.support.small_runs import CROPS, TWO_CROPS, Pictures, Small, fit

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # stock solo-learn and Lightning warn of their own uses
]
EPS = 8 / 255


class Drawn(Pictures):
    """A data set that draws at random itself, beside its transform."""

    def __getitem__(self, row: int) -> Any:
        views, target = super().__getitem__(row)
        return views, target, float(np.random.rand())


class OwnOrder(Sampler[int]):
    """A sampler with a generator of its own, asked as soon as an iterator is made."""

    def __init__(self, count: int) -> None:
        self.count, self.generator = count, np.random.default_rng(3)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(self.generator.permutation(self.count).tolist())


class Counting(Sampler[int]):
    """A sampler that counts its iterations and draws each order from the count."""

    def __init__(self, count: int) -> None:
        self.count, self.iterations = count, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        self.iterations += 1
        generator = torch.Generator().manual_seed(self.iterations)
        return iter(torch.randperm(self.count, generator=generator).tolist())


def loader(form: str) -> DataLoader[Any]:
    data = Drawn(TWO_CROPS)
    if form == "its own generator":
        return DataLoader(data, 4, shuffle=True, generator=torch.Generator().manual_seed(1))
    if form == "own order":
        return DataLoader(data, 4, sampler=OwnOrder(len(data)))
    if form == "counting":
        return DataLoader(data, 4, sampler=Counting(len(data)))
    if form == "counting, workers":
        return DataLoader(
            data,
            sampler=None,
            batch_sampler=BatchSampler(Counting(len(data)), 4, False),
            num_workers=2,
        )
    if form == "own order, workers":
        return DataLoader(data, 4, sampler=OwnOrder(len(data)), num_workers=2)
    if form == "workers":
        return DataLoader(data, 4, shuffle=True, num_workers=2)
    if form == "persistent workers":
        return DataLoader(data, 4, shuffle=True, num_workers=2, persistent_workers=True)
    return DataLoader(data, 4, shuffle=True)


FORMS = (
    *("plain", "its own generator", "own order", "own order, workers", "workers"),
    *("persistent workers", "counting", "counting, workers"),
)


class FromHook(pl.LightningDataModule):
    """Makes its loader when it is asked."""

    def train_dataloader(self) -> Any:
        torch.rand(3)
        return loader("plain")


def zeros() -> Poison:
    delta = torch.zeros(2, 3, 16, 16)
    return Poison(Perturbation(delta, EPS), "class", None, Pictures.classes)


def batches(data: Any, folder: Path, *callbacks: Any, seed: int = 7) -> list[Any]:
    """Return the batches of three epochs of one seed."""
    module = Small()  # seeds its weights
    pl.seed_everything(seed, workers=True, verbose=False)
    fit(module, data, folder, *callbacks, max_epochs=3)
    assert len(module.batches) == 12
    return module.batches


def assert_equal(found: list[Any], expected: list[Any], tolerance: float = 0) -> None:
    """Compare batches: labels, what the data set draws, and the pixels of all views."""
    for (views, labels, drawn), (views0, labels0, drawn0) in zip(found, expected, strict=True):
        assert torch.equal(labels, labels0)
        assert torch.equal(drawn, drawn0)
        for view, view0 in zip(views, views0, strict=True):
            assert (view - view0).abs().max() <= tolerance


@pytest.mark.parametrize("form", FORMS)
def test_a_users_loader_brings_a_victim_the_batches_of_a_clean_run(
    form: str, tmp_path: Path
) -> None:
    stock = batches(loader(form), tmp_path)
    assert_equal(batches(loader(form), tmp_path, CanonicalImages()), stock)
    around = (CanonicalImages(8), CanonicalImages(16))  # one change around another
    assert_equal(batches(loader(form), tmp_path, *around), stock, 1)
    assert_equal(batches(loader(form), tmp_path, InjectPoison(zeros())), stock)
    noise = NoisePoison(RandomConfig(eps=EPS), tmp_path / "noise")
    assert_equal(batches(loader(form), tmp_path, noise), stock, EPS + 1 / 255)


def test_a_data_module_and_a_monitor_change_no_draw(tmp_path: Path) -> None:
    stock = batches(FromHook(), tmp_path)
    assert_equal(batches(FromHook(), tmp_path, InjectPoison(zeros())), stock)
    monitors = [KNNMonitor(Pictures(CROPS), Pictures(CROPS), k=3) for _ in range(2)]
    assert_equal(batches(FromHook(), tmp_path, monitors[0]), stock)
    assert_equal(batches(FromHook(), tmp_path, InjectPoison(zeros()), monitors[1]), stock)
    assert "knn_poisoned_bank" in monitors[1].results[0]


def test_other_seeds_bring_other_batches(tmp_path: Path) -> None:
    first = batches(loader("plain"), tmp_path, InjectPoison(zeros()))
    other = batches(loader("plain"), tmp_path, InjectPoison(zeros()), seed=8)
    assert not torch.equal(other[0][0][0], first[0][0][0])


def zeros_of(images: Path, file: Path) -> Path:
    """Write a poison of zeros for the images of a folder, one row each."""
    data = load("custom", images)[0]
    raw = RawDataset(data, None)
    keys = torch.tensor([raw[row].key for row in range(len(raw))])
    delta = torch.zeros(len(raw), *raw[0].image.shape)
    return Poison(Perturbation(delta, EPS), "sample", keys=keys).save(file)


@pytest.mark.parametrize("augment", ["host", "mirror"])
@pytest.mark.parametrize("workers", [0, 2])
def test_runs_of_the_engine_see_the_same_views(
    workers: int,
    augment: str,
    image_folder: Callable[..., Path],
    call: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    images = image_folder(classes=3, per_class=8)
    file = zeros_of(images, tmp_path / "zeros.safetensors")
    seen: list[Tensor] = []
    own = Method.contiguous

    def contiguous(method: Any, views: list[Tensor]) -> list[Tensor]:
        seen.extend(view.clone() for view in views)
        return own(method, views)

    monkeypatch.setattr(Method, "contiguous", contiguous)

    def train(name: str, *settings: str) -> Tensor:
        seen.clear()
        ran = call(
            *("pretrain", "--config-name", "simclr", "data.dataset=custom", f"augment={augment}"),
            *(
                f"data.train_path={images}",
                f"data.val_path={images}",
                f"data.num_workers={workers}",
            ),
            *("backbone.kwargs.channels=[8,8,8,8]", "max_epochs=3", "optimizer.batch_size=8"),
            *("+monitor=knn", "monitor.k=3", "monitor.every_n_epochs=1", "seed=5"),
            *(f"+poison={name}", f"checkpoint.dir={name}", *settings),
        )
        assert ran.code == 0, ran.err
        assert len(seen) == 2 * 3 * 3
        return torch.stack(seen)

    clean = train("none")
    assert torch.equal(train("inject", f"poison.path={file}"), clean)
    noisy = train("random", "poison.eps=1/255")
    # Deviations of the normalisation are a fifth; jitter may double a contrast.
    assert 0 < (noisy - clean).abs().mean() < 10 / 255


def test_runs_of_solo_learn_see_the_same_images_in_the_same_order(
    stock: Stock,
    image_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    from solo.methods.base import BaseMethod

    from tests.support.applications import custom

    images = image_folder(classes=3, per_class=8)
    file = zeros_of(images, tmp_path / "zeros.safetensors")
    rows: list[Tensor] = []
    views: list[Tensor] = []
    own = BaseMethod.training_step

    def training_step(method: Any, batch: Any, batch_idx: int) -> Any:
        rows.append(batch[0].clone())
        views.extend(view.clone() for view in batch[1])
        return own(method, batch, batch_idx)

    monkeypatch.setattr(BaseMethod, "training_step", training_step)

    def train(name: str, *settings: str) -> tuple[Tensor, Tensor]:
        rows.clear()
        views.clear()
        ran = stock.pretrain(
            *("cifar/simclr", *custom(images, images), f"+poison={name}", *settings),
            *(f"checkpoint.dir={name}", "augmentations.0.crop_size=32", "max_epochs=3"),
        )
        assert ran.code == 0, ran.err
        return torch.cat(rows), torch.stack(views)

    order, seen = train("none")
    for name, settings in (("inject", f"poison.path={file}"), ("random", "poison.eps=1/255")):
        found, pixels = train(name, settings)
        assert torch.equal(found, order)
        if name == "inject":
            assert torch.equal(pixels, seen)
