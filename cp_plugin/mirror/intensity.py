"""Changes of intensity: solarise, posterise, equalise, autocontrast, sharpness, invert."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from cp_plugin.mirror.base import LEVEL, Gradient, ImageFormat, Operation, Params

LEVELS = 256


class StraightThrough(torch.autograd.Function):
    """A value that has no useful derivative: gradients pass as if nothing had been done."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, value: Tensor) -> Tensor:
        """Return the value."""
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Return the gradient as it came."""
        return grads[0], None


class Solarize(Operation):
    """Invert the pixels at or above a threshold (`ImageOps.solarize`).

    Args:
        threshold: in 8-bit levels for a Pillow image or bytes, in [0, 1] for a float tensor.
    """

    commutes_with_flips: bool = True

    def __init__(
        self, threshold: float, format: ImageFormat = ImageFormat.PILLOW, name: str | None = None
    ) -> None:
        super().__init__(name)
        self.threshold = (threshold - 0.5) * LEVEL if format.rounds else threshold

    def prepare(self, thresholds: Tensor) -> Params:
        """Take a threshold for each image (B,), in 8-bit levels."""
        return {"threshold": ((thresholds.ceil().double() - 0.5) * LEVEL)[:, None, None, None]}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Solarise."""
        return torch.where(images < params.get("threshold", self.threshold), images, 1 - images)


class Invert(Operation):
    """1 - x (`ImageOps.invert`)."""

    commutes_with_flips: bool = True

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Invert."""
        return 1 - images


class Posterize(Operation):
    """Keep the highest bits of every channel (`ImageOps.posterize`)."""

    gradient: ClassVar[Gradient] = "straight_through"
    commutes_with_flips: bool = True

    def __init__(self, bits: int, name: str | None = None) -> None:
        super().__init__(name)
        self.step = 2 ** (8 - bits)

    def prepare(self, bits: Tensor) -> Params:
        """Take a number of bits for each image (B,)."""
        return {"step": (2 ** (8 - bits))[:, None, None, None]}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Posterise."""
        step = params.get("step", self.step)
        levels = (images.detach() * 255).round_().div_(step).floor_()
        out: Tensor = StraightThrough.apply(images, levels.mul_(step * LEVEL))
        return out


class Equalize(Operation):
    """Spread the histogram of every channel (`ImageOps.equalize`)."""

    gradient: ClassVar[Gradient] = "straight_through"
    commutes_with_flips: bool = True

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Equalise."""
        levels = (images.detach() * 255).round_().long().flatten(2)
        table = equalising_table(levels).to(images.dtype).mul_(LEVEL)
        out: Tensor = StraightThrough.apply(images, table.gather(2, levels).view_as(images))
        return out


def equalising_table(levels: Tensor) -> Tensor:
    """Return Pillow's lookup tables (B, C, 256) for levels (B, C, N)."""
    counts = levels.new_zeros(*levels.shape[:2], LEVELS)
    counts.scatter_add_(2, levels, torch.ones_like(levels))
    occupied = counts > 0
    position = torch.arange(LEVELS, device=levels.device)
    last = counts.gather(2, (occupied * position).amax(2, keepdim=True))
    step = (levels.shape[2] - last) // (LEVELS - 1)
    before = counts.cumsum(2) - counts
    table = ((step // 2 + before) // step.clamp(min=1)).clamp_(max=LEVELS - 1)
    plain = (step == 0) | (occupied.sum(2, keepdim=True) <= 1)
    return torch.where(plain, position, table)


class Autocontrast(Operation):
    """Stretch every channel to the full range (`ImageOps.autocontrast`)."""

    commutes_with_flips: bool = True

    def __init__(self, format: ImageFormat = ImageFormat.PILLOW, name: str | None = None) -> None:
        super().__init__(name)
        self.bias = 0.5 * LEVEL if format.rounds else 0.0

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Stretch; a flat channel is left alone."""
        low = images.amin((2, 3), keepdim=True)
        span = images.amax((2, 3), keepdim=True) - low
        flat = span < 0.5 * LEVEL
        stretched = (images - low) / torch.where(flat, 1.0, span) - self.bias
        return torch.where(flat, images, stretched.clamp(0, 1))


class Sharpness(Operation):
    """Blend with, or away from, a smoothed image (`ImageEnhance.Sharpness`)."""

    commutes_with_flips: bool = True

    def __init__(
        self, factor: float, format: ImageFormat = ImageFormat.PILLOW, name: str | None = None
    ) -> None:
        super().__init__(name)
        self.factor = factor
        self.format = format

    def prepare(self, factors: Tensor) -> Params:
        """Take a factor for each image (B,)."""
        return {"factor": factors[:, None, None, None]}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Sharpen or smooth; the outermost pixels stay, as they have no full neighbourhood."""
        channels = images.shape[1]
        kernel = images.new_ones(3, 3)
        kernel[1, 1] = 5
        kernel = (kernel / 13).expand(channels, 1, 3, 3)
        smooth = images.clone()
        smooth[:, :, 1:-1, 1:-1] = conv2d(images, kernel, groups=channels)
        factor = params.get("factor", self.factor)
        bias = 0.5 * LEVEL * (factor != 1) if self.format.rounds else 0.0
        out: Tensor = factor * images + (1 - factor) * smooth - bias
        return out.clamp(0, 1)
