"""The canonical size of a data set's images: which one it is, and who keeps to it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightly.transforms.multi_view_transform import MultiViewTransform
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from cp_plugin import CraftPoison, InjectPoison, KNNMonitor, Poison
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.callbacks import CanonicalImages, MirrorViews
from cp_plugin.data import Canonical, Photos, RawDataset
from cp_plugin.data.canonical import canonical_form, canonical_size
from cp_plugin.loop import poisoned
from cp_plugin.mirror import mirror
from tests.support.own_module import simclr, trainer

MakeFolder = Callable[..., Path]
Steps = list[Any]


class Arrays(Dataset[Any]):
    """Images of any sizes, as users keep them: a list of arrays."""

    def __init__(self, sizes: list[tuple[int, int]], transform: Any) -> None:
        draw = np.random.default_rng(0)
        self.items = [draw.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
        self.targets = [row % 2 for row in range(len(sizes))]
        self.classes = ["a", "b"]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.items[row])), self.targets[row]


def pair(*steps: Any) -> MultiViewTransform:
    return MultiViewTransform([transforms.Compose([*steps, transforms.ToTensor()])] * 2)


CROP = transforms.RandomResizedCrop(32)
FLIP = transforms.RandomHorizontalFlip()


@pytest.mark.parametrize(
    ("sizes", "steps", "expected"),
    [
        # images of one size keep it
        ([(32, 32)], [CROP], (32, 32)),
        ([(32, 32)], [transforms.RandomCrop(24)], (32, 32)),
        ([(32, 96)], [transforms.Resize((32, 32)), FLIP], (32, 96)),
        ([(40, 32)], [FLIP], (40, 32)),
        ([(32, 48)], [CROP], (32, 48)),
        ([(16, 64)], [transforms.RandomResizedCrop((16, 64))], (16, 64)),
        ([(64, 64)], [CROP], (64, 64)),
        # much larger than the pipeline makes them: its largest side, not its last
        ([(480, 640)], [CROP], (32, 32)),
        ([(480, 640)], [transforms.Resize(40), transforms.CenterCrop(32)], (40, 40)),
        # a crop at the images' own scale shows something else of an image that was made smaller
        ([(96, 128)], [transforms.RandomCrop(24)], (96, 128)),
        ([(480, 640)], [FLIP], (480, 640)),
        # several sizes
        ([(40, 32), (64, 64)], [CROP], (32, 32)),
        ([(40, 32), (64, 64)], [transforms.Resize(36), transforms.RandomCrop(32)], (36, 36)),
        ([(40, 36), (64, 64)], [transforms.RandomCrop(24)], (36, 36)),
    ],
)
def test_rule(sizes: list[tuple[int, int]], steps: Steps, expected: tuple[int, int]) -> None:
    dataset = Arrays([sizes[row % len(sizes)] for row in range(6)], pair(*steps))
    side = mirror(dataset.transform).resized_side
    assert canonical_size(dataset, side) == expected
    assert canonical_size(dataset, side, 20) == (20, 20)


def test_multi_crop_counts_its_largest_view() -> None:
    views = [transforms.RandomResizedCrop(96), transforms.Compose([transforms.Resize(128), FLIP])]
    assert mirror(views).resized_side == 128
    assert mirror([*views, transforms.RandomCrop(24)]).resized_side is None


def test_all_headers_are_read(image_folder: MakeFolder) -> None:
    """One odd image far from those that are decoded first is found."""
    folder = image_folder(classes=3, per_class=8)
    dataset = ImageFolder(folder, pair(CROP))
    rows = [row for row in range(24) for _ in range(4)]
    odd = Subset(dataset, rows)
    assert not canonical_form(odd, 32).changes
    path, _ = dataset.samples[11]
    Image.open(path).resize((50, 32)).save(path)
    assert canonical_form(odd, 32).changes


def test_images_in_one_array_are_not_read_one_by_one(photos: Photos) -> None:
    form = canonical_form(Photos(train=True, patches=8, transform=pair(CROP)), 32)
    assert (form.size, form.changes) == ((32, 32), False)


def test_a_size_that_is_no_square_is_covered_and_cropped_in_the_centre() -> None:
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (40, 200, 3))
    made = Canonical((20, 60))(ramp)
    assert tuple(made.shape) == (3, 20, 60)
    assert float(made[0, 10, 0]) == pytest.approx(40, abs=3)
    assert float(made[0, 10, -1]) == pytest.approx(159, abs=3)
    assert torch.equal(Canonical((20, 60))(made), made)
    assert torch.equal(Canonical((32, 32))(ramp), Canonical(32)(ramp))


def craft(dataset: Any, folder: Path, **settings: Any) -> Path:
    settings = {"rounds": 1, "pgd_steps": 1, "dir": str(folder), **settings}
    fit(simclr(pl), dataset, folder, CraftPoison(**settings))
    return folder / "poison.safetensors"


def trained(dataset: Any, folder: Path, *callbacks: Any) -> list[torch.Tensor]:
    """Return the batches of first and second views that a module was trained on."""
    views: list[torch.Tensor] = []
    module = simclr(pl)
    step = module.training_step

    def noting(batch: Any, *rest: Any) -> Any:
        views.append(torch.stack([view.detach().clone() for view in batch[0]]))
        return step(batch, *rest)

    module.training_step = noting
    fit(module, dataset, folder, *callbacks)
    return views


def fit(module: Any, dataset: Any, folder: Path, *callbacks: Any) -> None:
    trainer(pl, folder, *callbacks, max_epochs=1).fit(module, DataLoader(dataset, 8))


@pytest.mark.filterwarnings("ignore")
def test_translations_stay_translations(tmp_path: Path) -> None:
    """A square of the crop's own size would make both views the same."""
    dataset = Arrays([(32, 32)] * 16, pair(transforms.RandomCrop(24)))
    poison = craft(dataset, tmp_path)
    assert Poison.load(poison).size == (32, 32)
    for first, second in trained(dataset, tmp_path, InjectPoison(poison)):
        assert float((first - second).abs().mean()) * 255 > 20


@pytest.mark.filterwarnings("ignore")
def test_a_victim_sees_the_whole_of_a_wide_image(tmp_path: Path) -> None:
    dataset = Arrays([(32, 96)] * 16, pair(transforms.Resize((32, 32))))
    for row, item in enumerate(dataset.items):
        item[:] = np.linspace(0, 255, 96, dtype=np.uint8)[None, :, None]
        item[0, :, 0] = row
    poison = craft(dataset, tmp_path)
    clean = trained(dataset, tmp_path)
    victim = trained(dataset, tmp_path, InjectPoison(poison))
    for ours, theirs in zip(victim, clean, strict=True):
        assert float((ours - theirs).abs().max()) <= 8.5 / 255


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("granularity", ["sample", "class"])
def test_images_without_a_crop_find_their_rows(granularity: str, tmp_path: Path) -> None:
    dataset = Arrays([(40, 32)] * 16, pair(FLIP))
    monitor = KNNMonitor(query=dataset, bank=dataset)
    poison = craft(dataset, tmp_path, granularity=granularity)
    assert Poison.load(poison).size == (40, 32)
    trained(dataset, tmp_path, InjectPoison(poison), monitor)
    assert {"knn_clean_bank", "knn_poisoned_bank"} <= monitor.results[-1].keys()


@pytest.mark.filterwarnings("ignore")
def test_poison_of_another_size_than_the_views_is_monitored(tmp_path: Path) -> None:
    """The bank is poisoned at the poison's size, then brought to what the encoder is shown."""
    dataset = Arrays([(48, 48)] * 16, pair(CROP))
    for size in (None, 64):
        monitor = KNNMonitor(query=dataset, bank=dataset)
        poison = craft(dataset, tmp_path / str(size), image_size=size)
        trained(dataset, tmp_path, InjectPoison(poison), monitor)
        assert monitor.results[-1]["knn_poisoned_bank"] >= 0


def test_squares_of_before_are_injected_as_before(tmp_path: Path) -> None:
    """A poison made of 32-pixel squares brings 48-pixel images to these, whatever the rule says."""
    dataset = Arrays([(48, 48)] * 4, transforms.ToTensor())
    square = Canonical(32)
    keys = torch.tensor([RawDataset(dataset, 32)[row].key for row in range(4)])
    rows = Perturbation(torch.full((4, 3, 32, 32), 8 / 255), 8 / 255)
    path = Poison(rows, "sample", keys).save(tmp_path / "old.safetensors")
    victim = poisoned(dataset, path)
    for row in range(4):
        expected = (square(dataset.items[row]).int() + 8).clamp(max=255)
        assert torch.equal((victim[row][0] * 255).round().int(), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sizes", [[(96, 128)], [(40, 44), (52, 40)]])
@pytest.mark.parametrize("order", ["plain", "mirror"])
def test_clean_runs_are_canonical_as_victims_are(
    sizes: list[tuple[int, int]],
    order: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Views of a fixed transform differ by delta alone."""
    resize = transforms.Resize(32, antialias=True)
    dataset = Arrays([sizes[row % len(sizes)] for row in range(16)], pair(resize))
    poison = craft(dataset, tmp_path)
    assert Poison.load(poison).size == (32, 32)
    tail = [MirrorViews()] if order == "mirror" else []
    with caplog.at_level(logging.INFO, "cp_plugin"):
        caplog.clear()
        clean = trained(dataset, tmp_path, CanonicalImages(), *tail)
        (line,) = [text for text in caplog.messages if "resized and centre-cropped" in text]
        assert "to 32 x 32 pixels" in line
        assert "clean and in poisoned runs alike" in line
    victim = trained(dataset, tmp_path, InjectPoison(poison), *tail)
    for ours, theirs in zip(victim, clean, strict=True):
        assert 0 < float((ours - theirs).abs().max()) <= 8.5 / 255


@pytest.mark.filterwarnings("ignore")
def test_a_clean_run_of_canonical_images_is_left_alone(tmp_path: Path) -> None:
    dataset = Arrays([(32, 32)] * 16, pair(CROP))
    callback = CanonicalImages()
    torch.manual_seed(0)
    plain = trained(dataset, tmp_path)
    torch.manual_seed(0)
    ours = trained(dataset, tmp_path, callback)
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
