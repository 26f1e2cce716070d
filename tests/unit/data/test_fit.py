"""Delta on a grid over a whole picture: the bound at every size, grey kept, crops that arrive."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision import transforms

from cp_plugin import Poison
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.data import Canonical
from cp_plugin.data.fit import at_size, in_bands, in_levels, keeping_grey
from cp_plugin.mirror import Shape, mirror

EPS = 8 / 255
long_sides = st.one_of(st.integers(1, 64), st.integers(1, 4000))
short_sides = st.one_of(st.integers(1, 64), st.integers(1, 3000))
budgets = st.floats(1 / 255, 1, allow_nan=False)


def extreme(grid: int, eps: float, seed: int) -> Tensor:
    """Rows whose entries are mostly at the budget's very edge, where rounding could leave it."""
    draw = np.random.default_rng(seed)
    values = draw.choice([-1, 1, draw.uniform(-1, 1)], size=(1, 3, grid, grid))
    return torch.from_numpy(values * eps).float().clamp(-eps, eps)


@settings(max_examples=60, deadline=None)
@given(long_sides, short_sides, st.integers(1, 512), budgets, st.integers(0, 9), st.booleans())
def test_bound_at_any_size(
    width: int, height: int, grid: int, eps: float, seed: int, upright: bool
) -> None:
    size = (width, height) if upright else (height, width)
    delta = at_size(extreme(grid, eps, seed), size)
    assert delta.shape == (1, 3, *size)
    assert float(delta.abs().max()) <= eps * (1 + 1e-6)
    for full in (255, 65535):
        levels = in_levels(delta.clone(), eps, full)
        assert int(levels.abs().max()) <= full * eps + 1e-6


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 1600), st.integers(1, 400), st.integers(1, 512), st.integers(0, 9))
def test_bands_are_the_whole_bit_for_bit(width: int, height: int, grid: int, seed: int) -> None:
    delta = torch.from_numpy(np.random.default_rng(seed).normal(size=(grid, grid))).float()
    before, whole = delta.clone(), at_size(delta[None, None], (height, width))[0, 0]
    found = torch.full_like(whole, torch.nan)
    for columns, part in in_bands(delta, (height, width)):
        found[:, columns] = part
        part.zero_()
    assert torch.equal(found, whole)
    assert torch.equal(delta, before)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 64), budgets, st.integers(0, 9))
def test_bound_of_poisoned_pictures(
    width: int, height: int, grid: int, eps: float, seed: int
) -> None:
    rows = Perturbation(extreme(grid, eps, seed), eps)
    poison = Poison(rows, "sample", torch.tensor([1]), info={"fit": "cover"})
    draw = np.random.default_rng(seed)
    images = torch.from_numpy(draw.integers(0, 256, (1, 3, height, width), dtype=np.uint8))
    found = poison.apply(images, torch.tensor([0]))
    assert found.dtype == torch.uint8
    assert int((found.int() - images).abs().max()) <= int(255 * eps + 1e-6)
    assert torch.equal(poison.apply(images, torch.tensor([-1])), images)


def test_weights_add_up_to_one_and_none_is_negative() -> None:
    grid = torch.eye(7)[:, None, :, None].expand(7, 1, 7, 3)
    for height in (1, 3, 7, 8, 50):
        weights = at_size(grid, (height, 3))
        assert float(weights.min()) >= 0
        assert torch.allclose(weights.sum(0), torch.ones(()))


def test_grey_images_stay_grey() -> None:
    draw = np.random.default_rng(0)
    grey = torch.from_numpy(draw.integers(0, 256, (1, 1, 20, 30), dtype=np.uint8)).expand(
        1, 3, -1, -1
    )
    colour = torch.from_numpy(draw.integers(0, 256, (1, 3, 20, 30), dtype=np.uint8))
    delta = extreme(8, EPS, 0)
    kept = keeping_grey(delta.expand(2, -1, -1, -1), torch.cat([grey, colour]))
    assert torch.equal(kept[0, 0], kept[0, 2])
    assert float(kept[0].abs().max()) <= EPS * (1 + 1e-6)
    assert torch.equal(kept[1], delta[0])


def test_cover_squeezes_all_of_a_picture() -> None:
    left, right = Image.new("RGB", (300, 100), "red"), Image.new("RGB", (300, 100), "blue")
    both = Image.new("RGB", (600, 100))
    both.paste(left, (0, 0))
    both.paste(right, (300, 0))
    covered = Canonical(32, "cover")(both)
    assert covered.shape == (3, 32, 32)
    assert covered[0, 16, 0] == 255
    assert covered[2, 16, 31] == 255
    assert Canonical((20, 40), "cover")(both).shape == (3, 20, 40)


@pytest.mark.parametrize("size", [(480, 640), (3200, 2400)])
def test_crops_of_pictures_arrive_as_crops_of_the_grid(size: tuple[int, int]) -> None:
    """A victim's crop of the protected picture carries what the same crop of the grid carries.

    Rows are white noise, the hardest: no crafted delta has finer detail.
    """
    (height, width), grid = size, 224
    torch.manual_seed(3)
    crop = mirror(transforms.RandomResizedCrop(grid))
    delta = Perturbation.uniform(1, (3, grid, grid), EPS).stored
    levels = in_levels(at_size(delta.clone(), size), EPS)[0]
    pixels = (128 + levels).permute(1, 2, 0).byte().numpy()
    picture, found = Image.fromarray(pixels), []
    for _ in range(20):
        box = transforms.RandomResizedCrop.get_params(picture, (0.08, 1), (3 / 4, 4 / 3))
        arrived = transforms.functional.resized_crop(picture, *box, [grid, grid])
        params = crop.sample(0.5 + delta)
        scales = (grid / height, grid / width) * 2
        for name, value, scale in zip(("top", "left", "height", "width"), box, scales, strict=True):
            params[0]["steps"][0][name] = torch.tensor([value * scale])
        (crafted,) = crop.apply(0.5 + delta, params)
        seen = np.asarray(arrived, dtype=np.float64).transpose(2, 0, 1) - 128
        found.append(np.corrcoef(seen.ravel(), (crafted[0] - 0.5).numpy().ravel())[0, 1])
    assert np.mean(found) >= 0.9
    assert min(found) >= 0.85


def test_boxes_of_squeezed_pictures_are_those_of_the_pictures() -> None:
    """Area and aspect in the picture are drawn as torchvision draws them, whatever its shape."""
    count = 4000
    images, aspects = torch.zeros(count, 3, 64, 64), torch.full((count,), 4 / 3)
    crop = mirror(transforms.RandomResizedCrop(32))
    generator = torch.Generator().manual_seed(0)
    box = crop.sample(images, generator, aspects)[0]["steps"][0]
    wide, tall = box["width"] * aspects, box["height"]
    assert float((box["left"] + box["width"]).max()) <= 64 + 1e-3
    assert float(box["top"].min()) >= 0
    ratio = wide / tall
    assert 0.74 < float(ratio.min()) < float(ratio.max()) < 1.34
    large = Image.new("1", (4000, 3000))
    torch.manual_seed(0)
    theirs = [
        transforms.RandomResizedCrop.get_params(large, (0.08, 1), (3 / 4, 4 / 3))
        for _ in range(count)
    ]
    _, _, height, width = (np.array(values, dtype=float) for values in zip(*theirs, strict=True))
    ours_area, ours_ratio = (wide * tall / (64 * 64 * 4 / 3)).numpy(), ratio.log().numpy()
    assert abs(ours_area.mean() - (height * width / 12e6).mean()) < 0.02
    assert abs(ours_ratio.mean() - np.log(width / height).mean()) < 0.02


def test_wide_pictures_get_the_largest_box_in_the_middle() -> None:
    crop = mirror(transforms.RandomResizedCrop(8, scale=(1.0, 1.0)))
    box = crop.sample(torch.zeros(1, 3, 30, 30), None, torch.tensor([10.0]))[0]["steps"][0]
    assert float(box["height"]) == 30
    assert float(box["width"]) == pytest.approx(4)  # 30 x 40 of 30 x 300 pixels
    assert float(box["left"]) == pytest.approx(13)


def test_a_choice_of_crops_knows_the_pictures_of_its_part() -> None:
    crops = [transforms.RandomResizedCrop(8, part) for part in ((0.2, 0.4), (0.6, 1.0))]
    images, aspects = torch.rand(9, 3, 16, 16), torch.linspace(0.5, 2, 9, dtype=torch.float64)
    (view,) = mirror(transforms.RandomChoice(crops))(
        images, torch.Generator().manual_seed(0), aspects=aspects
    )
    assert view.shape == (9, 3, 8, 8)


def test_a_shape_of_pictures_is_a_tuple_of_four_numbers() -> None:
    """Operations of users take it apart, and draw tensors of it."""
    shape = Shape(2, 3, 4, 5).squeezed_from(torch.ones(2, dtype=torch.float64))
    batch, channels, height, width = shape
    assert torch.rand(shape).shape == (batch, channels, height, width)
    assert shape.of_some(torch.tensor([1])).aspects.tolist() == [1.0]
    assert shape.resized(2, 2).aspects is None
