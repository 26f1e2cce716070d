"""Hue rotation as Pillow does it, in closed form, with a gradient that is finite everywhere.

In the HSV hexcone a pixel is its smallest channel m, its chroma c and an angle h in [0, 6); channel
n of the rotated pixel is m + c * v(h - 2n), v(d) = clamp(2 - |d|, 0, 1). The angle itself is a
clamp: with x = (2R - G - B) / c it is +-(1.5 - x + clamp(x, -1, 1) / 2), the sign that of G - B.
So nothing has to be sorted, and c * dh holds no division by c. Pillow keeps hue and saturation in
8 bit, truncates both, and lets the hue byte wrap at 256 although its circle has 255 steps (Pillow,
`Convert.c`; torchvision adds the byte).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cp_plugin.mirror.base import LEVEL

HALF = LEVEL / 2
TINY, HUGE = 1e-30, 1e30
ALMOST_ONE = 1 - 1e-7
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
    """1 where green is at least blue, -1 elsewhere."""
    offsets: tuple[Tensor, ...]
    """Angles from the centres of red, green and blue."""
    heights: tuple[Tensor, ...]
    """Of red, green and blue above the smallest channel, in chromas, clamped."""


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
    x = (red - green).add_(red).sub_(blue).mul_(over_chroma)
    side = torch.copysign(torch.ones((), dtype=x.dtype, device=x.device), green - blue)
    turn = x.clamp(-1, 1).sub_(x, alpha=2).add_(3).mul_(side)
    angle = _shifted(turn, shift, quantised)
    if quantised:
        chroma.sub_(largest, alpha=HALF).clamp_(min=0)
    smallest = largest.sub_(chroma)
    offsets = tuple(angle - centre for centre in CENTRES)
    heights = tuple(
        (2 - offset.abs() if channel else offset.abs().sub_(1)).clamp_(0, 1)
        for channel, offset in enumerate(offsets)
    )
    for channel, height in enumerate(heights):
        _put(images[:, channel], torch.addcmul, smallest, chroma, height)
    return Analysis(chroma, over_chroma, x, side, offsets, heights)


def _put(place: Tensor, function: Callable[..., Tensor], *values: Tensor, **named: Any) -> None:
    """Write what a function makes of values into a channel of images.

    A compiler knows no `out=` that has gaps, and fuses the copy.
    """
    if torch.compiler.is_compiling():
        place.copy_(function(*values, **named))
    else:
        function(*values, out=place, **named)


def _shifted(twelfths: Tensor, shift: Tensor, quantised: bool) -> Tensor:
    """Add the shift to hues in (-6, 6], twelfths of a turn; return angles on a circle of six."""
    turn = twelfths.mul_(1 / 12)
    turn.sub_(turn.floor())
    if not quantised:
        turn.add_(shift)
        return turn.sub_(turn.floor()).mul_(6)
    wrapped = torch.add(shift / 256, turn, alpha=255 / 256)
    return wrapped.sub_(wrapped.floor()).mul_(6 * 256 / 255).sub_(0.5 * 6 / 255)


def rotate_hue_backward(grad: Tensor, found: Analysis, quantised: bool) -> None:
    """Turn the gradient (B, 3, H, W) of the rotated images into that of the images, in place."""
    total = (grad[:, 0] + grad[:, 1]).add_(grad[:, 2])
    # The smallest channel is the largest less the chroma.
    along_chroma = total.neg()
    along_angle = torch.zeros_like(total)
    for channel, (offset, height) in enumerate(zip(found.offsets, found.heights, strict=True)):
        given = grad[:, channel]
        along_chroma.addcmul_(given, height)
        inner = _hardtanh_backward(given, height, 0.0, 1.0)
        sign = torch.mul(offset, HUGE).clamp_(-1, 1)
        along_angle.addcmul_(inner, sign, value=-1 if channel else 1)
    along_chroma = _threshold_backward(along_chroma, found.chroma, 0)
    along_angle.mul_(found.side).mul_(found.chroma).mul_(found.over_chroma)
    along_x = _hardtanh_backward(along_angle, found.x, -1.0, 1.0)
    along_x.mul_(0.5).sub_(along_angle)  # of 2R - G - B, with the chroma fixed
    through_chroma = torch.mul(along_x, found.x)
    to_largest = total.add_(along_chroma, alpha=1 - HALF if quantised else 1).sub_(through_chroma)
    to_smallest = through_chroma.sub_(along_chroma)
    _scatter(grad, found, to_largest, to_smallest, along_x)


_hardtanh_backward = torch.ops.aten.hardtanh_backward
_threshold_backward = torch.ops.aten.threshold_backward


def _scatter(
    out: Tensor, found: Analysis, to_largest: Tensor, to_smallest: Tensor, along_x: Tensor
) -> None:
    """Hand gradients to the channels they came from.

    Red is the largest where x >= 1 and the smallest where x <= -1; otherwise `side` decides between
    green and blue.
    """
    red = _threshold_backward(to_largest, found.x, ALMOST_ONE)
    red_smallest = _threshold_backward(to_smallest, found.x.neg(), ALMOST_ONE)
    to_largest.sub_(red)
    to_smallest.sub_(red_smallest)
    over_blue = found.side.add(1).mul_(0.5)
    green, blue = to_largest * over_blue, to_smallest * over_blue
    to_largest.sub_(green)
    to_smallest.sub_(blue)
    _put(out[:, 0], torch.add, red.add_(red_smallest), along_x, alpha=2)
    _put(out[:, 1], torch.sub, green.add_(to_smallest), along_x)
    _put(out[:, 2], torch.sub, blue.add_(to_largest), along_x)
