"""The mirror's pixels against Pillow's and torchvision's, with the same drawn parameters."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import lightly.transforms as lightly
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode as Mode
from torchvision.transforms import functional as F
from torchvision.transforms import v2

from cp_plugin.mirror import mirror
from tests.bench import pillow as oracle

Oracle = Callable[[Image.Image, dict[str, Any], int], Image.Image]
SOLO = Path(os.environ.get("SOLO_LEARN_ROOT", Path.home() / "solo-learn"))


@cache
def images(size: int) -> list[Image.Image]:
    return oracle.photographs(size, 24 if size < 100 else 4)


def compare(transform: object, expected: Oracle, size: int) -> dict[str, float]:
    pictures = images(size)
    twin = mirror(transform)
    given = oracle.to_tensor(pictures)
    params = twin.sample(given, torch.Generator().manual_seed(1))
    drawn = params[0]["steps"][0]
    result = oracle.to_tensor([expected(p, drawn, i) for i, p in enumerate(pictures)])
    view = twin.apply(given, params)[0]
    assert view.shape == result.shape
    return oracle.errors(view, result)


def cropped(size: int, mode: str) -> Oracle:
    return lambda image, p, i: oracle.crop(image, p, i, size, mode)


def chosen(function: Oracle) -> Oracle:
    return lambda image, p, i: oracle.subset(function, image, p, i)


def rotated(mode: Mode) -> Oracle:
    return lambda image, p, i: F.rotate(image, float(p["angle"][i]), mode, fill=[30, 60, 90])


def warped(mode: Mode) -> Oracle:
    def warp(image: Image.Image, p: dict[str, Any], i: int) -> Image.Image:
        right, bottom = image.width - 1, image.height - 1
        old = [[0, 0], [right, 0], [right, bottom], [0, bottom]]
        return F.perspective(image, old, p["corners"][i].tolist(), mode)

    return chosen(warp)


def mapped(mode: Mode, of_tensors: bool = False) -> Oracle:
    def warp(image: Image.Image, p: dict[str, Any], i: int) -> Any:
        given = F.pil_to_tensor(image) if of_tensors else image
        angle, scale = float(p["angle"][i]), float(p["scale"][i])
        shift = [int(value) for value in p["shift"][i]]
        made = F.affine(given, angle, shift, scale, p["shear"][i].tolist(), mode, [30, 60, 90])
        return F.to_pil_image(made) if of_tensors else made

    return warp


def window(mode: str) -> Oracle:
    def cut(image: Image.Image, p: dict[str, Any], i: int) -> Image.Image:
        padded = F.pad(image, [4, 4], 50, mode)
        top, left = int(p["top"][i]) + 4, int(p["left"][i]) + 4
        return F.crop(padded, top, left, image.height, image.width)

    return cut


MAP = (40, (0.2, 0.1), (0.7, 1.3), (-20, 20, -9, 9))
"""Degrees, shifts, scales and shears of an affine map."""
# (name, transform for a size, oracle for a size, highest 99.9th percentile in 1/255)
CASES: list[tuple[str, Callable[[int], object], Callable[[int], Oracle], float]] = [
    ("crop bicubic", lambda s: v1.RandomResizedCrop(s, interpolation=Mode.BICUBIC),
     lambda s: cropped(s, "bicubic"), 1.0),
    ("crop bilinear", lambda s: v2.RandomResizedCrop(s), lambda s: cropped(s, "bilinear"), 1.0),
    ("crop nearest", lambda s: v1.RandomResizedCrop(s, interpolation=Mode.NEAREST),
     lambda s: cropped(s, "nearest"), 0.0),
    ("crop lanczos", lambda s: v1.RandomResizedCrop(s, interpolation=Mode.LANCZOS),
     lambda s: cropped(s, "lanczos"), 1.1),
    ("crop box", lambda s: v1.RandomResizedCrop(s, interpolation=Mode.BOX),
     lambda s: cropped(s, "box"), 1.0),
    ("crop hamming", lambda s: v1.RandomResizedCrop(s, interpolation=Mode.HAMMING),
     lambda s: cropped(s, "hamming"), 1.0),
    ("crop and flips",
     lambda s: v1.Compose([v1.RandomResizedCrop(s), v1.RandomVerticalFlip(),
                           v1.RandomHorizontalFlip()]),
     lambda s: cropped(s, "bilinear"), 1.0),
    ("resize down", lambda s: v1.Resize(s // 2, Mode.BICUBIC),
     lambda s: lambda im, p, i: F.resize(im, s // 2, Mode.BICUBIC), 1.0),
    ("resize up", lambda s: v2.Resize(s + 9), lambda s: lambda im, p, i: F.resize(im, s + 9), 1.0),
    ("centre crop", lambda s: v1.CenterCrop(s - 5),
     lambda s: lambda im, p, i: F.center_crop(im, s - 5), 0.0),
    *[(f"random crop {mode}", lambda s, m=mode: v1.RandomCrop(s, 4, padding_mode=m, fill=50),
       lambda s, m=mode: window(m), 0.0) for mode in ("constant", "edge", "reflect", "symmetric")],
    ("brightness", lambda s: v1.ColorJitter(brightness=0.8), lambda s: oracle.jitter, 1.0),
    ("contrast", lambda s: v1.ColorJitter(contrast=0.8), lambda s: oracle.jitter, 1.0),
    ("saturation", lambda s: v2.ColorJitter(saturation=0.8), lambda s: oracle.jitter, 1.0),
    ("hue", lambda s: v1.ColorJitter(hue=0.5), lambda s: oracle.jitter, 2.5),
    ("grey", lambda s: v1.RandomGrayscale(0.5), lambda s: oracle.grey, 1.0),
    ("torchvision blur", lambda s: v1.GaussianBlur(5, (0.1, 2)),
     lambda s: lambda im, p, i: oracle.tensor_blur(im, p, i, 5), 1.0),
    ("solarise", lambda s: v2.RandomSolarize(128, 0.5), lambda s: chosen(oracle.solarize), 0.0),
    ("Lightly's solarise", lambda s: lightly.solarize.RandomSolarization(0.5),
     lambda s: chosen(oracle.solarize), 0.0),
    ("invert", lambda s: v1.RandomInvert(0.5),
     lambda s: chosen(lambda im, p, i: ImageOps.invert(im)), 0.01),
    ("equalise", lambda s: v1.RandomEqualize(0.5),
     lambda s: chosen(lambda im, p, i: ImageOps.equalize(im)), 0.0),
    ("posterise", lambda s: v2.RandomPosterize(3, 0.5),
     lambda s: chosen(lambda im, p, i: ImageOps.posterize(im, 3)), 0.01),
    ("autocontrast", lambda s: v1.RandomAutocontrast(0.5),
     lambda s: chosen(lambda im, p, i: ImageOps.autocontrast(im)), 1.0),
    ("sharper", lambda s: v1.RandomAdjustSharpness(2.0, 0.5),
     lambda s: chosen(lambda im, p, i: F.adjust_sharpness(im, 2.0)), 1.0),
    ("smoother", lambda s: v2.RandomAdjustSharpness(0.3, 0.5),
     lambda s: chosen(lambda im, p, i: F.adjust_sharpness(im, 0.3)), 1.0),
    *[(f"rotation {mode.value}", lambda s, m=mode: v1.RandomRotation(60, m, fill=(30, 60, 90)),
       lambda s, m=mode: rotated(m), limit)
      for mode, limit in ((Mode.NEAREST, 0.0), (Mode.BILINEAR, 1.0), (Mode.BICUBIC, 1.0))],
    *[(f"affine {mode.value}",
       lambda s, m=mode: v1.RandomAffine(*MAP, m, (30, 60, 90)),
       lambda s, m=mode: mapped(m), limit)
      for mode, limit in ((Mode.NEAREST, 0.0), (Mode.BILINEAR, 1.0), (Mode.BICUBIC, 1.0))],
    *[(f"affine {mode.value} of tensors",
       lambda s, m=mode: v2.Compose([v2.ToImage(), v2.RandomAffine(*MAP, m, (30, 60, 90))]),
       lambda s, m=mode: mapped(m, of_tensors=True), limit)
      for mode, limit in ((Mode.NEAREST, 0.0), (Mode.BILINEAR, 1.0))],
    ("Lightly's rotation", lambda s: lightly.RandomRotate(0.5, 90),
     lambda s: chosen(lambda im, p, i: F.rotate(im, 90)), 0.0),
    *[(f"perspective {mode.value}", lambda s, m=mode: v1.RandomPerspective(0.5, 0.7, m),
       lambda s, m=mode: warped(m), limit)
      for mode, limit in ((Mode.NEAREST, 0.0), (Mode.BILINEAR, 1.0), (Mode.BICUBIC, 1.0))],
]  # fmt: skip


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize(
    ("name", "transform", "expected", "limit"), CASES, ids=[c[0] for c in CASES]
)
def test_pixels(
    name: str,
    transform: Callable[[int], object],
    expected: Callable[[int], Oracle],
    limit: float,
    size: int,
) -> None:
    error = compare(transform(size), expected(size), size)
    assert error["p99.9"] <= limit + 1e-3, error


@pytest.mark.parametrize("sigmas", [(0.1, 2.0), (1.0, 1.0), (9.0, 9.0)])
@pytest.mark.parametrize("size", [32, 224])
def test_pillow_blur(size: int, sigmas: tuple[float, float]) -> None:
    """To the byte, also where a value lies halfway between two."""
    transform = lightly.GaussianBlur(prob=0.9, sigmas=sigmas)
    assert compare(transform, chosen(oracle.blur), size)["max"] <= 1e-3


@pytest.mark.parametrize("size", [32, 224])
def test_simclr_pipeline(size: int) -> None:
    """The whole pipeline, in the order of both hosts' SimCLR."""
    crop = v1.RandomResizedCrop(size, interpolation=Mode.BICUBIC)
    jitter = v1.RandomApply([v1.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8)
    blur = lightly.GaussianBlur(prob=0.5, sigmas=(0.1, 2.0))
    pipeline = v1.Compose(
        [crop, jitter, v1.RandomGrayscale(0.2), blur, v1.RandomHorizontalFlip(), v1.ToTensor()]
    )
    pictures = images(size)
    twin = mirror(pipeline)
    given = oracle.to_tensor(pictures)
    params = twin.sample(given, torch.Generator().manual_seed(2))
    steps = params[0]["steps"]
    result = []
    for i, picture in enumerate(pictures):
        picture = oracle.crop(picture, steps[0], i, size, "bicubic")
        picture = oracle.grey(oracle.jitter(picture, steps[1], i), steps[2], i)
        result.append(oracle.subset(oracle.blur, picture, steps[3], i))
    error = oracle.errors(twin.apply(given, params)[0], oracle.to_tensor(result))
    assert error["mean"] <= 1.0, error


def test_a_true_gaussian_is_told_apart() -> None:
    picture = images(32)
    given = oracle.to_tensor(picture)
    gaussian = torch.stack([F.gaussian_blur(x, [9, 9], [1.5, 1.5]) for x in given])
    drawn = {"sigma": torch.full((len(picture),), 1.5)}
    pillow = oracle.to_tensor([oracle.blur(p, drawn, i) for i, p in enumerate(picture)])
    assert oracle.errors(gaussian, pillow)["p99.9"] > 3


def float_cases() -> list[tuple[str, object, Callable[[Tensor, dict[str, Any]], Tensor]]]:
    def tensor_jitter(x: Tensor, p: dict[str, Any]) -> Tensor:
        for kind in p["order"][0].tolist():
            name = ("brightness", "contrast", "saturation", "hue")[kind]
            x = getattr(F, f"adjust_{name}")(x, float(p["factors"][0, kind]))
        return x

    def tensor_crop(x: Tensor, p: dict[str, Any]) -> Tensor:
        box = [int(p[key][0]) for key in ("top", "left", "height", "width")]
        return F.resized_crop(x, *box, [24, 20], Mode.BICUBIC)

    return [
        ("jitter", v1.ColorJitter(0.8, 0.8, 0.8, 0.5), tensor_jitter),
        ("crop", v2.RandomResizedCrop((24, 20), interpolation=Mode.BICUBIC), tensor_crop),
        ("solarise", v1.RandomSolarize(0.4, 1.0), lambda x, p: F.solarize(x, 0.4)),
        ("grey", v1.Grayscale(3), lambda x, p: F.rgb_to_grayscale(x, 3)),
        ("sharpness", v2.RandomAdjustSharpness(1.7, 1.0), lambda x, p: F.adjust_sharpness(x, 1.7)),
        ("autocontrast", v1.RandomAutocontrast(1.0), lambda x, p: F.autocontrast(x)),
    ]


@pytest.mark.parametrize("case", float_cases(), ids=lambda case: case[0])
def test_after_to_tensor_nothing_is_rounded(case: tuple[str, object, Any]) -> None:
    """Behind ToTensor hosts compute in floating point; so does the twin."""
    _, transform, expected = case
    twin = mirror(v1.Compose([v1.ToTensor(), transform]))
    for seed in range(4):
        given = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        params = twin.sample(given, torch.Generator().manual_seed(seed))
        torch.testing.assert_close(
            twin.apply(given, params)[0][0], expected(given[0], params[0]["steps"][-1]),
            atol=2e-5, rtol=0,
        )  # fmt: skip


def test_erasing_overwrites_the_drawn_box() -> None:
    twin = mirror(v1.Compose([v1.ToTensor(), v1.RandomErasing(1.0, value=(0.1, 0.2, 0.3))]))
    given = torch.rand(6, 3, 20, 24)
    params = twin.sample(given)
    p = params[0]["steps"][-1]
    for i, view in enumerate(twin.apply(given, params)[0]):
        top, left, high, wide = (int(p[key][i]) for key in ("top", "left", "height", "width"))
        value = torch.tensor([0.1, 0.2, 0.3])[:, None, None]
        torch.testing.assert_close(view, F.erase(given[i], top, left, high, wide, value))
        assert high > 0


@pytest.mark.skipif(not SOLO.is_dir(), reason=f"no checkout of solo-learn at {SOLO}")
def test_solo_learns_own_blur(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SOLO))
    solo = pytest.importorskip("solo.data.pretrain_dataloader")
    error = compare(solo.GaussianBlur([0.8, 2.0]), oracle.blur, 32)
    assert error["p99.9"] <= 2.0
