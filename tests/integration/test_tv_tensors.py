"""Data sets that give torchvision's tv_tensors to their transforms, from craft to victim."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightly.loss import NTXentLoss
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, tv_tensors
from torchvision.transforms import v2

from cp_plugin import CraftPoison, InjectPoison, KNNMonitor
from cp_plugin.data import Photos

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.*"),
]
PLAIN = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
VIEW = v2.Compose(
    [
        *(v2.ToImage(), v2.RandomResizedCrop(32, scale=(0.2, 1.0)), v2.RandomHorizontalFlip()),
        *(v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.25] * 3)),
    ]
)


class Twice:
    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __call__(self, image: Any) -> list[Tensor]:
        return [self.transform(image), self.transform(image)]


class Tensors(Dataset[Any]):
    """A user's own set of tv_tensors."""

    def __init__(self, transform: Any) -> None:
        photos = Photos(train=True, patches=1)
        self.transform, self.targets = transform, photos.targets
        self.images = [tv_tensors.Image(torch.from_numpy(x).permute(2, 0, 1)) for x in photos.data]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Any:
        return self.transform(self.images[row]), self.targets[row]


def tensors(folder: Path, transform: Any) -> Any:
    return Tensors(transform)


def image_folder(folder: Path, transform: Any) -> Any:
    return datasets.ImageFolder(str(folder), transform=transform)


def wrapped(folder: Path, transform: Any) -> Any:
    """As torchvision's own guide to v2 writes it."""
    return datasets.wrap_dataset_for_transforms_v2(image_folder(folder, transform))


class SimCLR(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        )
        self.head, self.criterion = nn.Linear(8, 8), NTXentLoss()
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        views = batch[0]
        self.seen.append(views)
        first, second = (self.head(self.backbone(view)) for view in views)
        return self.criterion(first, second)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(data: Any, *callbacks: Any) -> SimCLR:
    module = SimCLR()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **quiet,
    )
    trainer.fit(module, DataLoader(data, batch_size=12))
    return module


@pytest.mark.parametrize("make", [tensors, image_folder, wrapped])
def test_craft_victim_and_monitor(make, tmp_path):
    photos = Photos(train=True, patches=1)
    for number, (pixels, label) in enumerate(zip(photos.data, photos.targets, strict=True)):
        place = tmp_path / "images" / f"{label:02}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{number}.png")
    folder = tmp_path / "images"
    settings = {"rounds": 1, "model_steps": 1, "noise_steps": 1, "pgd_steps": 2}
    craft = CraftPoison(granularity="sample", **settings, dir=str(tmp_path / "out"), seed=1)
    fit(make(folder, Twice(VIEW)), craft)
    poison = craft.poison()
    clean = fit(make(folder, Twice(PLAIN))).seen[0]
    monitor = KNNMonitor(query=datasets.ImageFolder(str(folder), transform=PLAIN), k=3)
    victim = fit(make(folder, Twice(PLAIN)), InjectPoison(poison), monitor).seen[0]
    for before, after in zip(clean, victim, strict=True):
        change = (after - before).abs()
        assert 0 < float(change.max()) <= poison.eps + 1e-6
        assert bool((change.amax((1, 2, 3)) > 0).all())  # every image
    assert {"knn_clean_bank", "knn_poisoned_bank"} <= set(monitor.results[-1])
