"""Where a data set keeps its augmentations, and what is refused because it cannot be seen."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision import transforms

from cp_plugin import CraftPoison, Poison
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.config.settings import UserError
from cp_plugin.data import RawDataset
from cp_plugin.data.pipelines import held_pipeline, view_pipelines
from cp_plugin.loop import poisoned
from cp_plugin.mirror import mirror
from tests.support.own_module import simclr, trainer

FLIP = transforms.Compose([transforms.RandomHorizontalFlip(1.0), transforms.ToTensor()])
CROP = transforms.Compose([transforms.RandomResizedCrop(32), transforms.ToTensor()])
PLAIN = transforms.Compose([transforms.ToTensor()])


class Images(Dataset[Any]):
    """Images in memory; subclasses say how they are augmented."""

    def __init__(self, **pipelines: Any) -> None:
        draw = np.random.default_rng(0)
        self.items = draw.integers(16, 240, (16, 32, 32, 3), dtype=np.uint8)
        self.targets = [row % 2 for row in range(16)]
        self.classes = ["a", "b"]
        vars(self).update(pipelines)

    def __len__(self) -> int:
        return 16

    def __getitem__(self, row: int) -> Any:
        return self.views(Image.fromarray(self.items[row])), self.targets[row]

    def views(self, image: Any) -> Any:
        raise NotImplementedError


class TwoCrops:
    """MoCo's, as users write it."""

    def __init__(self, base: Any) -> None:
        self.base_transform = base

    def __call__(self, image: Any) -> list[Any]:
        return [self.base_transform(image), self.base_transform(image)]


class Prime:
    """Barlow Twins': two pipelines, a tuple."""

    def __init__(self, first: Any, second: Any) -> None:
        self.transform, self.transform_prime = first, second

    def __call__(self, image: Any) -> tuple[Any, Any]:
        return self.transform(image), self.transform_prime(image)


class Several(nn.Module):
    """A module with a list of pipelines."""

    def __init__(self, count: int, pipeline: Any) -> None:
        super().__init__()
        self.pipelines = [pipeline] * count

    def forward(self, image: Any) -> list[Any]:
        return [pipeline(image) for pipeline in self.pipelines]


class Alone:
    """Does nothing but call a pipeline."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    def __call__(self, image: Any) -> Any:
        return self.pipeline(image)


class Once(Images):
    def views(self, image: Any) -> Any:
        return self.transform(image)


class TwoCalls(Images):
    def __getitem__(self, row: int) -> Any:
        image = Image.fromarray(self.items[row])
        return (self.transform(image), self.transform(image)), self.targets[row]


class Numbered(Images):
    def views(self, image: Any) -> Any:
        return self.transform_1(image), self.transform_2(image)


class WithPrime(Images):
    def views(self, image: Any) -> Any:
        return self.transform(image), self.transform_prime(image)


class Named(Images):
    def views(self, image: Any) -> Any:
        return self.augment(image), self.augment(image)


class Holding(Images):
    def views(self, image: Any) -> Any:
        return self.augment(image)


SERVED: dict[str, Callable[[Any], Dataset[Any]]] = {
    "two calls": lambda t: TwoCalls(transform=t),
    "transform_1, transform_2": lambda t: Numbered(transform_1=t, transform_2=t),
    "transform, transform_prime": lambda t: WithPrime(transform=t, transform_prime=t),
    "self.augment": lambda t: Named(augment=t),
    "transform None beside it": lambda t: Named(augment=t, transform=None),
    "TwoCropsTransform": lambda t: Once(transform=TwoCrops(t)),
    "TwoCropsTransform elsewhere": lambda t: Holding(augment=TwoCrops(t)),
    "two pipelines of a class": lambda t: Once(transform=Prime(t, t)),
    "a module with a list": lambda t: Once(transform=Several(2, t)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SERVED)
def test_views_are_crafted_on(name: str, tmp_path: Any) -> None:
    dataset = SERVED[name](CROP)
    assert mirror(RawDataset(dataset, None).transform).views == 2
    callback = CraftPoison(rounds=1, pgd_steps=1, dir=str(tmp_path))
    trainer(pl, tmp_path, callback, max_epochs=1).fit(simclr(pl), DataLoader(dataset, 8))
    poison = Poison.load(tmp_path / "poison.safetensors")
    assert poison.perturbation.stored.shape == (16, 3, 32, 32)


@pytest.mark.parametrize("name", SERVED)
def test_every_view_is_poisoned_before_its_augmentation(name: str) -> None:
    dataset = SERVED[name](FLIP)
    delta = torch.zeros(2, 3, 32, 32)
    delta[..., :8] = 8 / 255  # on the left, so on the right of a flipped view
    victim = poisoned(dataset, Poison(Perturbation(delta, 8 / 255), "class", None, ("a", "b")))
    for row in (0, 5):
        for ours, theirs in zip(victim[row][0], dataset[row][0], strict=True):
            assert torch.allclose(ours - theirs, delta[0].flip(-1), atol=1e-6)


def test_a_class_that_only_calls_a_pipeline_is_mirrored_as_that() -> None:
    assert held_pipeline(Alone(CROP)) is CROP
    assert mirror(Alone(CROP)).views == 1
    assert mirror([Alone(CROP), CROP]).views == 2


class Choosing(Prime):
    def __call__(self, image: Any) -> Any:
        pipelines = [self.transform, self.transform_prime]
        return [random.choice(pipelines)(image), random.choice(pipelines)(image)]


class Resizing(TwoCrops):
    def __call__(self, image: Any) -> Any:
        return super().__call__(image.resize((16, 16)))


class Stacking(TwoCrops):
    def __call__(self, image: Any) -> Any:
        return torch.stack(super().__call__(image))


class Keeping(TwoCrops):
    def __call__(self, image: Any) -> Any:
        return [image, *super().__call__(image)]


@pytest.mark.parametrize("kind", [Resizing, Stacking, Keeping])
def test_a_class_that_does_more_is_not_followed(kind: Any) -> None:
    assert view_pipelines(kind(CROP)) is None
    with pytest.raises(UserError, match=kind.__name__):
        mirror(kind(CROP))


def test_a_class_that_chooses_is_not_followed() -> None:
    state = random.getstate()
    random.seed(1)
    before = random.getstate()
    assert view_pipelines(Choosing(CROP, FLIP)) is None
    assert random.getstate() == before
    random.setstate(state)


class Jitter:
    """A user's augmentation that holds nothing known."""

    def __call__(self, image: Any) -> Tensor:
        return transforms.functional.to_tensor(image) * (0.5 + 0.5 * torch.rand(()))


class Inline(Images):
    def views(self, image: Any) -> Any:
        return CROP(image)


class Pairs(Images):
    def views(self, image: Any) -> Any:
        return transforms.functional.to_tensor(image), transforms.functional.to_tensor(image)


class Half(Images):
    def views(self, image: Any) -> Any:
        return self.transform(image), Jitter()(image)


class Keyword(Images):
    def views(self, image: Any) -> Any:
        return self.transform(image=image)["image"]


class Chained(Images):
    def views(self, image: Any) -> Any:
        return self.augment(self.resize(image))


REFUSED: dict[str, tuple[Dataset[Any], str]] = {
    "augments inside": (Inline(), "returns other pixels each time row 0 is read"),
    "under a name of its own": (Holding(augment=Jitter()), "returns other pixels each time"),
    "two images": (Pairs(), "returns 2 images a sample and no attribute of it"),
    "one view elsewhere": (Half(transform=FLIP), "returns 1 images a sample that the transforms"),
    "albumentations": (Keyword(transform=FLIP), "calls a transform with image="),
    "one after another": (
        Chained(resize=transforms.Resize(32), augment=FLIP),
        "on what another one has made",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_poisoned_before_its_augmentation_is_refused(name: str) -> None:
    dataset, text = REFUSED[name]
    poison = Poison(Perturbation(torch.zeros(2, 3, 32, 32), 8 / 255), "class", None, ("a", "b"))
    with pytest.raises(UserError, match=text) as refused:
        poisoned(dataset, poison)
    assert "self.transform" in str(refused.value)


def test_a_transform_beside_what_prepares_the_image_is_served() -> None:
    """Only `transform` is exchanged: `resize` is called on the raw image before it."""

    class Prepared(Images):
        def views(self, image: Any) -> Any:
            return self.transform(self.resize(image))

    raw = RawDataset(Prepared(transform=FLIP, resize=transforms.Resize(24)), None)
    assert raw.transform is FLIP
    assert raw[0].image.shape == (3, 24, 24)


def test_finished_tensors_are_poisoned_as_before() -> None:
    images = torch.rand(6, 3, 32, 32)
    dataset = TensorDataset(images, torch.arange(6) % 2)
    rows = Perturbation(torch.full((2, 3, 32, 32), 4 / 255), 8 / 255)
    victim = poisoned(dataset, Poison(rows, "class", None, ("0", "1")))
    assert float((victim[3][0] - images[3]).abs().max()) > 3 / 255


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("dataset", "text"),
    [
        (Once(transform=PLAIN), r"makes one view of an image, and SimCLR\.training_step fails"),
        (Once(transform=None), "the data set's transform is None"),
        (Once(transform=lambda image: [CROP(image)] * 2), r"is a function, .*<lambda>"),
    ],
)
def test_views_made_elsewhere_are_refused_in_true_words(
    dataset: Dataset[Any], text: str, tmp_path: Any
) -> None:
    callback = CraftPoison(rounds=1, dir=str(tmp_path))
    with pytest.raises(UserError, match=text) as refused:
        trainer(pl, tmp_path, callback).fit(simclr(pl), DataLoader(dataset, 8))
    assert "masked" not in str(refused.value)
    assert "MultiViewTransform" in str(refused.value)
