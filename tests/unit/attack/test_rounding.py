"""Rows of fewer digits than a step move by it all the same, on the mean, and never leave eps."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from cp_plugin import poisoned
from cp_plugin.apps.export import export
from cp_plugin.attack.perturbation import DTYPES, Perturbation
from cp_plugin.attack.poison_file import Poison
from cp_plugin.attack.rounding import encode, stepped
from cp_plugin.data import Canonical, image_key, load

EPS = 8 / 255
SHAPE = (3, 40, 40)
STEPS = 200
dtypes = st.sampled_from(["float32", "float16", "int8"])
budgets = st.integers(1, 64).map(lambda level: level / 255) | st.floats(1 / 255, 0.3)


def walked(dtype, step, seed=0, steps=STEPS, start=0.0):
    """Rows that have gone the same way for some steps, in units of eps."""
    rows = Perturbation.zeros(1, SHAPE, EPS, dtype)
    rows.write(torch.tensor([0]), torch.full((1, *SHAPE), start * EPS))
    up = -torch.ones(1, *SHAPE)
    for number in range(steps):
        rows.descend(torch.tensor([0]), up, step * EPS, seed * steps + number)
    return rows


@pytest.mark.parametrize("dtype", ["int8", "float16"])
@pytest.mark.parametrize("step", [0.0001, 0.001, 0.0039, 0.004])
def test_short_steps_move_rows_by_their_length_on_the_mean(dtype, step):
    start = 0.1 if dtype == "int8" else 0.6  # where float16 numbers are farther apart
    before = walked(dtype, step, steps=0, start=start).gather(torch.tensor([0])) / EPS
    after = walked(dtype, step, start=start).gather(torch.tensor([0])) / EPS
    way = (after - before).mean()
    reached = min(STEPS * step, 1 - start)
    assert way == pytest.approx(reached, rel=0.03)
    assert after.max() <= 1


def test_the_same_seed_gives_the_same_rows_and_another_one_others():
    first, again = (walked("int8", 0.002, seed=1).stored for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, walked("int8", 0.002, seed=2).stored)


def test_a_pixel_without_a_gradient_stays():
    rows = Perturbation.uniform(1, SHAPE, EPS, "int8", torch.Generator().manual_seed(0))
    for dtype in (torch.int8, torch.float16):
        stored = encode(rows.gather(torch.tensor([0])), EPS, dtype)
        for seed in range(100):
            assert torch.equal(stored, stepped(stored, torch.zeros(stored.shape), 1.0, EPS, seed))


@given(values=st.floats(-1, 1, width=32), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_a_float16_row_goes_to_one_of_its_two_neighbours(values, seed):
    exact = torch.tensor([values], dtype=torch.float32)
    start = torch.zeros(1, dtype=torch.float16)
    (found,) = stepped(start, -exact.sign(), abs(values), 1.0, seed).tolist()
    near = exact.half()
    ends = [torch.nextafter(near, torch.tensor([way], dtype=torch.float16)) for way in (-2.0, 2.0)]
    assert ends[0] <= found <= ends[1]
    assert abs(found) <= 1
    if near.float() == exact:
        assert found == values


@given(
    *(dtypes, budgets, st.floats(1e-5, 2), st.integers(0, 2**31), st.booleans()),
    st.integers(1, 6),
)
@settings(max_examples=25, deadline=None)
def test_no_exported_pixel_is_off_by_more_than_the_budget(
    tmp_path_factory, dtype, eps, step, seed, by_class, moves
):
    """Save, load, inject and export agree bit for bit, for any images, eps, step and type."""
    folder = tmp_path_factory.mktemp("case")
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=draw)
    images[0], images[1] = 0, 255
    for row, image in enumerate(images):
        (folder / "clean" / "ab"[row % 2]).mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(folder / "clean" / "ab"[row % 2] / f"{row}.png")
    count = 2 if by_class else 4
    rows = Perturbation.uniform(count, (3, 8, 8), eps, dtype, draw)
    for number in range(moves):
        gradient = torch.randn(count, 3, 8, 8, generator=draw)
        rows.descend(torch.arange(count), gradient, step * eps, seed + number)
    keys = None if by_class else torch.tensor([image_key(image) for image in images])
    classes = ("a", "b") if by_class else None
    poison = Poison(rows, "class" if by_class else "sample", keys, classes)
    loaded = Poison.load(poison.save(folder / "poison.safetensors"))
    assert torch.equal(loaded.perturbation.stored, rows.stored)
    assert loaded.perturbation.stored.dtype == DTYPES[dtype]
    export(folder / "poison.safetensors", folder / "out", folder / "clean")
    dataset = load("custom", folder / "clean", no_labels=not by_class)[0]
    dataset.transform = pil_to_tensor
    injected = poisoned(dataset, folder / "poison.safetensors")
    owners = [row % 2 if by_class else row for row in range(4)]
    in_order = sorted(range(4), key=lambda row: ("ab"[row % 2], row))
    for place, row in enumerate(in_order):
        (file,) = (folder / "out").rglob(f"{row}.png")
        with Image.open(file) as picture:
            written = Canonical(8)(picture)
        assert torch.equal(written, poison.apply(images[row][None], torch.tensor([owners[row]]))[0])
        assert torch.equal(written, injected[place][0])
        off = (written.short() - images[row].short()).abs().max()
        assert off <= math.floor(255 * eps + 1e-6)
