"""Data sets that keep what their transform returned: they stay the user's own."""

import functools
from collections import UserDict
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import PILToTensor

from cp_plugin.attack.inject import inject
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.attack.poison_file import Poison
from cp_plugin.config.settings import UserError
from cp_plugin.data import RawDataset
from cp_plugin.evaluation.banks import Bank

COUNT = 6
DELTA = Poison(
    Perturbation(torch.full((2, 3, 8, 8), 8 / 255), 8 / 255), "class", classes=("a", "b")
)


class Store:
    """A user's own cache."""

    def __init__(self):
        self.entries = {}

    def get(self, row):
        return self.entries.get(row)

    def __setitem__(self, row, value):
        self.entries[row] = value

    def __iter__(self):
        return iter(self.entries)


class Nested(Store):
    """A cache by split, in a namespace."""

    def __init__(self):
        self.inner = SimpleNamespace(splits={"train": {}})

    @property
    def entries(self):
        return self.inner.splits["train"]


def objects():
    return np.full(COUNT, None, dtype=object)


class Kept(Dataset):
    """Keeps samples in a container by row: a dictionary, a list, an array or an own object."""

    def __init__(self, container):
        self.items = [np.full((8, 8, 3), 10 * row, np.uint8) for row in range(COUNT)]
        self.targets = [row % 2 for row in range(COUNT)]
        self.classes = ["a", "b"]
        self.transform = PILToTensor()
        self.kept = container

    def __len__(self):
        return COUNT

    def __getitem__(self, row):
        if isinstance(self.kept, list) and not self.kept:
            self.kept.extend([None] * COUNT)
        found = self.kept.get(row) if hasattr(self.kept, "get") else self.kept[row]
        if found is None:
            found = self.transform(Image.fromarray(self.items[row])), self.targets[row]
            self.kept[row] = found
        return found


containers = pytest.mark.parametrize("container", [dict, list, objects, Store, Nested, UserDict])


def is_clean(dataset):
    return all((dataset[row][0] == 10 * row).all() for row in range(COUNT))


@containers
def test_measuring_leaves_nothing_in_the_users_data_set(container):
    images = Kept(container())
    raw, bank = RawDataset(images, None), Bank.clean(images, None)
    assert [int(raw[row].image[0, 0, 0]) for row in range(COUNT)] == list(range(0, 60, 10))
    assert bank.images.shape == (COUNT, 3, 8, 8)
    assert not any(images.kept)
    assert is_clean(images)


@containers
def test_a_victim_of_a_data_set_that_keeps_its_samples(container):
    images = Kept(container())
    victim = inject(images, DELTA)
    for _ in range(2):  # epochs
        for row in range(COUNT):
            assert torch.equal(victim[row][0], torch.full((3, 8, 8), 10 * row + 8).byte())
    assert is_clean(images)


@containers
@pytest.mark.parametrize("filled", [range(COUNT), [3]], ids=["all", "one"])
def test_samples_kept_from_before_are_refused(container, filled):
    images = Kept(container())
    for row in filled:
        images[row]

    def read_all():
        victim = inject(images, DELTA)
        return [victim[row] for row in range(COUNT)]

    with pytest.raises(UserError, match=r"Kept .*transform"):
        read_all()


class Elsewhere(Kept):
    """Keeps samples in a class attribute, which all copies of a data set share."""

    everyones: ClassVar[dict] = {}

    def __init__(self):
        super().__init__({})
        self.everyones.clear()
        del self.kept

    @property
    def kept(self):
        return self.everyones

    @kept.setter
    def kept(self, value):
        self.given = value

    @kept.deleter
    def kept(self):
        del self.given


def test_samples_kept_where_all_copies_share_them_are_refused():
    says = "Elsewhere keeps its samples in a place that all its copies share"
    with pytest.raises(UserError, match=says):
        RawDataset(Elsewhere(), None)
    with pytest.raises(UserError, match=says):
        inject(Elsewhere(), DELTA)


class Memoised(Kept):
    @functools.lru_cache(maxsize=None)  # noqa: B019, UP033
    def __getitem__(self, row):
        return self.transform(Image.fromarray(self.items[row])), self.targets[row]


def test_a_memoised_method_is_served_and_stays_the_users_own():
    images = Memoised({})
    bank = Bank.clean(images, None)
    assert bank.images.shape == (COUNT, 3, 8, 8)
    victim = inject(images, DELTA)
    for row in range(COUNT):
        assert torch.equal(victim[row][0], torch.full((3, 8, 8), 10 * row + 8).byte())
    assert is_clean(images)


class HoldingMethod(Kept):
    """Memoises a method of the instance: a copy asks the original, whose transform is the own."""

    def __init__(self):
        super().__init__({})
        self.load = functools.lru_cache(maxsize=None)(self._load)

    def _load(self, row):
        return self.transform(Image.fromarray(self.items[row])), self.targets[row]

    def __getitem__(self, row):
        return self.load(row)


def test_a_memoised_method_of_the_instance_is_refused():
    images = HoldingMethod()
    with pytest.raises(UserError, match="HoldingMethod"):
        inject(images, DELTA)
    assert is_clean(images)
