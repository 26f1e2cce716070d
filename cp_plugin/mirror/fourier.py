"""Operations on the spectrum of an image (Lightly's views for Fourier domain augmentation).

Between `ToSpectrum` and `FromSpectrum` images are complex, (B, C, H, W // 2 + 1): the half that a
real image needs. Every operation there multiplies the spectrum, so all of it is exact.

Source: Wang et al., "Fourier Domain Augmentation", as in `lightly.transforms.fda_transform`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from cp_plugin.mirror.base import Gradient, Operation, Params, Shape, chance, uniform, whole
from cp_plugin.mirror.intensity import StraightThrough


class ToSpectrum(Operation):
    """The two-dimensional Fourier transform of every channel (`torch.fft.rfft2`)."""

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of the spectrum."""
        return shape.resized(shape.height, shape.width // 2 + 1)

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Transform."""
        out: Tensor = torch.fft.rfft2(images)
        return out


class FromSpectrum(Operation):
    """Back to an image of a given size (`torch.fft.irfft2`).

    Args:
        size: (height, width) in pixels.
    """

    def __init__(self, size: tuple[int, int], name: str | None = None) -> None:
        super().__init__(name)
        self.size = size

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of the images."""
        return shape.resized(*self.size)

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Transform back."""
        out: Tensor = torch.fft.irfft2(images, s=self.size)
        return out


class RescaleAmplitude(Operation):
    """Every frequency times a factor of its own, the same in all channels.

    Args:
        factors: range that the factors are drawn from.
    """

    def __init__(self, factors: tuple[float, float], name: str | None = None) -> None:
        super().__init__(name)
        self.factors = factors

    def sample(self, shape: Shape, generator: torch.Generator | None = None) -> Params:
        """Draw `factor` (B, H, W // 2 + 1)."""
        size = (shape.batch, shape.height, shape.width)
        return {"factor": uniform(size, *self.factors, generator)}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Rescale."""
        out: Tensor = images * params["factor"][:, None].to(images.real.dtype)
        return out


class ShiftPhase(Operation):
    """All frequencies turned by one angle an image.

    Args:
        angles: range in radians.
        positive: probability that an angle keeps its sign.
    """

    def __init__(
        self, angles: tuple[float, float], positive: float = 1.0, name: str | None = None
    ) -> None:
        super().__init__(name)
        self.angles = angles
        self.positive = positive

    def sample(self, shape: Shape, generator: torch.Generator | None = None) -> Params:
        """Draw `angle` (B,)."""
        angle = uniform(shape.batch, *self.angles, generator)
        if self.positive < 1:
            angle = torch.where(chance(shape.batch, self.positive, generator), angle, -angle)
        return {"angle": angle}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Turn."""
        angle = params["angle"].to(images.real.dtype)
        out: Tensor = images * torch.polar(torch.ones_like(angle), angle)[:, None, None, None]
        return out


class DropFrequencies(Operation):
    """Frequencies set to zero at random, but for the mean.

    Args:
        share: range of the part that is dropped of an image.
    """

    def __init__(self, share: tuple[float, float], name: str | None = None) -> None:
        super().__init__(name)
        self.share = share

    def sample(self, shape: Shape, generator: torch.Generator | None = None) -> Params:
        """Draw `kept` (B, H, W // 2 + 1)."""
        share = uniform(shape.batch, *self.share, generator)
        draws = torch.rand(shape.batch, shape.height, shape.width, generator=generator)
        kept = draws > share[:, None, None]
        kept[:, 0, 0] = True
        return {"kept": kept}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Drop."""
        out: Tensor = images * params["kept"][:, None]
        return out


class MaskByGaussians(Operation):
    """The product of 1 minus a Gaussian for each of several centres.

    Args:
        count: of Gaussians.
        deviations: range of their deviations along either axis, in frequencies.
    """

    def __init__(
        self, count: int, deviations: tuple[float, float], name: str | None = None
    ) -> None:
        super().__init__(name)
        self.count = count
        self.deviations = deviations

    def sample(self, shape: Shape, generator: torch.Generator | None = None) -> Params:
        """Draw `centre` and `deviation`, each (B, count, 2), rows first."""
        sides = torch.tensor([shape.height, shape.width])
        size = (shape.batch, self.count, 2)
        return {
            "centre": whole(sides.expand(size), generator),
            "deviation": uniform(size, *self.deviations, generator),
        }

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Mask."""
        deviation = params["deviation"].to(images.real.dtype)
        mask = deviation.new_ones(len(images), *images.shape[-2:])
        for number in range(self.count):
            rows, columns = (
                self._profile(params["centre"][:, number, axis], deviation[:, number, axis], side)
                for axis, side in enumerate(images.shape[-2:])
            )
            mask = mask * (1 - rows[:, :, None] * columns[:, None, :])
        out: Tensor = images * mask[:, None]
        return out

    def _profile(self, centre: Tensor, deviation: Tensor, side: int) -> Tensor:
        """Return one axis of a Gaussian, (B, side)."""
        distance = torch.arange(side, device=centre.device) - centre[:, None]
        return torch.exp(-(distance**2) / (2 * deviation[:, None] ** 2))


class Truncate(Operation):
    """Bytes of a float image as torchvision's `ToPILImage` makes them: cut off, modulo 256.

    A spectrum that was changed gives pixels outside [0, 1]; the host's bytes wrap around there.
    """

    gradient: ClassVar[Gradient] = "straight_through"
    commutes_with_flips: bool = True

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Make whole levels."""
        levels = (images.detach() * 255).trunc().remainder(256)
        out: Tensor = StraightThrough.apply(images, levels / 255)
        return out
