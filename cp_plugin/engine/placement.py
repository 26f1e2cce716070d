"""Which cluster a picture belongs to: a small encoder and the centres of clusters of its features.

It travels in the poison file, so that pictures taken later get the perturbation of their cluster.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cp_plugin.attack.poison_file import Poison
from cp_plugin.config.settings import UserError
from cp_plugin.data import Canonical
from cp_plugin.engine.backbones import surrogate
from cp_plugin.evaluation.metrics import features

SPEC, CENTRES, WEIGHTS = "placement", "placement.centres", "placement.encoder."
READING = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
"""Arguments of timm that read files or fetch them."""
LEAST_SIDE, MOST_SIDE = 8, 512
MOMENTS = ("mean", "std")


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
        weights = {
            name.removeprefix(WEIGHTS): value
            for name, value in poison.attached.items()
            if name.startswith(WEIGHTS)
        }
        try:
            spec = json.loads(poison.info[SPEC])
            _check_spec(spec, weights)
            encoder = surrogate(spec["name"], spec["side"], **spec["arguments"])
            encoder.load_state_dict(weights)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                "the poison file names the encoder of its clusters in a way that does not fit its "
                f"weights ({str(error).splitlines()[0]}); it is damaged: make or copy it again."
            ) from error
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


def _check_spec(spec: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Check what an encoder is to be built of before it is built: a file may name any network.

    Raises:
        ValueError, KeyError, TypeError: it reads files, or is larger than the weights that it gets.
    """
    unwanted = sorted(READING & set(spec["arguments"]))
    if unwanted:
        raise ValueError(f"{unwanted[0]} reads other files")
    if not LEAST_SIDE <= int(spec["side"]) <= MOST_SIDE:
        raise ValueError(f"a side of {spec['side']} pixels")
    if not all(len(spec[key]) == 3 and all(map(math.isfinite, spec[key])) for key in MOMENTS):
        raise ValueError("mean and std are not three numbers each")
    with torch.device("meta"):  # no memory is taken
        planned = surrogate(spec["name"], spec["side"], **spec["arguments"]).state_dict()
    if {name: value.shape for name, value in planned.items()} != {
        name: value.shape for name, value in weights.items()
    }:
        raise ValueError(f"{spec['name']} has other weights")


class _Shown(torch.utils.data.Dataset[Tensor]):
    """Images at the size that an encoder was trained at."""

    def __init__(self, images: Any, side: int) -> None:
        self._images, self._show = images, Canonical(side, "cover")

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, row: int) -> Tensor:
        return self._show(self._images[row])
