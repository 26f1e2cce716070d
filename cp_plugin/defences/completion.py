"""Matrix completion of images as a defence: completions made once, one drawn at every loading."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cp_plugin.config.defences import MatrixCompletionConfig
from cp_plugin.data.image import Size
from cp_plugin.defences.lowrank import complete
from cp_plugin.defences.precomputed import Precomputed


def complete_images(
    images_BCHW: Tensor, kept_BCHW: Tensor, shrinkage: float = 0.3, iterations: int = 60
) -> Tensor:
    """Complete images from a part of their pixels, the channels side by side as one matrix.

    Args:
        images_BCHW: float (B, C, H, W) in [0, 1], on any device.
        kept_BCHW: bool (B, C, H, W), the values that are read.
        shrinkage: weight of the nuclear norm, in units of singular values.
        iterations: thresholding steps.

    Returns:
        (B, C, H, W), not clipped.

    Raises:
        UserError: shapes or types do not match.

    Source: Yang et al., "ME-Net: Towards Effective Adversarial Robustness with Matrix Estimation",
        ICML 2019.
    """
    channels = images_BCHW.shape[1]
    matrices, kept = (
        t.transpose(1, 2).reshape(len(t), t.shape[2], -1) for t in (images_BCHW, kept_BCHW)
    )
    completed = complete(matrices, kept, shrinkage, iterations)
    height, width = images_BCHW.shape[2:]
    return completed.view(-1, height, channels, width).transpose(1, 2)


def completions_of(
    images_BCHW: Tensor, config: MatrixCompletionConfig, generator: torch.Generator | None = None
) -> Tensor:
    """Return several completions of each image, from pixels kept at random.

    Args:
        images_BCHW: uint8 (B, C, H, W), on any device.
        config: the settings.
        generator: on the CPU; None: torch's default one.

    Returns:
        uint8 (B, n, C, H, W), n = `config.completions`.
    """
    images = images_BCHW.float() / 255
    made = []
    for keep in torch.linspace(config.keep_min, config.keep_max, config.completions).tolist():
        kept = (torch.rand(images.shape, generator=generator) < keep).to(images.device)
        completed = complete_images(images, kept, config.shrinkage, config.iterations)
        made.append((completed.clamp(0, 1) * 255).round().to(torch.uint8))
    return torch.stack(made, 1)


class Completions(Precomputed):
    """The completions of a data set's images."""

    name = "matrix completion"

    def __init__(
        self,
        dataset: Any,
        config: MatrixCompletionConfig,
        image_size: int | Size | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        """Make them; see `Precomputed`.

        Args:
            dataset: a map-style data set of images.
            config: the settings.
            image_size: of the canonical images.
            device: where they are computed.
            seed: used where the configuration has none.
        """
        chosen = seed if config.seed is None else config.seed
        generator = torch.Generator().manual_seed(chosen)
        super().__init__(
            dataset, lambda images: completions_of(images, config, generator), image_size, device
        )
