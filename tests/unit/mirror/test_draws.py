"""The parameters that a mirror draws follow the hosts' distributions."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import lightly.transforms as lightly
import numpy as np
import pytest
import torch
from scipy.stats import binomtest, chisquare, ks_2samp
from torch import Tensor
from torchvision import transforms as v1

from cp_plugin.mirror import mirror

N = 10_000
SIGNIFICANCE = 1e-3


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    state = torch.get_rng_state()
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    yield
    torch.set_rng_state(state)


def drawn(transform: object, height: int = 32, width: int = 48) -> dict[str, Any]:
    blank = torch.zeros(1, 3, height, width).expand(N, 3, height, width)
    params = mirror(transform).sample(blank, torch.Generator().manual_seed(7))
    return params[0]["steps"][0]


def same(mine: Tensor, theirs: list[float]) -> None:
    assert ks_2samp(mine.double().numpy(), np.array(theirs)).pvalue > SIGNIFICANCE


def often(times: int, p: float, of: int = N) -> None:
    assert binomtest(times, of, p).pvalue > SIGNIFICANCE, (times, of, p)


def test_crops() -> None:
    transform = v1.RandomResizedCrop(32)
    p = drawn(transform)
    blank = torch.zeros(3, 32, 48)
    theirs = [transform.get_params(blank, transform.scale, transform.ratio) for _ in range(N)]
    top, left, height, width = (list(column) for column in zip(*theirs, strict=True))
    same(p["top"], top)
    same(p["left"], left)
    same(p["height"] * p["width"], [a * b for a, b in zip(height, width, strict=True)])
    same(p["width"] / p["height"], [b / a for a, b in zip(height, width, strict=True)])


def test_crops_that_seldom_fit() -> None:
    """Where ten attempts fail, both take the central box."""
    transform = v1.RandomResizedCrop(32, scale=(0.9, 1.0))
    p = drawn(transform, 20, 64)
    blank = torch.zeros(3, 20, 64)
    theirs = [transform.get_params(blank, transform.scale, transform.ratio) for _ in range(2000)]
    same(p["width"], [box[3] for box in theirs])
    assert p["width"].unique().tolist() == [round(20 * 4 / 3)]


def test_jitter() -> None:
    transform = v1.ColorJitter(0.4, (0.3, 1.9), 0.8, 0.1)
    p = drawn(v1.RandomApply([transform], p=0.8))
    ranges = (transform.brightness, transform.contrast, transform.saturation, transform.hue)
    theirs = [transform.get_params(*ranges) for _ in range(N)]
    for column in range(4):
        same(p["factors"][:, column], [draw[1 + column] for draw in theirs])
    often(int(p["applied"].sum()), 0.8)
    code = (p["order"] * torch.tensor([64, 16, 4, 1])).sum(1)
    counts = code.unique(return_counts=True)[1]
    assert len(counts) == math.factorial(4)
    assert chisquare(counts.numpy()).pvalue > SIGNIFICANCE


@pytest.mark.parametrize(
    ("transform", "low", "high"),
    [
        (lightly.GaussianBlur(prob=1.0, sigmas=(0.2, 1.7)), 0.2, 1.7),
        (v1.GaussianBlur(3, (0.3, 1.1)), 0.3, 1.1),
    ],
    ids=["Pillow", "torchvision"],
)
def test_sigma(transform: object, low: float, high: float) -> None:
    p = drawn(transform)
    p = p.get("inner", p)
    same(p["sigma"], np.random.uniform(low, high, N).tolist())


def test_angle_and_erased_box() -> None:
    same(drawn(v1.RandomRotation((-20, 50)))["angle"], np.random.uniform(-20, 50, N).tolist())
    transform = v1.RandomErasing(1.0)
    p = drawn(transform)
    blank = torch.zeros(3, 32, 48)
    theirs = [transform.get_params(blank, transform.scale, transform.ratio, [0.0])
              for _ in range(N)]  # fmt: skip
    for place, key in enumerate(("top", "left", "height", "width")):
        same(p[key], [float(box[place]) for box in theirs])


def test_corners_of_perspective() -> None:
    p = drawn(v1.RandomPerspective(0.5, 1.0))["inner"]
    theirs = [v1.RandomPerspective.get_params(48, 32, 0.5)[1] for _ in range(N)]
    for corner in range(4):
        for axis in range(2):
            same(p["corners"][:, corner, axis], [draw[corner][axis] for draw in theirs])


def test_windows() -> None:
    p = drawn(v1.RandomCrop(32, padding=4))
    assert chisquare((p["top"] + 4).bincount(minlength=9).numpy()).pvalue > SIGNIFICANCE
    assert chisquare((p["left"] + 4).bincount(minlength=25).numpy()).pvalue > SIGNIFICANCE


@pytest.mark.parametrize(
    ("transform", "count"),
    [
        (v1.RandomGrayscale(0.2), lambda p: int(p["applied"].sum())),
        (v1.RandomSolarize(128, 0.2), lambda p: len(p["index"])),
        (lightly.GaussianBlur(prob=0.2), lambda p: len(p["index"])),
        (v1.RandomApply([v1.GaussianBlur(3)], p=0.2), lambda p: len(p["index"])),
        (v1.RandomHorizontalFlip(0.2), lambda p: int(p["flip"].sum())),
        (v1.RandomErasing(0.2), lambda p: int((p["height"] > 0).sum())),
    ],
    ids=lambda value: type(value).__name__,
)
def test_probabilities(transform: object, count: Callable[[dict[str, Any]], int]) -> None:
    often(count(drawn(transform)), 0.2)


def test_flips_within_a_crop() -> None:
    flips = [v1.RandomHorizontalFlip(0.3), v1.RandomVerticalFlip(0.1)]
    p = drawn(v1.Compose([v1.RandomResizedCrop(8), *flips]))
    often(int(p["flip_x"].sum()), 0.3)
    often(int(p["flip_y"].sum()), 0.1)


def test_choice_and_order() -> None:
    tones = [v1.RandomInvert(1.0), v1.RandomEqualize(1.0), v1.RandomPosterize(2, 1.0)]
    chosen = drawn(v1.RandomChoice(tones, p=[0.5, 0.3, 0.2]))["index"]
    assert chisquare([len(part) for part in chosen], [5000, 3000, 2000]).pvalue > SIGNIFICANCE
    order = drawn(v1.RandomOrder(tones))["order"]
    counts = (order * torch.tensor([9, 3, 1])).sum(1).unique(return_counts=True)[1]
    assert len(counts) == 6
    assert chisquare(counts.numpy()).pvalue > SIGNIFICANCE


def test_a_wrong_range_is_told_apart() -> None:
    p = drawn(v1.ColorJitter(brightness=0.4))
    theirs = np.random.uniform(0.65, 1.4, N)
    assert ks_2samp(p["factors"][:, 0].numpy(), theirs).pvalue < SIGNIFICANCE
