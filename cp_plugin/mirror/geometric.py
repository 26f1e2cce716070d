"""Affine maps and perspective: every output pixel reads the image at a point of its own.

Pillow evaluates its coordinate maps at pixel centres, fills where a centre falls outside, repeats
the border otherwise, and truncates to 8 bit (Pillow, `Geometry.c`). Nearest affine maps run in
16.16 fixed point. torchvision reads tensors with `grid_sample`, whose border fades into the fill.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from cp_plugin.mirror.base import LEVEL, ImageFormat, Operation, Params, Shape, uniform, whole

FIXED = 65536


class Geometric(Operation):
    """What reads images at points that are not their own.

    Args:
        filter_name: `nearest`, `bilinear`, or, of Pillow images, `bicubic`.
        fill: what stands outside the image, in levels, of a float tensor in [0, 1]; one for all
            channels or one a channel. None is 0, of tensors without a border that fades.
        format: what the host holds.
    """

    def __init__(
        self,
        filter_name: str,
        fill: tuple[float, ...] | None = (0.0,),
        format: ImageFormat = ImageFormat.PILLOW,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.filter_name = filter_name
        self.fill = fill
        self.format = format

    def read(self, images: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Return images (B, C, h, w) read at x and y (B, h, w), in pixels."""
        scale = LEVEL if self.format.rounds else 1.0
        fill = images.new_tensor(self.fill or (0.0,))[:, None, None] * scale
        if self.format is not ImageFormat.PILLOW and self.filter_name != "nearest":
            return self._faded(images, x, y, fill)
        height, width = images.shape[-2:]
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        if self.filter_name == "nearest":
            values = _gather(images, x.floor(), y.floor())
        else:
            values = _interpolate(images, x - 0.5, y - 0.5, self.filter_name == "bicubic")
            values = (values - 0.5 * LEVEL).clamp(0, 1)
        return torch.where(inside[:, None], values, fill)

    def map_affine(self, images: Tensor, rows: tuple[Tensor, Tensor]) -> Tensor:
        """Return images read at the points that two rows (B, 3) of a matrix make of x, y and 1."""
        height, width = images.shape[-2:]
        fixed = self.filter_name == "nearest" and self.format is ImageFormat.PILLOW
        along = _fixed_point if fixed else _linear
        x, y = (along(row.double(), height, width) for row in rows)
        return self.read(images, x, y)

    def _faded(self, images: Tensor, x: Tensor, y: Tensor, fill: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        points = torch.stack((x * 2 / width - 1, y * 2 / height - 1), -1).to(images.dtype)
        values = grid_sample(images, points, align_corners=False)
        if self.fill is None:
            return values
        ones = images.new_ones(len(images), 1, height, width)
        covered = grid_sample(ones, points, align_corners=False)
        return covered * (values - fill) + fill


class RandomRotation(Geometric):
    """Rotation about a centre by a random angle (torchvision `RandomRotation`)."""

    def __init__(
        self,
        degrees: tuple[float, float],
        filter_name: str = "nearest",
        centre: tuple[float, float] | None = None,
        fill: tuple[float, ...] | None = (0.0,),
        format: ImageFormat = ImageFormat.PILLOW,
        name: str | None = None,
    ) -> None:
        super().__init__(filter_name, fill, format, name)
        self.degrees = degrees
        self.centre = centre

    def sample(self, shape: Shape, generator: torch.Generator | None = None) -> Params:
        """Draw `angle` (B,) in degrees, counter-clockwise."""
        return {"angle": uniform(shape.batch, *self.degrees, generator)}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Rotate."""
        height, width = images.shape[-2:]
        centre_x, centre_y = self.centre or (width / 2, height / 2)
        angle = params["angle"].double() * (-math.pi / 180)
        cos, sin = angle.cos(), angle.sin()
        shift_x = centre_x - centre_x * cos - centre_y * sin
        shift_y = centre_y + centre_x * sin - centre_y * cos
        rows = (
            torch.stack((cos, sin, shift_x), 1),
            torch.stack((-sin, cos, shift_y), 1),
        )
        return self.map_affine(images, rows)


class RandomPerspective(Geometric):
    """Corners moved inwards at random (torchvision `RandomPerspective`, without its p)."""

    def __init__(
        self,
        distortion: float,
        filter_name: str = "bilinear",
        fill: tuple[float, ...] | None = (0.0,),
        format: ImageFormat = ImageFormat.PILLOW,
        name: str | None = None,
    ) -> None:
        super().__init__(filter_name, fill, format, name)
        self.distortion = distortion

    def sample(self, shape: Shape, generator: torch.Generator | None = None) -> Params:
        """Draw `corners` (B, 4, 2), x and y in pixels from top left clockwise."""
        moves = []
        for side in (shape.width, shape.height):
            bound = int(self.distortion * (side // 2)) + 1
            moves.append(whole(torch.full((shape.batch, 4), bound), generator))
        x, y = moves
        x[:, 1:3] = shape.width - 1 - x[:, 1:3]
        y[:, 2:4] = shape.height - 1 - y[:, 2:4]
        return self.prepare(torch.stack((x, y), 2), shape)

    def prepare(self, corners: Tensor, shape: Shape) -> Params:
        """Solve for the eight `coefficients` (B, 8) that map the corners back."""
        right, bottom = shape.width - 1.0, shape.height - 1.0
        old = torch.tensor(
            [[0, 0], [right, 0], [right, bottom], [0, bottom]], dtype=torch.float64
        ).expand(len(corners), 4, 2)
        new = corners.double()
        one = torch.ones_like(new[..., :1])
        zero = torch.zeros_like(new)
        x_rows = torch.cat((new, one, zero, zero[..., :1], -old[..., :1] * new), 2)
        y_rows = torch.cat((zero, zero[..., :1], new, one, -old[..., 1:] * new), 2)
        system = torch.stack((x_rows, y_rows), 2).flatten(1, 2)
        solution = torch.linalg.solve(system, old.flatten(1))
        return {"corners": corners, "coefficients": solution}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Warp."""
        height, width = images.shape[-2:]
        a = params["coefficients"].double()[:, :, None, None].unbind(1)
        x, y = _centres(height, width, images.device)
        below = a[6] * x + a[7] * y + 1
        return self.read(
            images, (a[0] * x + a[1] * y + a[2]) / below, (a[3] * x + a[4] * y + a[5]) / below
        )


def _centres(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    x = torch.arange(width, device=device, dtype=torch.float64) + 0.5
    y = torch.arange(height, device=device, dtype=torch.float64) + 0.5
    return x[None, :], y[:, None]


def _linear(row: Tensor, height: int, width: int) -> Tensor:
    x, y = _centres(height, width, row.device)
    along_x, along_y, shift = row[:, :, None, None].unbind(1)
    return along_x * x + along_y * y + shift


def _fixed_point(row: Tensor, height: int, width: int) -> Tensor:
    """Evaluate an affine map as Pillow does, and return whole pixels."""
    along_x, along_y, shift = row.unbind(1)
    start = shift + along_x * 0.5 + along_y * 0.5
    fixed = (torch.stack((along_x, along_y, start), 1) * FIXED + 0.5).floor().long()
    step_x, step_y, first = fixed[:, :, None, None].unbind(1)
    x = torch.arange(width, device=row.device)
    y = torch.arange(height, device=row.device)[:, None]
    return ((first + step_x * x + step_y * y) >> 16).double()


def _gather(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Read pixels (B, C, h, w) at whole coordinates (B, h, w), repeating the border."""
    b, c, height, width = images.shape
    index = y.clamp(0, height - 1).long() * width + x.clamp(0, width - 1).long()
    flat = index.flatten(1)[:, None].expand(b, c, index[0].numel())
    return images.flatten(2).gather(2, flat).view(b, c, *index.shape[1:])


def _interpolate(images: Tensor, x: Tensor, y: Tensor, cubic: bool) -> Tensor:
    reach = range(-1, 3) if cubic else range(2)
    left, top = x.floor(), y.floor()
    weigh = _cubic if cubic else _tent
    total = torch.zeros((), device=images.device, dtype=images.dtype)
    for row in reach:
        weight_y = weigh(y - top - row)
        for column in reach:
            weight = (weigh(x - left - column) * weight_y).to(images.dtype)
            total = total + weight[:, None] * _gather(images, left + column, top + row)
    return total


def _tent(distance: Tensor) -> Tensor:
    return 1 - distance.abs()


def _cubic(distance: Tensor) -> Tensor:
    """Pillow's cubic for maps, a = -1 (its resize takes -0.5)."""
    t = distance.abs()
    inner = (t - 2) * t * t + 1
    outer = ((5 - t) * t - 8) * t + 4
    return torch.where(t < 1, inner, outer)
