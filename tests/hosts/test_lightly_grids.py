"""VICRegL's loss needs where pixels were: crafting hands it the grids of the mirror's own crops."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from lightly.loss import VICRegLLoss
from lightly.transforms import VICRegLTransform
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cp_plugin.callbacks import CraftPoison
from cp_plugin.data import Photos

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's and torchvision's own
VIEWS = 4


class VICRegL(LightningModule):
    """As in Lightly's example, on feature maps of a small network."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model("test_resnet", num_classes=0, global_pool="")
        self.projection_head = nn.Linear(self.backbone.num_features, 16)
        self.local_projection_head = nn.Linear(self.backbone.num_features, 16)
        self.criterion = VICRegLLoss(num_matches=(2, 2))
        self.grids: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        views, grids = batch[0][:VIEWS], batch[0][VIEWS:]
        self.grids = [grid.detach() for grid in grids]
        pooled, local = [], []
        for view, grid in zip(views, grids, strict=True):
            maps = nn.functional.adaptive_avg_pool2d(self.backbone(view), grid.shape[1])
            pooled.append(self.projection_head(maps.mean((2, 3))))
            local.append(self.local_projection_head(maps.permute(0, 2, 3, 1)))
        loss: Tensor = self.criterion(
            global_view_features=list(zip(pooled[:2], local[:2], strict=True)),
            global_view_grids=grids[:2],
            local_view_features=list(zip(pooled[2:], local[2:], strict=True)),
            local_view_grids=grids[2:],
        )
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_a_craft_on_vicregl(tmp_path: Any) -> None:
    transform = VICRegLTransform(
        global_crop_size=32, local_crop_size=16, n_local_views=2, global_grid_size=3,
        local_grid_size=2,
    )  # fmt: skip
    data = Photos(train=True, patches=2, transform=transform)
    craft = CraftPoison(rounds=1, model_steps=1, noise_steps=1, pgd_steps=1, dir=str(tmp_path))
    module = VICRegL()
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[craft], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, 8, shuffle=True, drop_last=True))
    assert [tuple(grid.shape) for grid in module.grids] == [(8, 3, 3, 2)] * 2 + [(8, 2, 2, 2)] * 2
    assert all(float(grid.min()) >= 0 and float(grid.max()) <= 48 for grid in module.grids)
    delta = craft.poison().perturbation.stored
    assert bool(delta.isfinite().all())
    assert craft.poison().info["method"] == "VICRegL"
