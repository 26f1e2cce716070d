"""ColorJitter on a processor: all steps on one image while it lies in the cache, by Numba.

The arithmetic is that of `jitter.py` and `hue.py`, which explain it and serve everything else;
there every step passes over a batch that has left the cache meanwhile. Numba compiles at the first
call, within seconds, and keeps the result on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from cp_plugin.mirror import hue
from cp_plugin.mirror.jitter import CONTRAST, HUE, SATURATION
from cp_plugin.mirror.processor import in_threads

Array = NDArray[Any]

# Typed, since an untyped number would turn the arithmetic into float64.
ZERO, HALF, ONE, TWO, THREE, FOUR, SIX = (np.float32(n) for n in (0, 0.5, 1, 2, 3, 4, 6))
TWELFTH, BYTES, STEPS = np.float32(1 / 12), np.float32(1 / 256), np.float32(255 / 256)
SIXTHS, MIDDLE = np.float32(6 * 256 / 255), np.float32(0.5 * 6 / 255)
LOST, KEPT = np.float32(hue.HALF), np.float32(1 - hue.HALF)
TINY, HUGE, ALMOST_ONE = (np.float32(n) for n in (hue.TINY, hue.HUGE, hue.ALMOST_ONE))

_inlined: Any = njit(inline="always", fastmath=True)
_pixels: Any = njit(fastmath=True)
_images: Any = njit(cache=True, nogil=True)


class Plan(NamedTuple):
    """What happens to each of B images, as arrays on the processor."""

    order: Array
    """int64 (B, 4): kinds of step in the order in which they come; -1: none."""
    factor: Array
    """float32 (B, 4): of each kind; of hue its shift."""
    bias: Array
    """float32 (B, 4): added by each kind."""
    grey: Array
    """float32 (3,): the host's grey weights."""
    quantised: bool
    """Whether hue and saturation pass through 8 bit."""


def forward(images: Tensor, plan: Plan) -> Tensor:
    """Carry out the steps of every image.

    Args:
        images: (B, 3, H, W) in [0, 1], float32, on the processor.
        plan: the steps.

    Returns:
        (B, 3, H, W).
    """
    out = torch.empty_like(images, memory_format=torch.contiguous_format)
    _in_parts(_forward, _array(images), _array(out), plan)
    return out


def backward(images: Tensor, grad: Tensor, plan: Plan) -> Tensor:
    """Return the gradient (B, 3, H, W) of the images from that of `forward`'s result."""
    out = grad.clone(memory_format=torch.contiguous_format)
    _in_parts(_backward, _array(images), _array(out), plan)
    return out


def _in_parts(kernel: Callable[..., None], source: Array, target: Array, plan: Plan) -> None:
    def run(part: slice) -> None:
        rows = (array[part] for array in (plan.order, plan.factor, plan.bias))
        kernel(source[part], target[part], *rows, plan.grey, plan.quantised)

    in_threads(run, len(source))


def _array(images: Tensor) -> Array:
    array: Array = images.detach().contiguous().flatten(2).numpy()
    return array


@_images
def _forward(images, outs, order, factor, bias, grey, quantised):  # type: ignore[no-untyped-def]
    for b in range(len(images)):
        now, out = images[b].copy(), outs[b]
        for kind in order[b]:
            if kind < 0:
                continue
            if kind == HUE:
                _rotate(now, out, factor[b, kind], quantised)
            else:
                mean = _mean_grey(now, grey) if kind == CONTRAST else ZERO
                _mix(now, out, kind, factor[b, kind], bias[b, kind], mean, grey)
            now[:] = out
        out[:] = now


@_images
def _backward(images, grads, order, factor, bias, grey, quantised):  # type: ignore[no-untyped-def]
    steps = order.shape[1]
    for b in range(len(images)):
        tape = np.empty((steps + 1, images.shape[1], images.shape[2]), np.float32)
        tape[0] = images[b]
        for step in range(steps):
            kind, now, after = order[b, step], tape[step], tape[step + 1]
            if kind < 0:
                after[:] = now
            elif kind == HUE:
                _rotate(now, after, factor[b, kind], quantised)
            else:
                mean = _mean_grey(now, grey) if kind == CONTRAST else ZERO
                _mix(now, after, kind, factor[b, kind], bias[b, kind], mean, grey)
        for step in range(steps - 1, -1, -1):
            kind = order[b, step]
            if kind == HUE:
                _rotate_backward(tape[step], grads[b], factor[b, kind], quantised)
            elif kind >= 0:
                _mix_backward(tape[step + 1], grads[b], kind, factor[b, kind], grey)


@_pixels
def _mean_grey(image, grey):  # type: ignore[no-untyped-def]
    total = ZERO
    for i in range(image.shape[1]):
        total += grey[0] * image[0, i] + grey[1] * image[1, i] + grey[2] * image[2, i]
    return total / np.float32(image.shape[1])


@_pixels
def _mix(image, out, kind, factor, bias, mean, grey):  # type: ignore[no-untyped-def]
    """Mix with black, with the mean grey, or with the grey of the pixel itself."""
    of_grey = ONE - factor if kind == SATURATION else ZERO
    offset = bias + (ONE - factor) * mean if kind == CONTRAST else bias
    for i in range(image.shape[1]):
        red, green, blue = image[0, i], image[1, i], image[2, i]
        rest = offset + of_grey * (grey[0] * red + grey[1] * green + grey[2] * blue)
        out[0, i] = _clamp(factor * red + rest, ZERO, ONE)
        out[1, i] = _clamp(factor * green + rest, ZERO, ONE)
        out[2, i] = _clamp(factor * blue + rest, ZERO, ONE)


@_pixels
def _mix_backward(result, grad, kind, factor, grey):  # type: ignore[no-untyped-def]
    of_grey = ONE - factor if kind == SATURATION else ZERO
    total = ZERO
    for i in range(result.shape[1]):
        red = _where_open(grad[0, i], result[0, i])
        green = _where_open(grad[1, i], result[1, i])
        blue = _where_open(grad[2, i], result[2, i])
        inner = red + green + blue
        total += inner
        grad[0, i] = factor * red + of_grey * grey[0] * inner
        grad[1, i] = factor * green + of_grey * grey[1] * inner
        grad[2, i] = factor * blue + of_grey * grey[2] * inner
    if kind == CONTRAST:
        through_mean = (ONE - factor) * total / np.float32(result.shape[1])
        for channel in range(3):
            for i in range(result.shape[1]):
                grad[channel, i] += grey[channel] * through_mean


@_pixels
def _rotate(image, out, shift, quantised):  # type: ignore[no-untyped-def]
    for i in range(image.shape[1]):
        chroma, _, _, _, angle, largest = _analyse(
            image[0, i], image[1, i], image[2, i], shift, quantised
        )
        smallest = largest - chroma
        out[0, i] = smallest + chroma * _clamp(abs(angle - THREE) - ONE, ZERO, ONE)
        out[1, i] = smallest + chroma * _clamp(TWO - abs(angle - TWO), ZERO, ONE)
        out[2, i] = smallest + chroma * _clamp(TWO - abs(angle - FOUR), ZERO, ONE)


@_pixels
def _rotate_backward(image, grad, shift, quantised):  # type: ignore[no-untyped-def]
    kept = KEPT if quantised else ONE
    for i in range(image.shape[1]):
        chroma, over_chroma, x, side, angle, _ = _analyse(
            image[0, i], image[1, i], image[2, i], shift, quantised
        )
        red, green, blue = grad[0, i], grad[1, i], grad[2, i]
        from_red, from_green, from_blue = angle - THREE, angle - TWO, angle - FOUR
        of_red = _clamp(abs(from_red) - ONE, ZERO, ONE)
        of_green = _clamp(TWO - abs(from_green), ZERO, ONE)
        of_blue = _clamp(TWO - abs(from_blue), ZERO, ONE)
        total = red + green + blue
        along_chroma = red * of_red + green * of_green + blue * of_blue - total
        along_chroma = along_chroma if chroma > ZERO else ZERO
        along_angle = (
            _where_open(red, of_red) * _sign(from_red)
            - _where_open(green, of_green) * _sign(from_green)
            - _where_open(blue, of_blue) * _sign(from_blue)
        ) * (side * chroma * over_chroma)
        along_x = (HALF * along_angle if abs(x) < ONE else ZERO) - along_angle
        to_smallest = along_x * x - along_chroma
        to_largest = total + kept * along_chroma - along_x * x
        # Red is the largest where x >= 1 and the smallest where x <= -1.
        red_largest = to_largest if x > ALMOST_ONE else ZERO
        red_smallest = to_smallest if -x > ALMOST_ONE else ZERO
        to_largest -= red_largest
        to_smallest -= red_smallest
        over_blue = HALF * (side + ONE)
        over_green = ONE - over_blue
        grad[0, i] = red_largest + red_smallest + TWO * along_x
        grad[1, i] = to_largest * over_blue + to_smallest * over_green - along_x
        grad[2, i] = to_smallest * over_blue + to_largest * over_green - along_x


@_inlined
def _analyse(red, green, blue, shift, quantised):  # type: ignore[no-untyped-def]
    """Return chroma, 1 / chroma before it is cut, x, side, angle and the largest channel."""
    largest = max(max(red, green), blue)
    chroma = largest - min(min(red, green), blue)
    over_chroma = ONE / max(chroma, TINY)
    x = (red - green + red - blue) * over_chroma
    side = ONE if green >= blue else -ONE
    turn = (_clamp(x, -ONE, ONE) - TWO * x + THREE) * side * TWELFTH
    turn -= np.floor(turn)
    if quantised:
        wrapped = shift * BYTES + turn * STEPS
        angle = (wrapped - np.floor(wrapped)) * SIXTHS - MIDDLE
        chroma = max(chroma - LOST * largest, ZERO)
    else:
        turn += shift
        angle = (turn - np.floor(turn)) * SIX
    return chroma, over_chroma, x, side, angle, largest


@_inlined
def _clamp(value, low, high):  # type: ignore[no-untyped-def]
    return min(max(value, low), high)


@_inlined
def _where_open(grad, clamped):  # type: ignore[no-untyped-def]
    """Return the gradient where a value clamped to [0, 1] moves."""
    return grad if clamped > ZERO and clamped < ONE else ZERO


@_inlined
def _sign(value):  # type: ignore[no-untyped-def]
    return _clamp(value * HUGE, -ONE, ONE)
