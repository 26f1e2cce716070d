"""Unlearnable clusters: groups of like images, each moved to another's place in feature space."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader

from cp_plugin.callbacks.loader_hooks import training_loader
from cp_plugin.callbacks.supervised import CraftOnTrained
from cp_plugin.config.baselines import UnlearnableClustersConfig
from cp_plugin.config.settings import UserError
from cp_plugin.data import RawDataset, RawStream, streams
from cp_plugin.data.loading import batch_size_of, moved
from cp_plugin.evaluation.clusters import put_into_clusters
from cp_plugin.hosts.clusters import ClusterHost, cluster_host
from cp_plugin.hosts.lightning import LightningHost
from cp_plugin.util.seed import derived_seed


class CraftUnlearnableClusters(CraftOnTrained):
    """Train a LightningModule on clean images, group them, and mix the groups up in its features.

    The module trains as its trainer says, by any method, and reads no labels for the poison. When
    training ends, k-means on its features groups the images, and sign-gradient steps on one delta a
    group, each on augmentations drawn anew, move a group's images to the centre of the next one.

    Source: Zhang et al., "Unlearnable Clusters: Towards Label-agnostic Unlearnable Examples",
    CVPR 2023, which trains a generator for each group in place of these steps.
    """

    kind = "unlearnable_clusters"
    settings_class = UnlearnableClustersConfig

    def adapted(self, trainer: Any, pl_module: Any, raw: RawDataset | RawStream) -> LightningHost:
        """Return the surrogate as an encoder of clusters.

        Raises:
            UserError: there are several processes.
        """
        if trainer.world_size > 1:
            raise UserError(
                f"{self.kind} is crafted by one process, got {trainer.world_size}; set devices=1."
            )
        context = trainer.precision_plugin.train_step_context
        return cluster_host(pl_module, raw.with_views, "auto", context, trainer)

    def _check_stream(self, dataset: Any) -> None:
        """Check that images have rows.

        Raises:
            UserError: the data set is a stream.
        """
        if streams(dataset):
            raise UserError(
                f"poison={self.kind} groups the images of a data set by their rows, and "
                f"{type(dataset).__name__} streams its images; use a map-style data set, or craft "
                "+poison=cp on it."
            )

    def plan(self, trainer: Any, loader: DataLoader[Any]) -> None:
        """One round: all steps of training, then every image as often as `epochs` says."""
        super().plan(trainer, loader)
        self.schedule.noise_steps *= self._clusters.epochs

    def _mislead(self, trainer: Any, pl_module: Any) -> None:
        if self._misled or self.path.exists():
            return
        host = self._host
        assert isinstance(host, ClusterHost)
        host.centres_KD = put_into_clusters(self.crafting, self.placed).to(pl_module.device)
        host.clusters_N = self.attack.rows.of_image
        super()._mislead(trainer, pl_module)

    def _every_image(self, trainer: Any, pl_module: Any) -> Any:
        """Yield raw batches of all images, as often as `epochs` says, each time shuffled."""
        own = training_loader(trainer)
        draws = torch.Generator().manual_seed(derived_seed(self.crafting.seed, "clusters"))
        loader: DataLoader[Any] = DataLoader(
            own.dataset,
            batch_size_of(own),
            shuffle=True,
            num_workers=own.num_workers,
            collate_fn=own.collate_fn,
            generator=draws,
        )
        for _ in range(self._clusters.epochs):
            for batch in loader:
                yield moved(batch, pl_module.device)

    @property
    def _clusters(self) -> UnlearnableClustersConfig:
        assert isinstance(self._chosen, UnlearnableClustersConfig)
        return self._chosen
