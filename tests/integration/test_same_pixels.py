"""Victims of Lightly, solo-learn and the engine see the same pixels, injected or exported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch
import numpy as np
import pytest
import torch
from lightly.data import LightlyDataset
from lightly.transforms.simclr_transform import SimCLRTransform
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms import v2

from cp_plugin import InjectPoison, Poison
from cp_plugin.apps.export import export
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.data import RawDataset, load
from cp_plugin.mirror import Mirror
from tests.support.applications import Ran, Stock, custom
from tests.support.lightly_modules import simclr

# Stock solo-learn, timm and Lightning warn of their own uses of what is deprecated.
pytestmark = [pytest.mark.filterwarnings("ignore")]

COUNT, SIZE, VIEWS = 24, 32, 2
ENGINE = ("backbone.kwargs.channels=[8,8,8,8]", "max_epochs=1", "optimizer.batch_size=8")


@pytest.fixture
def images(image_folder: Callable[..., Path]) -> Path:
    """Images that are not square, so that resizing and cropping count too."""
    return image_folder(classes=3, per_class=COUNT // 3, size=(44, 38))


@pytest.fixture
def clean(images: Path) -> Tensor:
    raw = RawDataset(load("custom", images)[0], SIZE)
    return torch.stack([raw[row].image for row in range(COUNT)])


@pytest.fixture
def poison_file(images: Path, tmp_path: Path) -> Path:
    """A row an image, anywhere in the budget; many values fall between two levels of 8 bit."""
    raw = RawDataset(load("custom", images)[0], SIZE)
    keys = torch.tensor([raw[row].key for row in range(COUNT)])
    generator = torch.Generator().manual_seed(7)
    rows = Perturbation.uniform(COUNT, (3, SIZE, SIZE), 8 / 255, "float16", generator)
    return Poison(rows, "sample", keys=keys).save(tmp_path / "poison.safetensors")


@contextmanager
def seen_by_transform(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Note every image that the first step of a host's transform gets, once a view."""
    seen: list[Tensor] = []

    def noting(own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(crop: Any, image: Any) -> Any:
            seen.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
            return own(crop, image)

        return forward

    with monkeypatch.context() as patch:
        # Before training the first image is looked at once more, for its channels alone.
        patch.setattr("cp_plugin.data.channels.channels_made", lambda *_: set())
        patch.setattr("cp_plugin.mirror.channels.channels_made", lambda *_: set())
        for crop in (transforms.RandomResizedCrop, v2.RandomResizedCrop):  # v2 is Lightly's
            patch.setattr(crop, "forward", noting(crop.forward))
        yield seen


@contextmanager
def seen_by_mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Note every image that a mirror gets, as often as it makes views of it."""
    seen: list[Tensor] = []
    own = Mirror.forward

    def forward(twin: Mirror, batch: Tensor, *args: Any, **kwargs: Any) -> list[Tensor]:
        levels = (255 * batch).round().to(torch.uint8)
        assert torch.equal(levels.float() / 255, batch)
        seen.extend([*levels] * twin.views)
        return own(twin, batch, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Mirror, "forward", forward)
        yield seen


def by_image(seen: list[Tensor], clean: Tensor) -> Tensor:
    """Sort what was seen by the clean image it is nearest to; each must come once a view."""
    found: dict[int, list[Tensor]] = {row: [] for row in range(COUNT)}
    for image in seen:
        assert image.shape == (3, SIZE, SIZE)
        off = (clean.int() - image.int()).abs().flatten(1).amax(1)
        assert off.min() <= 8
        found[int(off.argmin())].append(image)
    for copies in found.values():
        assert len(copies) == VIEWS
        assert torch.equal(copies[0], copies[1])
    return torch.stack([copies[0] for copies in found.values()])


def train_lightly(images: Path, poison_file: Path, folder: Path) -> None:
    """A user's module on `LightlyDataset`, with the callback."""
    torch.manual_seed(0)
    transform = SimCLRTransform(input_size=16, gaussian_blur=0)
    loader = DataLoader(LightlyDataset(str(images), transform), batch_size=8, shuffle=True)
    trainer = lightning.pytorch.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[InjectPoison(poison_file)],
    )
    trainer.fit(simclr(lightning.pytorch), loader)
    assert trainer.global_step == COUNT // 8


def train_engine(images: Path, augment: str, call: Callable[..., Ran]) -> None:
    """`cp-plugin pretrain` on a folder of images, without any poison."""
    source = (f"data.train_path={images}", f"data.val_path={images}", "data.num_workers=0")
    arguments = ("--config-name", "simclr", "data.dataset=custom", *source, *ENGINE)
    trained = call("pretrain", *arguments, f"augment={augment}")
    assert trained.code == 0, trained.err


def test_victims_of_all_hosts_see_the_same_pixels(
    stock: Stock,
    images: Path,
    clean: Tensor,
    poison_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[..., Ran],
) -> None:
    exported = tmp_path / "exported"
    assert export(poison_file, exported, images) == COUNT
    pixels = {}
    with seen_by_transform(monkeypatch) as seen:
        train_lightly(images, poison_file, tmp_path)
    pixels["lightly"] = by_image(seen, clean)
    with seen_by_transform(monkeypatch) as seen:
        ran = stock.pretrain(
            *("cifar/simclr", *custom(images), "+poison=inject", f"poison.path={poison_file}"),
            *("augmentations.0.crop_size=32", "checkpoint.dir=victim"),
        )
    assert ran.code == 0, ran.err
    pixels["solo-learn"] = by_image(seen, clean)
    with seen_by_transform(monkeypatch) as seen:
        train_engine(exported, "host", call)
    pixels["engine"] = by_image(seen, clean)
    with seen_by_mirror(monkeypatch) as seen:
        train_engine(exported, "mirror", call)
    pixels["mirror"] = by_image(seen, clean)

    poison = Poison.load(poison_file)
    expected = poison.apply(clean, torch.arange(COUNT))
    assert (expected != clean).float().mean() > 0.8
    for host, found in pixels.items():
        assert torch.equal(found, expected), host


@pytest.mark.parametrize("host", ["engine", "engine's mirror", "solo-learn"])
def test_clean_runs_and_noise_see_the_pixels_of_victims(
    host: str,
    image_folder: Callable[..., Path],
    stock: Stock,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[..., Ran],
) -> None:
    """Photographs of several sizes: whatever is selected, they differ by delta alone."""
    images = image_folder("several", classes=3, per_class=COUNT // 3, size=(80, 100))
    for odd in sorted(images.rglob("*_000.png")):
        Image.open(odd).resize((90, 44)).save(odd)
    raw = RawDataset(load("custom", images)[0], SIZE)
    clean = torch.stack([raw[row].image for row in range(COUNT)])
    source = custom(images, images)

    def train(name: str, *settings: str) -> tuple[Tensor, str]:
        selected = (f"+poison={name}", *settings, f"checkpoint.dir={name}")
        noting = seen_by_mirror if "mirror" in host else seen_by_transform
        with noting(monkeypatch) as seen:
            if host == "solo-learn":
                yaml = ("cifar/simclr", *source, "augmentations.0.crop_size=32")
                ran = stock.pretrain(*yaml, *selected)
            else:
                augment = "augment=mirror" if "mirror" in host else "augment=host"
                common = (*source, "data.num_workers=0", *ENGINE, augment)
                ran = call("pretrain", "--config-name", "simclr", *common, *selected)
        assert ran.code == 0, ran.err
        return by_image(seen, clean), " ".join(ran.err.split())

    found, said = train("none")
    assert torch.equal(found, clean)
    assert "every image is resized and centre-cropped to 32 x 32 pixels" in said
    noisy, said = train("random")
    assert "every image is resized and centre-cropped to 32 x 32 pixels" in said
    (poison_file,) = Path("random").rglob("poison.safetensors")
    poison = Poison.load(poison_file)
    keys = [raw[row].key for row in range(COUNT)]
    assert torch.equal(noisy, poison.apply(clean, poison.rows(keys)))
    victim, said = train("inject", f"poison.path={poison_file}")
    assert "every image is resized and centre-cropped to 32 x 32 pixels" in said
    assert torch.equal(victim, noisy)
