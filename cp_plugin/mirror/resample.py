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

from cp_plugin.mirror.operation import portions

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
    inside = (position >= start[:, None]).logical_and_(position < (start + length)[:, None])
    offset = (position + 0.5).sub_(centre).div_(spread)
    weights = filter_values(filter_name, offset).mul_(inside.to(offset.dtype))
    weights.div_(weights.sum(0))
    dense = start.new_zeros(len(start), target, source)
    return dense.scatter_(2, position.long().permute(1, 2, 0), weights.permute(1, 2, 0))


class _Separable(torch.autograd.Function):
    """rows @ images @ columns^T, optionally clamped to [0, 1] after each product.

    Matrices are as large as images: they are made again in the backward pass, not kept.
    """

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, build: Build, clamp: bool, boxes: Tensor | None
    ) -> Tensor:
        rows, columns = build()
        out = images.new_empty(*images.shape[:2], rows.shape[1], columns.shape[1])
        for part in portions(images):
            y, x = _region(boxes, part, images)
            wide = _horizontal(images[part, :, y, x], columns[_of(columns, part), :, x], clamp)
            torch.matmul(rows[_of(rows, part), None, :, y], wide, out=out[part])
        ctx.build, ctx.boxes = build, boxes
        if clamp:
            out.clamp_(0, 1)
            ctx.save_for_backward(images, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        rows, columns = ctx.build()
        saved = ctx.saved_tensors
        result = grads[0].new_zeros(*grads[0].shape[:2], rows.shape[2], columns.shape[2])
        for part in portions(result):
            y, x = _region(ctx.boxes, part, result)
            horizontal = columns[_of(columns, part), :, x]
            grad = grads[0][part]
            if saved:
                grad = _hardtanh_backward(grad, saved[1][part], 0.0, 1.0)
            grad = torch.matmul(rows[_of(rows, part), None, :, y].mT, grad)
            if saved:
                wide = _horizontal(saved[0][part, :, y, x], horizontal, True)
                grad = _hardtanh_backward(grad, wide, 0.0, 1.0)
            n, c, height, _ = grad.shape
            flat = torch.matmul(grad.view(n, c * height, -1), horizontal)
            result[part, :, y, x] = flat.view(n, c, height, -1)
        return result, None, None, None


FEW = 4
"""Images of which the smallest rectangle around all crops is worth finding."""


def _region(boxes: Tensor | None, part: slice, images: Tensor) -> tuple[slice, slice]:
    """Return the rows and columns that hold all crops of a part; all of them on a GPU."""
    everything = slice(None)
    if boxes is None or boxes.device.type != "cpu" or part.stop - part.start > FEW:
        return everything, everything
    top, left = boxes[part, :2].amin(0).tolist()
    bottom, right = (boxes[part, :2] + boxes[part, 2:]).amax(0).tolist()
    return slice(int(top), int(bottom)), slice(int(left), int(right))


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
    images: Tensor, build: Build, clamp: bool = False, boxes: Tensor | None = None
) -> Tensor:
    """Multiply every image with a matrix along each axis, columns (the horizontal pass) first.

    Args:
        images: (B, C, H, W).
        build: makes the matrices, always the same: rows (B or 1, h, H), columns (B or 1, w, W).
        clamp: to [0, 1] after each of the two products, as 8-bit images are.
        boxes: (B, 4) top, left, height, width outside which all weights are zero, or None.

    Returns:
        (B, C, h, w), contiguous.
    """
    out: Tensor = _Separable.apply(images, build, clamp, boxes)
    return out
