"""Grey, normalising and other changes that are affine in a pixel's channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from cp_plugin.config.settings import UserError
from cp_plugin.mirror.base import ImageFormat, Operation, Params, Shape, chance

GREY_PILLOW = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in Pillow's mode `L` (ITU-R 601-2)."""
GREY_TENSOR = (0.2989, 0.587, 0.114)
"""The same in torchvision's functions for tensors."""


def grey_weights(format: ImageFormat) -> Tensor:
    """Return the host's grey weights (3,) in float64."""
    weights = GREY_PILLOW if format is ImageFormat.PILLOW else GREY_TENSOR
    return torch.tensor(weights, dtype=torch.float64)


def mix_channels(images: Tensor, matrix: Tensor, offset: Tensor | None = None) -> Tensor:
    """Multiply the channels of every pixel with a matrix.

    Args:
        images: (B, C, H, W).
        matrix: (B, C, C).
        offset: (C,) added afterwards, or None.

    Returns:
        (B, C, H, W).
    """
    flat = images.flatten(2)
    if offset is None:
        return torch.bmm(matrix, flat).view_as(images)
    return torch.baddbmm(offset[None, :, None], matrix, flat).view_as(images)


class RandomGrayscale(Operation):
    """Three equal channels, with probability p (torchvision `RandomGrayscale`, `Grayscale`).

    Where the host makes one channel of them, `Mirror` leaves the others out in the end.
    """

    needs_colour: ClassVar[bool] = True
    commutes_with_flips: bool = True

    def __init__(
        self,
        p: float,
        format: ImageFormat = ImageFormat.PILLOW,
        name: str | None = None,
        channels: int | None = None,
    ) -> None:
        """Take the settings.

        Args:
            p: probability.
            format: whose weights of the colours.
            name: of the host's transform.
            channels: 1 or 3 where the host makes so many of any image; None: as many as it had.
        """
        super().__init__(name)
        self.p = p
        self.format = format
        self.channels = channels

    def sample(self, shape: Shape, generator: torch.Generator | None = None) -> Params:
        """Draw `applied` (B,)."""
        return self.prepare(chance(shape.batch, self.p, generator))

    def prepare(self, applied: Tensor) -> Params:
        """Turn the choice into the `matrix` (B, 3, 3) that `apply` multiplies with."""
        grey = grey_weights(self.format).expand(3, 3)
        keep = torch.eye(3, dtype=torch.float64)
        return {"applied": applied, "matrix": torch.where(applied[:, None, None], grey, keep)}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Convert the images chosen."""
        return mix_channels(images, params["matrix"].to(images.dtype))


class GreyNormalize(Operation):
    """`RandomGrayscale` and `Normalize` in one matrix product."""

    needs_colour: ClassVar[bool] = True
    commutes_with_flips: bool = True

    def __init__(self, grey: RandomGrayscale, normalize: Normalize) -> None:
        super().__init__(f"{grey.name} and {normalize.name}")
        self.grey = grey
        self.normalize = normalize

    def parts(self) -> list[Operation]:
        """Return the two."""
        return [self.grey, self.normalize]

    def check(self, shape: Shape) -> None:
        """Check both."""
        for part in self.parts():
            part.check(shape)

    def sample(self, shape: Shape, generator: torch.Generator | None = None) -> Params:
        """Draw as `RandomGrayscale` does."""
        return self.grey.sample(shape, generator)

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Convert and normalise."""
        mean = images.new_tensor(self.normalize.mean).expand(3)
        std = images.new_tensor(self.normalize.std).expand(3)
        matrix = params["matrix"].to(images.dtype) / std[:, None]
        return mix_channels(images, matrix, -mean / std)


class PermuteChannels(Operation):
    """Channels in an order of its own for each image (torchvision `RandomChannelPermutation`)."""

    commutes_with_flips: bool = True

    def sample(self, shape: Shape, generator: torch.Generator | None = None) -> Params:
        """Draw `order` (B, C)."""
        return {"order": torch.rand(shape.batch, shape.channels, generator=generator).argsort(1)}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Permute."""
        return images.gather(1, params["order"][:, :, None, None].expand_as(images))


class Normalize(Operation):
    """(x - mean) / std for each channel (torchvision `Normalize`)."""

    commutes_with_flips: bool = True

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], name: str | None = None
    ) -> None:
        super().__init__(name)
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)

    def check(self, shape: Shape) -> None:
        """Refuse images with another number of channels than mean and std have."""
        for values in (self.mean, self.std):
            if len(values) not in (1, shape.channels):
                raise UserError(
                    f"{self.name} expected images with {len(values)} channels, as many as its "
                    f"mean and std have values, got {shape.channels}."
                )

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Normalise."""
        mean = images.new_tensor(self.mean)[:, None, None]
        std = images.new_tensor(self.std)[:, None, None]
        return (images - mean) / std
