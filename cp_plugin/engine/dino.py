"""DINO (Caron et al., ICCV 2021) with two global crops."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from lightly.loss import DINOLoss
from lightly.models.modules.heads import DINOProjectionHead
from lightly.models.utils import deactivate_requires_grad
from omegaconf import DictConfig
from torch import Tensor

from cp_plugin.engine.base import MomentumMethod


class DINO(MomentumMethod):
    """A view's distribution over prototypes follows that of the momentum branch on the other view.

    The temperature of the momentum branch is constant. The last layer is trained after
    `method_kwargs.freeze_last_layer` epochs.
    """

    def __init__(self, cfg: DictConfig | dict[str, Any], image_size: int) -> None:
        """Build both branches and the loss with its centre; see `Method`."""
        super().__init__(cfg, image_size)
        settings = self.cfg.method_kwargs
        self.projection_head = self._head()
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = self._head()  # weight norm keeps it from being copied
        self.projection_head_momentum.load_state_dict(self.projection_head.state_dict())
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.criterion = DINOLoss(
            settings.num_prototypes,
            teacher_temp=settings.get("teacher_temperature", 0.04),
            student_temp=settings.get("student_temperature", 0.1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return scores of prototypes, (B, K), of images, (B, C, H, W)."""
        scores: Tensor = self.projection_head(self.backbone(x))
        return scores

    def forward_momentum(self, x: Tensor) -> Tensor:
        """Return the momentum branch's scores, (B, K), of images, without gradient."""
        scores: Tensor = self.projection_head_momentum(self.backbone_momentum(x))
        return scores.detach()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch; its scores move the centre."""
        views = self.contiguous(batch[0])
        targets = [self.forward_momentum(view) for view in views]
        loss: Tensor = self.criterion(targets, [self.forward(view) for view in views])
        return loss

    def on_after_backward(self) -> None:
        """Hold the last layer in the first epochs."""
        head = self.projection_head
        assert isinstance(head, DINOProjectionHead)
        head.cancel_last_layer_gradients(self.current_epoch)

    def _head(self) -> DINOProjectionHead:
        settings = self.cfg.method_kwargs
        with warnings.catch_warnings():
            # Lightly's head is built on the weight norm that torch means to replace.
            warnings.filterwarnings("ignore", ".*weight_norm", FutureWarning)
            return DINOProjectionHead(
                self.features,
                settings.proj_hidden_dim,
                settings.proj_output_dim,
                settings.num_prototypes,
                batch_norm=settings.get("use_bn_in_head", False),
                freeze_last_layer=settings.get("freeze_last_layer", 1),
            )
