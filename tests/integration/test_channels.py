"""Grey images and grey views, of every type; and images whose channels a poison cannot keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightly.loss import NTXentLoss
from lightly.transforms.multi_view_transform import MultiViewTransform
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from cp_plugin import CraftPoison, Defence, InjectPoison, KNNMonitor, Poison
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.callbacks import CanonicalImages, MirrorViews
from cp_plugin.config.settings import UserError
from cp_plugin.data import RawDataset
from cp_plugin.mirror import mirror
from cp_plugin.mirror.channels import with_channels
from tests.support.small_runs import fit

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.*"),
]
EPS = 8 / 255
CROP = transforms.RandomResizedCrop(16, scale=(0.5, 1.0), antialias=True)
FLOAT = transforms.ConvertImageDtype(torch.float)
NORMAL = transforms.Normalize((0.5,), (0.25,))
PILLOW = transforms.Compose([CROP, transforms.ToTensor(), NORMAL])
TENSOR = transforms.Compose([CROP, FLOAT, NORMAL])
GREY = transforms.Compose([CROP, transforms.Grayscale(), transforms.ToTensor(), NORMAL])
FORMS: dict[str, tuple[Any, Any]] = {
    "L": (Image.fromarray, PILLOW),
    "array": (lambda a: a, transforms.Compose([transforms.ToPILImage(), PILLOW])),
    "array with channel": (
        lambda a: a[:, :, None],
        transforms.Compose([transforms.ToTensor(), CROP]),
    ),
    "tensor": (lambda a: torch.from_numpy(a)[None], TENSOR),
    "float tensor": (lambda a: torch.from_numpy(a)[None].float() / 255, TENSOR),
    "RGB made grey": (lambda a: Image.fromarray(np.dstack([a, 255 - a, a // 2])), GREY),
}


class Pictures(Dataset[Any]):
    """Pictures of two classes, 20 x 20, in some form."""

    classes = ("a", "b")

    def __init__(self, make: Any, transform: Any) -> None:
        generator = np.random.default_rng(0)
        self.images = generator.integers(20, 236, (16, 20, 20), dtype=np.uint8)
        self.targets = [row % 2 for row in range(16)]
        self.make, self.transform = make, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Any:
        return self.transform(self.make(self.images[row])), self.targets[row]


class Net(pl.LightningModule):
    """SimCLR on a network of some number of input channels."""

    def __init__(self, inputs: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Conv2d(inputs, 4, 3, 2), nn.Tanh(), nn.Flatten())
        self.head = nn.Linear(4 * 7 * 7, 4)
        self.criterion = NTXentLoss(0.5)
        self.views: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.views.extend(view.detach().clone() for view in batch[0])
        z0, z1 = (self.head(self.backbone(view)) for view in batch[0])
        return self.criterion(z0, z1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def data(form: str) -> Pictures:
    make, transform = FORMS[form]
    return Pictures(make, MultiViewTransform([transform, transform]))


def poison(value: float) -> Poison:
    delta = torch.full((2, 3, 20, 20), value)
    return Poison(Perturbation(delta, EPS), "class", None, Pictures.classes)


def views(dataset: Any, folder: Path, *callbacks: Any) -> Tensor:
    module = Net()
    pl.seed_everything(3, verbose=False)
    fit(module, DataLoader(dataset, 8, shuffle=True), folder, *callbacks)
    return torch.stack(module.views)


@pytest.mark.parametrize("form", FORMS)
def test_grey_victims_see_one_channel_of_the_clean_pixels_and_delta(
    form: str, tmp_path: Path
) -> None:
    clean = views(data(form), tmp_path)
    assert clean.shape[2] == 1
    assert torch.equal(views(data(form), tmp_path, CanonicalImages(20)), clean)
    assert torch.equal(views(data(form), tmp_path, InjectPoison(poison(0))), clean)
    found = views(data(form), tmp_path, InjectPoison(poison(EPS)))
    normal = 1 if form == "array with channel" else 0.25
    assert (normal * (found - clean)).abs().max() <= EPS + 1.5 / 255
    assert normal * (found - clean).mean() > 0.9 * EPS


@pytest.mark.parametrize("form", FORMS)
def test_crafts_and_mirrored_victims_of_grey_images(form: str, tmp_path: Path) -> None:
    module = Net()
    folder = {"dir": str(tmp_path), "rounds": 1, "model_steps": 1, "noise_steps": 2, "pgd_steps": 1}
    fit(module, DataLoader(data(form), 8), tmp_path, CraftPoison(**folder, init="zero", seed=1))
    assert {view.shape[1] for view in module.views} == {1}
    made = Poison.load(tmp_path / "poison.safetensors")
    assert made.perturbation.stored.float().abs().max() > 0
    victim = Net()
    monitor = KNNMonitor(data(form), data(form), k=3)
    callbacks = (InjectPoison(made), MirrorViews(), Defence("noise"), monitor)
    fit(victim, DataLoader(data(form), 8), tmp_path, *callbacks)
    assert {view.shape[1] for view in victim.views} == {1}
    assert {"knn_clean_bank", "knn_poisoned_bank"} <= monitor.results[0].keys()


@pytest.mark.parametrize("form", FORMS)
def test_the_mirror_of_grey_images_is_the_hosts_transform(form: str) -> None:
    make, transform = FORMS[form]
    steps = transform.transforms
    steps = [step for step in getattr(steps[-1], "transforms", steps) if step is not CROP]
    if isinstance(transform.transforms[0], transforms.ToPILImage):
        steps = [transforms.ToPILImage(), *steps]
    dataset = Pictures(make, transforms.Compose(steps))
    raw = RawDataset(dataset, None)
    found = with_channels(mirror(raw.transform), raw)
    images = torch.stack([raw[row].image for row in range(4)]).float() / 255
    expected = torch.stack([dataset[row][0] for row in range(4)])
    assert expected.shape == (4, 1, 20, 20)
    # Grey of Pillow is rounded to 8 bit, in units of the normalising deviation.
    tolerance = 4 / 255 if form == "RGB made grey" else 1e-5
    (made,) = found(images)
    assert made.shape == expected.shape
    assert (made - expected).abs().max() <= tolerance
    assert (found.normalize(images) - expected).abs().max() <= tolerance


def test_the_gradient_of_a_grey_view_is_that_of_the_luminance() -> None:
    raw = RawDataset(Pictures(Image.fromarray, transforms.ToTensor()), None)
    found = with_channels(mirror(raw.transform), raw)
    images = torch.full((1, 3, 20, 20), 0.5, dtype=torch.float64, requires_grad=True)
    (view,) = found(images)
    view.sum().backward()
    assert images.grad is not None
    assert images.grad[0, :, 3, 4].tolist() == pytest.approx([0.299, 0.587, 0.114])


def with_bands(count: int) -> Any:
    return lambda a: torch.from_numpy(np.stack([a] * count))


def in_mode(mode: str) -> Any:
    return lambda a: Image.fromarray(a).convert(mode)


LOST = {
    "two bands": (with_bands(2), TENSOR, "must be .C, H, W. with C of 1 or 3"),
    "four bands": (with_bands(4), TENSOR, "has 4 channels, and a perturbation has three"),
    "five bands": (with_bands(5), TENSOR, "has 5 channels, and a perturbation has three"),
    "four in an array": (
        *(lambda a: np.dstack([a] * 4), transforms.ToTensor()),
        "has 4 channels, and a perturbation has three",
    ),
    "transparent": (in_mode("RGBA"), PILLOW, "4 channels of .* mode RGBA, and views of 3 channels"),
    "grey, transparent": (in_mode("LA"), PILLOW, "2 channels of .* mode LA, and views of 3"),
    "palette": (in_mode("P"), PILLOW, "1 channel of .* mode P, and views of 3 channels"),
    "print": (in_mode("CMYK"), PILLOW, "4 channels of .* mode CMYK, and views of 3"),
    "16 bit": (in_mode("I;16"), transforms.ToTensor(), "1 channel of .* mode I;16, and views of 3"),
}


@pytest.mark.parametrize("form", LOST)
def test_images_whose_channels_would_be_lost_are_refused(form: str, tmp_path: Path) -> None:
    make, transform, says = LOST[form]
    dataset = Pictures(make, MultiViewTransform([transform, transform]))
    craft = CraftPoison(rounds=1, dir=str(tmp_path))
    for callback in (InjectPoison(poison(0)), craft, MirrorViews()):
        with pytest.raises(UserError, match=says):
            fit(Net(3), DataLoader(dataset, 8), tmp_path, callback)


def test_transparent_images_that_the_transform_makes_rgb_are_served(tmp_path: Path) -> None:
    to_rgb = transforms.Lambda(lambda picture: picture.convert("RGB"))
    steps = transforms.Compose([to_rgb, CROP, transforms.ToTensor()])
    module = Net(3)
    dataset = Pictures(in_mode("RGBA"), MultiViewTransform([steps, steps]))
    fit(module, DataLoader(dataset, 8), tmp_path, InjectPoison(poison(EPS)))
    assert {view.shape[1] for view in module.views} == {3}
