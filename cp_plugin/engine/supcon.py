"""Supervised contrastive learning (Khosla et al., NeurIPS 2020)."""

from __future__ import annotations

from typing import Any

import torch
from lightly.models.modules.heads import SimCLRProjectionHead
from lightly.utils.dist import gather
from omegaconf import DictConfig
from torch import Tensor
from torch.nn import functional

from cp_plugin.engine.base import Method


class SupCon(Method):
    """All views of a class attract, those of other classes repel."""

    def __init__(self, cfg: DictConfig | dict[str, Any], image_size: int) -> None:
        """Build backbone and projection head; see `Method`."""
        super().__init__(cfg, image_size)
        settings = self.cfg.method_kwargs
        self.projection_head = SimCLRProjectionHead(
            self.features, settings.proj_hidden_dim, settings.proj_output_dim, batch_norm=False
        )
        self.temperature = float(settings.temperature)

    def forward(self, x: Tensor) -> Tensor:
        """Return projections, (B, D), of images, (B, C, H, W)."""
        z: Tensor = self.projection_head(self.backbone(x))
        return z

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch, over the images of all processes."""
        views = [self.forward(view) for view in self.contiguous(list(batch[0]))]
        projections, labels = torch.stack(views, dim=1), batch[1]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            projections, labels = torch.cat(gather(projections)), torch.cat(gather(labels))
        return supervised_contrastive(projections, labels, self.temperature)


def supervised_contrastive(z_BVD: Tensor, labels_B: Tensor, temperature: float) -> Tensor:
    """Return the loss L_out of supervised contrastive learning.

        L = mean over i of  -1/|P(i)| sum over p in P(i) of log( exp(z_i z_p / t) / sum_a exp(…) )

    P(i) are the other views with the label of i, a runs over all other views. Projections are
    normalised here. An image with a negative label has its own other views as positives alone.

    Args:
        z_BVD: projections of V >= 2 views of B images, float (B, V, D).
        labels_B: int64 (B).
        temperature: positive; cosines are divided by it.

    Source: Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, equation 2.
    """
    batch, views = z_BVD.shape[:2]
    precise = z_BVD.to(torch.promote_types(z_BVD.dtype, torch.float32))
    z = functional.normalize(precise, dim=-1).flatten(0, 1)
    own = torch.arange(batch, device=z.device)
    groups = torch.where(labels_B >= 0, labels_B, -1 - own).repeat_interleave(views)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = (groups[:, None] == groups[None, :]) & ~itself
    logits = (z @ z.T / temperature).masked_fill(itself, -torch.inf)
    log_prob = logits - logits.logsumexp(1, keepdim=True)
    total = log_prob.masked_fill(~positive, 0).sum(1)
    return -(total / positive.sum(1)).mean()
