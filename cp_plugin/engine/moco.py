"""MoCo v2 with a symmetric loss, called MoCo v2+ (Chen et al., 2020; Chen and He, CVPR 2021)."""

from __future__ import annotations

import copy
from typing import Any

import torch.distributed
from lightly.loss import NTXentLoss
from lightly.models.modules.heads import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad
from omegaconf import DictConfig
from torch import Tensor

from cp_plugin.engine.base import MomentumMethod


class MoCoV2(MomentumMethod):
    """A view attracts the momentum branch's view of the same image and repels a queue of others.

    Both views are queries; with `method_kwargs.symmetric=False` the first alone is, as in MoCo v2.
    """

    def __init__(self, cfg: DictConfig | dict[str, Any], image_size: int) -> None:
        """Build both branches, the loss and its queues; see `Method`."""
        super().__init__(cfg, image_size)
        settings = self.cfg.method_kwargs
        self.projection_head = MoCoProjectionHead(
            self.features, settings.proj_hidden_dim, settings.proj_output_dim, batch_norm=False
        )
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        # A queue a direction: with one, a query's own image would be among its negatives.
        self.criterion = self._criterion()
        self.symmetric = bool(settings.get("symmetric", True))
        if self.symmetric:
            self.criterion_swapped = self._criterion()

    def forward(self, x: Tensor) -> Tensor:
        """Return queries, (B, D), of images, (B, C, H, W)."""
        query: Tensor = self.projection_head(self.backbone(x))
        return query

    def forward_momentum(self, x: Tensor) -> Tensor:
        """Return keys, (B, D), of images, (B, C, H, W), without gradient."""
        key: Tensor = self.projection_head_momentum(self.backbone_momentum(x))
        return key.detach()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch; its keys enter the queues."""
        x0, x1 = self.contiguous(batch[0])
        if not self.symmetric:
            key = self.forward_momentum(x1)
            one_way: Tensor = self.criterion(self.forward(x0), key)
            return one_way
        key0, key1 = self.forward_momentum(x0), self.forward_momentum(x1)
        loss: Tensor = 0.5 * (
            self.criterion(self.forward(x0), key1) + self.criterion_swapped(self.forward(x1), key0)
        )
        return loss

    def _criterion(self) -> NTXentLoss:
        settings = self.cfg.method_kwargs
        criterion = NTXentLoss(
            settings.temperature,
            memory_bank_size=(settings.queue_size, settings.proj_output_dim),
            gather_distributed=torch.distributed.is_available(),
        )
        # Lightly keeps the queue out of checkpoints; a resumed run would start with random keys.
        for name, buffer in list(criterion.memory_bank.named_buffers()):
            criterion.memory_bank.register_buffer(name, buffer, persistent=True)
        return criterion
