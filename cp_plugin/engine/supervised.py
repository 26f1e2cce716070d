"""Supervised training by cross-entropy: a victim, and the surrogate of supervised poisons."""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional

from cp_plugin.engine.base import Method

UNLABELLED = -1


class Supervised(Method):
    """A linear classifier on the backbone; every view of an image is an example of its class."""

    def __init__(self, cfg: DictConfig | dict[str, Any], image_size: int) -> None:
        """Build backbone and classifier for `data.num_classes` classes; see `Method`.

        `method_kwargs.bias=False` leaves out the classifier's bias.
        """
        super().__init__(cfg, image_size)
        bias = bool(self.cfg.method_kwargs.get("bias", True))
        self.classifier = nn.Linear(self.features, self.cfg.data.num_classes, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, (B, K), of images, (B, C, H, W)."""
        logits: Tensor = self.classifier(self.backbone(x))
        return logits

    def image_losses(self, batch: Any) -> Tensor:
        """Return the cross-entropy of each image of a batch, (B), 0 where it has no label.

        That of an image is the mean over its views.
        """
        views, labels = self.contiguous(list(batch[0])), batch[1]
        targets = labels.clamp(min=UNLABELLED).repeat(len(views))
        of_views = functional.cross_entropy(
            self.forward(torch.cat(views)), targets, ignore_index=UNLABELLED, reduction="none"
        )
        return of_views.view(len(views), -1).mean(0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of a batch's labelled views, 0 where there are none.

        Labels are int64 (B), or float (B, K) where they are mixed.
        """
        views, labels = self.contiguous(list(batch[0])), batch[1]
        logits = self.forward(torch.cat(views))
        if labels.ndim == 2:
            return functional.cross_entropy(logits, labels.repeat(len(views), 1))
        targets = labels.clamp(min=UNLABELLED).repeat(len(views))
        total = functional.cross_entropy(logits, targets, ignore_index=UNLABELLED, reduction="sum")
        mean: Tensor = total / (targets >= 0).sum().clamp(min=1)
        return mean
