"""BYOL (Grill et al., NeurIPS 2020)."""

from __future__ import annotations

import copy
from typing import Any

from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules.heads import BYOLPredictionHead, BYOLProjectionHead
from lightly.models.utils import deactivate_requires_grad
from omegaconf import DictConfig
from torch import Tensor

from cp_plugin.engine.base import MomentumMethod


class BYOL(MomentumMethod):
    """A view predicts what the momentum branch makes of the other view of the same image."""

    def __init__(self, cfg: DictConfig | dict[str, Any], image_size: int) -> None:
        """Build both branches, the prediction head and the loss; see `Method`."""
        super().__init__(cfg, image_size)
        settings = self.cfg.method_kwargs
        width = settings.proj_output_dim
        self.projection_head = BYOLProjectionHead(self.features, settings.proj_hidden_dim, width)
        self.prediction_head = BYOLPredictionHead(width, settings.pred_hidden_dim, width)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, x: Tensor) -> Tensor:
        """Return predictions, (B, D), of images, (B, C, H, W)."""
        p: Tensor = self.prediction_head(self.projection_head(self.backbone(x)))
        return p

    def forward_momentum(self, x: Tensor) -> Tensor:
        """Return targets, (B, D), of images, (B, C, H, W), without gradient."""
        z: Tensor = self.projection_head_momentum(self.backbone_momentum(x))
        return z.detach()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch: squared distances of unit vectors, both directions added."""
        x0, x1 = self.contiguous(batch[0])
        p0, z0 = self.forward(x0), self.forward_momentum(x0)
        p1, z1 = self.forward(x1), self.forward_momentum(x1)
        loss: Tensor = 4 + 2 * (self.criterion(p0, z1) + self.criterion(p1, z0))
        return loss
