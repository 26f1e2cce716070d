"""Errors of the mirror and of kornia against Pillow, with the same drawn parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import kornia.enhance as enhance
import kornia.geometry.transform as geometry
import lightly.transforms as lightly
import torch
from kornia.color import rgb_to_grayscale
from kornia.filters import gaussian_blur2d
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode as Mode
from torchvision.transforms import functional as F

from cp_plugin.mirror import mirror
from tests.bench import pillow as oracle

Drawn = dict[str, Any]
Row = tuple[
    str,
    Callable[[int], object],
    Callable[[Image.Image, Drawn, int, int], Image.Image],
    Callable[[Tensor, Drawn, int], Tensor] | None,
    float | None,
]
COUNTS = {32: 128, 224: 16}
"""Images by their size."""


def kornia_crop(images: Tensor, p: Drawn, size: int) -> Tensor:
    """Crop, resize and flip with kornia's `crop_and_resize` (bicubic)."""
    top, left = p["top"].float(), p["left"].float()
    bottom, right = top + p["height"] - 1, left + p["width"] - 1
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    boxes = torch.stack([torch.stack(corner, 1) for corner in corners], 1)
    out = geometry.crop_and_resize(images, boxes, (size, size), mode="bicubic")
    return torch.where(p["flip_x"][:, None, None, None], out.flip(-1), out).clamp(0, 1)


def kornia_jitter(images: Tensor, p: Drawn, size: int) -> Tensor:
    """Change colours with kornia's functions, image by image in the drawn order."""
    functions = (
        enhance.adjust_brightness_accumulative,
        enhance.adjust_contrast_with_mean_subtraction,
        enhance.adjust_saturation_with_gray_subtraction,
        lambda x, f: enhance.adjust_hue(x, f * 2 * math.pi),
    )
    out = images.clone()
    for i in range(len(images)):
        for kind in p["order"][i].tolist() if p["applied"][i] else []:
            factor = p["factors"][i : i + 1, kind].float()
            if factor != (0 if kind == 3 else 1):
                out[i : i + 1] = functions[kind](out[i : i + 1], factor).clamp(0, 1)
    return out


def kornia_grey(images: Tensor, p: Drawn, size: int) -> Tensor:
    """Convert with kornia."""
    grey = rgb_to_grayscale(images).expand_as(images)
    return torch.where(p["applied"][:, None, None, None], grey, images)


def kornia_blur(images: Tensor, p: Drawn, size: int) -> Tensor:
    """Blur with kornia's Gaussian, wide enough for any sigma."""
    out = images.clone()
    sigma = p["inner"]["sigma"].float()[:, None].expand(-1, 2)
    out[p["index"]] = gaussian_blur2d(images[p["index"]], (17, 17), sigma)
    return out


def kornia_solarize(images: Tensor, p: Drawn, size: int) -> Tensor:
    """Solarise with kornia."""
    out = images.clone()
    out[p["index"]] = enhance.solarize(images[p["index"]], 128 / 255)
    return out


def crop(image: Image.Image, p: Drawn, i: int, size: int) -> Image.Image:
    """Crop with Pillow, bicubic."""
    return oracle.crop(image, p, i, size, "bicubic")


def jitter(image: Image.Image, p: Drawn, i: int, size: int) -> Image.Image:
    """Change colours with Pillow."""
    return oracle.jitter(image, p, i)


def chosen(function: Callable[..., Image.Image]) -> Callable[..., Image.Image]:
    """Carry out a Pillow function on the images drawn."""
    return lambda image, p, i, size: oracle.subset(function, image, p, i)


def flat(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Drawn, int], Tensor]:
    """Carry out a kornia function that draws nothing on all images."""
    return lambda images, p, size: function(images)


# name, transform, Pillow, kornia or None, goal of the 99.9th percentile or None
ROWS: list[Row] = [
    ("crop, resize (bicubic)", lambda s: v1.RandomResizedCrop(s, interpolation=Mode.BICUBIC),
     crop, kornia_crop, 1.0),
    ("crop, resize (bilinear)", lambda s: v1.RandomResizedCrop(s),
     lambda im, p, i, s: oracle.crop(im, p, i, s, "bilinear"), None, 1.0),
    ("brightness", lambda s: v1.ColorJitter(brightness=0.8), jitter, kornia_jitter, 1.0),
    ("contrast", lambda s: v1.ColorJitter(contrast=0.8), jitter, kornia_jitter, 1.0),
    ("saturation", lambda s: v1.ColorJitter(saturation=0.8), jitter, kornia_jitter, 1.0),
    ("hue", lambda s: v1.ColorJitter(hue=0.2), jitter, kornia_jitter, 2.5),
    ("grey", lambda s: v1.RandomGrayscale(0.5),
     lambda im, p, i, s: oracle.grey(im, p, i), kornia_grey, 1.0),
    ("blur (Pillow's)", lambda s: lightly.GaussianBlur(prob=0.5, sigmas=(0.1, 2.0)),
     chosen(oracle.blur), kornia_blur, 2.0),
    ("blur (torchvision's)", lambda s: v1.GaussianBlur(5, (0.1, 2.0)),
     lambda im, p, i, s: oracle.tensor_blur(im, p, i, 5), None, None),
    ("solarise", lambda s: v1.RandomSolarize(128, 0.5),
     chosen(oracle.solarize), kornia_solarize, 1.0),
    ("equalise", lambda s: v1.RandomEqualize(1.0),
     chosen(lambda im, p, i: ImageOps.equalize(im)), flat(enhance.equalize), None),
    ("posterise", lambda s: v1.RandomPosterize(4, 1.0),
     chosen(lambda im, p, i: ImageOps.posterize(im, 4)),
     flat(lambda x: enhance.posterize(x, 4)), None),
    ("autocontrast", lambda s: v1.RandomAutocontrast(1.0),
     chosen(lambda im, p, i: ImageOps.autocontrast(im)), None, None),
    ("sharpness", lambda s: v1.RandomAdjustSharpness(2.0, 1.0),
     chosen(lambda im, p, i: F.adjust_sharpness(im, 2.0)),
     flat(lambda x: enhance.sharpness(x, 2.0)), None),
    ("rotation (bilinear)", lambda s: v1.RandomRotation(30, Mode.BILINEAR),
     lambda im, p, i, s: F.rotate(im, float(p["angle"][i]), Mode.BILINEAR),
     lambda x, p, s: geometry.rotate(x, p["angle"].float()), None),
]  # fmt: skip


def rows() -> list[dict[str, Any]]:
    """Measure every row at both sizes."""
    measured = []
    for size, count in COUNTS.items():
        pictures = oracle.photographs(size, count)
        given = oracle.to_tensor(pictures)
        for name, transform, with_pillow, with_kornia, goal in ROWS:
            twin = mirror(transform(size))
            params = twin.sample(given, torch.Generator().manual_seed(0))
            p = params[0]["steps"][0]
            truth = oracle.to_tensor([with_pillow(im, p, i, size) for i, im in enumerate(pictures)])
            row = {"transform": name, "size": size, "images": count, "goal_p99.9": goal,
                   "mirror": oracle.errors(twin.apply(given, params)[0], truth)}  # fmt: skip
            if with_kornia is not None:
                row["kornia"] = oracle.errors(with_kornia(given, p, size), truth)
            measured.append(row)
        measured.append(_simclr(pictures, given, size))
    return measured


def _simclr(pictures: list[Image.Image], given: Tensor, size: int) -> dict[str, Any]:
    """The whole pipeline of SimCLR (solo-learn's order), before normalising."""
    twin = mirror(
        v1.Compose(
            [
                v1.RandomResizedCrop(size, interpolation=Mode.BICUBIC),
                v1.RandomApply([v1.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
                v1.RandomGrayscale(0.2),
                lightly.GaussianBlur(prob=0.5, sigmas=(0.1, 2.0)),
                v1.RandomHorizontalFlip(),
            ]
        )
    )
    params = twin.sample(given, torch.Generator().manual_seed(0))
    cut, colours, grey, blur = params[0]["steps"]
    truth = []
    for i, picture in enumerate(pictures):
        out = oracle.jitter(crop(picture, cut, i, size), colours, i)
        truth.append(oracle.subset(oracle.blur, oracle.grey(out, grey, i), blur, i))
    expected = oracle.to_tensor(truth)
    other = kornia_jitter(kornia_crop(given, cut, size), colours, size)
    other = kornia_blur(kornia_grey(other, grey, size), blur, size)
    return {
        "transform": "SimCLR, whole",
        "size": size,
        "images": len(pictures),
        "goal_mean": 1.0,
        "mirror": oracle.errors(twin.apply(given, params)[0], expected),
        "kornia": oracle.errors(other, expected),
    }
