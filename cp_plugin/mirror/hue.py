"""Hue rotation as Pillow does it, in closed form, with a gradient that is finite everywhere.

In the HSV hexcone a pixel is its largest channel M, its chroma c = M - m and a hue in [0, 6). Every
channel of the rotated pixel is M - c * w(hue + phase) with a trapezoid w, so the rotation is
piecewise linear in the channels once hue * c is written as their differences: no division is left
in the gradient. Pillow holds hue and saturation in 8 bit, truncates both, and lets the hue byte
wrap at 256 although its circle has 255 steps (Pillow, `Convert.c`; torchvision adds the byte).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cp_plugin.mirror.operation import LEVEL

HALF = LEVEL / 2
PHASES = (5.0, 3.0, 1.0)
"""Where the trapezoids of red, green and blue start on the circle of six."""


class _Pixel(NamedTuple):
    """What forward and backward share; all (B, H, W)."""

    largest: Tensor
    chroma: Tensor
    slope: Tensor
    hue: Tensor
    red_largest: Tensor
    green_largest: Tensor


def rotate_hue(images: Tensor, shift: Tensor, quantised: bool, out: Tensor | None = None) -> Tensor:
    """Rotate the hue of images.

    Args:
        images: (B, 3, H, W) in [0, 1].
        shift: (B, 1, 1): whole 8-bit hue steps in [0, 255] if quantised, else turns.
        quantised: whether hue and saturation pass through 8 bit.
        out: where the result goes; may be `images`.

    Returns:
        (B, 3, H, W) in [0, 1].
    """
    pixel = _analyse(images, shift, quantised)
    chroma = _kept_chroma(pixel, quantised)
    out = torch.empty_like(images) if out is None else out
    for channel, phase in enumerate(PHASES):
        weight = _trapezoid(_position(pixel.hue, phase))
        torch.addcmul(pixel.largest, weight, chroma, value=-1, out=out[:, channel])
    return out


def rotate_hue_backward(images: Tensor, shift: Tensor, quantised: bool, grad: Tensor) -> Tensor:
    """Gradient of `rotate_hue` with respect to the images."""
    pixel = _analyse(images, shift, quantised)
    chroma = _kept_chroma(pixel, quantised)
    along_chroma = torch.zeros_like(chroma)
    along_hue = torch.zeros_like(chroma)
    for channel, phase in enumerate(PHASES):
        position = _position(pixel.hue, phase)
        along_chroma.addcmul_(_trapezoid(position), grad[:, channel])
        along_hue.addcmul_(_slope(position), grad[:, channel])
    along_hue.mul_(chroma).div_(pixel.chroma.clamp(min=1e-12)).neg_()
    along_chroma.mul_(chroma > 0)
    from_hue = along_hue * pixel.slope
    to_largest = grad.sum(1).sub_(along_chroma, alpha=1 - HALF if quantised else 1).sub_(from_hue)
    to_smallest = along_chroma.add_(from_hue)
    return _scatter(images, pixel, to_largest, to_smallest, along_hue)


def _analyse(images: Tensor, shift: Tensor, quantised: bool) -> _Pixel:
    red, green, blue = images.unbind(1)
    largest = torch.maximum(torch.maximum(red, green), blue)
    smallest = torch.minimum(torch.minimum(red, green), blue)
    chroma = largest - smallest
    red_largest = red == largest
    green_largest = green == largest
    difference = torch.where(
        red_largest, green - blue, torch.where(green_largest, blue - red, red - green)
    )
    sector = torch.where(red_largest, 0.0, torch.where(green_largest, 2.0, 4.0))
    slope = difference.div_(chroma.clamp(min=1e-12))
    hue = sector.to(slope.dtype).add_(slope)
    if quantised:
        hue.add_(6.0 * (hue < 0)).mul_(255 / 6).add_(shift)
        hue.sub_(256.0 * (hue >= 256)).sub_(0.5).mul_(6 / 255)
    else:
        hue.add_(6 * shift)
    return _Pixel(largest, chroma, slope, hue, red_largest, green_largest)


def _kept_chroma(pixel: _Pixel, quantised: bool) -> Tensor:
    """Chroma after the saturation byte was cut: half a level less on average."""
    if not quantised:
        return pixel.chroma
    return pixel.chroma.sub(pixel.largest, alpha=HALF).clamp_(min=0)


def _position(hue: Tensor, phase: float) -> Tensor:
    position = hue + phase
    return position.sub_((position / 6).floor_(), alpha=6)


def _trapezoid(position: Tensor) -> Tensor:
    return (position - 2).abs_().neg_().add_(2).clamp_(0, 1)


def _slope(position: Tensor) -> Tensor:
    """Derivative of the trapezoid: 1 before 1, -1 between 3 and 4."""
    falling = (position > 3) & (position < 4)
    return (position < 1).to(position.dtype).sub_(falling.to(position.dtype))


def _scatter(
    images: Tensor, pixel: _Pixel, to_largest: Tensor, to_smallest: Tensor, along_hue: Tensor
) -> Tensor:
    """Hand the gradients of largest, smallest and difference to the channels they came from."""
    red, green, blue = images.unbind(1)
    first = pixel.red_largest
    second = pixel.green_largest & ~first
    blue_smallest = (blue <= red) & (blue <= green)
    green_smallest = (green <= red) & ~blue_smallest
    red_smallest = ~(blue_smallest | green_smallest)
    down = -along_hue
    out = torch.empty_like(images)
    channels = (
        (torch.where(first, to_largest, torch.where(second, down, along_hue)), red_smallest),
        (torch.where(first, along_hue, torch.where(second, to_largest, down)), green_smallest),
        (torch.where(first, down, torch.where(second, along_hue, to_largest)), blue_smallest),
    )
    for channel, (part, is_smallest) in enumerate(channels):
        torch.addcmul(part, to_smallest, is_smallest.to(part.dtype), out=out[:, channel])
    return out
