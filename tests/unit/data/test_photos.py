"""The embedded photographs: patches of two parts that share no pixel."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from cp_plugin.config.settings import UserError
from cp_plugin.data import Photos, image_key
from cp_plugin.data import photos as photo_module


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    """Cut patches anew: tests put other photographs in the place of these."""
    photo_module._kept_patches.cache_clear()
    yield
    photo_module._kept_patches.cache_clear()


def test_photos_have_the_manner_of_torchvision() -> None:
    train, test = Photos(train=True), Photos(train=False)
    assert len(train.classes) == len(set(train.classes)) >= 10
    assert train.data.dtype == np.uint8
    assert train.data.shape == (150 * len(train.classes), 32, 32, 3)
    assert test.data.shape == train.data.shape
    assert np.bincount(train.targets).tolist() == [150] * len(train.classes)
    image, target = train[149]
    assert isinstance(image, Image.Image)
    assert np.array_equal(np.array(image), train.data[149])
    assert (target, train[150][1]) == (0, 1)
    train.transform = transforms.ToTensor()
    assert train[0][0].shape == (3, 32, 32)
    assert len({image_key(torch.from_numpy(patch)) for patch in train.data}) == len(train)


def test_photos_are_the_same_every_time_and_leave_global_randomness_alone() -> None:
    state = random.getstate()
    first = Photos(True, patches=5)
    photo_module._kept_patches.cache_clear()  # they would be the same ones
    again = Photos(True, patches=5)
    assert random.getstate() == state
    assert np.array_equal(first.data, again.data)
    assert not np.array_equal(first.data, Photos(True, patches=5, seed=1).data)
    assert Photos(False, size=48, patches=2).data.shape[1:] == (48, 48, 3)


@pytest.mark.parametrize("name", photo_module.PHOTOGRAPHS)
def test_train_and_test_patches_share_no_pixel(name: str) -> None:
    """Painted on the photograph itself, whatever rule chose the places."""
    picture = photo_module.photograph(name)
    painted = []
    for train, count in ((True, 150), (False, 50)):
        canvas = np.zeros((picture.height, picture.width), dtype=bool)
        cut = photo_module.boxes(picture.width, picture.height, train, count, f"0 {name}")
        assert len(cut) == count
        for left, top, side in cut:
            assert left >= 0
            assert top >= 0
            assert canvas[top : top + side, left : left + side].shape == (side, side)
            canvas[top : top + side, left : left + side] = True
        painted.append(canvas)
    assert not (painted[0] & painted[1]).any()
    assert painted[0].mean() > 0.4
    assert painted[1].mean() > 0.15


def test_a_patch_depends_on_no_pixel_outside_its_box(monkeypatch: pytest.MonkeyPatch) -> None:
    """Painting the part for testing over changes its own patches and no others."""
    cat = photo_module.photograph("cat")
    before = {train: photo_module._patches("cat", train, 32, 20, 0) for train in (True, False)}
    array = np.array(cat)
    for y in range(cat.height):
        for x in range(cat.width):
            if photo_module.in_test_part(x, y, cat.width, cat.height):
                array[y, x] = 255 - array[y, x]
    monkeypatch.setattr(photo_module, "photograph", lambda name: Image.fromarray(array))
    assert np.array_equal(photo_module._patches("cat", True, 32, 20, 0), before[True])
    assert not np.array_equal(photo_module._patches("cat", False, 32, 20, 0), before[False])


def test_photos_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="8 to 128"):
        Photos(True, size=4)
    with pytest.raises(UserError, match="at least one patch"):
        Photos(True, patches=0)
    with pytest.raises(UserError, match="fewer than 3000 different patches"):
        photo_module.boxes(60, 60, False, 3000, 0)
    monkeypatch.setattr(photo_module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="scikit-image"):
        Photos(True)


def test_patches_are_cut_once_and_each_data_set_has_pixels_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = Photos(True, patches=4)
    expected = first.data.copy()
    monkeypatch.setattr(photo_module, "boxes", None)  # nothing is cut any more
    first.data[:] = 0
    assert np.array_equal(Photos(True, patches=4).data, expected)
