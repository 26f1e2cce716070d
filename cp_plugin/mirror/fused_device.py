"""ColorJitter on a GPU: all steps on a block of pixels while it lies in registers, by Triton.

The arithmetic is that of `jitter.py` and `hue.py`, which explain it and serve everything else;
there every step is a dozen kernels over the batch, and starting them takes longer than they do.
Contrast mixes with the mean grey of the whole image, so it is known before pixels are changed, and
so is the sum of gradients that passes it: two kernels each way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cp_plugin.mirror import hue
from cp_plugin.mirror.jitter import CONTRAST, HUE, SATURATION

BLOCK = 1024
"""Pixels that a program changes at a time."""
STEPS = 4
CONTRAST_, SATURATION_, HUE_, STEPS_ = map(tl.constexpr, (CONTRAST, SATURATION, HUE, STEPS))
HALF, TINY = tl.constexpr(hue.HALF), tl.constexpr(hue.TINY)
ALMOST_ONE = tl.constexpr(hue.ALMOST_ONE)


class Plan(NamedTuple):
    """What happens to each of B images, as tensors on the device."""

    order: Tensor
    """int64 (B, 4): kinds of step in the order in which they come; -1: none."""
    amounts: Tensor
    """float32 (2, B, 4): of each kind factor and bias; of hue its shift."""
    grey: Tensor
    """float32 (3,): the host's grey weights."""
    has_contrast: bool
    quantised: bool
    """Whether hue and saturation pass through 8 bit."""


def forward(images: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Carry out the steps of every image.

    Args:
        images: (B, 3, H, W) in [0, 1], float32, on the device, contiguous.
        plan: the steps.

    Returns:
        (B, 3, H, W), and the mean grey (B,) that contrast mixed with, for `backward`.
    """
    out, means = torch.empty_like(images), images.new_zeros(len(images))
    pixels = images[0, 0].numel()
    given = (images, plan.order, *plan.amounts, plan.grey)
    if plan.has_contrast:
        _means[(len(images),)](*given, means, pixels, BLOCK, plan.quantised)
    grid = (len(images), triton.cdiv(pixels, BLOCK))
    _colours[grid](*given, means, out, pixels, BLOCK, plan.quantised)
    return out, means


def backward(images: Tensor, means: Tensor, grad: Tensor, plan: Plan) -> Tensor:
    """Return the gradient (B, 3, H, W) of the images from that of `forward`'s result."""
    out, sums = torch.empty_like(images), images.new_zeros(len(images))
    pixels = images[0, 0].numel()
    given = (images, plan.order, *plan.amounts, plan.grey, means, grad.contiguous(), sums)
    if plan.has_contrast:
        _sums[(len(images),)](*given, pixels, BLOCK, plan.quantised)
    grid = (len(images), triton.cdiv(pixels, BLOCK))
    _gradients[grid](*given, out, pixels, BLOCK, plan.quantised)
    return out


@triton.jit
def _means(  # type: ignore[no-untyped-def]
    images, order, factors, biases, weights, means, pixels,
    BLOCK: tl.constexpr, QUANTISED: tl.constexpr,
):  # fmt: skip
    """Find the mean grey of an image as it is when contrast comes, if it does."""
    b = tl.program_id(0)
    steps, grey = _steps(order, factors, biases, b), _three(weights)
    place = _place_of(steps[0], CONTRAST_)
    if place < STEPS_:
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, pixels, BLOCK):
            at, inside = _at(b, start, pixels, BLOCK)
            pixel = _load(images, at, pixels, inside)
            for step in tl.static_range(STEPS_):
                if step < place:
                    pixel = _step(pixel, steps, step, 0.0, grey, QUANTISED)
            shade = grey[0] * pixel[0] + grey[1] * pixel[1] + grey[2] * pixel[2]
            total += tl.where(inside, shade, 0.0)
        tl.store(means + b, tl.sum(total, 0) / pixels)


@triton.jit
def _colours(  # type: ignore[no-untyped-def]
    images, order, factors, biases, weights, means, outs, pixels,
    BLOCK: tl.constexpr, QUANTISED: tl.constexpr,
):  # fmt: skip
    """Change the colours of a block of pixels."""
    b = tl.program_id(0)
    steps, grey, mean = _steps(order, factors, biases, b), _three(weights), tl.load(means + b)
    at, inside = _at(b, tl.program_id(1) * BLOCK, pixels, BLOCK)
    pixel = _load(images, at, pixels, inside)
    for step in tl.static_range(STEPS_):
        pixel = _step(pixel, steps, step, mean, grey, QUANTISED)
    _store(outs, at, pixels, inside, pixel)


@triton.jit
def _sums(  # type: ignore[no-untyped-def]
    images, order, factors, biases, weights, means, grads, sums, pixels,
    BLOCK: tl.constexpr, QUANTISED: tl.constexpr,
):  # fmt: skip
    """Find the gradient of the mean grey that contrast mixes with, over the number of pixels."""
    b = tl.program_id(0)
    steps, grey, mean = _steps(order, factors, biases, b), _three(weights), tl.load(means + b)
    place = _place_of(steps[0], CONTRAST_)
    if place < STEPS_:
        total = tl.zeros((BLOCK,), tl.float32)
        factor = tl.load(factors + b * STEPS_ + CONTRAST_)
        for start in range(0, pixels, BLOCK):
            at, inside = _at(b, start, pixels, BLOCK)
            first = _load(images, at, pixels, inside)
            second = _step(first, steps, 0, mean, grey, QUANTISED)
            third = _step(second, steps, 1, mean, grey, QUANTISED)
            fourth = _step(third, steps, 2, mean, grey, QUANTISED)
            last = _step(fourth, steps, 3, mean, grey, QUANTISED)
            grad = _load(grads, at, pixels, inside)
            if place < 3:
                grad = _step_back(grad, fourth, last, steps, 3, 0.0, grey, QUANTISED)
            if place < 2:
                grad = _step_back(grad, third, fourth, steps, 2, 0.0, grey, QUANTISED)
            if place < 1:
                grad = _step_back(grad, second, third, steps, 1, 0.0, grey, QUANTISED)
            red, green, blue = second
            if place == 1:
                red, green, blue = third
            if place == 2:
                red, green, blue = fourth
            if place == 3:
                red, green, blue = last
            inner = _where_open(grad[0], red) + _where_open(grad[1], green)
            total += tl.where(inside, inner + _where_open(grad[2], blue), 0.0)
        tl.store(sums + b, (1 - factor) * tl.sum(total, 0) / pixels)


@triton.jit
def _gradients(  # type: ignore[no-untyped-def]
    images, order, factors, biases, weights, means, grads, sums, outs, pixels,
    BLOCK: tl.constexpr, QUANTISED: tl.constexpr,
):  # fmt: skip
    """Turn the gradient of a block of changed pixels into that of the pixels."""
    b = tl.program_id(0)
    steps, grey, mean = _steps(order, factors, biases, b), _three(weights), tl.load(means + b)
    through = tl.load(sums + b)
    at, inside = _at(b, tl.program_id(1) * BLOCK, pixels, BLOCK)
    first = _load(images, at, pixels, inside)
    second = _step(first, steps, 0, mean, grey, QUANTISED)
    third = _step(second, steps, 1, mean, grey, QUANTISED)
    fourth = _step(third, steps, 2, mean, grey, QUANTISED)
    last = _step(fourth, steps, 3, mean, grey, QUANTISED)
    grad = _load(grads, at, pixels, inside)
    grad = _step_back(grad, fourth, last, steps, 3, through, grey, QUANTISED)
    grad = _step_back(grad, third, fourth, steps, 2, through, grey, QUANTISED)
    grad = _step_back(grad, second, third, steps, 1, through, grey, QUANTISED)
    grad = _step_back(grad, first, second, steps, 0, through, grey, QUANTISED)
    _store(outs, at, pixels, inside, grad)


@triton.jit
def _steps(order, factors, biases, b):  # type: ignore[no-untyped-def]
    """Return the kinds of an image's steps, and where factor and bias of each kind are."""
    kinds = order + b * STEPS_
    named = (tl.load(kinds), tl.load(kinds + 1), tl.load(kinds + 2), tl.load(kinds + 3))
    return named, factors + b * STEPS_, biases + b * STEPS_


@triton.jit
def _place_of(kinds, wanted: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the step at which a kind comes; as many as there are where it does not."""
    place = tl.where(kinds[3] == wanted, 3, STEPS_)
    place = tl.where(kinds[2] == wanted, 2, place)
    place = tl.where(kinds[1] == wanted, 1, place)
    return tl.where(kinds[0] == wanted, 0, place)


@triton.jit
def _three(values):  # type: ignore[no-untyped-def]
    return tl.load(values), tl.load(values + 1), tl.load(values + 2)


@triton.jit
def _at(b, start, pixels, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    pixel = start + tl.arange(0, BLOCK)
    return b.to(tl.int64) * 3 * pixels + pixel, pixel < pixels


@triton.jit
def _load(images, at, pixels, inside):  # type: ignore[no-untyped-def]
    red = tl.load(images + at, inside, 0.0)
    green = tl.load(images + at + pixels, inside, 0.0)
    return red, green, tl.load(images + at + 2 * pixels, inside, 0.0)


@triton.jit
def _store(images, at, pixels, inside, pixel):  # type: ignore[no-untyped-def]
    tl.store(images + at, pixel[0], inside)
    tl.store(images + at + pixels, pixel[1], inside)
    tl.store(images + at + 2 * pixels, pixel[2], inside)


@triton.jit
def _step(pixel, steps, number: tl.constexpr, mean, grey, QUANTISED: tl.constexpr):  # type: ignore[no-untyped-def]
    red, green, blue = pixel
    kind = steps[0][number]
    if kind >= 0:
        factor, bias = tl.load(steps[1] + kind), tl.load(steps[2] + kind)
        if kind == HUE_:
            chroma, _, _, _, angle, largest = _analyse(red, green, blue, factor, QUANTISED)
            smallest = largest - chroma
            red = smallest + chroma * _clamp(tl.abs(angle - 3.0) - 1.0, 0.0, 1.0)
            green = smallest + chroma * _clamp(2.0 - tl.abs(angle - 2.0), 0.0, 1.0)
            blue = smallest + chroma * _clamp(2.0 - tl.abs(angle - 4.0), 0.0, 1.0)
        else:
            of_grey = tl.where(kind == SATURATION_, 1.0 - factor, 0.0)
            offset = bias + tl.where(kind == CONTRAST_, (1.0 - factor) * mean, 0.0)
            rest = offset + of_grey * (grey[0] * red + grey[1] * green + grey[2] * blue)
            red = _clamp(factor * red + rest, 0.0, 1.0)
            green = _clamp(factor * green + rest, 0.0, 1.0)
            blue = _clamp(factor * blue + rest, 0.0, 1.0)
    return red, green, blue


@triton.jit
def _step_back(  # type: ignore[no-untyped-def]
    grad, before, after, steps, number: tl.constexpr, through, grey, QUANTISED: tl.constexpr
):
    """Take a gradient back through a step; `through` is that of the mean grey, of each pixel."""
    red, green, blue = grad
    kind = steps[0][number]
    if kind >= 0:
        factor = tl.load(steps[1] + kind)
        if kind == HUE_:
            red, green, blue = _rotate_back(red, green, blue, before, factor, QUANTISED)
        else:
            red = _where_open(red, after[0])
            green = _where_open(green, after[1])
            blue = _where_open(blue, after[2])
            of_grey = tl.where(kind == SATURATION_, 1.0 - factor, 0.0)
            rest = of_grey * (red + green + blue) + tl.where(kind == CONTRAST_, through, 0.0)
            red = factor * red + grey[0] * rest
            green = factor * green + grey[1] * rest
            blue = factor * blue + grey[2] * rest
    return red, green, blue


@triton.jit
def _rotate_back(red, green, blue, before, shift, QUANTISED: tl.constexpr):  # type: ignore[no-untyped-def]
    chroma, over_chroma, x, side, angle, _ = _analyse(
        before[0], before[1], before[2], shift, QUANTISED
    )
    kept = 1.0
    if QUANTISED:
        kept = 1.0 - HALF
    of_red = _clamp(tl.abs(angle - 3.0) - 1.0, 0.0, 1.0)
    of_green = _clamp(2.0 - tl.abs(angle - 2.0), 0.0, 1.0)
    of_blue = _clamp(2.0 - tl.abs(angle - 4.0), 0.0, 1.0)
    total = red + green + blue
    along_chroma = red * of_red + green * of_green + blue * of_blue - total
    along_chroma = tl.where(chroma > 0.0, along_chroma, 0.0)
    along_angle = _where_open(red, of_red) * _sign(angle - 3.0)
    along_angle -= _where_open(green, of_green) * _sign(angle - 2.0)
    along_angle -= _where_open(blue, of_blue) * _sign(angle - 4.0)
    along_angle *= side * chroma * over_chroma
    along_x = tl.where(tl.abs(x) < 1.0, 0.5 * along_angle, 0.0) - along_angle
    to_smallest = along_x * x - along_chroma
    to_largest = total + kept * along_chroma - along_x * x
    # Red is the largest where x >= 1 and the smallest where x <= -1.
    red_largest = tl.where(x > ALMOST_ONE, to_largest, 0.0)
    red_smallest = tl.where(-x > ALMOST_ONE, to_smallest, 0.0)
    to_largest -= red_largest
    to_smallest -= red_smallest
    over_blue = 0.5 * (side + 1.0)
    over_green = 1.0 - over_blue
    of_green_ = to_largest * over_blue + to_smallest * over_green - along_x
    of_blue_ = to_smallest * over_blue + to_largest * over_green - along_x
    return red_largest + red_smallest + 2.0 * along_x, of_green_, of_blue_


@triton.jit
def _analyse(red, green, blue, shift, QUANTISED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return chroma, 1 / chroma before it is cut, x, side, angle and the largest channel."""
    largest = tl.maximum(tl.maximum(red, green), blue)
    chroma = largest - tl.minimum(tl.minimum(red, green), blue)
    over_chroma = 1.0 / tl.maximum(chroma, TINY)
    x = (red - green + red - blue) * over_chroma
    side = tl.where(green >= blue, 1.0, -1.0)
    turn = (_clamp(x, -1.0, 1.0) - 2.0 * x + 3.0) * side * (1.0 / 12.0)
    turn -= tl.floor(turn)
    if QUANTISED:
        wrapped = shift * (1.0 / 256.0) + turn * (255.0 / 256.0)
        angle = (wrapped - tl.floor(wrapped)) * (6.0 * 256.0 / 255.0) - 0.5 * 6.0 / 255.0
        chroma = tl.maximum(chroma - HALF * largest, 0.0)
    else:
        turn += shift
        angle = (turn - tl.floor(turn)) * 6.0
    return chroma, over_chroma, x, side, angle, largest


@triton.jit
def _clamp(value, low, high):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(value, low), high)


@triton.jit
def _where_open(grad, clamped):  # type: ignore[no-untyped-def]
    """Return the gradient where a value clamped to [0, 1] moves."""
    return tl.where((clamped > 0.0) & (clamped < 1.0), grad, 0.0)


@triton.jit
def _sign(value):  # type: ignore[no-untyped-def]
    return tl.where(value > 0.0, 1.0, tl.where(value < 0.0, -1.0, 0.0))


def as_plan(params: dict[str, Any]) -> Plan:
    """Return what `ColorJitter.sample` drew as a plan."""
    return Plan(
        params["steps"],
        params["amounts"],
        params["grey"],
        params["has_contrast"],
        params["quantised"],
    )
