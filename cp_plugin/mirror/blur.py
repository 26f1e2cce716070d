"""Gaussian blur as the hosts compute it: linear, so a matrix along each axis.

Pillow's `GaussianBlur` is three box blurs of fractional radius with the border pixel repeated,
each rounded to 8 bit (Pillow, `BoxBlur.c`; Gwosdek et al., SSVM 2011). torchvision's is a sampled
Gaussian with a reflected border.
"""

from __future__ import annotations

from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor

from cp_plugin.config.settings import UserError
from cp_plugin.mirror.base import LEVEL, Gradient, Operation, Params, Shape, uniform
from cp_plugin.mirror.processor import compiled, serves
from cp_plugin.mirror.resample import separable

PASSES = 3


class PillowBlur(Operation):
    """`ImageFilter.GaussianBlur` with a radius drawn uniformly (solo-learn, Lightly).

    Pixels are rounded after each pass, as Pillow's are: a small radius changes nothing there. The
    gradient is that of the passes without rounding.
    """

    gradient: ClassVar[Gradient] = "straight_through"
    commutes_with_flips: bool = True

    def __init__(self, sigma: tuple[float, float], name: str | None = None) -> None:
        super().__init__(name)
        self.sigma = sigma

    def sample(self, shape: Shape, generator: torch.Generator | None = None) -> Params:
        """Draw `sigma` (B,) in pixels."""
        return {"sigma": uniform(shape.batch, *self.sigma, generator)}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Blur."""
        radius = box_radius(params["sigma"]).to(images.dtype)
        height, width = images.shape[-2:]

        def boxes() -> tuple[Tensor, Tensor]:
            columns = box_matrix(radius, width)
            return columns if height == width else box_matrix(radius, height), columns

        def build() -> tuple[Tensor, Tensor]:
            rows, columns = boxes()
            done = _passes(columns)
            return done if rows is columns else _passes(rows), done

        return separable(images, build, value=_rounded(images.detach(), *boxes()))


def _rounded(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Carry out all passes of a box blur along each axis, rounding to 8 bit after each."""
    if images.dtype.itemsize < torch.float32.itemsize:  # 255 levels need more digits
        return _rounded(images.float(), rows.float(), columns.float()).to(images.dtype)
    if serves(images):
        out: Tensor = compiled("banded").rounded_passes(images, rows, columns, PASSES)
        return out
    for _ in range(PASSES):
        images = _to_levels(images @ columns[:, None].mT)
    for _ in range(PASSES):
        images = _to_levels(rows[:, None] @ images)
    return images


def _to_levels(images: Tensor) -> Tensor:
    return images.mul_(255).add_(0.5).floor_().mul_(LEVEL)


def _passes(box: Tensor) -> Tensor:
    """Return the matrix (B, size, size) of all passes of a box blur, made of that of one."""
    if not serves(box):
        return torch.matrix_power(box, PASSES)
    product = compiled("banded").product
    return reduce(lambda done, again: product(again, done), [box] * PASSES)


def box_radius(sigma: Tensor) -> Tensor:
    """Return the fractional radius of three boxes that together have deviation sigma."""
    variance = sigma * sigma / PASSES
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    return whole + part / (6 * (variance - (whole + 1) ** 2))


def box_matrix(radius: Tensor, size: int) -> Tensor:
    """Return the matrix of one box blur with repeated borders.

    Args:
        radius: (B,) in pixels, fractional.
        size: pixels along the axis.

    Returns:
        (B, size, size).
    """
    index = torch.arange(size, device=radius.device, dtype=radius.dtype)
    reach = radius[:, None] + 1
    distance = (index[:, None] - index).abs_()
    matrix = (reach[:, :, None] - distance).clamp_(0, 1)
    matrix[:, :, 0] = (reach - index).clamp_(min=0)
    matrix[:, :, -1] = (reach - (size - 1 - index)).clamp_(min=0)
    return matrix / (2 * radius + 1)[:, None, None]


class TensorBlur(Operation):
    """torchvision's `GaussianBlur`: a kernel of fixed size, reflected borders."""

    commutes_with_flips: bool = True

    def __init__(
        self, kernel_size: tuple[int, int], sigma: tuple[float, float], name: str | None = None
    ) -> None:
        super().__init__(name)
        self.kernel_size = kernel_size
        self.sigma = sigma

    def check(self, shape: Shape) -> None:
        """Refuse images too small for a reflected border."""
        if self.kernel_size[0] // 2 >= shape.width or self.kernel_size[1] // 2 >= shape.height:
            raise UserError(
                f"{self.name} expected images larger than half its kernel of {self.kernel_size} "
                f"pixels, got {shape.height}x{shape.width}: take a smaller kernel."
            )

    def sample(self, shape: Shape, generator: torch.Generator | None = None) -> Params:
        """Draw `sigma` (B,) in pixels."""
        return {"sigma": uniform(shape.batch, *self.sigma, generator)}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Blur."""
        sigma = params["sigma"].to(images.dtype)
        height, width = images.shape[-2:]

        def build() -> tuple[Tensor, Tensor]:
            return (
                reflected_matrix(sigma, self.kernel_size[1], height),
                reflected_matrix(sigma, self.kernel_size[0], width),
            )

        return separable(images, build)


def reflected_matrix(sigma: Tensor, kernel_size: int, size: int) -> Tensor:
    """Return the matrix (B, size, size) of a sampled Gaussian with reflected borders."""
    half = kernel_size // 2
    offset = torch.arange(-half, half + 1, device=sigma.device, dtype=sigma.dtype)
    kernel = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    source = torch.arange(size, device=sigma.device)[:, None] + offset.long()
    source = (size - 1) - ((size - 1) - source.abs()).abs()
    matrix = sigma.new_zeros(len(sigma), size, size)
    index = source.expand(len(sigma), size, kernel_size)
    return matrix.scatter_add_(2, index, kernel[:, None].expand_as(index))
