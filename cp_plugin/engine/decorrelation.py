"""Methods without negatives that keep features from collapsing: Barlow Twins and VICReg."""

from __future__ import annotations

from typing import Any

import torch.distributed
from lightly.loss import BarlowTwinsLoss, VICRegLoss
from lightly.models.modules.heads import BarlowTwinsProjectionHead, VICRegProjectionHead
from omegaconf import DictConfig
from torch import Tensor

from cp_plugin.engine.base import Method


class BarlowTwins(Method):
    """The features of both views correlate each with itself and with no other.

    Source: Zbontar et al., "Barlow Twins", ICML 2021. `method_kwargs.lamb` weighs the correlations
    of different features, `method_kwargs.scale_loss` the whole, as in solo-learn.
    """

    def __init__(self, cfg: DictConfig | dict[str, Any], image_size: int) -> None:
        """Build backbone, projection head and loss; see `Method`."""
        super().__init__(cfg, image_size)
        settings = self.cfg.method_kwargs
        self.projection_head = BarlowTwinsProjectionHead(
            self.features, settings.proj_hidden_dim, settings.proj_output_dim
        )
        self.criterion = BarlowTwinsLoss(
            settings.get("lamb", 0.0051), gather_distributed=torch.distributed.is_available()
        )
        self.scale = float(settings.get("scale_loss", 0.024))

    def forward(self, x: Tensor) -> Tensor:
        """Return projections, (B, D), of images, (B, C, H, W)."""
        z: Tensor = self.projection_head(self.backbone(x))
        return z

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        x0, x1 = self.contiguous(batch[0])
        loss: Tensor = self.scale * self.criterion(self.forward(x0), self.forward(x1))
        return loss


class VICReg(Method):
    """Both views agree, each feature varies over a batch, and no two features covary.

    Source: Bardes, Ponce, LeCun, "VICReg", ICLR 2022; `method_kwargs` has the weights of the three
    terms, `sim_loss_weight`, `var_loss_weight` and `cov_loss_weight`, as in solo-learn.
    """

    def __init__(self, cfg: DictConfig | dict[str, Any], image_size: int) -> None:
        """Build backbone, projection head and loss; see `Method`."""
        super().__init__(cfg, image_size)
        settings = self.cfg.method_kwargs
        self.projection_head = VICRegProjectionHead(
            self.features, settings.proj_hidden_dim, settings.proj_output_dim
        )
        self.criterion = VICRegLoss(
            settings.get("sim_loss_weight", 25.0),
            settings.get("var_loss_weight", 25.0),
            settings.get("cov_loss_weight", 1.0),
            gather_distributed=torch.distributed.is_available(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return projections, (B, D), of images, (B, C, H, W)."""
        z: Tensor = self.projection_head(self.backbone(x))
        return z

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        x0, x1 = self.contiguous(batch[0])
        loss: Tensor = self.criterion(self.forward(x0), self.forward(x1))
        return loss
