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
ONE = 1 << 24
"""What Pillow's weights add up to, but for what is cut off."""


class PillowBlur(Operation):
    """`ImageFilter.GaussianBlur` with a radius drawn uniformly (solo-learn, Lightly).

    Pixels are bytes, and rounded after each pass, as Pillow's are: a small radius changes nothing
    there. The gradient is that of the passes without rounding.
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
        single = box_radius(params["sigma"].float())
        radius = single.to(images.dtype)
        height, width = images.shape[-2:]

        def build() -> tuple[Tensor, Tensor]:
            columns = _passes(box_matrix(radius, width))
            rows = columns if height == width else _passes(box_matrix(radius, height))
            return rows, columns

        return separable(images, build, value=_rounded(images.detach(), single))


def _rounded(images: Tensor, radius: Tensor) -> Tensor:
    """Carry out all passes of a box blur along each axis as Pillow does, on bytes."""
    rows, columns = (box_integers(radius, size) for size in images.shape[-2:])
    if serves(images):
        out: Tensor = compiled("banded").byte_passes(images, rows, columns, PASSES)
        return out
    # Whole numbers of up to 32 bits, which double precision has.
    exact = torch.float32 if images.device.type == "mps" else torch.float64
    rows, columns = (part.to(exact)[:, None].div_(ONE) for part in (rows, columns))
    levels = images.to(exact).mul(255).round_().clamp_(0, 255)
    for _ in range(PASSES):
        levels = (levels @ columns.mT).add_(0.5).floor_()
    for _ in range(PASSES):
        levels = (rows @ levels).add_(0.5).floor_()
    return levels.mul_(LEVEL).to(images.dtype)


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


def box_integers(radius: Tensor, size: int) -> Tensor:
    """Return Pillow's weights of one box blur, whole numbers that mean parts of `ONE`.

    They decide what a value halfway between two levels becomes.

    Args:
        radius: (B,) in pixels, single precision as Pillow's.
        size: pixels along the axis.

    Returns:
        (B, size, size), int64.
    """
    whole = radius.floor()
    inner = (ONE / (2 * radius + 1)).long()
    outer = (ONE - (2 * whole.long() + 1) * inner) // 2
    whole = whole.long()[:, None]
    index = torch.arange(size, device=radius.device)
    distance = (index[:, None] - index).abs_()
    inside = (distance <= whole[:, :, None]).long()
    edge = (distance == whole[:, :, None] + 1).long()
    for column, away in ((0, index), (-1, size - 1 - index)):  # the border pixel, repeated
        inside[:, :, column] = (whole + 1 - away).clamp_(min=0)
        edge[:, :, column] = (away <= whole + 1).long()
    return inside * inner[:, None, None] + edge * outer[:, None, None]


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
