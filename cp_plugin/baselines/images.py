"""What a poison that is drawn has to know of a data set: keys, labels, the form of its images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cp_plugin.config import Granularity, UserError
from cp_plugin.data import Opened, class_names, labels
from cp_plugin.perturbation import Perturbation
from cp_plugin.poison import Poison
from cp_plugin.provenance import versions


@dataclass(frozen=True)
class Images:
    """The images of a data set as a poison addresses them."""

    dataset: Any
    shape: tuple[int, int, int]
    """(C, H, W) of a canonical image."""
    keys: Tensor
    """int64 (N)."""
    labels: Tensor | None
    """int64 (N), negative where unlabelled."""

    @classmethod
    def read(cls, dataset: Any, image_size: int | None) -> Images:
        """Read every image once.

        Args:
            dataset: a map-style data set of images.
            image_size: side in pixels; None keeps the images' own.
        """
        opened = Opened(dataset, image_size)
        channels, height, width = opened[0].image.shape
        keys = torch.tensor([opened[row].key for row in range(len(opened))])
        return cls(dataset, (channels, height, width), keys, labels(dataset))

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes.

        Raises:
            UserError: the data set has no labels.
        """
        names = class_names(self.dataset)
        if names is None or self.labels is None:
            raise UserError(
                "poison.granularity=class needs labelled images and this data set has no labels; "
                "use labelled data or +poison=random with poison.granularity=sample."
            )
        return names

    def poison(
        self,
        perturbation: Perturbation,
        granularity: Granularity,
        keys: Tensor | None,
        fraction: float,
        info: Mapping[str, str],
    ) -> Poison:
        """Return rows as a poison of these images, or of a part of them."""
        facts = {"host": "none", **info, "versions": json.dumps(versions())}
        different = len(torch.unique(self.keys))
        if keys is not None and len(keys) < different:  # unlabelled images have no row
            facts["fraction"] = repr(len(keys) / different)
        classes = self.classes if granularity == "class" else None
        whole = Poison(perturbation, granularity, keys, classes, facts)
        return whole if fraction == 1 else whole.part(fraction, self.keys, self.labels)
