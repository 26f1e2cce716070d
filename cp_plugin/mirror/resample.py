"""Crop, resize and flip as two batched matrix products with Pillow's own filter weights.

Pillow resizes separably, horizontally first, with filters that widen when the image shrinks, and
rounds to 8 bit in between (Pillow, `Resample.c`). A crop is the same product with the weights of
the crop's columns, a flip reverses their rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SUPPORT = {"bilinear": 1.0, "bicubic": 2.0, "box": 0.5, "hamming": 1.0, "lanczos": 3.0}
"""Half width of Pillow's filters, in pixels of the smaller image."""


def filter_values(name: str, distance: Tensor) -> Tensor:
    """Evaluate one of Pillow's filters at distances from its centre, in place where possible."""
    t = distance.abs_()
    if name == "bilinear":
        return t.neg_().add_(1).clamp_(min=0)
    if name == "bicubic":
        outer, inner = (2 - t).clamp_(min=0), (1 - t).clamp_(min=0)
        wings = (outer - 1).mul_(outer).mul_(outer).mul_(0.5)
        return wings.add_(inner.mul(-2).add_(1).mul_(inner).mul_(inner))
    if name == "box":
        return ((distance > -0.5) & (distance <= 0.5)).to(t.dtype)
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
        filter_name: `nearest` or a key of `SUPPORT`.
        flip: (B,) truth values, or None.

    Returns:
        (B, target, source), each row adding up to one.
    """
    scale = (length / target)[:, None]
    row = torch.arange(target, device=start.device, dtype=start.dtype).add_(0.5)[None]
    if flip is not None:
        row = torch.where(flip[:, None], target - row, row)
    centre = row * scale
    column = torch.arange(source, device=start.device, dtype=start.dtype)
    if filter_name == "nearest":
        chosen = centre.floor() + start[:, None]
        picked: Tensor = chosen[:, :, None] == column
        return picked.to(start.dtype)
    spread = scale.clamp(min=1)[:, :, None]
    offset = column + 0.5 - (centre + start[:, None])[:, :, None]
    weights = filter_values(filter_name, offset.div_(spread))
    inside = (column >= start[:, None]) & (column < (start + length)[:, None])
    weights.mul_(inside[:, None])
    return weights.div_(weights.sum(2, keepdim=True))


class _Separable(torch.autograd.Function):
    """rows @ images @ columns^T, optionally clamped to [0, 1] after each product."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, rows: Tensor, columns: Tensor, clamp: bool) -> Tensor:
        b, c, height, width = images.shape
        wide = torch.matmul(images.reshape(b, c * height, width), columns.mT)
        wide = wide.view(b, c, height, -1)
        if clamp:
            wide.clamp_(0, 1)
        out = torch.matmul(rows[:, None], wide)
        if clamp:
            out.clamp_(0, 1)
            ctx.save_for_backward(rows, columns, wide, out)
        else:
            ctx.save_for_backward(rows, columns)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad = grads[0]
        rows, columns, *clamped = ctx.saved_tensors
        if clamped:
            grad = torch.ops.aten.hardtanh_backward(grad, clamped[1], 0.0, 1.0)
        grad = torch.matmul(rows.mT[:, None], grad)
        if clamped:
            grad = torch.ops.aten.hardtanh_backward(grad, clamped[0], 0.0, 1.0)
        b, c, height, width = grad.shape
        grad = torch.matmul(grad.reshape(b, c * height, width), columns)
        return grad.view(b, c, height, -1), None, None, None


def separable(images: Tensor, rows: Tensor, columns: Tensor, clamp: bool = False) -> Tensor:
    """Multiply every image with a matrix along each axis, columns (the horizontal pass) first.

    Args:
        images: (B, C, H, W).
        rows: (B or 1, h, H).
        columns: (B or 1, w, W).
        clamp: to [0, 1] after each of the two products, as 8-bit images are.

    Returns:
        (B, C, h, w), contiguous.
    """
    out: Tensor = _Separable.apply(images, rows, columns, clamp)
    return out
