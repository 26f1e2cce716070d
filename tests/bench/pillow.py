"""The oracle of the mirror: torchvision on Pillow images, with the parameters a mirror drew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from skimage import data
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
"""Colour photographs that the wheel of scikit-image holds."""
MODES = {mode.value: mode for mode in InterpolationMode}


def photographs(size: int, count: int) -> list[Image.Image]:
    """Return `count` square cuts of photographs, resized to `size` pixels."""
    random = np.random.default_rng(0)
    images = []
    for number in range(count):
        whole = Image.fromarray(getattr(data, PHOTOGRAPHS[number % len(PHOTOGRAPHS)])())
        side = int(random.integers(160, min(whole.size)))
        left = int(random.integers(0, whole.width - side + 1))
        top = int(random.integers(0, whole.height - side + 1))
        cut = whole.crop((left, top, left + side, top + side))
        images.append(cut.resize((size, size), Image.Resampling.BICUBIC))
    return images


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Stack Pillow images to (B, 3, H, W) in [0, 1]."""
    return torch.stack([F.to_tensor(image) for image in images])


def crop(image: Image.Image, p: dict[str, Any], i: int, size: int, mode: str) -> Image.Image:
    """Crop, resize and flip as drawn."""
    box = [int(p[key][i]) for key in ("top", "left", "height", "width")]
    out = F.resized_crop(image, *box, [size, size], MODES[mode])
    if p["flip_x"][i]:
        out = F.hflip(out)
    return F.vflip(out) if p["flip_y"][i] else out


def jitter(image: Image.Image, p: dict[str, Any], i: int) -> Image.Image:
    """Change colours as drawn."""
    if not p["applied"][i]:
        return image
    functions = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    for kind in p["order"][i].tolist():
        factor = float(p["factors"][i, kind])
        if factor != (0 if kind == 3 else 1):
            image = functions[kind](image, factor)
    return image


def grey(image: Image.Image, p: dict[str, Any], i: int) -> Image.Image:
    """Convert to grey as drawn."""
    return F.to_grayscale(image, 3) if p["applied"][i] else image


def blur(image: Image.Image, p: dict[str, Any], i: int) -> Image.Image:
    """Blur as solo-learn and Lightly do."""
    return image.filter(ImageFilter.GaussianBlur(radius=float(p["sigma"][i])))


def tensor_blur(image: Image.Image, p: dict[str, Any], i: int, kernel: int) -> Image.Image:
    """Blur as torchvision does."""
    return F.gaussian_blur(image, [kernel, kernel], [float(p["sigma"][i])] * 2)


def solarize(image: Image.Image, p: dict[str, Any], i: int) -> Image.Image:
    """Solarise."""
    return ImageOps.solarize(image)


def subset(
    function: Callable[..., Image.Image], image: Image.Image, p: dict[str, Any], i: int
) -> Image.Image:
    """Carry out `function` if image `i` is among those drawn."""
    place = (p["index"] == i).nonzero()
    return function(image, p["inner"], int(place[0, 0])) if len(place) else image


def errors(mine: Tensor, theirs: Tensor) -> dict[str, float]:
    """Return maximum, 99.9th percentile and mean of the difference, in 1/255."""
    difference = ((mine.double() - theirs.double()).abs() * 255).flatten()
    rank = min(len(difference), int(np.ceil(0.999 * len(difference))))
    return {
        "max": float(difference.max()),
        "p99.9": float(difference.kthvalue(rank).values),
        "mean": float(difference.mean()),
    }
