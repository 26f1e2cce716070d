"""Images in memory are poisoned once, with the very pixels that loading would give them."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lightly.data import LightlyDataset
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from torchvision.transforms import PILToTensor

from cp_plugin.attack.inject import AddPoison, inject
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.attack.poison_file import Poison
from cp_plugin.config.settings import UserError
from cp_plugin.data import Photos, PreTransformDataset, RawDataset, class_names


class TwoCrops:
    """A transform that makes two views, told apart."""

    def __call__(self, image: Any) -> list[Tensor]:
        pixels = PILToTensor()(image)
        return [pixels, pixels.flip(-1)]


class Array(Dataset[Any]):
    """Images in one array, in the manner of torchvision's archives."""

    classes = ("first", "second", "third")

    def __init__(self, data: Any, read: Callable[[Any], Any], transform: Any = None) -> None:
        self.data, self.read = data, read
        self.targets = [row % 3 for row in range(len(data))]
        self.transform = transform or TwoCrops()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> Any:
        return self.transform(self.read(self.data[row])), self.targets[row]


def pictures(photos: Photos) -> Array:
    return Array(photos.data[:30], Image.fromarray)


def flipped(pixels: Any) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels[:, ::-1]))


HELD: dict[str, Callable[[Photos], Any]] = {
    "photographs": lambda photos: Photos(train=True, patches=4, transform=TwoCrops()),
    "channels first": lambda photos: Array(
        photos.data[:30].transpose(0, 3, 1, 2).copy(),
        lambda pixels: Image.fromarray(np.transpose(pixels, (1, 2, 0))),
    ),
    "a subset": lambda photos: Subset(pictures(photos), [4, 20, 7, 4]),
    "joined sets": lambda photos: ConcatDataset(
        [pictures(photos), Array(photos.data[40:50], Image.fromarray)]
    ),
    "Lightly's wrapper": lambda photos: LightlyDataset.from_torch_dataset(
        pictures(photos), transform=TwoCrops()
    ),
    "arrays": lambda photos: Array(
        photos.data[:9], lambda pixels: pixels, lambda x: torch.from_numpy(x).permute(2, 0, 1)
    ),
}
LOADED: dict[str, Callable[[Photos], Any]] = {
    "changed before the transform": lambda photos: Array(photos.data[:30], flipped),
    "grey": lambda photos: Array(photos.data[:30], lambda p: Image.fromarray(p[:, :, 0])),
    "of another size": lambda photos: Array(
        photos.data[:30], lambda p: Image.fromarray(p).resize((40, 40))
    ),
}


def poison_of(dataset: Any, granularity: str) -> Poison:
    raw = RawDataset(dataset, 32)
    keys = torch.tensor(sorted({raw[row].key for row in range(len(raw))}))
    classes = class_names(dataset)
    count = len(keys) if granularity == "sample" else len(classes or ())
    return Poison(
        Perturbation.uniform(count, (3, 32, 32), 8 / 255, generator=torch.manual_seed(0)),
        "sample" if granularity == "sample" else "class",
        keys if granularity == "sample" else None,
        classes if granularity == "class" else None,
    )


def samples(dataset: Any) -> list[Tensor]:
    found = []
    for row in range(len(dataset)):
        views = dataset[row][0]
        found.extend(views if isinstance(views, list) else [views])
    return found


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize("granularity", ["sample", "class"])
@pytest.mark.parametrize("name", [*HELD, *LOADED])
def test_the_pixels_are_those_of_loading(name: str, granularity: str, photos: Photos) -> None:
    dataset = {**HELD, **LOADED}[name](photos)
    poison = poison_of(dataset, granularity)
    loaded = PreTransformDataset(dataset, AddPoison(poison, class_names(dataset)), 32)
    once = inject(dataset, poison)
    clean = samples(dataset)
    assert (once._changed_arrays is not None) == (name in HELD)
    assert loaded._changed_arrays is None
    assert same(samples(once), samples(loaded))
    assert not same(samples(once), clean)
    assert same(samples(dataset), clean)


def test_it_stays_held_with_another_transform_in_workers_and_opened(photos: Photos) -> None:
    once = inject(pictures(photos), poison_of(pictures(photos), "sample"))
    expected = [view for number, view in enumerate(samples(once)) if number % 2 == 0]
    once.transform = PILToTensor()
    assert same(samples(once), expected)
    assert type(once._changed().transform) is PILToTensor
    assert same(samples(pickle.loads(pickle.dumps(once))), expected)
    (batch,) = DataLoader(once, batch_size=30, num_workers=2)
    assert same(list(batch[0]), expected)
    raw = RawDataset(once, 32)
    assert same([raw[row].image for row in range(30)], expected)


class Handle(Array):
    """A data set that opens a file when it is first read, in the manner of h5."""

    opened_by: int | None = None

    def __getitem__(self, row: int) -> Any:
        self.opened_by = self.opened_by or os.getpid()
        return self.transform(self.read(self.data[row])), self.opened_by


def test_a_file_is_opened_by_each_worker_itself(photos: Photos) -> None:
    dataset = Handle(photos.data[:8], Image.fromarray, TwoCrops())
    add = AddPoison(poison_of(dataset, "class"), class_names(dataset))
    raw, poisoned = RawDataset(dataset, 32), PreTransformDataset(dataset, add, 32)
    assert raw[0].sample[1] == poisoned[0][1] == os.getpid()
    for loader in (
        DataLoader(raw, batch_size=4, collate_fn=first_targets, num_workers=1),
        DataLoader(poisoned, batch_size=4, collate_fn=targets, num_workers=1),
    ):
        assert all(os.getpid() not in batch for batch in loader)
    assert dataset.opened_by is None
    # Workers that are not forked get a pickle: nothing that has opened a file is in it.
    assert "opened_by" not in str(pickle.dumps(raw)) + str(pickle.dumps(poisoned))


def targets(samples: list[Any]) -> list[int]:
    return [sample[1] for sample in samples]


def first_targets(items: list[Any]) -> list[int]:
    return [item.sample[1] for item in items]


def test_an_image_without_a_row_is_found_wherever_it_stands(photos: Photos) -> None:
    poison = poison_of(pictures(photos), "sample")
    more = Array(np.concatenate([photos.data[:30]] * 40 + [photos.data[40:41]]), Image.fromarray)
    assert len(more) > 1000
    with pytest.raises(UserError, match="no row for"):
        inject(more, poison)
