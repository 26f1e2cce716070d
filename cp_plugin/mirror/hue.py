"""Hue rotation as Pillow does it, in closed form, with a gradient that is finite everywhere.

In the HSV hexcone a pixel is its smallest channel m, its chroma c and an angle h in [0, 6); channel
n of the rotated pixel is m + c * v(h - 2n), v(d) = clamp(2 - |d|, 0, 1). The angle itself is a
clamp: with x = (2R - G - B) / c it is +-(1.5 - x + clamp(x, -1, 1) / 2), the sign that of G - B.
So nothing has to be sorted, and c * dh holds no division by c. Pillow keeps hue and saturation in
8 bit, truncates both, and lets the hue byte wrap at 256 although its circle has 255 steps (Pillow,
`Convert.c`; torchvision adds the byte).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cp_plugin.mirror.operation import LEVEL

HALF = LEVEL / 2
TINY = 1e-30
CENTRES = (3.0, 2.0, 4.0)
"""Angles that red, green and blue are measured from; red's is the opposite of its own, so that the
circle is cut where its value is the same on both sides."""


class _Pixel(NamedTuple):
    """What forward and backward share; all (B, H, W)."""

    largest: Tensor
    chroma: Tensor
    over_chroma: Tensor
    x: Tensor
    side: Tensor
    angle: Tensor


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
    smallest = pixel.largest - chroma
    out = torch.empty_like(images) if out is None else out
    for channel, centre in enumerate(CENTRES):
        value = _height(pixel.angle - centre, channel).clamp_(0, 1)
        torch.addcmul(smallest, chroma, value, out=out[:, channel])
    return out


def rotate_hue_backward(
    images: Tensor, shift: Tensor, quantised: bool, grad: Tensor, out: Tensor | None = None
) -> Tensor:
    """Gradient of `rotate_hue` with respect to the images; `out` may be `grad`."""
    pixel = _analyse(images, shift, quantised)
    chroma = _kept_chroma(pixel, quantised)
    along_chroma, along_angle = torch.zeros_like(chroma), torch.zeros_like(chroma)
    for channel, centre in enumerate(CENTRES):
        offset = pixel.angle - centre
        side = offset.sgn()
        height = _height(offset, channel)
        inner = torch.ops.aten.hardtanh_backward(grad[:, channel], height, 0.0, 1.0)
        along_angle.addcmul_(inner, side, value=1 if channel == 0 else -1)
        along_chroma.addcmul_(grad[:, channel], height.clamp_(0, 1))
    total = grad.sum(1)
    along_chroma.sub_(total)  # the smallest channel is the largest less the chroma
    along_chroma = torch.ops.aten.threshold_backward(along_chroma, chroma, 0)
    along_angle.mul_(chroma).mul_(pixel.over_chroma).mul_(pixel.side)
    along_x = torch.ops.aten.hardtanh_backward(along_angle, pixel.x, -1.0, 1.0)
    along_x.mul_(0.5).sub_(along_angle)  # of 2R - G - B, with c fixed
    through_chroma = torch.mul(along_x, pixel.x).neg_()
    to_largest = total.add_(along_chroma, alpha=1 - HALF if quantised else 1).add_(through_chroma)
    to_smallest = through_chroma.add_(along_chroma).neg_()
    return _scatter(images, to_largest, to_smallest, along_x, out)


def _analyse(images: Tensor, shift: Tensor, quantised: bool) -> _Pixel:
    red, green, blue = images.unbind(1)
    largest = torch.maximum(torch.maximum(red, green), blue)
    chroma = largest - torch.minimum(torch.minimum(red, green), blue)
    over_chroma = chroma.clamp(min=TINY).reciprocal_()
    x = (red - green).add_(red).sub_(blue).mul_(over_chroma)
    side = torch.copysign(torch.ones((), dtype=x.dtype, device=x.device), green - blue)
    angle = x.clamp(-1, 1).mul_(0.5).sub_(x).add_(1.5).mul_(side)
    if quantised:
        angle.mul_(255 / 6)
        angle.sub_((angle / 255).floor_(), alpha=255).add_(shift)
        angle.sub_((angle / 256).floor_(), alpha=256).sub_(0.5).mul_(6 / 255)
    else:
        angle.add_(6 * shift)
        angle.sub_((angle / 6).floor_(), alpha=6)
    return _Pixel(largest, chroma, over_chroma, x, side, angle)


def _kept_chroma(pixel: _Pixel, quantised: bool) -> Tensor:
    """Chroma after the saturation byte was cut: half a level less on average."""
    if not quantised:
        return pixel.chroma
    return pixel.chroma.sub(pixel.largest, alpha=HALF).clamp_(min=0)


def _height(offset: Tensor, channel: int) -> Tensor:
    """Height of a channel above the smallest, in chromas and unclamped; takes `offset` over."""
    offset.abs_()
    return offset.sub_(1) if channel == 0 else offset.neg_().add_(2)


def _scatter(
    images: Tensor, to_largest: Tensor, to_smallest: Tensor, along_x: Tensor, out: Tensor | None
) -> Tensor:
    """Hand gradients to the channels they came from; of equal channels one gets it."""
    red, green, blue = images.unbind(1)
    pass_on = torch.ops.aten.threshold_backward
    over_green, over_blue, green_over_blue = red - green, red - blue, green - blue
    red_first = pass_on(to_largest, torch.minimum(over_green, over_blue), -TINY)
    green_first = pass_on(to_largest, torch.minimum(green_over_blue + TINY, -over_green), 0)
    to_largest.sub_(red_first).sub_(green_first)
    blue_last = pass_on(to_smallest, torch.minimum(over_blue, green_over_blue), -TINY)
    green_last = pass_on(to_smallest, torch.minimum(over_green, -green_over_blue - TINY), -TINY)
    to_smallest.sub_(blue_last).sub_(green_last)
    out = torch.empty_like(images) if out is None else out
    torch.add(red_first, to_smallest, out=out[:, 0]).add_(along_x, alpha=2)
    torch.add(green_first, green_last, out=out[:, 1]).sub_(along_x)
    torch.add(to_largest, blue_last, out=out[:, 2]).sub_(along_x)
    return out
