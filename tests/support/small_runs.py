"""Small pictures, a small module and its trainer, for runs of a second; and odd data loaders."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightly.loss import NTXentLoss
from lightly.transforms.multi_view_transform import MultiViewTransform
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms

CROPS = transforms.Compose(
    [transforms.RandomResizedCrop(16, scale=(0.5, 1)), transforms.ToTensor()]
)
TWO_CROPS = MultiViewTransform([CROPS, CROPS])
TWO_COPIES = MultiViewTransform([transforms.ToTensor(), transforms.ToTensor()])


class Pictures(Dataset[Any]):
    """Pictures of two classes, 16 x 16, as people write such a data set."""

    classes = ("a", "b")

    def __init__(self, transform: Any, count: int = 16) -> None:
        generator = np.random.default_rng(0)
        self.images = generator.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
        self.targets = [row % 2 for row in range(count)]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Any:
        return self.transform(Image.fromarray(self.images[row])), self.targets[row]

    def clean(self) -> Tensor:
        """Return all images, float (N, 3, 16, 16) in [0, 1]."""
        return torch.from_numpy(self.images).permute(0, 3, 1, 2).float() / 255


class Small(pl.LightningModule):
    """SimCLR on a network without batch statistics, so that a batch of one image will do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Tanh(), nn.Flatten())
        self.head = nn.Linear(4 * 7 * 7, 4)
        self.criterion = NTXentLoss(0.5)
        self.batches: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.training:
            self.batches.append(batch)
        x0, x1 = batch[0]
        z0, z1 = self.head(self.backbone(x0)), self.head(self.backbone(x1))
        return self.criterion(z0, z1) + (z0 - z1).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Supervised(Small):
    """A classifier of the first view."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        views, target = batch
        view = views[0] if isinstance(views, list) else views
        return nn.functional.cross_entropy(self.head(self.backbone(view)), target)


def fit(module: Any, data: Any, folder: Any, *callbacks: Any, **settings: Any) -> pl.Trainer:
    """Train a module on a loader or a DataModule."""
    chosen = {"max_epochs": 1, "logger": False, "enable_checkpointing": False} | settings
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **chosen,
    )
    trainer.fit(module, data)
    return trainer


class Endless(Sampler[Any]):
    """A batch sampler that never ends."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Any:
        while True:
            yield from iter(self.sampler)


class EagerLoader(DataLoader[Any]):
    """Makes its iterator at once and keeps it, as loaders do that spare the start of workers."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        object.__setattr__(self, "batch_sampler", Endless(self.batch_sampler))
        self.iterator = super().__iter__()

    def __iter__(self) -> Any:
        for _ in range(len(self)):
            yield next(self.iterator)


class LazyLoader(EagerLoader):
    """Makes its iterator when it is first asked, and keeps it."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.iterator = None

    def __iter__(self) -> Any:
        if self.iterator is None:
            self.iterator = DataLoader.__iter__(self)
        return super().__iter__()


class ClosedLoader(EagerLoader):
    """Keeps its iterator where nobody sees it."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        held = self.iterator
        del self.iterator
        self.next = lambda: next(held)

    def __iter__(self) -> Any:
        for _ in range(len(self)):
            yield self.next()


class Wrapper:
    """Holds a loader and moves its batches, as Accelerate's and Fabric's do."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.base_dataloader = loader
        self.device = torch.device("cpu")

    def __iter__(self) -> Any:
        yield from self.base_dataloader
