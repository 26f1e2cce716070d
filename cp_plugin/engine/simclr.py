"""SimCLR (Chen et al., ICML 2020)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from lightly.loss import NTXentLoss
from lightly.models.modules.heads import SimCLRProjectionHead
from omegaconf import DictConfig
from torch import Tensor

from cp_plugin.engine.base import Method


class SimCLR(Method):
    """Two views of an image attract, all other views of the batch repel.

    Each view is a batch of its own to the norm layers, or with `method_kwargs.joint_forward` both
    views are one.
    """

    def __init__(self, cfg: DictConfig | dict[str, Any], image_size: int) -> None:
        """Build backbone, projection head and loss; see `Method`."""
        super().__init__(cfg, image_size)
        settings = self.cfg.method_kwargs
        self.projection_head = SimCLRProjectionHead(
            self.features, settings.proj_hidden_dim, settings.proj_output_dim, batch_norm=False
        )
        self.criterion = NTXentLoss(
            settings.temperature, gather_distributed=torch.distributed.is_available()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return projections, (B, D), of images, (B, C, H, W)."""
        z: Tensor = self.projection_head(self.backbone(x))
        return z

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        x0, x1 = self.contiguous(batch[0])
        if self.cfg.method_kwargs.get("joint_forward", False):
            z0, z1 = self.forward(torch.cat([x0, x1])).chunk(2)
        else:
            z0, z1 = self.forward(x0), self.forward(x1)
        loss: Tensor = self.criterion(z0, z1)
        return loss
