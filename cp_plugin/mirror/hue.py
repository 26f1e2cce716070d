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


class Analysis(NamedTuple):
    """What the gradient of a rotation needs; (B, H, W) where nothing else is said."""

    chroma: Tensor
    """As Pillow's saturation byte keeps it."""
    over_chroma: Tensor
    x: Tensor
    side: Tensor
    offsets: Tensor
    """(B, 3, H, W) angles from the centres of red, green and blue."""
    heights: Tensor
    """(B, 3, H, W) heights above the smallest channel, in chromas, clamped."""
    differences: tuple[Tensor, Tensor, Tensor]
    """R - G, R - B, G - B."""


def rotate_hue(images: Tensor, shift: Tensor, quantised: bool) -> Analysis:
    """Rotate the hue of images in place.

    Args:
        images: (B, 3, H, W) in [0, 1].
        shift: (B, 1, 1): whole 8-bit hue steps in [0, 255] if quantised, else turns.
        quantised: whether hue and saturation pass through 8 bit.

    Returns:
        What `rotate_hue_backward` needs.
    """
    red, green, blue = images.unbind(1)
    largest = torch.maximum(torch.maximum(red, green), blue)
    chroma = largest - torch.minimum(torch.minimum(red, green), blue)
    over_chroma = chroma.clamp(min=TINY).reciprocal_()
    differences = (red - green, red - blue, green - blue)
    x = (differences[0] + differences[1]).mul_(over_chroma)
    side = torch.copysign(torch.full((), 1 / 12, dtype=x.dtype, device=x.device), differences[2])
    turn = x.clamp(-1, 1).sub_(x, alpha=2).add_(3).mul_(side)
    angle = _shifted(turn, shift, quantised)
    if quantised:
        chroma.sub_(largest, alpha=HALF).clamp_(min=0)
    smallest = largest.sub_(chroma)
    centres, slopes, tops = _trapezoids(images)
    offsets = angle[:, None] - centres
    heights = torch.addcmul(tops, slopes, offsets.abs()).clamp_(0, 1)
    torch.addcmul(smallest[:, None], chroma[:, None], heights, out=images)
    return Analysis(chroma, over_chroma, x, side, offsets, heights, differences)


def _trapezoids(like: Tensor) -> Tensor:
    """Return centres, slopes and tops (3, 3, 1, 1) of the heights of red, green and blue."""
    return like.new_tensor((CENTRES, (1.0, -1.0, -1.0), (-1.0, 2.0, 2.0)))[:, :, None, None]


def _shifted(turn: Tensor, shift: Tensor, quantised: bool) -> Tensor:
    """Add the shift to hues in turns, (-0.5, 0.5]; return angles on a circle of six."""
    turn.sub_(turn.floor())
    if not quantised:
        turn.add_(shift)
        return turn.sub_(turn.floor()).mul_(6)
    wrapped = torch.add(shift / 256, turn, alpha=255 / 256)
    return wrapped.sub_(wrapped.floor()).mul_(6 * 256 / 255).sub_(0.5 * 6 / 255)


def rotate_hue_backward(grad: Tensor, found: Analysis, quantised: bool) -> None:
    """Turn the gradient (B, 3, H, W) of the rotated images into that of the images, in place."""
    total = _sum(grad)
    # The smallest channel is the largest less the chroma.
    along_chroma = _sum(grad * found.heights).sub_(total)
    along_chroma = _threshold_backward(along_chroma, found.chroma, 0)
    inner = _hardtanh_backward(grad, found.heights, 0.0, 1.0).mul_(found.offsets.sgn())
    along_angle = (inner[:, 0] - inner[:, 1]).sub_(inner[:, 2]).mul_(found.side)
    along_angle.mul_(found.chroma).mul_(found.over_chroma).mul_(12)
    along_x = _hardtanh_backward(along_angle, found.x, -1.0, 1.0)
    along_x.mul_(0.5).sub_(along_angle)  # of 2R - G - B, with the chroma fixed
    through_chroma = torch.mul(along_x, found.x)
    to_largest = total.add_(along_chroma, alpha=1 - HALF if quantised else 1).sub_(through_chroma)
    to_smallest = through_chroma.sub_(along_chroma)
    _scatter(grad, found.differences, to_largest, to_smallest, along_x)


def _sum(images: Tensor) -> Tensor:
    """Sum over the channels; faster than a reduction over three."""
    return (images[:, 0] + images[:, 1]).add_(images[:, 2])


_hardtanh_backward = torch.ops.aten.hardtanh_backward
_threshold_backward = torch.ops.aten.threshold_backward


def _scatter(
    out: Tensor,
    differences: tuple[Tensor, Tensor, Tensor],
    to_largest: Tensor,
    to_smallest: Tensor,
    along_x: Tensor,
) -> None:
    """Hand gradients to the channels they came from; of equal channels one gets it."""
    red_green, red_blue, green_blue = differences
    red_first = _threshold_backward(to_largest, torch.minimum(red_green, red_blue), -TINY)
    green_red = -red_green
    green_first = _threshold_backward(to_largest, torch.minimum(green_blue + TINY, green_red), 0)
    to_largest.sub_(red_first).sub_(green_first)
    blue_last = _threshold_backward(to_smallest, torch.minimum(red_blue, green_blue), -TINY)
    blue_green = (-TINY) - green_blue
    green_last = _threshold_backward(to_smallest, torch.minimum(red_green, blue_green), -TINY)
    to_smallest.sub_(blue_last).sub_(green_last)
    torch.add(red_first, to_smallest, out=out[:, 0]).add_(along_x, alpha=2)
    torch.add(green_first, green_last, out=out[:, 1]).sub_(along_x)
    torch.add(to_largest, blue_last, out=out[:, 2]).sub_(along_x)
