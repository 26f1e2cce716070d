"""SimSiam (Chen and He, CVPR 2021)."""

from __future__ import annotations

from typing import Any

from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules.heads import SimSiamPredictionHead, SimSiamProjectionHead
from omegaconf import DictConfig
from torch import Tensor

from cp_plugin.engine.base import Method


class SimSiam(Method):
    """A view predicts the projection of the other view of the same image, which is held."""

    def __init__(self, cfg: DictConfig | dict[str, Any], image_size: int) -> None:
        """Build backbone, both heads and the loss; see `Method`."""
        super().__init__(cfg, image_size)
        settings = self.cfg.method_kwargs
        width = settings.proj_output_dim
        self.projection_head = SimSiamProjectionHead(self.features, settings.proj_hidden_dim, width)
        self.prediction_head = SimSiamPredictionHead(width, settings.pred_hidden_dim, width)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, x: Tensor) -> Tensor:
        """Return projections, (B, D), of images, (B, C, H, W)."""
        z: Tensor = self.projection_head(self.backbone(x))
        return z

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch: the mean negative cosine of both directions."""
        x0, x1 = self.contiguous(batch[0])
        z0, z1 = self.forward(x0), self.forward(x1)
        p0, p1 = self.prediction_head(z0), self.prediction_head(z1)
        loss: Tensor = 0.5 * (self.criterion(p0, z1.detach()) + self.criterion(p1, z0.detach()))
        return loss
