"""Separable resampling on a processor: only the weights that are not zero, by Numba.

A row of a filter's matrix holds a few weights side by side, two to six where an image is enlarged.
`resample.py` multiplies whole matrices, which suits a GPU; here an image stays in the cache, and
each weight is multiplied with a whole line of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from torch import Tensor

from cp_plugin.mirror.processor import in_threads

ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)
LEVELS = np.float32(255)

_lines: Any = njit(fastmath=True)
_images: Any = njit(cache=True, nogil=True)


def forward(images: Tensor, rows: Tensor, columns: Tensor, clamp: bool) -> Tensor:
    """Return rows @ images @ columns^T.

    Args:
        images: (B, C, H, W), float32, on the processor.
        rows: (B or 1, h, H).
        columns: (B or 1, w, W).
        clamp: to [0, 1] after each of the two products, columns first.

    Returns:
        (B, C, h, w).
    """
    out = images.new_empty(*images.shape[:2], rows.shape[1], columns.shape[1])
    source, target = images.detach().contiguous().numpy(), out.numpy()
    x, y = columns.contiguous().numpy(), rows.contiguous().numpy()

    def run(part: slice) -> None:
        _forward(source[part], target[part], _of(y, part), _of(x, part), clamp)

    in_threads(run, len(images))
    return out


def backward(
    grad: Tensor, rows: Tensor, columns: Tensor, clamped: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Return the gradient (B, C, H, W) of the images from that of `forward`'s result.

    Args:
        grad: (B, C, h, w).
        rows: as they were.
        columns: as they were.
        clamped: images and result, where `forward` has clamped.
    """
    result = grad.new_empty(*grad.shape[:2], rows.shape[2], columns.shape[2])
    given, target = grad.contiguous().numpy(), result.numpy()
    x, y = columns.contiguous().numpy(), rows.contiguous().numpy()
    kept = [tensor.detach().contiguous().numpy() for tensor in clamped or (result, grad)]

    def run(part: slice) -> None:
        own = (given[part], target[part], _of(y, part), _of(x, part))
        _backward(*own, kept[0][part], kept[1][part], clamped is not None)

    in_threads(run, len(grad))
    return result


def byte_passes(images: Tensor, rows: Tensor, columns: Tensor, passes: int) -> Tensor:
    """Multiply bytes with columns^T again and again, then with rows, rounding each time.

    Args:
        images: (B, C, H, W), float32 in [0, 1], on the processor; taken as bytes.
        rows: (B, H, H), whole numbers in parts of 2^24.
        columns: (B, W, W), likewise.
        passes: along each axis.
    """
    out = images.new_empty(images.shape)
    source, target = images.detach().contiguous().numpy(), out.numpy()
    x, y = (part.numpy().astype(np.uint32) for part in (columns, rows))

    def run(part: slice) -> None:
        _byte_passes(source[part], target[part], y[part], x[part], passes)

    in_threads(run, len(images))
    return out


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return left (B, J, K) @ right (B, K, L) in float32; quick where left is banded."""
    out = right.new_empty(len(left), left.shape[1], right.shape[2])
    own, other, target = left.contiguous().numpy(), right.contiguous().numpy(), out.numpy()
    in_threads(lambda part: _product(own[part], other[part], target[part]), len(left))
    return out


def _of(matrices: Any, part: slice) -> Any:
    """Return the matrices of a part; images may share one."""
    return matrices[part] if len(matrices) > 1 else matrices


@_images
def _forward(images, outs, rows, columns, clamp):  # type: ignore[no-untyped-def]
    for b in range(len(images)):
        own_rows = rows[b if len(rows) > 1 else 0]
        low, high = _bands(own_rows)
        top, bottom = low.min(), high.max()
        wide = _widened(images[b], columns[b if len(columns) > 1 else 0], top, bottom, clamp)
        for channel in range(len(wide)):
            _multiply(own_rows, low, high, top, wide[channel], outs[b, channel])
        if clamp:
            _clamp(outs[b])


@_images
def _backward(grads, results, rows, columns, images, outs, clamped):  # type: ignore[no-untyped-def]
    for b in range(len(grads)):
        own_rows = rows[b if len(rows) > 1 else 0]
        own_columns = columns[b if len(columns) > 1 else 0]
        low, high = _bands(own_rows)
        top, bottom = low.min(), high.max()
        grad = grads[b].copy()
        if clamped:
            _mask(grad, outs[b])
        channels, width = grad.shape[0], grad.shape[2]
        tall = np.zeros((channels, bottom - top, width), np.float32)
        for channel in range(channels):
            _multiply_back(own_rows, low, high, top, grad[channel], tall[channel])
        if clamped:
            _mask(tall, _widened(images[b], own_columns, top, bottom, True))
        lines = _turned(tall, 0, bottom - top)
        low, high = _bands(own_columns)
        wide = np.zeros((own_columns.shape[1], lines.shape[1]), np.float32)
        _multiply_back(own_columns, low, high, 0, lines, wide)
        results[b] = ZERO
        _turn_back(wide, results[b], top, bottom)


@_images
def _byte_passes(images, outs, rows, columns, passes):  # type: ignore[no-untyped-def]
    for b in range(len(images)):
        low, high = _bands(columns[b])
        lines = _bytes(_turned(images[b], 0, images.shape[2]), LEVELS)
        for _ in range(passes):
            lines = _byte_product(columns[b], low, high, lines)
        _turn_back(lines, outs[b], 0, images.shape[2])
        low, high = _bands(rows[b])
        for channel in range(len(outs[b])):
            lines = _bytes(outs[b, channel], ONE)
            for _ in range(passes):
                lines = _byte_product(rows[b], low, high, lines)
            outs[b, channel] = lines / LEVELS


@_images
def _product(lefts, rights, outs):  # type: ignore[no-untyped-def]
    for b in range(len(lefts)):
        low, high = _bands(lefts[b])
        _multiply(lefts[b], low, high, 0, rights[b], outs[b])


@_lines
def _widened(image, columns, top, bottom, clamp):  # type: ignore[no-untyped-def]
    """Return the horizontal product (C, bottom - top, w) of the lines that are needed."""
    low, high = _bands(columns)
    lines = _turned(image, top, bottom)
    wide = np.empty((len(columns), lines.shape[1]), np.float32)
    _multiply(columns, low, high, 0, lines, wide)
    result = np.empty((len(image), bottom - top, len(columns)), np.float32)
    _turn_back(wide, result, 0, bottom - top)
    if clamp:
        _clamp(result)
    return result


@_lines
def _bands(matrix):  # type: ignore[no-untyped-def]
    """Return where the weights of each row begin and end; a row of zeros has none."""
    size = matrix.shape[1]
    low, high = np.zeros(len(matrix), np.int64), np.zeros(len(matrix), np.int64)
    for row in range(len(matrix)):
        first, last = 0, size
        while first < size and matrix[row, first] == ZERO:
            first += 1
        while last > first and matrix[row, last - 1] == ZERO:
            last -= 1
        low[row], high[row] = min(first, last, size - 1), last
    return low, high


@_lines
def _multiply(matrix, low, high, offset, source, out):  # type: ignore[no-untyped-def]
    """Write matrix @ source (K, L) into out (J, L); line 0 of source is column `offset`."""
    for row in range(len(matrix)):
        line = out[row]
        line[:] = ZERO
        for column in range(low[row], high[row]):
            weight, other = matrix[row, column], source[column - offset]
            for i in range(len(line)):
                line[i] += weight * other[i]


@_lines
def _bytes(lines, scale):  # type: ignore[no-untyped-def]
    """Return the nearest of 256 levels of each value, times scale, as 32-bit whole numbers."""
    out = np.empty(lines.shape, np.uint32)
    for row in range(len(lines)):
        for i in range(lines.shape[1]):
            level = min(max(lines[row, i] * scale, ZERO), LEVELS)
            out[row, i] = np.uint32(level + HALF)
    return out


@_lines
def _byte_product(matrix, low, high, lines):  # type: ignore[no-untyped-def]
    """Return matrix @ lines (K, L), in parts of 2^24, rounded to levels."""
    out = np.empty(lines.shape, np.uint32)
    for row in range(len(matrix)):
        line = out[row]
        line[:] = np.uint32(1 << 23)
        for column in range(low[row], high[row]):
            weight, other = matrix[row, column], lines[column]
            for i in range(len(line)):
                line[i] += weight * other[i]
        for i in range(len(line)):
            line[i] >>= np.uint32(24)
    return out


@_lines
def _multiply_back(matrix, low, high, offset, source, out):  # type: ignore[no-untyped-def]
    """Add matrix^T @ source (J, L) to out (K, L)."""
    for row in range(len(matrix)):
        other = source[row]
        for column in range(low[row], high[row]):
            weight, line = matrix[row, column], out[column - offset]
            for i in range(len(line)):
                line[i] += weight * other[i]


@_lines
def _turned(image, top, bottom):  # type: ignore[no-untyped-def]
    """Return lines `top` to `bottom` of an image (C, H, W) as columns: (W, C * (bottom - top))."""
    channels, _, width = image.shape
    height = bottom - top
    out = np.empty((width, channels * height), np.float32)
    for channel in range(channels):
        for y in range(height):
            line, place = image[channel, top + y], channel * height + y
            for x in range(width):
                out[x, place] = line[x]
    return out


@_lines
def _turn_back(lines, image, top, bottom):  # type: ignore[no-untyped-def]
    """Write what `_turned` would have made of an image back into it."""
    height = bottom - top
    for channel in range(len(image)):
        for y in range(height):
            line, place = image[channel, top + y], channel * height + y
            for x in range(len(line)):
                line[x] = lines[x, place]


@_lines
def _clamp(image):  # type: ignore[no-untyped-def]
    flat = image.reshape(-1)
    for i in range(len(flat)):
        flat[i] = min(max(flat[i], ZERO), ONE)


@_lines
def _mask(grad, result):  # type: ignore[no-untyped-def]
    """Leave out the gradient of what was clamped."""
    flat, kept = grad.reshape(-1), result.reshape(-1)
    for i in range(len(flat)):
        if not ZERO < kept[i] < ONE:
            flat[i] = ZERO
