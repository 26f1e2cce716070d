"""One form for every image: uint8 (C, H, W) at canonical size, and the key of its pixels."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as operations

from cp_plugin.config.settings import Fit, UserError

CHANNELS = (1, 3, 4)
_BICUBIC = InterpolationMode.BICUBIC
Size = tuple[int, int]
"""Height and width in pixels."""


def image_key(image_CHW: Tensor) -> int:
    """Return a 64-bit hash of an image's pixels and shape.

    Args:
        image_CHW: uint8 (C, H, W), on any device.

    Returns:
        BLAKE2b with a digest of 8 bytes, as a signed integer, so that it fits into int64.

    Raises:
        UserError: the image is not uint8 with three dimensions.
    """
    if image_CHW.dtype != torch.uint8 or image_CHW.ndim != 3:
        raise UserError(
            f"image_key expects uint8 (C, H, W), got {image_CHW.dtype} {tuple(image_CHW.shape)}; "
            "bring the image to canonical form with Canonical(size) first."
        )
    digest = hashlib.blake2b(struct.pack("<3q", *image_CHW.shape), digest_size=8)
    digest.update(image_CHW.cpu().contiguous().numpy().data)
    return int.from_bytes(digest.digest(), "little", signed=True)


class Canonical:
    """Bring any image to uint8 RGB (3, H, W) of one size.

    An image whose size differs is resized (bicubic, antialiased, by Pillow): with `crop` until it
    covers the size, and then cropped in the centre; with `cover` the whole of it is squeezed into
    the size. Which size that is: `cp_plugin.data.canonical`.
    """

    def __init__(self, size: int | Size | None, fit: Fit = "crop") -> None:
        """Keep the size.

        Args:
            size: height and width in pixels, or the side of a square; None leaves images as large
                as they are.
            fit: which part of an image of another shape is kept: the centre, or all of it.
        """
        self.size: Size | None = (size, size) if isinstance(size, int) else size
        self.fit: Fit = fit

    def __call__(self, image: Any) -> Tensor:
        """Return the image in canonical form.

        Args:
            image: a PIL image, a uint8 array (H, W) or (H, W, C), or a tensor (C, H, W): uint8, or
                floating point in [0, 1]. C is 1 or 3.

        Returns:
            uint8 (3, H, W), of `size` unless that is None.

        Raises:
            UserError: it is none of these.
        """
        if isinstance(image, Tensor):
            pixels = _from_tensor(image)
            if self.size is None or tuple(pixels.shape[1:]) == self.size:
                return pixels
            image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        picture = as_picture(image)
        if self.size is not None and picture.size != self.size[::-1]:
            picture = operations.resize(picture, self._resized(picture), _BICUBIC)
            if self.fit == "crop":
                picture = operations.center_crop(picture, list(self.size))
        channels = [np.asarray(channel) for channel in picture.split()]
        return torch.from_numpy(np.stack(channels))

    def _resized(self, picture: Image.Image) -> list[int]:
        """Return the size that a picture is resized to, as torchvision has it.

        Before a crop that is the one at which it just covers the canonical size: for a square its
        shorter side, the longer one rounded down, since keys of poison files depend on it.
        """
        assert self.size is not None
        if self.fit == "cover":
            return list(self.size)
        height, width = self.size
        if height == width:
            return [height]
        scale = max(height / picture.height, width / picture.width)
        return [
            max(height, round(picture.height * scale)),
            max(width, round(picture.width * scale)),
        ]

    def __repr__(self) -> str:
        return f"Canonical({self.size}, {self.fit})"


def as_picture(image: Any) -> Image.Image:
    """Return a PIL image or an array as an RGB PIL image."""
    if isinstance(image, Image.Image):
        return _rgb(image)
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint8 and (image.ndim == 2 or image.shape[2:] == (3,)):
            return Image.fromarray(image).convert("RGB")
        if image.dtype == np.uint8 and image.shape[2:] == (1,):
            return Image.fromarray(image[:, :, 0]).convert("RGB")
        if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] > 3:
            raise UserError(_too_many(image.shape[2]))
        raise UserError(
            "An image given as an array must be uint8 (H, W) or (H, W, C) with C of 1 or 3; "
            f"got {image.dtype} {image.shape}; convert it in __getitem__, before the transform."
        )
    raise UserError(
        "Expected an image: PIL, uint8 array (H, W, C) or tensor (C, H, W); "
        f"got {type(image).__name__}; let __getitem__ give the transform one of these."
    )


def _rgb(picture: Image.Image) -> Image.Image:
    """Return a picture in RGB; Pillow alone would clip 16 bits to 8, so that all became white."""
    if picture.mode == "RGB":
        return picture
    if picture.mode == "F" or picture.mode.startswith("I"):
        values = np.asarray(picture, dtype=np.float64)
        if picture.mode == "F":
            scale = 255.0 if values.max(initial=0) <= 1 else 1.0
        else:
            scale = 1 / 257 if values.max(initial=0) <= 65535 else 255 / values.max()
        levels = (values * scale).round().clip(0, 255).astype(np.uint8)
        return Image.fromarray(levels).convert("RGB")
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


def is_image(value: Any) -> bool:
    """Tell whether a value can be read as an image; 2-d tensors and arrays cannot."""
    if isinstance(value, Image.Image):
        return True
    if isinstance(value, Tensor):
        whole = value.dtype == torch.uint8 or value.is_floating_point()
        return whole and value.ndim == 3 and value.shape[0] in CHANNELS
    return isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3


def like(pixels_CHW: Tensor, original: Any) -> Any:
    """Return uint8 pixels (3, H, W) in the original's type: PIL, array, uint8 or float tensor.

    Where the original has one channel, so has what is returned: the luminance of the pixels.
    """
    if is_grey(original):
        pixels_CHW = _grey(pixels_CHW)
    if isinstance(original, Tensor):
        if original.is_floating_point():
            return pixels_CHW.to(original.dtype) / 255
        return pixels_CHW
    channels = tuple(pixels_CHW.numpy())
    if isinstance(original, np.ndarray):
        return channels[0] if original.ndim == 2 else np.dstack(channels)
    if len(channels) == 1:
        return Image.fromarray(channels[0])
    return Image.merge("RGB", [Image.fromarray(channel) for channel in channels])


def is_grey(image: Any) -> bool:
    """Tell whether an image has one channel of 8 bit, or of floating point."""
    if isinstance(image, Image.Image):
        return bool(image.mode == "L")
    if isinstance(image, Tensor):
        return image.shape[0] == 1
    return isinstance(image, np.ndarray) and (image.ndim == 2 or image.shape[2] == 1)


def _grey(pixels_CHW: Tensor) -> Tensor:
    """Return the luminance of uint8 pixels (3, H, W), (1, H, W), as Pillow has it."""
    picture = Image.fromarray(pixels_CHW.permute(1, 2, 0).contiguous().numpy())
    return torch.from_numpy(np.array(picture.convert("L")))[None]


def _too_many(channels: int) -> str:
    return (
        f"An image has {channels} channels, and a perturbation has three (red, green, blue), so "
        "the others would be lost; give the transform RGB or grey images alone."
    )


def _from_tensor(image: Tensor) -> Tensor:
    if image.ndim == 3 and image.shape[0] > 3 and image.shape[0] == min(image.shape):
        raise UserError(_too_many(image.shape[0]))
    if not is_image(image):
        raise UserError(
            "An image given as a tensor must be (C, H, W) with C of 1 or 3, uint8 or floating "
            f"point; got {image.dtype} {tuple(image.shape)}; convert it in __getitem__, before the "
            "transform."
        )
    image = image.detach().cpu().as_subclass(Tensor)
    if image.is_floating_point():
        low, high = image.aminmax()
        if not (low >= 0 and high <= 1):
            raise UserError(
                "An image given as a floating point tensor must lie in [0, 1], before any "
                f"normalising; got values from {float(low):.3g} to {float(high):.3g}; divide bytes "
                "by 255, and normalise in the transform."
            )
        image = (image * 255).round().to(torch.uint8)
    if image.shape[0] == 1:
        image = image.expand(3, -1, -1)
    return image.contiguous()
