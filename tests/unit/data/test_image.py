"""One form for every image, and the key of its pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from cp_plugin.config.settings import UserError
from cp_plugin.data import Canonical, Photos, image_key
from cp_plugin.data import photos as photo_module


def test_key_is_a_signed_64_bit_number_of_pixels_and_shape() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (500, 3, 8, 8), dtype=torch.uint8, generator=generator)
    keys = [image_key(image) for image in images]
    assert len(set(keys)) == 500
    assert torch.tensor(keys, dtype=torch.int64).tolist() == keys
    assert min(keys) < 0 < max(keys)
    changed = images[0].clone()
    changed[2, 7, 7] ^= 1
    assert image_key(changed) != keys[0] == image_key(images[0].clone())
    zeros = torch.zeros(3, 4, 16, dtype=torch.uint8)
    assert len({image_key(zeros.reshape(shape)) for shape in ((3, 4, 16), (3, 8, 8))}) == 2


def test_key_does_not_depend_on_memory_layout() -> None:
    image = torch.arange(3 * 5 * 7, dtype=torch.uint8).reshape(3, 5, 7)
    turned = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert not turned.is_contiguous()
    assert image_key(turned) == image_key(image)


def test_key_is_the_same_in_every_version() -> None:
    """Poison files keep keys, so the value is part of the file format."""
    image = torch.arange(48, dtype=torch.uint8).reshape(3, 4, 4)
    assert image_key(image) == -4407671424568978480


def test_key_refuses_floats() -> None:
    with pytest.raises(UserError, match="uint8"):
        image_key(torch.zeros(3, 4, 4))


def test_canonical_reads_every_kind_of_image_alike(photos: Photos) -> None:
    array = photos.data[0]
    expected = torch.from_numpy(array).permute(2, 0, 1)
    kinds = [Image.fromarray(array), array, expected, expected.float() / 255, expected / 255.0]
    for size in (None, 32):
        assert all(torch.equal(Canonical(size)(kind), expected) for kind in kinds)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_canonical_converts_to_rgb(mode: str, photos: Photos) -> None:
    picture = Image.fromarray(photos.data[3]).convert(mode)
    expected = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(Canonical(32)(picture), expected)


def test_canonical_grey_tensors_and_arrays_get_three_channels() -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    expected = torch.from_numpy(grey).expand(3, 8, 8)
    for image in (grey, grey[:, :, None], torch.from_numpy(grey)[None]):
        assert torch.equal(Canonical(None)(image), expected)


@pytest.mark.parametrize("width_height", [(50, 40), (40, 70), (20, 31), (32, 48)])
def test_canonical_resizes_as_torchvision_does_on_pillow(width_height: tuple[int, int]) -> None:
    picture = photo_module.photograph("cat").resize(width_height)
    reference = transforms.Compose(
        [
            transforms.Resize(32, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            transforms.PILToTensor(),
        ]
    )
    assert torch.equal(Canonical(32)(picture), reference(picture))
    assert torch.equal(Canonical(32)(transforms.PILToTensor()(picture)), reference(picture))


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (torch.rand(3, 8, 8) * 255, r"must lie in \[0, 1\]"),
        (torch.full((3, 8, 8), float("nan")), r"must lie in \[0, 1\]"),
        (torch.zeros(5, 8, 8), "has 5 channels, and a perturbation has three"),
        (torch.zeros(2, 8, 8), r"\(C, H, W\)"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "uint8 or floating"),
        (np.zeros((8, 8, 3)), "must be uint8"),
        ("picture.png", "Expected an image"),
    ],
)
def test_canonical_refuses(image: Any, text: str) -> None:
    with pytest.raises(UserError, match=text):
        Canonical(8)(image)
