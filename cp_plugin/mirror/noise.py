"""Noise that a host adds to its images, and JPEG files that it makes of them."""

from __future__ import annotations

from io import BytesIO
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from cp_plugin.mirror.base import LEVEL, Gradient, ImageFormat, Operation, Params, Shape, whole
from cp_plugin.mirror.intensity import StraightThrough


class GaussianNoise(Operation):
    """Normal noise in each pixel (torchvision `GaussianNoise`).

    Args:
        mean: in [0, 1].
        sigma: deviation, in [0, 1].
        clip: whether pixels are brought back to [0, 1].
        format: what the host holds; of bytes the noise is cut off to whole levels.
    """

    def __init__(
        self,
        mean: float,
        sigma: float,
        clip: bool,
        format: ImageFormat = ImageFormat.FLOAT,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.mean = mean
        self.sigma = sigma
        self.clip = clip
        self.format = format

    def sample(self, shape: Shape, generator: torch.Generator | None = None) -> Params:
        """Draw `noise` (B, C, H, W)."""
        noise = self.mean + self.sigma * torch.randn(tuple(shape), generator=generator)
        return {"noise": (noise / LEVEL).trunc() * LEVEL if self.format.rounds else noise}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Add it."""
        noisy: Tensor = images + params["noise"].to(images.dtype)
        return noisy.clamp(0, 1) if self.clip else noisy


class Jpeg(Operation):
    """The image of a JPEG file of a quality that is drawn for each (torchvision `JPEG`)."""

    gradient: ClassVar[Gradient] = "straight_through"

    def __init__(self, quality: tuple[int, int], name: str | None = None) -> None:
        super().__init__(name)
        self.quality = quality

    def sample(self, shape: Shape, generator: torch.Generator | None = None) -> Params:
        """Draw `quality` (B,), between both bounds and with them."""
        low, high = self.quality
        return {"quality": low + whole(torch.full((shape.batch,), high - low + 1), generator)}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Encode and decode, on the CPU."""
        levels = (images.detach() * 255).round().to(torch.uint8).cpu()
        pairs = zip(levels, params["quality"].tolist(), strict=True)
        decoded = torch.stack([_decoded(image, quality) for image, quality in pairs])
        made = decoded.to(images.device, images.dtype) * LEVEL
        out: Tensor = StraightThrough.apply(images, made)
        return out


def _decoded(image_CHW: Tensor, quality: int) -> Tensor:
    file = BytesIO()
    to_pil_image(image_CHW).save(file, "JPEG", quality=quality)
    decoded: Tensor = pil_to_tensor(Image.open(file))
    return decoded
