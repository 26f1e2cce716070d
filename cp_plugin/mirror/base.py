"""What every operation of a mirror is: draws apart from pixels, and a declared gradient.

Legend of shapes: B images, C channels, H x W pixels in, h x w pixels out. Pixels live in [0, 1].
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from cp_plugin.config.settings import UserError

Params = dict[str, Any]
Gradient = Literal["exact", "straight_through"]
LEVEL = 1 / 255
"""One step of an 8-bit image, in [0, 1]."""
PORTION = 2**17
"""Numbers that an operation works on at a time: half a megabyte, so that they stay in a cache."""
PORTION_ON_DEVICE = 2**24
"""The same where starting a kernel costs more than memory traffic."""


class ImageFormat(Enum):
    """What the host holds when an operation runs: it decides how the host rounds."""

    PILLOW = "a Pillow image"
    BYTES = "a uint8 tensor"
    FLOAT = "a float tensor"
    SPECTRUM = "a spectrum"

    @property
    def rounds(self) -> bool:
        """Whether every operation ends in whole 8-bit levels within [0, 1]."""
        return self in (ImageFormat.PILLOW, ImageFormat.BYTES)


class _Sizes(NamedTuple):
    batch: int
    channels: int
    height: int
    width: int


class Shape(_Sizes):
    """Shape of a batch, as a tuple (batch, channels, height, width)."""

    aspects: Tensor | None = None
    """float64 (B): width over height of the pictures that these images are, each squeezed into the
    shape of the batch; None: images as they are. Crops at random are drawn as of the pictures."""

    def squeezed_from(self, aspects: Tensor | None) -> Shape:
        """Return the same shape of pictures that had other aspects, float64 (B) or None."""
        shape = Shape(*self)
        shape.aspects = aspects
        return shape

    def of_some(self, index: Tensor) -> Shape:
        """Return the shape of some images of the batch, int64 (b)."""
        aspects = None if self.aspects is None else self.aspects[index]
        return Shape(len(index), *self[1:]).squeezed_from(aspects)

    def repeated(self, times: int) -> Shape:
        """Return the shape of the batch so many times over, one after the other."""
        aspects = None if self.aspects is None else self.aspects.repeat(times)
        return Shape(self.batch * times, *self[1:]).squeezed_from(aspects)

    def resized(self, height: int, width: int) -> Shape:
        """Return the same batch with other pixels."""
        return Shape(self.batch, self.channels, height, width)


class Operation:
    """One transform of the host: `sample` draws for a whole batch, `apply` is a pure function.

    An op for a class of your own subclasses this, sets `gradient`, and overrides `apply` and,
    where it draws anything, `sample`; `register_op` then makes `mirror` use it.
    """

    gradient: ClassVar[Gradient] = "exact"
    """`exact`: the derivative of what `apply` computes; `straight_through`: that of what it rounds
    to levels, as if it did not."""
    needs_colour: ClassVar[bool] = False
    """Whether the operation is defined on three channels only."""
    commutes_with_flips: bool = False
    """Whether flipping before or after makes no difference to the result."""

    def __init__(self, name: str | None = None) -> None:
        self.name = name or type(self).__name__

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape that `apply` gives for images of `shape`."""
        return shape

    def check(self, shape: Shape) -> None:
        """Refuse images that the operation is not defined on.

        Raises:
            UserError: wrong channel count, or a crop larger than the image.
        """
        if self.needs_colour and shape.channels != 3:
            raise UserError(
                f"{self.name} expected images with 3 channels, got {shape.channels}: "
                "convert them to RGB first."
            )

    def sample(self, shape: Shape, generator: torch.Generator | None = None) -> Params:
        """Draw the parameters of `shape.batch` images, on the CPU.

        Args:
            shape: of the images that `apply` will get.
            generator: source of randomness on the CPU; None: torch's default one.

        Returns:
            A dictionary of tensors whose first dimension is B, and of what follows from them.
        """
        return {}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Transform images (B, C, H, W) in [0, 1] with parameters that `sample` drew.

        Returns:
            (B, C, h, w), same dtype and device.
        """
        raise NotImplementedError

    def parts(self) -> list[Operation]:
        """Return the operations that this one is made of."""
        return []

    def walk(self) -> Iterator[Operation]:
        """Yield this operation and, in order, all that it is made of."""
        yield self
        for part in self.parts():
            yield from part.walk()

    def __repr__(self) -> str:
        inner = ", ".join(map(repr, self.parts())) or self.gradient
        return f"{self.name}({inner})"


def uniform(
    count: int | tuple[int, ...], low: float, high: float, generator: torch.Generator | None
) -> Tensor:
    """Draw float64 numbers in [low, high) on the CPU."""
    draws = torch.rand(count, generator=generator, dtype=torch.float64)
    return low + (high - low) * draws


def whole(highs: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw, for each entry n of `highs`, an integer in [0, n)."""
    draws = torch.rand(highs.shape, generator=generator, dtype=torch.float64)
    return (draws * highs).floor().to(torch.int64)


def chance(count: int, p: float, generator: torch.Generator | None) -> Tensor:
    """Draw `count` truth values that are true with probability p."""
    return torch.rand(count, generator=generator, dtype=torch.float64) < p


def portions(images: Tensor, stop: int | None = None) -> list[slice]:
    """Cut a batch into portions that stay in a processor's cache, and keep little in memory.

    Args:
        images: (B, C, H, W).
        stop: only the first `stop` images; None: all.
    """
    stop = len(images) if stop is None else stop
    if not stop:
        return []
    budget = PORTION_ON_DEVICE
    if images.device.type == "cpu":
        budget = min(PORTION, max(images.numel() // 6, PORTION // 8))
    most = max(1, budget // max(1, images[0].numel()))
    step = -(-stop // -(-stop // most))  # portions of like size
    return [slice(start, min(start + step, stop)) for start in range(0, stop, step)]


def moved(params: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Copy nested parameters to a device without waiting for it; float64 becomes `dtype`."""
    if isinstance(params, Tensor):
        if dtype is not None and params.is_floating_point():
            return params.to(device, dtype, non_blocking=True)
        return params.to(device, non_blocking=True)
    if isinstance(params, dict):
        return {key: moved(value, device, dtype) for key, value in params.items()}
    if isinstance(params, (list, tuple)):
        return type(params)(moved(value, device, dtype) for value in params)
    return params
