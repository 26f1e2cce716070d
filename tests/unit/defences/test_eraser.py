"""UEraser: its plasma, its shuffling, and the worst of several draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cp_plugin.config.defences import defence_settings
from cp_plugin.config.settings import UserError
from cp_plugin.data import Photos
from cp_plugin.defences import Pixels, Ueraser, worst_views
from cp_plugin.defences.eraser import plasma


def slow_plasma(noise: list[Tensor], roughness: float, height: int, width: int) -> Tensor:
    """Midpoints one at a time: of an edge two corners' mean, of a square four corners'."""
    grid = noise[0].tolist()
    for level, displacement in enumerate(noise[1:], 1):
        side = len(displacement)
        finer = [[0.0] * side for _ in range(side)]
        for y in range(side):
            for x in range(side):
                ys = {y // 2, (y + 1) // 2}
                xs = {x // 2, (x + 1) // 2}
                corners = [grid[a][b] for a in ys for b in xs]
                middle = sum(corners) / len(corners)
                finer[y][x] = middle + roughness**level * float(displacement[y, x])
        grid = finer
    cut = torch.tensor([row[:width] for row in grid[:height]])
    return (cut - cut.min()) / (cut.max() - cut.min())


def test_the_plasma_is_midpoint_displacement() -> None:
    draws = torch.Generator().manual_seed(0)
    noise = [2 * torch.rand(2, 1, 2**k + 1, 2**k + 1, generator=draws) - 1 for k in range(5)]
    roughness = torch.tensor([0.3, 0.6])
    found = plasma(noise, roughness, 16, 12)
    for image in range(2):
        own = [grid[image, 0] for grid in noise]
        expected = slow_plasma(own, float(roughness[image]), 16, 12)
        assert torch.allclose(found[image, 0], expected, atol=1e-5)
    assert (found.amin((1, 2, 3)).max(), found.amax((1, 2, 3)).min()) == (0, 1)


@pytest.fixture
def views() -> Tensor:
    return torch.from_numpy(Photos(train=True, patches=2).data[:24]).permute(0, 3, 1, 2) / 255


def parts(views: Tensor, which: str) -> Tensor:
    """Views under one of the changes alone."""
    change: Any = Ueraser()
    return change._shuffled(views) if which == "shuffled" else change._under_plasma(views)


def test_half_of_the_images_get_their_channels_in_another_order() -> None:
    torch.manual_seed(0)
    views = torch.rand(24, 3, 4, 4)
    kept = 0
    for _ in range(20):
        for before, after in zip(views, parts(views, "shuffled"), strict=True):
            order = [int((before == channel).flatten(1).all(1).nonzero()[0]) for channel in after]
            assert sorted(order) == [0, 1, 2]
            kept += order == [0, 1, 2]
    assert kept / (20 * len(views)) == pytest.approx(0.5 + 0.5 / 6, abs=0.07)


def test_a_plasma_moves_all_channels_alike_and_half_of_the_images(views: Tensor) -> None:
    torch.manual_seed(0)
    grey = torch.full_like(views, 0.5)
    moved = parts(grey, "plasma") - grey
    assert torch.equal(moved[:, 0], moved[:, 2])
    changed = moved.flatten(1).abs().amax(1) > 0
    assert 4 < changed.sum() < 20
    assert moved.abs().max() <= 0.5 + 1e-6
    ranges = moved.amax((1, 2, 3)) - moved.amin((1, 2, 3))
    assert ranges.max() > 0.5


def test_views_stay_pixels_also_where_they_are_normalised(views: Tensor) -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    means, stds = (torch.tensor(values)[:, None, None] for values in (mean, std))
    normalised = (views - means) / stds
    torch.manual_seed(0)
    plain = Ueraser()(views)
    torch.manual_seed(0)
    found = Ueraser(pixels=Pixels.normalized(mean, std))(normalised)
    back = found * stds + means
    assert (back - plain).abs().max() < 2 / 255
    assert (plain.min() >= 0, plain.max() <= 1) == (True, True)
    assert (plain - views).flatten(1).abs().amax(1).gt(0.02).float().mean() > 0.7


def test_the_worst_draw_is_that_of_each_image_or_of_the_batch() -> None:
    values = [[float(10 * k + view) for view in range(2)] for k in range(4)]
    draws = [[torch.full((3, 1, 2, 2), value) for value in draw] for draw in values]
    of_images = torch.tensor([[1.0, 5, 0], [2, 4, 9], [7, 1, 3], [0, 0, 8]])
    found = worst_views(draws, list(of_images))
    for view in range(2):
        expected = [10 * max(range(4), key=lambda k: of_images[k, row]) + view for row in range(3)]
        assert found[view][:, 0, 0, 0].tolist() == expected
    (first, second) = worst_views(draws, [torch.tensor(value) for value in (1.0, 3.0, 2.0, 0.0)])
    assert (float(first.mean()), float(second.mean())) == (10, 11)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"form": "best"}, r"defence\.form must be mean or worst"),
        ({"draws": 1}, r"defence\.draws must lie in \[2, 100\]"),
        ({"intensity": 2}, r"defence\.intensity must lie in"),
    ],
)
def test_mistakes_in_settings(values: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        defence_settings("ueraser", values)
