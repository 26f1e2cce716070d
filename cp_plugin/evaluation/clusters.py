"""Groups of like images: k-means on what an encoder makes of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import faiss
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from cp_plugin.attack.crafting import Crafting
from cp_plugin.config.settings import CraftConfig
from cp_plugin.data import Canonical, RawDataset
from cp_plugin.evaluation.metrics import features
from cp_plugin.util.processes import of_first
from cp_plugin.util.random_state import random_state_kept

log = logging.getLogger("cp_plugin")

Placing = Callable[[nn.Module, Tensor], tuple[Mapping[str, Tensor], Mapping[str, str]]]
"""From an encoder and the centres of clusters to what tells the cluster of a new image: tensors and
text for the poison file."""
ITERATIONS = 30


@random_state_kept()
def put_into_clusters(crafting: Crafting, placed: Placing | None = None) -> Tensor:
    """Group the images of a craft by features that its surrogate has by now.

    Every process arrives at the same groups.

    Args:
        crafting: of granularity `cluster`.
        placed: what else the poison file carries; None: nothing.

    Returns:
        The centres of the groups, float32 (K, D), of length 1.
    """
    host, mirror, config = crafting.host, crafting.mirror, crafting.config
    assert isinstance(config, CraftConfig)
    assert isinstance(crafting.raw, RawDataset)
    shown = _Whole(crafting.raw, Canonical(mirror.view_size, "cover"))
    found = features(host.encode, shown, mirror.normalize, device=host.device)
    directions = functional.normalize(found)
    middle = of_first(centres(directions, config.clusters, crafting.seed))
    clusters = of_first(nearest(directions, middle))
    tensors, facts = ({}, {}) if placed is None else placed(host.encoder(), middle)
    crafting.group(clusters, tensors, facts)
    sizes = torch.bincount(clusters, minlength=config.clusters).tolist()
    log.info("%d clusters of %s images", len(sizes), ", ".join(map(str, sorted(sizes))))
    return middle


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


def nearest(features_ND: Tensor, centres_KD: Tensor) -> Tensor:
    """Return the cluster of each row of features, int64 (N)."""
    return (features_ND @ centres_KD.T).argmax(1)


class _Whole(Dataset[Tensor]):
    """Whole clean images at the size of a view, uint8 (C, h, w)."""

    def __init__(self, raw: RawDataset, show: Canonical) -> None:
        self._raw, self._show = raw, show

    def __len__(self) -> int:
        return len(self._raw)

    def __getitem__(self, row: int) -> Any:
        return self._show(self._raw[row].image)
