"""Labels are those that samples have, and classes are matched by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from cp_plugin import Poison
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.config.settings import UserError
from cp_plugin.data import Photos, class_names, labels, names_or_numbers
from cp_plugin.data.labels import distinct, renumbered
from cp_plugin.loop import poisoned

MakeFolder = Callable[..., Path]
TENSOR = transforms.PILToTensor()


class Wrapper(Dataset[Any]):
    """A user's own wrapper: rows in an order of its own, under a name that nobody knows."""

    def __init__(self, inner: Any, order: Sequence[int], form: str = "pair") -> None:
        self.inner, self.order, self.form = inner, list(order), form

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, row: int) -> Any:
        image, label = self.inner[self.order[row]]
        return {
            "pair": (image, label),
            "dictionary": {"image": image, "label": torch.tensor(label), "patient": 7 * row % 5},
            "index": (row, image, label),
            "image": (image,),
        }[self.form]


class Relabelled(Dataset[Any]):
    """A wrapper that keeps some classes and numbers them anew."""

    def __init__(self, inner: Any, kept: Sequence[int]) -> None:
        self.inner, self.kept = inner, list(kept)
        self.rows = [row for row, label in enumerate(inner.targets) if label in self.kept]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        image, label = self.inner[self.rows[row]]
        return image, self.kept.index(label)


def reordered(count: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(3)).tolist()
    return order


@pytest.mark.parametrize("form", ["pair", "dictionary", "index", "image"])
@pytest.mark.parametrize("part", ["all", "half"])
def test_labels_of_a_wrapper_under_names_of_its_own(form: str, part: str) -> None:
    photos = Photos(train=True, patches=8, transform=TENSOR)
    order = reordered(len(photos))[: len(photos) // (1 if part == "all" else 2)]
    found = labels(Wrapper(photos, order, form))
    assert found is not None
    assert found.tolist() == [photos.targets[row] for row in order]
    assert class_names(Wrapper(photos, order, form)) == tuple(photos.classes)


@pytest.mark.parametrize("form", ["pair", "dictionary", "index", "image"])
def test_every_image_gets_the_delta_of_its_own_class(form: str) -> None:
    photos = Photos(train=True, patches=4, transform=TENSOR)
    levels = torch.linspace(-8, 8, 12).round()
    rows = Perturbation((levels / 255).view(12, 1, 1, 1).expand(12, 3, 32, 32).clone(), 8 / 255)
    poison = Poison(rows, "class", None, tuple(photos.classes))
    clean = Wrapper(photos, reordered(len(photos)), form)
    victim = poisoned(clean, poison)
    place = {"dictionary": "image", "index": 1}.get(form, 0)
    for row, inner_row in enumerate(clean.order):
        before = photos[inner_row][0].int()
        expected = (before + levels[photos.targets[inner_row]].int()).clamp(0, 255)
        assert torch.equal(victim[row][place].int(), expected)


def test_names_do_not_outlive_the_numbers_they_belong_to() -> None:
    photos = Photos(train=True, patches=4, transform=TENSOR)
    dataset = Relabelled(photos, [7, 2, 5])
    found = labels(dataset)
    assert found is not None
    assert sorted(set(found.tolist())) == [0, 1, 2]
    assert class_names(dataset) is None
    assert names_or_numbers(dataset) == ("0", "1", "2")
    rows = Perturbation(torch.zeros(12, 3, 32, 32), 8 / 255)
    with pytest.raises(UserError, match="it has no delta for 0, 1, 2"):
        poisoned(dataset, Poison(rows, "class", None, tuple(photos.classes)))


def test_numbers_that_may_be_labels_are_not_guessed_among() -> None:
    photos = Photos(train=True, patches=4, transform=TENSOR)

    class Two(Wrapper):
        def __getitem__(self, row: int) -> Any:
            image, label = self.inner[self.order[row]]
            return image, label, (label + 1) % 12

    with pytest.raises(UserError, match=r"hold 2 whole numbers.*return one of them only"):
        labels(Two(photos, reordered(48)))
    assert labels(Two(photos, range(48))) is not None


def test_samples_without_lists_and_lists_without_samples() -> None:
    photos = Photos(train=True, patches=4, transform=TENSOR)

    class NoList(Dataset[Any]):
        transform = None

        def __init__(self, form: Callable[[int], Any]) -> None:
            self.form, self.transform = form, TENSOR

        def __len__(self) -> int:
            return 48

        def __getitem__(self, row: int) -> Any:
            image = transforms.ToPILImage()(photos[row][0])
            return self.transform(image), self.form(row)

    found = labels(NoList(lambda row: photos.targets[row]))
    assert found is not None
    assert found.tolist() == photos.targets
    assert labels(NoList(lambda row: row)) is None  # its row
    assert labels(NoList(lambda row: 1000 - row)) is None  # a number of each image
    assert labels(NoList(lambda row: 0)) is None  # often stands for no label
    assert labels(NoList(lambda row: -1)) is None
    assert labels(NoList(lambda row: "a name")) is None


def test_a_class_poison_fits_a_folder_that_lacks_a_class(image_folder: MakeFolder) -> None:
    folder = image_folder(classes=4, per_class=3)
    names = class_names(ImageFolder(folder))
    assert names is not None
    rows = Perturbation((torch.arange(4) / 255).view(4, 1, 1, 1).expand(4, 3, 32, 32).clone(), 0.1)
    poison = Poison(rows, "class", None, names)
    for file in (folder / names[1]).iterdir():
        file.unlink()
    (folder / names[1]).rmdir()
    clean = ImageFolder(folder, TENSOR)
    victim = poisoned(clean, poison)
    for row in range(9):
        change = (victim[row][0].int() - clean[row][0].int()).max()
        assert int(change) == names.index(clean.classes[clean.targets[row]])


def test_labels_are_renumbered_by_name() -> None:
    own, reference = ("b", "c"), ("a", "b", "c")
    found = renumbered(torch.tensor([0, 1, -1, 0]), own, reference)
    assert found.tolist() == [1, 2, -1, 1]
    with pytest.raises(UserError, match=r"1 classes that the training images lack \(d\)"):
        renumbered(torch.tensor([0, 1]), ("a", "d"), reference)
    assert renumbered(torch.tensor([0]), ("a", "d"), reference).tolist() == [0]  # no image of d
    assert renumbered(torch.tensor([1]), None, reference).tolist() == [1]


def test_names_that_stand_twice_stay_apart() -> None:
    """ImageNet has a bird and a machine called crane."""
    assert distinct(["crane", "dog", "crane"]) == ("crane", "dog", "crane (2)")


def test_subsets_are_still_read_from_lists(image_folder: MakeFolder) -> None:
    dataset = ImageFolder(image_folder(classes=3, per_class=4), TENSOR)
    found = labels(Subset(dataset, [11, 0, 5]))
    assert found is not None
    assert found.tolist() == [2, 0, 1]
