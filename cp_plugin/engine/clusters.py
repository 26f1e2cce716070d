"""What a poison by cluster carries of its surrogate, to tell the cluster of a new image."""

from __future__ import annotations

import copy

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from cp_plugin.engine.pipeline import normalisation
from cp_plugin.engine.placement import Placement
from cp_plugin.engine.settings import plain


def placement(encoder: nn.Module, cfg: DictConfig, centres: Tensor | None = None) -> Placement:
    """Return an encoder, as it is now, with the centres of clusters of its features.

    Args:
        encoder: the backbone of a trained method.
        cfg: its configuration.
        centres: float32 (K, D); None: there are no clusters, it makes features alone.
    """
    node = cfg.augmentations[0]
    mean, std = normalisation(cfg.data.dataset, node)
    spec = {
        "name": cfg.backbone.name,
        "side": int(node.crop_size),
        "arguments": {"whiten": cfg.backbone.get("whiten"), **plain(cfg.backbone.kwargs)},
        "mean": list(mean),
        "std": list(std),
    }
    kept = copy.deepcopy(encoder).cpu().eval()  # training goes on with the original
    return Placement(kept, torch.empty(0) if centres is None else centres, spec)
