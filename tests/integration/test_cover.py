"""Poisons on a grid over whole images of any size: crafted, injected, their banks, clean runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch
import numpy as np
import pytest
import torch
from lightly.transforms.multi_view_transform import MultiViewTransform
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms

from cp_plugin import CraftPoison, InjectPoison, Poison
from cp_plugin.apps.export import export
from cp_plugin.callbacks.inject import CanonicalImages, NoisePoison
from cp_plugin.config.baselines import RandomConfig
from cp_plugin.config.settings import UserError
from cp_plugin.data import Canonical, FlatFolder, RawDataset, image_key, load
from cp_plugin.data.fit import at_size, in_levels
from cp_plugin.evaluation.banks import Bank
from tests.support.own_module import simclr, trainer

SIZES = [(40, 30), (30, 40), (64, 20), (33, 33), (90, 70), (8, 50)]  # (width, height)
SETTINGS = {"image_size": 16, "fit": "cover", "model_steps": 1, "noise_steps": 2, "pgd_steps": 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures of different sizes in two class folders, one of them grey."""
    draw = np.random.default_rng(0)
    for number, (width, height) in enumerate(SIZES):
        pixels = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels if number else pixels[:, :, 0])
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    return tmp_path / "images"


def views() -> Any:
    steps = [transforms.RandomResizedCrop(16), transforms.ToTensor()]
    return MultiViewTransform([transforms.Compose(steps)] * 2)


def trained(folder: Path, out: Path, callback: Any) -> None:
    loader = DataLoader(FlatFolder(folder, views()), batch_size=3, drop_last=True)
    trainer(lightning.pytorch, out, callback, max_epochs=1).fit(simclr(lightning.pytorch), loader)


@pytest.fixture
def poison(folder: Path, tmp_path: Path) -> Poison:
    trained(folder, tmp_path, CraftPoison(rounds=2, dir=str(tmp_path / "craft"), **SETTINGS))
    return Poison.load(tmp_path / "craft" / "poison.safetensors")


def seen_in(
    monkeypatch: pytest.MonkeyPatch, folder: Path, out: Path, callback: Any
) -> list[Tensor]:
    """Return the images that the first view's transform gets in one epoch."""
    seen: list[Tensor] = []
    own = transforms.RandomResizedCrop.forward

    def noting(crop: Any, image: Any) -> Any:
        seen.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).clone())
        return own(crop, image)

    with monkeypatch.context() as patch:
        patch.setattr(transforms.RandomResizedCrop, "forward", noting)
        trained(folder, out, callback)
    return seen[-2 * len(SIZES) :: 2]  # the first image is read before, to learn what it is


@pytest.mark.filterwarnings("ignore")
def test_victims_see_the_clean_run_s_pixels_but_for_delta(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path, poison: Poison
) -> None:
    """At the images' own size, as do runs on random noise."""
    assert poison.fit == "cover"
    assert poison.size == (16, 16)
    assert len(poison.perturbation) == len(SIZES)
    noise = NoisePoison(RandomConfig(image_size=16, fit="cover"), tmp_path / "noise")
    clean, poisoned, noisy = (
        seen_in(monkeypatch, folder, tmp_path / "run", callback)
        for callback in (CanonicalImages(fit="cover"), InjectPoison(poison), noise)
    )
    assert sorted(tuple(image.shape[1:]) for image in clean) == sorted(
        (height, width) for width, height in SIZES
    )
    grid = Canonical(16, "cover")
    for used, seen in ((poison, poisoned), (noise.poison(), noisy)):
        left = {image_key(grid(image)): image for image in clean}
        assert used.fit == "cover"
        for changed in seen:
            key = next(
                key
                for key, image in left.items()
                if image.shape == changed.shape and int((image.int() - changed).abs().max()) <= 8
            )
            image = left.pop(key)
            row = used.perturbation.gather(used.rows(keys=[key]))
            if (image == image[:1]).all():
                assert (changed == changed[:1]).all()
                continue
            height, width = image.shape[1:]
            levels = in_levels(at_size(row, (height, width)), used.eps)[0]
            assert torch.equal(changed.int(), (image + levels).clamp(0, 255))
            assert levels.abs().max() > 0
        assert not left


@pytest.mark.filterwarnings("ignore")
def test_banks_carry_delta_at_the_images_own_size(folder: Path, poison: Poison) -> None:
    dataset = load("custom", folder)[0]
    bank = Bank.clean(dataset, 16)
    found = bank.poisoned(poison)
    show, grid = Canonical(16), Canonical(16, "cover")
    own = RawDataset(dataset, None)
    for row in range(len(own)):
        image = own[row].image
        changed = poison.apply(image[None], poison.rows(keys=[image_key(grid(image))]))[0]
        assert not torch.equal(changed, image)
        assert torch.equal(found.images[row], show(changed))


@pytest.mark.filterwarnings("ignore")
def test_crafting_shows_crops_of_the_pictures_shape(folder: Path, tmp_path: Path) -> None:
    """A crop of 3 to 4 at most in the picture is another box on its squeezed form."""
    craft = CraftPoison(rounds=1, dir=str(tmp_path), **SETTINGS)
    trained(folder, tmp_path, craft)
    expected = [width / height for width, height in sorted_as_listed()]
    assert craft.attack.aspects is not None
    assert craft.attack.aspects.tolist() == pytest.approx(expected)


def sorted_as_listed() -> list[tuple[int, int]]:
    """Return the sizes in the order of the files' paths."""
    return [SIZES[n] for n in (0, 2, 4, 1, 3, 5)]


@pytest.mark.filterwarnings("ignore")
def test_a_start_of_the_other_kind_is_refused(folder: Path, tmp_path: Path, poison: Poison) -> None:
    start = str(tmp_path / "craft" / "poison.safetensors")
    settings = {**SETTINGS, "fit": "crop"}
    craft = CraftPoison(rounds=1, dir=str(tmp_path / "other"), init=start, **settings)
    with pytest.raises(UserError, match=r"set poison\.fit=cover"):
        trained(folder, tmp_path, craft)


@pytest.mark.filterwarnings("ignore")
def test_export_is_what_victims_see(folder: Path, tmp_path: Path, poison: Poison) -> None:
    """At the images' own size, modes kept, over folders of classes and of no classes."""
    file = poison.save(tmp_path / "again.safetensors")
    assert export(file, tmp_path / "out", folder) == len(SIZES)
    for path in folder.rglob("*.png"):
        with (
            Image.open(path) as one,
            Image.open(tmp_path / "out" / path.relative_to(folder)) as two,
        ):
            assert one.size == two.size
            assert one.mode == two.mode
            clean, exported = Canonical(None)(one), Canonical(None)(two)
        rows = poison.rows(keys=[image_key(Canonical(16, "cover")(clean))])
        assert torch.equal(exported, poison.apply(clean[None], rows)[0])
        assert not torch.equal(exported, clean)
