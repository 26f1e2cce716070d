"""Crafting on streams: rows found or made by the hash of the pixels, or by the label."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightly.loss import NTXentLoss
from lightly.transforms.multi_view_transform import MultiViewTransform
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torchvision import transforms

from cp_plugin import CraftPoison, Poison, PoisonLoop
from cp_plugin.config.settings import UserError
from cp_plugin.data import image_key

SIDE, CLASSES, COUNT, BATCH = 12, 3, 48, 8
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*`IterableDataset` has `__len__` defined.*"),
]


def pixels(number: int) -> np.ndarray[Any, Any]:
    drawn = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    return np.asarray(drawn)


def key_of(number: int) -> int:
    return image_key(torch.from_numpy(pixels(number)).permute(2, 0, 1).contiguous())


def two_views() -> Any:
    view = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIDE, scale=(0.4, 1)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
        ]
    )
    return MultiViewTransform([view, view])


class Images(Dataset[Any]):
    """The images by row."""

    def __init__(self, labelled: bool = False) -> None:
        self.transform, self.labelled = two_views(), labelled
        self.targets = [number % CLASSES for number in range(COUNT)]
        if not labelled:
            del self.targets

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, row: int) -> Any:
        views = self.transform(Image.fromarray(pixels(row)))
        return (views, row % CLASSES) if self.labelled else (views, f"{row}.png")


class Stream(IterableDataset[Any]):
    """The same images in the same order, one after another, without a length."""

    def __init__(self, labelled: bool = False, order: str = "same") -> None:
        self.transform, self.labelled, self.order = two_views(), labelled, order
        self.passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        numbers = list(range(COUNT))
        if self.order == "shuffled":
            np.random.default_rng(self.passes).shuffle(numbers)
        worker = get_worker_info()
        if worker is not None:
            numbers = numbers[worker.id :: worker.num_workers]
        for number in numbers:
            views = self.transform(Image.fromarray(pixels(number)))
            yield (views, number % CLASSES) if self.labelled else (views, f"{number}.png")


class LongStream(Stream):
    """One that tells its length."""

    def __len__(self) -> int:
        return COUNT


class NamedStream(LongStream):
    """One that tells the names of its classes."""

    classes = ("cat", "dog", "owl")


class Stopping(Callback):
    """Breaks a run off."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("broken off")


class SimCLR(LightningModule):
    """In Lightly's style."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()
        )
        self.projection_head = nn.Linear(200, 8)
        self.criterion = NTXentLoss(temperature=0.5)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x0, x1 = batch[0]
        loss: Tensor = self.criterion(*(self.projection_head(self.backbone(x)) for x in (x0, x1)))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


SCHEDULE = {"rounds": 2, "model_steps": 6, "noise_steps": 6, "pgd_steps": 2, "seed": 3}


def craft(
    dataset: Any, folder: Path, workers: int = 0, ckpt: Any = None, **settings: Any
) -> Poison:
    callback = CraftPoison(**{**SCHEDULE, "dir": str(folder), **settings})
    fit([callback], dataset, folder, workers, ckpt)
    return Poison.load(folder / "poison.safetensors")


def fit(
    callbacks: list[Any], dataset: Any, folder: Path, workers: int = 0, ckpt: Any = None
) -> None:
    loader = DataLoader(dataset, batch_size=BATCH, num_workers=workers)
    trainer = Trainer(
        **{"accelerator": "cpu", "max_epochs": 10, "logger": False, "devices": 1},
        **{"enable_progress_bar": False, "enable_model_summary": False},
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
        default_root_dir=folder,
        callbacks=callbacks,
    )
    trainer.fit(SimCLR(), loader, ckpt_path=ckpt)


def rows_by_key(poison: Poison, keys: list[int] | None = None) -> Tensor:
    wanted = [key_of(number) for number in range(COUNT)] if keys is None else keys
    rows = poison.rows(keys=wanted)
    assert int(rows.min()) >= 0
    return poison.perturbation.gather(rows)


@pytest.mark.parametrize("stream", [LongStream(), Stream()], ids=["length", "no length"])
def test_a_keyed_stream_equals_the_craft_by_row(stream: Any, tmp_path: Path) -> None:
    """With a length the start noise is the same too; without one it is given."""
    init = {} if hasattr(stream, "__len__") else {"init": "zero"}
    by_row = craft(Images(), tmp_path / "rows", **init)
    by_key = craft(stream, tmp_path / "keys", **init)
    assert torch.equal(rows_by_key(by_row), rows_by_key(by_key))
    assert len(by_key.perturbation) == COUNT
    schedules = [json.loads(one.info["schedule"]) for one in (by_row, by_key)]
    assert schedules[0] == schedules[1]
    assert not list((tmp_path / "keys").glob("*.rows"))


@pytest.mark.parametrize("stream", [NamedStream(True), LongStream(True)], ids=["names", "numbers"])
def test_a_labelled_stream_equals_the_craft_by_row(stream: Any, tmp_path: Path) -> None:
    by_row = craft(Images(True), tmp_path / "rows", granularity="class", init="zero")
    streamed = craft(stream, tmp_path / "keys", granularity="class", init="zero")
    assert torch.equal(by_row.perturbation.stored, streamed.perturbation.stored)
    assert streamed.classes == (getattr(stream, "classes", None) or ("0", "1", "2"))
    if hasattr(stream, "classes"):  # the noise that classes start from is the same as well
        by_row = craft(Images(True), tmp_path / "noise", granularity="class")
        streamed = craft(stream, tmp_path / "noise keys", granularity="class")
        assert torch.equal(by_row.perturbation.stored, streamed.perturbation.stored)


@pytest.mark.parametrize("workers", [0, 2])
def test_any_order_and_several_workers(workers: int, tmp_path: Path) -> None:
    poison = craft(Stream(order="shuffled"), tmp_path, workers)
    assert sorted(poison.keys.tolist()) == sorted(key_of(number) for number in range(COUNT))
    assert poison.perturbation.largest() <= 8 / 255 + 1e-6
    assert json.loads(poison.info["schedule"])["rows_not_moved"] == 0


def test_a_poison_is_handed_on_by_key(tmp_path: Path) -> None:
    first = craft(Images(), tmp_path / "first")
    path = str(tmp_path / "first" / "poison.safetensors")
    by_row = craft(Images(), tmp_path / "rows", init=path)
    by_key = craft(Stream(), tmp_path / "keys", init=path)
    assert torch.equal(rows_by_key(by_row), rows_by_key(by_key))
    assert not torch.equal(rows_by_key(first), rows_by_key(by_key))


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
@pytest.mark.parametrize("granularity", ["sample", "class"])
def test_a_craft_goes_on_from_a_checkpoint(granularity: str, tmp_path: Path) -> None:
    def run(folder: Path, stop: int | None, ckpt: Any) -> None:
        settings = {**SCHEDULE, "granularity": granularity, "dir": str(folder)}
        saved = ModelCheckpoint(folder, "at-{step}", every_n_train_steps=6, save_top_k=-1)
        callbacks: list[Any] = [CraftPoison(**settings), saved]
        if stop is not None:
            callbacks.append(Stopping(stop))
        fit(callbacks, LongStream(granularity == "class"), folder, 0, ckpt)

    run(tmp_path / "whole", None, None)
    with pytest.raises(RuntimeError, match="broken off"):
        run(tmp_path / "parts", 7, None)
    run(tmp_path / "parts", None, tmp_path / "parts" / "at-step=6.ckpt")
    whole, parts = (
        Poison.load(tmp_path / name / "poison.safetensors") for name in ("whole", "parts")
    )
    assert torch.equal(whole.perturbation.stored, parts.perturbation.stored)


def loop_craft(dataset: Any, folder: Path, **settings: Any) -> Poison:
    module = SimCLR()
    optimizer = module.configure_optimizers()
    loop = PoisonLoop(
        DataLoader(dataset, batch_size=BATCH),
        module,
        **{**SCHEDULE, "dir": str(folder)},
        **settings,
    )
    while not loop.finished:
        for batch in loop:
            loop.backward(module.training_step(batch, 0))
            optimizer.step()
            optimizer.zero_grad()
    return Poison.load(loop.save())


def test_a_plain_loop_on_a_stream(tmp_path: Path) -> None:
    by_row = loop_craft(Images(), tmp_path / "rows")
    by_key = loop_craft(LongStream(), tmp_path / "keys")
    assert torch.equal(rows_by_key(by_row), rows_by_key(by_key))


class Unlabelled(Stream):
    def __iter__(self) -> Iterator[Any]:
        for views, _ in super().__iter__():
            yield views


class Once(IterableDataset[Any]):
    """Can be read only once."""

    def __init__(self) -> None:
        self.transform, self.left = two_views(), iter(range(COUNT))

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self.transform(Image.fromarray(pixels(next(self.left)))), "name"


class Bare(IterableDataset[Any]):
    """Augments where it cannot be seen."""

    def __iter__(self) -> Iterator[Any]:
        for number in range(COUNT):
            yield [transforms.ToTensor()(Image.fromarray(pixels(number)))] * 2, number


@pytest.mark.parametrize(
    ("stream", "settings", "says"),
    [
        (Stream(), {"model_steps": "epoch"}, "set both to numbers"),
        (Stream(), {"granularity": "cluster"}, "never there together"),
        (Stream(), {"fraction": 0.5}, "picks images among all"),
        (Stream(), {"fit": "cover"}, "looks up the shape of each image"),
        (Unlabelled(), {"granularity": "class"}, "none of the first 48 samples"),
        (Once(), {}, "can be read only once"),
        (Bare(), {}, "has no attribute `transform`"),
    ],
)
def test_what_a_stream_cannot_do_is_said(
    stream: Any, settings: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says):
        craft(stream, tmp_path, **settings)
