"""UEraser: views under plasma noise, shuffled channels and TrivialAugment (Qin et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import v2

from cp_plugin.config.defences import UeraserConfig
from cp_plugin.defences.views import Pixels

PROBABILITY = 0.5
"""Of plasma noise, and of shuffled channels."""
ROUGHNESS = (0.1, 0.7)
"""Range of the factor by which displacements shrink from one grid of a plasma to the next."""


def plasma(noise: Sequence[Tensor], roughness_B: Tensor, height: int, width: int) -> Tensor:
    """Make plasma fractals by midpoint displacement (Fournier, Fussell, Carpenter, 1982).

    Each grid is the coarser one interpolated, and displaced by less and less.

    Args:
        noise: displacements in [-1, 1], float (B, 1, 2^k + 1, 2^k + 1) for k = 0, 1, …; the finest
            grid must not be coarser than the image.
        roughness_B: factor of the displacements from one grid to the next, in (0, 1).
        height: of the image in pixels.
        width: of the image in pixels.

    Returns:
        float (B, 1, height, width), from 0 to 1 in each image.
    """
    grid = noise[0]
    for finer, displacement in enumerate(noise[1:], 1):
        side = displacement.shape[-1]
        grid = functional.interpolate(grid, (side, side), mode="bilinear", align_corners=True)
        grid = grid + displacement * (roughness_B**finer).view(-1, 1, 1, 1)
    grid = grid[..., :height, :width]
    low, high = grid.amin((1, 2, 3), True), grid.amax((1, 2, 3), True)
    return (grid - low) / (high - low).clamp(min=1e-12)


class Ueraser(nn.Module):
    """Brightness moved by a plasma, channels shuffled, then TrivialAugment; each image its own.

    Shape:
        float (B, 3, H, W) to the same.

    Source: Qin, Gao, Zhao, Ye, Xu, "Learning the Unlearnable: Adversarial Augmentations Suppress
    Unlearnable Example Attacks", arXiv:2303.15127, 2023.
    """

    def __init__(self, intensity: float = 1.0, pixels: Pixels | None = None) -> None:
        """Take the settings.

        Args:
            intensity: largest range of the change of brightness, pixels in [0, 1].
            pixels: where views are normalised, what 0 and 1 are in them.

        Raises:
            UserError: the intensity is out of range.
        """
        super().__init__()
        self.intensity = UeraserConfig(intensity=intensity).intensity
        self.pixels = pixels or Pixels()
        self._trivial = v2.TrivialAugmentWide()

    def forward(self, views: Tensor) -> Tensor:
        """Return views under one draw of all three."""
        low, high = self.pixels.to(views.device)
        shown = ((views - low) / (high - low)).clamp(0, 1)
        shown = self._shuffled(self._under_plasma(shown))
        whole = shown.mul(255).round().to(torch.uint8)
        changed = torch.stack([self._trivial(image) for image in whole])
        again: Tensor = (changed.to(views) / 255) * (high - low) + low
        return again

    def _under_plasma(self, images: Tensor) -> Tensor:
        count, _, height, width = images.shape
        grids = (max(height, width) - 1).bit_length() + 1
        noise = [
            2 * torch.rand(count, 1, 2**k + 1, 2**k + 1, device=images.device) - 1
            for k in range(grids)
        ]
        roughness, strength, used = torch.rand(3, count, device=images.device)
        roughness = ROUGHNESS[0] + (ROUGHNESS[1] - ROUGHNESS[0]) * roughness
        strength = self.intensity * strength * (used < PROBABILITY)
        moved = (plasma(noise, roughness, height, width) - 0.5) * strength.view(-1, 1, 1, 1)
        brighter: Tensor = (images + moved).clamp(0, 1)
        return brighter

    def _shuffled(self, images: Tensor) -> Tensor:
        count, channels = images.shape[:2]
        order = torch.rand(count, channels, device=images.device).argsort(1)
        kept = torch.rand(count, 1, device=images.device) >= PROBABILITY
        order = torch.arange(channels, device=images.device).where(kept, order)
        return images[torch.arange(count, device=images.device)[:, None], order]

    def extra_repr(self) -> str:
        """Name the intensity."""
        return f"intensity={self.intensity}"


def worst_views(draws: Sequence[Sequence[Tensor]], losses: Sequence[Tensor]) -> list[Tensor]:
    """Return the draw of views with the largest loss, of each image where losses are an image's.

    Args:
        draws: K draws of V views, each float (B, C, h, w).
        losses: K losses, each float () of the batch or (B) of its images.
    """
    worst = torch.stack([loss.detach() for loss in losses]).argmax(0)
    if worst.ndim == 0:
        return list(draws[int(worst)])
    images = torch.arange(len(worst), device=worst.device)
    return [torch.stack(list(views))[worst, images] for views in zip(*draws, strict=True)]
