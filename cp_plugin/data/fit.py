"""A perturbation on a grid that covers a whole picture, brought to the picture's own size.

With `fit: cover` a row of delta is a square grid over each whole picture, whatever the picture's
shape: all rows then have one shape, and a random crop of the picture is a box of the grid. It is
interpolated with weights that are not negative and add up to one (bilinear; antialiased where the
picture is smaller than the grid), so that no pixel changes by more than the largest entry of the
grid, at any size.

Grey pictures stay grey: their delta is its luminance, a convex combination of the channels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from cp_plugin.config.settings import eps_levels
from cp_plugin.data.image import Size

GRID = 224
"""Side of the grid in pixels, unless a pipeline or a setting says otherwise."""
BAND = 512
"""Columns of a picture that delta is made for at once."""
LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in a grey picture, as Pillow has them (ITU-R 601)."""


def at_size(delta_BCHW: Tensor, size: Size) -> Tensor:
    """Bring delta to the size of pictures.

    Args:
        delta_BCHW: float (B, C, H, W).
        size: height and width in pixels, each at least 1.

    Returns:
        float (B, C, *size), nowhere larger than the largest entry of its grid.
    """
    if tuple(delta_BCHW.shape[2:]) == tuple(size):
        return delta_BCHW
    # Antialiasing widens the filter where the picture is smaller, and changes nothing elsewhere.
    return functional.interpolate(
        delta_BCHW, list(size), mode="bilinear", align_corners=False, antialias=True
    )


def in_bands(delta_HW: Tensor, size: Size) -> Iterator[tuple[slice, Tensor]]:
    """Bring delta to the size of a picture a band of columns at a time, which needs less memory.

    Args:
        delta_HW: float (H, W).
        size: height and width in pixels.

    Yields:
        The columns of a band, and float (height, columns), bit for bit those of `at_size`; it may
        be overwritten.
    """
    height, width = size
    # The filter is separable, and torch applies it along rows first.
    wide = at_size(delta_HW[None, None], (len(delta_HW), width))
    for left in range(0, width, BAND):
        columns = slice(left, min(left + BAND, width))
        part = wide[..., columns].clone()
        yield columns, at_size(part, (height, part.shape[3]))[0, 0]


def in_levels(delta: Tensor, eps: float, full_scale: int = 255) -> Tensor:
    """Round delta to whole levels, int32, at most floor(full_scale * eps) each.

    Args:
        delta: pixels in [0, 1]; may be overwritten.
        eps: the budget.
        full_scale: the largest level: 255 of 8 bit, 65,535 of 16 bit.
    """
    limit = eps_levels(eps, full_scale)
    return delta.mul_(full_scale).round_().clamp_(-limit, limit).int()


def luminance(delta: Tensor) -> Tensor:
    """Return delta (…, 3, H, W) as a grey picture carries it, (…, 1, H, W)."""
    weights = delta.new_tensor(LUMINANCE).view(3, 1, 1)
    return (delta * weights).sum(-3, keepdim=True)


def keeping_grey(delta_BCHW: Tensor, images_BCHW: Tensor) -> Tensor:
    """Return delta with the luminance in all channels where an image is grey.

    Args:
        delta_BCHW: float (B, 3, h, w).
        images_BCHW: (B, 3, H, W); grey ones have three like channels.
    """
    grey = (images_BCHW == images_BCHW[:, :1]).flatten(1).all(1)
    if not bool(grey.any()):
        return delta_BCHW
    return torch.where(grey.view(-1, 1, 1, 1), luminance(delta_BCHW), delta_BCHW)
