"""Shortcuts squeezed out of images: JPEG, grey, fewer bits (Liu et al., ICML 2023)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cp_plugin.config.defences import BitDepthConfig, JpegConfig
from cp_plugin.mirror.survival import through_jpeg

LUMINANCE = (19595, 38470, 7471)
"""Parts of red, green and blue in Pillow's grey, of 65,536."""


class Jpeg(nn.Module):
    """Store images as JPEG and read them again, as Pillow does.

    Shape:
        uint8 (C, H, W) or (B, C, H, W) to the same; C is 1 or 3.

    Source: Liu et al., "Image Shortcut Squeezing", ICML 2023, with a quality of 10.
    """

    def __init__(self, quality: int = 10) -> None:
        """Take the settings.

        Args:
            quality: as Pillow counts it, 1 to 95.

        Raises:
            UserError: it is out of range.
        """
        super().__init__()
        self.quality = JpegConfig(quality).quality

    def forward(self, images: Tensor) -> Tensor:
        """Return the images as they are read again."""
        if images.ndim == 4:
            return torch.stack([self(image) for image in images])
        return through_jpeg(images.cpu(), self.quality).to(images.device)

    def extra_repr(self) -> str:
        """Name the quality."""
        return f"quality={self.quality}"


class Grey(nn.Module):
    """Replace the colours of an image by its luminance, as Pillow computes it.

    Shape:
        uint8 (3, H, W) or (B, 3, H, W) to the same; images of one channel stay as they are.

    Source: Liu et al., "Image Shortcut Squeezing", ICML 2023.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Return the grey images, with three equal channels."""
        if images.shape[-3] == 1:
            return images
        parts = torch.tensor(LUMINANCE, device=images.device).view(3, 1, 1)
        grey = ((images.int() * parts).sum(-3, keepdim=True) + (1 << 15)) >> 16
        return grey.to(torch.uint8).expand_as(images).clone()


class BitDepth(nn.Module):
    """Keep the nearest of 2^bits evenly spaced values of a pixel.

    Shape:
        uint8, any, to the same.

    Source: Xu, Evans, Qi, "Feature Squeezing", NDSS 2018; as a defence against poisons Liu et al.,
        "Image Shortcut Squeezing", ICML 2023, with 2 bits.
    """

    def __init__(self, bits: int = 2) -> None:
        """Take the settings.

        Args:
            bits: of a colour, 1 to 7.

        Raises:
            UserError: it is out of range.
        """
        super().__init__()
        self.bits = BitDepthConfig(bits).bits

    def forward(self, images: Tensor) -> Tensor:
        """Return the images with fewer values."""
        steps = 2**self.bits - 1
        level = (images.double() * (steps / 255)).round()
        nearest: Tensor = (level * (255 / steps)).round().to(torch.uint8)
        return nearest

    def extra_repr(self) -> str:
        """Name the number of bits."""
        return f"bits={self.bits}"
