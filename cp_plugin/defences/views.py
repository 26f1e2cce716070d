"""Defences that act on augmented views: noise, cutout, and views moved against the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cp_plugin.config.defences import AdversarialConfig, CutoutConfig, NoiseConfig

Loss = Callable[[list[Tensor]], Tensor]
"""From views to a scalar."""


class Pixels(NamedTuple):
    """What the pixel values 0 and 1 have become in views, by channel; knows no other statistics."""

    low: Any = 0.0
    """float (C, 1, 1), or a number."""
    high: Any = 1.0
    """float (C, 1, 1), or a number."""

    @classmethod
    def normalized(cls, mean: Sequence[float], std: Sequence[float]) -> Pixels:
        """Return those of views that `Normalize(mean, std)` has made."""
        means, stds = (torch.tensor(values)[:, None, None] for values in (mean, std))
        return cls(-means / stds, (1 - means) / stds)

    def to(self, device: torch.device | str) -> Pixels:
        """Return them on a device."""
        return Pixels(*(v.to(device) if isinstance(v, Tensor) else v for v in self))

    def clip(self, views: Tensor) -> Tensor:
        """Return views within the values that pixels can have."""
        low, high = (torch.as_tensor(v, dtype=views.dtype, device=views.device) for v in self)
        return torch.minimum(torch.maximum(views, low), high)


class GaussianNoise(nn.Module):
    """Add Gaussian noise, and keep pixels within what they can be.

    Shape:
        float (C, H, W) or (B, C, H, W) to the same.
    """

    def __init__(self, std: float = 8 / 255, pixels: Pixels | None = None) -> None:
        """Take the settings.

        Args:
            std: standard deviation, pixels in [0, 1].
            pixels: where views are normalised, what 0 and 1 are in them.

        Raises:
            UserError: std is out of range.
        """
        super().__init__()
        self.std, self.pixels = NoiseConfig(std).std, pixels or Pixels()

    def forward(self, images: Tensor) -> Tensor:
        """Return noisy images."""
        low, high = pixels = self.pixels.to(images.device)
        return pixels.clip(images + self.std * (high - low) * torch.randn_like(images))

    def extra_repr(self) -> str:
        """Name the deviation."""
        return f"std={self.std:.4g}"


class Cutout(nn.Module):
    """Set a square to 0, the mean of normalised views; its centre lies anywhere in the image.

    Shape:
        float (C, H, W) or (B, C, H, W) to the same; each image has its own square.

    Source: DeVries, Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout",
    arXiv:1708.04552, 2017.
    """

    def __init__(self, size: float = 0.5, fill: float = 0.0) -> None:
        """Take the settings.

        Args:
            size: side of the square as a part of the image's shorter side.
            fill: the value that is put in; 0.5 is grey where pixels are in [0, 1].

        Raises:
            UserError: size is out of range.
        """
        super().__init__()
        self.size, self.fill = CutoutConfig(size).size, fill

    def forward(self, images: Tensor) -> Tensor:
        """Return images with a hole."""
        height, width = images.shape[-2:]
        side = max(1, round(self.size * min(height, width)))
        shape = (*images.shape[:-3], 1, 1, 1)
        inside = torch.ones((), dtype=torch.bool, device=images.device)
        for dim, length in ((-2, height), (-1, width)):
            centre = torch.randint(length, shape, device=images.device)
            place = torch.arange(length, device=images.device)
            place = place[:, None] if dim == -2 else place
            first = centre - side // 2
            inside = inside & (place >= first) & (place < first + side)
        return images.masked_fill(inside, self.fill)

    def extra_repr(self) -> str:
        """Name the size."""
        return f"size={self.size}"


def adversarial_views(
    loss: Loss,
    views: Sequence[Tensor],
    config: AdversarialConfig | None = None,
    pixels: Pixels | None = None,
    restore: Callable[[], None] | None = None,
) -> list[Tensor]:
    """Move views within eps so that a loss rises: projected gradient ascent from a random start.

    Args:
        loss: the model's own loss of all views together; weights should not require gradients.
        views: V views, each float (B, C, h, w).
        config: eps, steps and step size.
        pixels: where views are normalised, what 0 and 1 are in them.
        restore: called after each step, to undo what the loss has changed in the model.

    Returns:
        V views, each no pixel further than eps from its own, within the values of pixels.

    Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR
        2018; for contrastive losses Kim, Tack, Hwang, "Adversarial Self-Supervised Contrastive
        Learning", and Jiang et al., "Robust Pre-Training by Adversarial Contrastive Learning",
        both NeurIPS 2020.
    """
    config, pixels = config or AdversarialConfig(), pixels or Pixels()
    clean = [view.detach() for view in views]
    low, high = pixels = pixels.to(clean[0].device)
    eps = config.eps * (high - low)
    moved = [pixels.clip(view + eps * (2 * torch.rand_like(view) - 1)) for view in clean]
    for _ in range(config.steps):
        leaves = [view.requires_grad_() for view in moved]
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss([leaf.clone() for leaf in leaves]), leaves)
        moved = [
            pixels.clip(_within(leaf.detach() + config.step_size * eps * g.sign(), view, eps))
            for leaf, g, view in zip(leaves, gradients, clean, strict=True)
        ]
        if restore is not None:
            restore()
    return moved


def _within(moved: Tensor, view: Tensor, eps: Any) -> Tensor:
    return torch.minimum(torch.maximum(moved, view - eps), view + eps)
