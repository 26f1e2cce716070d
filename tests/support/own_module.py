"""A user's own LightningModule, its trainer and its loader, in both of Lightning's packages."""

import lightning.pytorch
import pytorch_lightning
import torch
from lightly.loss import NTXentLoss
from torch import nn
from torch.utils.data import DataLoader

ROOTS = {"lightning.pytorch": lightning.pytorch, "pytorch_lightning": pytorch_lightning}


def simclr(root):
    class SimCLR(root.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(
                nn.Conv2d(3, 8, 3, stride=2),
                nn.BatchNorm2d(8),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
            )
            self.projection_head = nn.Linear(8, 8)
            self.criterion = NTXentLoss()
            self.seen = []

        def training_step(self, batch, batch_index):
            (x0, x1), target = batch
            self.seen.append((x0.detach().clone(), target))
            z0, z1 = (self.projection_head(self.backbone(x)) for x in (x0, x1))
            return self.criterion(z0, z1)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    torch.manual_seed(0)
    return SimCLR()


def trainer(root, tmp_path, *callbacks, **settings):
    chosen = {"max_epochs": 2, "logger": False, "enable_progress_bar": False} | settings
    return root.Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=list(callbacks),
        **chosen,
    )


def loader(data, batch_size=12):
    return DataLoader(data, batch_size=batch_size, shuffle=True, drop_last=True)
