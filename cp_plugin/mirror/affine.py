"""Rotation, shift, scale and shear in one affine map (torchvision `RandomAffine`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cp_plugin.mirror.base import ImageFormat, Params, Shape, uniform
from cp_plugin.mirror.geometric import Geometric

Range = tuple[float, float]


class Affine(Geometric):
    """Reads images through a matrix of their own, `rows` (B, 2, 3): from x, y, 1 of a pixel of the
    result to x and y in the image, both counted in pixels from the top left corner."""

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Map."""
        first, second = params["rows"].unbind(1)
        return self.map_affine(images, (first, second))


class RandomAffine(Affine):
    """torchvision's `RandomAffine`.

    Args:
        degrees: range of the rotation, clockwise.
        translate: largest shifts along x and y, as parts of width and height.
        scale: range of the enlargement.
        shear: ranges of the angles along x and y, in degrees.
        centre: what stays in place, x and y in pixels; None: the image's centre.
        filter_name: see `Geometric`, as for `fill`, `format` and `name`.
    """

    def __init__(
        self,
        degrees: Range,
        translate: Range = (0.0, 0.0),
        scale: Range = (1.0, 1.0),
        shear: tuple[Range, Range] = ((0.0, 0.0), (0.0, 0.0)),
        centre: Range | None = None,
        filter_name: str = "nearest",
        fill: tuple[float, ...] | None = (0.0,),
        format: ImageFormat = ImageFormat.PILLOW,
        name: str | None = None,
    ) -> None:
        super().__init__(filter_name, fill, format, name)
        self.degrees = degrees
        self.translate = translate
        self.scale = scale
        self.shear = shear
        self.centre = centre

    def sample(self, shape: Shape, generator: torch.Generator | None = None) -> Params:
        """Draw `angle`, `shift` (B, 2) in whole pixels, `scale` and `shear` (B, 2) in degrees."""
        count = shape.batch
        sides = (shape.width, shape.height)
        most = [part * side for part, side in zip(self.translate, sides, strict=True)]
        drawn = {
            "angle": uniform(count, *self.degrees, generator),
            "shift": torch.stack([uniform(count, -m, m, generator).round() for m in most], 1),
            "scale": uniform(count, *self.scale, generator),
            "shear": torch.stack([uniform(count, *r, generator) for r in self.shear], 1),
        }
        return {**drawn, "rows": self._rows(drawn, shape)}

    def _rows(self, drawn: Params, shape: Shape) -> Tensor:
        """Return the inverse of shear, rotation and enlargement about the centre, then shift."""
        angle = drawn["angle"] * (math.pi / 180)
        along_x, along_y = (drawn["shear"] * (math.pi / 180)).unbind(1)
        cos, sin = (angle - along_y).cos(), (angle - along_y).sin()
        first = torch.stack((cos / along_y.cos(), -cos * along_x.tan() / along_y.cos()), 1)
        second = torch.stack((sin / along_y.cos(), -sin * along_x.tan() / along_y.cos()), 1)
        first[:, 1] -= angle.sin()
        second[:, 1] += angle.cos()
        forward = torch.stack((first, second), 1) * drawn["scale"][:, None, None]
        back = torch.linalg.inv(forward)
        centre = torch.tensor(
            self.centre or (shape.width / 2, shape.height / 2), dtype=torch.float64
        )
        moved = centre - (back @ (centre + drawn["shift"])[..., None])[..., 0]
        return torch.cat((back, moved[..., None]), 2)
