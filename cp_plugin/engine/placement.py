"""Which cluster a picture belongs to: a small encoder and the centres of clusters of its features.

It travels in the poison file, so that pictures taken later get the perturbation of their cluster.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cp_plugin.attack.poison_file import Poison
from cp_plugin.data import Canonical
from cp_plugin.engine.backbones import surrogate
from cp_plugin.evaluation.metrics import features

SPEC, CENTRES, WEIGHTS = "placement", "placement.centres", "placement.encoder."


@dataclass(frozen=True)
class Placement:
    """An encoder and the centres of clusters of what it makes of pictures."""

    encoder: nn.Module
    """Of `surrogate`, in eval mode."""
    centres: Tensor
    """float32 (K, D), of length 1."""
    spec: Mapping[str, Any]
    """What the encoder is built of: `name`, `side`, `arguments`, `mean`, `std`."""

    @classmethod
    def of(cls, poison: Poison) -> Placement | None:
        """Return what a poison file carries, None where it carries none."""
        if CENTRES not in poison.attached:
            return None
        spec = json.loads(poison.info[SPEC])
        encoder = surrogate(spec["name"], spec["side"], **spec["arguments"])
        weights = {
            name.removeprefix(WEIGHTS): value
            for name, value in poison.attached.items()
            if name.startswith(WEIGHTS)
        }
        encoder.load_state_dict(weights)
        return cls(encoder.eval(), poison.attached[CENTRES], spec)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a poison file holds as tensors."""
        state = self.encoder.state_dict()
        weights = {f"{WEIGHTS}{name}": value.contiguous() for name, value in state.items()}
        return {CENTRES: self.centres, **weights}

    def info(self) -> dict[str, str]:
        """Return what a poison file holds as text."""
        return {SPEC: json.dumps(dict(self.spec))}

    def clusters(self, images: Any) -> Tensor:
        """Return the cluster of each image, int64 (N); the arguments are those of `features`."""
        return self.nearest(self.features(images))

    def features(self, images: Any) -> Tensor:
        """Return the directions of images' features, float32 (N, D).

        Args:
            images: uint8 (N, 3, H, W), or a map-style data set of uint8 (3, H, W): whole pictures,
                squeezed to one size.
        """
        side = self.spec["side"]
        mean = torch.tensor(self.spec["mean"]).view(3, 1, 1)
        std = torch.tensor(self.spec["std"]).view(3, 1, 1)

        def normalized(pixels: Tensor) -> Tensor:
            return (pixels - mean) / std

        found = features(self.encoder, _Shown(images, side), normalized)
        return functional.normalize(found)

    def nearest(self, features_ND: Tensor) -> Tensor:
        """Return the cluster of each row of `features`, int64 (N)."""
        return (features_ND @ self.centres.T).argmax(1)


class _Shown(torch.utils.data.Dataset[Tensor]):
    """Images at the size that an encoder was trained at."""

    def __init__(self, images: Any, side: int) -> None:
        self._images, self._show = images, Canonical(side, "cover")

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, row: int) -> Tensor:
        return self._show(self._images[row])
