"""Groups of like pictures: k-means on what a trained encoder makes of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import faiss
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from cp_plugin.config.settings import UserError
from cp_plugin.engine.pipeline import normalisation
from cp_plugin.engine.placement import Placement
from cp_plugin.engine.settings import plain

ITERATIONS = 30


def clustered(
    encoder: nn.Module, cfg: DictConfig, images: Any, clusters: int, seed: int
) -> tuple[Placement, Tensor]:
    """Group images by k-means on the directions of their features.

    Args:
        encoder: the backbone of a trained method.
        cfg: its configuration.
        images: a map-style data set of uint8 images (3, H, W).
        clusters: K.
        seed: of k-means.

    Returns:
        What places further images, and the cluster of each image, int64 (N).

    Raises:
        UserError: there are fewer images than clusters.
    """
    if len(images) < clusters:
        raise UserError(
            f"{len(images)} pictures cannot be put into {clusters} clusters; give fewer --clusters."
        )
    without = without_centres(encoder, cfg)
    found = without.features(images)
    made = replace(without, centres=centres(found, clusters, seed))
    return made, made.nearest(found)


def without_centres(encoder: nn.Module, cfg: DictConfig) -> Placement:
    """Return what makes features of whole pictures, before there are clusters.

    Args:
        encoder: the backbone of a trained method.
        cfg: its configuration.
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
    return Placement(encoder.eval(), torch.empty(0), spec)


def centres(features_ND: Tensor, clusters: int, seed: int) -> Tensor:
    """Return the centres of clusters of directions, float32 (K, D), of length 1.

    Args:
        features_ND: float32, rows of length 1.
        clusters: K, at most N.
        seed: of k-means.
    """
    # Clusters of few images are as welcome as others: faiss would warn of them.
    means = faiss.Kmeans(
        features_ND.shape[1],
        clusters,
        niter=ITERATIONS,
        seed=seed,
        spherical=True,
        min_points_per_centroid=1,
    )
    means.train(features_ND.numpy())
    return torch.from_numpy(means.centroids)
