"""Crop, resize and flip as two batched matrix products with Pillow's own filter weights.

Pillow resizes separably, horizontally first, with filters that widen when the image shrinks, and
rounds to 8 bit in between (Pillow, `Resample.c`). A crop is the same product with the weights of
the crop's columns, a flip reverses their rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cp_plugin.mirror.base import portions
from cp_plugin.mirror.processor import compiled, serves

SUPPORT = {
    "nearest": 0.5,
    "box": 0.5,
    "bilinear": 1.0,
    "hamming": 1.0,
    "bicubic": 2.0,
    "lanczos": 3.0,
}
"""Half width of Pillow's filters, in pixels of the smaller image."""
Build = Callable[[], tuple[Tensor, Tensor]]
OVERSHOOTING = ("bicubic", "lanczos")
"""Filters with negative weights: 8-bit images are clipped after each pass."""


def filter_values(name: str, distance: Tensor) -> Tensor:
    """Evaluate one of Pillow's filters at distances from its centre, in place where possible."""
    if name in ("nearest", "box"):
        return ((distance > -0.5) & (distance <= 0.5)).to(distance.dtype)
    t = distance.abs_()
    if name == "bilinear":
        return t.neg_().add_(1).clamp_(min=0)
    if name == "bicubic":
        outer, inner = (2 - t).clamp_(min=0), (1 - t).clamp_(min=0)
        wings = (outer - 1).mul_(outer).mul_(outer).mul_(0.5)
        return wings.add_(inner.mul(-2).add_(1).mul_(inner).mul_(inner))
    if name == "hamming":
        window = 0.54 + 0.46 * torch.cos(torch.pi * t)
        return torch.where(t < 1, torch.sinc(t) * window, 0)
    return torch.where(t < 3, torch.sinc(t) * torch.sinc(t / 3), 0)


def resize_weights(
    start: Tensor, length: Tensor, source: int, target: int, filter_name: str, flip: Tensor | None
) -> Tensor:
    """Weights that crop `length` pixels from `start` and resize them to `target`.

    Args:
        start: (B,) first pixel of the crop, floating point.
        length: (B,) pixels in the crop, floating point.
        source: pixels along this axis of the image.
        target: pixels to make.
        filter_name: a key of `SUPPORT`.
        flip: (B,) truth values, or None.

    Returns:
        (B, target, source), each row adding up to one.
    """
    scale = (length / target)[:, None]
    row = torch.arange(target, device=start.device, dtype=start.dtype).add_(0.5)[None]
    if flip is not None:
        row = torch.where(flip[:, None], target - row, row)
    centre = row * scale + start[:, None]
    reach, spread = SUPPORT[filter_name], scale.clamp(min=1)
    taps = min(source, int(2 * reach * max(1.0, source / target)) + 1)
    first = (centre - reach * spread + 0.5).floor_().clamp_(0, source - taps)
    tap = torch.arange(taps, device=start.device, dtype=start.dtype)
    position = first + tap[:, None, None]  # taps first: the long axis is the fast one
    # Boxes of squeezed pictures begin and end within a pixel; these pixels belong to them.
    inside = (position > start[:, None] - 1).logical_and_(position < (start + length)[:, None])
    offset = (position + 0.5).sub_(centre).div_(spread)
    weights = filter_values(filter_name, offset).mul_(inside.to(offset.dtype))
    weights.div_(weights.sum(0))
    dense = start.new_zeros(len(start), target, source)
    return dense.scatter_(2, position.long().permute(1, 2, 0), weights.permute(1, 2, 0))


class _Separable(torch.autograd.Function):
    """rows @ images @ columns^T, optionally clamped to [0, 1] after each product.

    Matrices are as large as images: on a processor they are made again in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, build: Build, clamp: bool, value: Tensor | None
    ) -> Tensor:
        rows, columns = build()
        if value is None:
            out = images.new_empty(*images.shape[:2], rows.shape[1], columns.shape[1])
            for part in portions(images):
                wide = _horizontal(images[part], columns[_of(columns, part)], clamp)
                torch.matmul(rows[_of(rows, part), None], wide, out=out[part])
        else:
            out = value
        # On an accelerator starting the kernels that make them costs more than keeping them.
        made = (rows, columns) if images.device.type != "cpu" else None
        ctx.build = build if made is None else lambda: made
        if clamp:
            out.clamp_(0, 1)
            ctx.save_for_backward(images, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        rows, columns = ctx.build()
        saved = ctx.saved_tensors
        result = grads[0].new_empty(*grads[0].shape[:2], rows.shape[2], columns.shape[2])
        for part in portions(result):
            horizontal = columns[_of(columns, part)]
            grad = grads[0][part]
            if saved:
                grad = _hardtanh_backward(grad, saved[1][part], 0.0, 1.0)
            grad = torch.matmul(rows[_of(rows, part), None].mT, grad)
            if saved:
                wide = _horizontal(saved[0][part], horizontal, True)
                grad = _hardtanh_backward(grad, wide, 0.0, 1.0)
            n, c, height, _ = grad.shape
            flat = torch.matmul(grad.view(n, c * height, -1), horizontal)
            result[part] = flat.view(n, c, height, -1)
        return result, None, None, None


class _Banded(torch.autograd.Function):
    """The same on a processor, an image at a time."""

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, build: Build, clamp: bool, value: Tensor | None
    ) -> Tensor:
        banded = compiled("banded")
        out: Tensor = banded.forward(images, *build(), clamp) if value is None else value
        ctx.build = build
        if clamp:
            ctx.save_for_backward(images, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        clamped = ctx.saved_tensors or None
        return compiled("banded").backward(grads[0], *ctx.build(), clamped), None, None, None


_hardtanh_backward = torch.ops.aten.hardtanh_backward


def _horizontal(images: Tensor, columns: Tensor, clamp: bool) -> Tensor:
    b, c, height, width = images.shape
    wide = torch.matmul(images.reshape(b, c * height, width), columns.mT)
    if clamp:
        wide.clamp_(0, 1)
    return wide.view(b, c, height, -1)


def _of(matrices: Tensor, part: slice) -> slice:
    """Return the part of matrices that belongs to images, which may share one."""
    return part if len(matrices) > 1 else slice(None)


def separable(
    images: Tensor, build: Build, clamp: bool = False, value: Tensor | None = None
) -> Tensor:
    """Multiply every image with a matrix along each axis, columns (the horizontal pass) first.

    Args:
        images: (B, C, H, W).
        build: makes the matrices, always the same: rows (B or 1, h, H), columns (B or 1, w, W).
        clamp: to [0, 1] after each of the two products, as 8-bit images are.
        value: what the product comes out as where the host rounds on the way, (B, C, h, w): it is
            returned, with the gradient of the product. None: the product.

    Returns:
        (B, C, h, w), contiguous.
    """
    function = _Banded if serves(images) else _Separable
    out: Tensor = function.apply(images, build, clamp, value)
    return out
