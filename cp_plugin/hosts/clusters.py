"""A trained encoder whose clusters of images a perturbation is to mix up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cp_plugin.hosts import host_class
from cp_plugin.hosts.lightning import LightningHost
from cp_plugin.hosts.plain import PlainHost
from cp_plugin.hosts.protocol import LossRequest


class ClusterHost(PlainHost):
    """A LightningModule as the encoder of images in clusters; its own loss trains it, no more.

    `cluster_host` makes one that is of the module's framework too.

    What it shows is how far the features of views lie from the centre of another cluster than
    their image's own: 1 - cosine, mean over views and over images that are in a cluster.

    Source: Zhang et al., "Unlearnable Clusters: Towards Label-agnostic Unlearnable Examples",
    CVPR 2023, section 3.
    """

    centres_KD: Tensor
    """float32, the centres of the clusters, of length 1."""
    clusters_N: Tensor
    """int64, on the CPU: the cluster of each image of the data set, negative for none."""
    shift = 1
    """How many clusters on the wrong one is; the last ones are followed by the first."""

    def show(self, request: LossRequest) -> None:
        """Show the mean distance of the views from the wrong centres."""
        clusters_B = self.clusters_N[request.batch.rows].to(self.centres_KD.device)
        wrong_BD = self.centres_KD[(clusters_B + self.shift) % len(self.centres_KD)]
        carried_B = (clusters_B >= 0).float()
        distances = [
            1 - functional.cosine_similarity(self.features(view), wrong_BD)
            for view in request.views
        ]
        loss = (torch.stack(distances).mean(0) * carried_B).sum() / carried_B.sum().clamp(min=1)
        request.on_loss(loss)


def cluster_host(module: Any, *arguments: Any) -> ClusterHost:
    """Return a module as an encoder of images in clusters, by the framework it belongs to.

    Args:
        module: a LightningModule.
        arguments: those of `LightningHost` after the module.
    """
    own = host_class(module)
    if own is LightningHost:
        return ClusterHost(module, *arguments)
    made: ClusterHost = type(f"Cluster{own.__name__}", (ClusterHost, own), {})(module, *arguments)
    return made
