"""Changes of single tones: solarise, posterise, equalise, autocontrast, invert."""

from __future__ import annotations

import torch
from torch import Tensor

from cp_plugin.mirror.operation import LEVEL, Operation, Params, Stage


class Solarize(Operation):
    """Invert the pixels at or above a threshold (`ImageOps.solarize`).

    Args:
        threshold: in 8-bit levels for a Pillow image or bytes, in [0, 1] for a float tensor.
    """

    commutes_with_flips: bool = True

    def __init__(
        self, threshold: float, stage: Stage = Stage.PILLOW, name: str | None = None
    ) -> None:
        super().__init__(name)
        self.threshold = (threshold - 0.5) * LEVEL if stage.rounds else threshold

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Solarise."""
        return torch.where(images < self.threshold, images, 1 - images)
