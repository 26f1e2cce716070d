"""A poison for a part of the images meets data sets: its own, parts of it, others, changed ones."""

import functools
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import ConcatDataset, Subset
from torchvision.transforms import PILToTensor

from cp_plugin.attack.inject import inject
from cp_plugin.attack.noise import random_poison
from cp_plugin.config.baselines import RandomConfig
from cp_plugin.config.settings import UserError
from cp_plugin.data import Photos

PATCHES = 10


def data(change=None, rows=lambda row: True):
    images = Photos(train=True, patches=PATCHES, transform=PILToTensor())
    images.data = images.data.copy()
    for row in range(len(images)):
        if change is not None and rows(row):
            images.data[row] = np.asarray(change(Image.fromarray(images.data[row])))
    return images


def decoded_otherwise(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return Image.open(file)


def resized(image):
    return image.resize((40, 40)).resize((32, 32))


def inverted(image):
    return Image.fromarray(255 - np.asarray(image))


@functools.cache
def poison_of(granularity, fraction, old):
    config = RandomConfig(granularity=granularity, fraction=fraction)
    poison = random_poison(data(), None, config, seed=1)
    info = {key: value for key, value in poison.info.items() if key != "images"}
    if old:
        info["fraction"] = repr(fraction)
    return replace(poison, info=info) if old else poison


def poisoned_rows(dataset, poison):
    clean, changed = dataset, inject(dataset, poison)
    return [row for row in range(len(clean)) if not (clean[row][0] == changed[row][0]).all()]


kinds = pytest.mark.parametrize("granularity", ["sample", "class"])
ages = pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
fractions = pytest.mark.parametrize("fraction", [0.12, 0.5])


@kinds
@ages
@fractions
def test_its_own_images_and_parts_of_them(granularity, fraction, old):
    poison = poison_of(granularity, fraction, old)
    assert len(poisoned_rows(data(), poison)) == 12 * round(PATCHES * fraction)
    half = Subset(data(), [row for row in range(12 * PATCHES) if row % 2])
    assert 0 < len(poisoned_rows(half, poison)) < 12 * round(PATCHES * fraction)


@kinds
@ages
@fractions
@pytest.mark.parametrize("change", [inverted, decoded_otherwise, resized])
def test_other_images_and_changed_ones(granularity, fraction, old, change):
    poison = poison_of(granularity, fraction, old)
    with pytest.raises(UserError, match=r"% of the images that it was made for, .* it has 0 \(0 %"):
        inject(data(change), poison)


@kinds
@ages
def test_images_of_which_some_were_changed(granularity, old):
    poison = poison_of(granularity, 0.5, old)
    with pytest.raises(UserError, match="use the data set that it was made for"):
        inject(data(resized, rows=lambda row: row % 2), poison)


@kinds
def test_a_single_changed_image_is_noticed(granularity):
    poison = poison_of(granularity, 0.5, old=False)
    (first, *_) = poisoned_rows(data(), poison)
    with pytest.raises(UserError, match=r"is for 50 % .* it has 59 \(49\.2 %\)"):
        inject(data(inverted, rows=lambda row: row == first), poison)


@kinds
@ages
def test_images_most_of_which_are_others(granularity, old):
    poison = poison_of(granularity, 0.5, old)
    with pytest.raises(UserError, match="use the data set that it was made for"):
        inject(ConcatDataset([data(), data(inverted)]), poison)


@kinds
@ages
def test_the_poisoned_part_alone_is_not_what_the_file_says(granularity, old):
    poison = poison_of(granularity, 0.5, old)
    alone = Subset(data(), poisoned_rows(data(), poison))
    with pytest.raises(UserError, match=r"it has 60 \(100 %\)"):
        inject(alone, poison)
