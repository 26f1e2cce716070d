"""Crops, resizes and flips."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cp_plugin.config.settings import UserError
from cp_plugin.mirror.base import ImageFormat, Operation, Params, Shape, chance, uniform, whole
from cp_plugin.mirror.resample import OVERSHOOTING, resize_weights, separable

ATTEMPTS = 10
"""How often torchvision draws a crop before it takes the whole image."""


class RandomResizedCrop(Operation):
    """A box of random area and aspect, resized (torchvision `RandomResizedCrop`), then flipped.

    Flips are part of it, since they cost nothing here: with probability `flip_horizontal` and
    `flip_vertical`.
    """

    def __init__(
        self,
        size: tuple[int, int],
        scale: Sequence[float],
        ratio: Sequence[float],
        filter_name: str = "bilinear",
        format: ImageFormat = ImageFormat.PILLOW,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.size = size
        self.scale = (float(scale[0]), float(scale[1]))
        self.ratio = (float(ratio[0]), float(ratio[1]))
        self.filter_name = filter_name
        self.format = format
        self.flip_horizontal = 0.0
        self.flip_vertical = 0.0

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape after the crop."""
        return shape.resized(*self.size)

    def sample(self, shape: Shape, generator: torch.Generator | None = None) -> Params:
        """Draw `top`, `left`, `height`, `width` in pixels, and `flip_x`, `flip_y`."""
        params = draw_boxes(shape, self.scale, self.ratio, generator)
        params["flip_x"] = chance(shape.batch, self.flip_horizontal, generator)
        params["flip_y"] = chance(shape.batch, self.flip_vertical, generator)
        return params

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Crop, resize and flip."""
        boxes = {key: params[key].to(images.dtype) for key in ("top", "left", "height", "width")}
        height, width = images.shape[-2:]
        flip_x = params["flip_x"] if self.flip_horizontal else None
        flip_y = params["flip_y"] if self.flip_vertical else None

        def build() -> tuple[Tensor, Tensor]:
            return (
                resize_weights(
                    boxes["top"], boxes["height"], height, self.size[0], self.filter_name, flip_y
                ),
                resize_weights(
                    boxes["left"], boxes["width"], width, self.size[1], self.filter_name, flip_x
                ),
            )

        clamp = self.format.rounds and self.filter_name in OVERSHOOTING
        return separable(images, build, clamp)


def draw_boxes(
    shape: Shape,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: torch.Generator | None,
) -> Params:
    """Draw boxes as torchvision does: ten attempts, then the largest central one."""
    count, _, height, width = shape
    if shape.aspects is not None:
        return _boxes_in_squeezed(shape, shape.aspects, scale, ratio, generator)
    area = uniform((count, ATTEMPTS), scale[0], scale[1], generator) * height * width
    low, high = torch.log(torch.tensor(ratio, dtype=torch.float64)).tolist()
    aspect = torch.exp(uniform((count, ATTEMPTS), low, high, generator))
    widths, heights = (area * aspect).sqrt_().round_(), (area / aspect).sqrt_().round_()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits.to(torch.uint8).argmax(1, keepdim=True)
    central = central_box(height, width, ratio)
    found = fits.any(1)
    box_width = torch.where(found, widths.gather(1, first)[:, 0].long(), central[1])
    box_height = torch.where(found, heights.gather(1, first)[:, 0].long(), central[0])
    top, left = height - box_height, width - box_width
    return {
        "top": torch.where(found, whole(top + 1, generator), top // 2),
        "left": torch.where(found, whole(left + 1, generator), left // 2),
        "height": box_height,
        "width": box_width,
    }


def _boxes_in_squeezed(
    shape: Shape,
    aspects_B: Tensor,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: torch.Generator | None,
) -> Params:
    """Draw boxes of pictures that were squeezed: area and aspect are those in the picture.

    The picture is taken to be as high as the image, and `aspects_B` times as wide as it is high.
    Its pixels may be many more than the image's, so boxes have no whole ones.
    """
    count, _, height, width = shape
    widths_B = height * aspects_B
    area = uniform((count, ATTEMPTS), scale[0], scale[1], generator) * (height * widths_B)[:, None]
    low, high = torch.log(torch.tensor(ratio, dtype=torch.float64)).tolist()
    aspect = torch.exp(uniform((count, ATTEMPTS), low, high, generator))
    wide, tall = (area * aspect).sqrt_(), (area / aspect).sqrt_()
    fits = (wide <= widths_B[:, None]) & (tall <= height)
    first = fits.to(torch.uint8).argmax(1, keepdim=True)
    found = fits.any(1)
    # Otherwise the largest central box whose own aspect is within the ratios.
    inside = aspects_B.clamp(*ratio)
    largest = torch.minimum(widths_B, height * inside)
    box_width = torch.where(found, wide.gather(1, first)[:, 0], largest)
    box_height = torch.where(found, tall.gather(1, first)[:, 0], largest / inside)
    draws = torch.rand(2, count, generator=generator, dtype=torch.float64)
    places = torch.where(found, draws, 0.5)
    squeeze = width / widths_B
    return {
        "top": places[0] * (height - box_height),
        "left": places[1] * (widths_B - box_width) * squeeze,
        "height": box_height,
        "width": box_width * squeeze,
    }


def crop_grid(params: Params, side: int) -> Tensor:
    """Return where the points of a grid over each crop were in the image.

    Args:
        params: what `RandomResizedCrop.sample` drew.
        side: points a side.

    Returns:
        (B, side, side, 2): x and y in pixels, as Lightly's `RandomResizedCropAndFlip` counts them.
    """
    step = torch.linspace(0, 1, side, device=params["left"].device)
    axes = []
    for start, length, flip in (("left", "width", "flip_x"), ("top", "height", "flip_y")):
        first, long = params[start][:, None].float(), params[length][:, None].float()
        points = first + long * step + long / side / 2
        axes.append(torch.where(params[flip][:, None], points.flip(1), points))
    x, y = axes
    return torch.stack((x[:, None, :].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side)), 3)


def central_box(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int]:
    """Return the height and width of the largest box within the ratios."""
    if width / height < min(ratio):
        return round(width / min(ratio)), width
    if width / height > max(ratio):
        return height, round(height * max(ratio))
    return height, width


class Resize(Operation):
    """Resize to a fixed size, or the shorter side to one number (torchvision `Resize`)."""

    def __init__(
        self,
        size: int | tuple[int, int] | None,
        max_size: int | None = None,
        filter_name: str = "bilinear",
        format: ImageFormat = ImageFormat.PILLOW,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.size = size
        self.max_size = max_size
        self.filter_name = filter_name
        self.format = format

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape after resizing."""
        if isinstance(self.size, tuple):
            return shape.resized(*self.size)
        short, long = sorted((shape.height, shape.width))
        wanted = self.max_size if self.size is None else self.size
        assert wanted is not None
        new_short, new_long = wanted, int(wanted * long / short)
        if self.max_size is not None and (self.size is None or new_long > self.max_size):
            new_short, new_long = int(self.max_size * short / long), self.max_size
        if shape.height <= shape.width:
            return shape.resized(new_short, new_long)
        return shape.resized(new_long, new_short)

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Resize."""
        _, _, height, width = images.shape
        *_, new_height, new_width = self.output_shape(Shape(*images.shape))
        if (height, width) == (new_height, new_width):
            return images
        zero = images.new_zeros(1)

        def build() -> tuple[Tensor, Tensor]:
            return (
                resize_weights(zero, zero + height, height, new_height, self.filter_name, None),
                resize_weights(zero, zero + width, width, new_width, self.filter_name, None),
            )

        overshoots = self.filter_name in OVERSHOOTING
        return separable(images, build, clamp=self.format.rounds and overshoots)


class CenterCrop(Operation):
    """The central pixels (torchvision `CenterCrop`)."""

    def __init__(self, size: tuple[int, int], name: str | None = None) -> None:
        super().__init__(name)
        self.size = size

    def check(self, shape: Shape) -> None:
        """Refuse images smaller than the crop."""
        super().check(shape)
        check_fits(self.name, self.size, (shape.height, shape.width))

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape after the crop."""
        return shape.resized(*self.size)

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Crop."""
        height, width = self.size
        top = round((images.shape[-2] - height) / 2)
        left = round((images.shape[-1] - width) / 2)
        return images[:, :, top : top + height, left : left + width]


class Flip(Operation):
    """Mirror images left to right or top to bottom with probability p."""

    def __init__(self, dim: int, p: float, name: str | None = None) -> None:
        super().__init__(name)
        self.dim = dim
        self.p = p

    commutes_with_flips: bool = True

    def sample(self, shape: Shape, generator: torch.Generator | None = None) -> Params:
        """Draw `flip`, one truth value an image."""
        return {"flip": chance(shape.batch, self.p, generator)}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Flip the images chosen."""
        return torch.where(params["flip"][:, None, None, None], images.flip(self.dim), images)


def check_fits(name: str, crop: tuple[int, int], image: tuple[int, int]) -> None:
    """Refuse a crop that is larger than the image.

    Raises:
        UserError: naming the operation and both sizes.
    """
    if crop[0] > image[0] or crop[1] > image[1]:
        raise UserError(
            f"{name} expected images of at least {crop[0]}x{crop[1]} pixels, got "
            f"{image[0]}x{image[1]}: take a smaller crop, larger images, or pad first."
        )


class RandomCrop(Operation):
    """Pad, then cut out a window at a random place (torchvision `RandomCrop`).

    Args:
        size: (height, width) of the window.
        padding: (left, top, right, bottom) in pixels.
        pad_if_needed: pad both sides of an axis that is shorter than the window.
        mode: `constant`, `edge`, `reflect` or `symmetric`.
        fill: what constant padding holds, in [0, 1], one for all or one a channel.
    """

    def __init__(
        self,
        size: tuple[int, int],
        padding: tuple[int, int, int, int] = (0, 0, 0, 0),
        pad_if_needed: bool = False,
        mode: str = "constant",
        fill: tuple[float, ...] = (0.0,),
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.size = size
        self.padding = padding
        self.pad_if_needed = pad_if_needed
        self.mode = mode
        self.fill = fill

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of the window."""
        return shape.resized(*self.size)

    def check(self, shape: Shape) -> None:
        """Refuse images that are smaller than the window even when padded."""
        (_, height), (_, width) = self._padded(shape)
        check_fits(self.name, self.size, (height, width))

    def sample(self, shape: Shape, generator: torch.Generator | None = None) -> Params:
        """Draw `top` and `left` (B,), in pixels of the image before padding."""
        params = {}
        axes = zip(("top", "left"), self._padded(shape), self.size, strict=True)
        for key, (before, padded), window in axes:
            room = torch.full((shape.batch,), padded - window + 1)
            params[key] = whole(room, generator) - before
        return params

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Cut out."""
        height, width = images.shape[-2:]
        *_, high, wide = self.output_shape(Shape(*images.shape))
        rows = self._window(params["top"], high, height, images)
        columns = self._window(params["left"], wide, width, images)
        out = separable(images, lambda: (rows, columns))
        if self.mode == "constant" and any(self.fill):
            covered = rows.sum(2)[:, None, :, None] * columns.sum(2)[:, None, None, :]
            out = out + (1 - covered) * images.new_tensor(self.fill)[:, None, None]
        return out

    def _padded(self, shape: Shape) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return (pixels added before, padded size) of rows and of columns."""
        left, top, right, bottom = self.padding
        axes = []
        sides = ((top, bottom, shape.height), (left, right, shape.width))
        for (before, after, length), window in zip(sides, self.size, strict=True):
            missing = max(0, window - length - before - after) if self.pad_if_needed else 0
            axes.append((before + missing, length + before + after + 2 * missing))
        return axes[0], axes[1]

    def _window(self, start: Tensor, window: int, size: int, like: Tensor) -> Tensor:
        """Return the matrix (B, window, size) that picks pixels."""
        index = start[:, None] + torch.arange(window, device=start.device)
        if self.mode == "edge":
            index = index.clamp(0, size - 1)
        elif self.mode == "reflect":
            index = (size - 1) - ((size - 1) - index.abs()).abs()
        elif self.mode == "symmetric":
            index = torch.where(index < 0, -1 - index, index)
            index = torch.where(index >= size, 2 * size - 1 - index, index)
        column = torch.arange(size, device=start.device)
        return (index[:, :, None] == column).to(like.dtype)


class Pad(RandomCrop):
    """More pixels on every side (torchvision `Pad`); arguments as of `RandomCrop`."""

    def __init__(
        self,
        padding: tuple[int, int, int, int],
        mode: str = "constant",
        fill: tuple[float, ...] = (0.0,),
        name: str | None = None,
    ) -> None:
        super().__init__((0, 0), padding, False, mode, fill, name)

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape with the padding."""
        (_, height), (_, width) = self._padded(shape)
        return shape.resized(height, width)

    def sample(self, shape: Shape, generator: torch.Generator | None = None) -> Params:
        """Return where the padding begins; nothing is drawn."""
        left, top, _, _ = self.padding
        return {
            "top": torch.full((shape.batch,), -top),
            "left": torch.full((shape.batch,), -left),
        }
