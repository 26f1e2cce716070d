"""JPEG, grey, bit depth and orthogonal projection, each against a computation of its own."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision import transforms

from cp_plugin.config.defences import OrthogonalConfig, defence_settings
from cp_plugin.config.settings import UserError
from cp_plugin.data import Photos
from cp_plugin.defences import BitDepth, Grey, Jpeg, Projection, defended
from cp_plugin.defences.projection import fitted_weights


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.from_numpy(Photos(train=True, patches=1).data[:6]).permute(0, 3, 1, 2)


def pillow(image_CHW: torch.Tensor) -> Image.Image:
    return Image.fromarray(image_CHW.permute(1, 2, 0).numpy())


def array(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize("quality", [10, 50, 95])
def test_jpeg_is_pillows(images: torch.Tensor, quality: int) -> None:
    found = Jpeg(quality)(images)
    for image, result in zip(images, found, strict=True):
        file = io.BytesIO()
        pillow(image).save(file, "JPEG", quality=quality)
        assert torch.equal(array(Image.open(file)), result)
    assert not torch.equal(found, images)
    assert torch.equal(Jpeg(quality)(images[0]), found[0])


def test_grey_is_pillows(images: torch.Tensor) -> None:
    found = Grey()(images)
    for image, result in zip(images, found, strict=True):
        assert torch.equal(array(pillow(image).convert("L")), result)
    every = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    assert torch.equal(Grey()(every), array(pillow(every).convert("L")))
    assert torch.equal(Grey()(images[:, :1]), images[:, :1])


@pytest.mark.parametrize("bits", [1, 2, 4, 7])
def test_bit_depth_takes_the_nearest_of_the_values(bits: int) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    values = [255 * level / (2**bits - 1) for level in range(2**bits)]
    for before, after in zip(
        every.flatten().tolist(), BitDepth(bits)(every).flatten(), strict=True
    ):
        distance = min(abs(before - value) for value in values)
        assert abs(before - float(after)) <= distance + 0.5
        assert any(abs(float(after) - value) <= 0.5 for value in values)
    assert len(BitDepth(bits)(every).unique()) == 2**bits


def test_few_bits_are_not_pillows_cut_which_darkens(images: torch.Tensor) -> None:
    cut = torch.stack([array(ImageOps.posterize(pillow(image), 2)) for image in images])
    kept = BitDepth(2)(images)
    assert abs(kept.float().mean() - images.float().mean()) < 10
    assert cut.float().mean() < images.float().mean() - 20


def test_projection_removes_what_lies_in_the_span() -> None:
    """Against numpy: x minus its least-squares part in the columns of the weights."""
    draws = np.random.default_rng(0)
    weights = draws.normal(size=(48, 3))
    grey = draws.integers(100, 156, (5, 3, 4, 4), dtype=np.uint8)
    found = Projection(torch.from_numpy(weights).float())(torch.from_numpy(grey))
    for image, result in zip(grey, found.numpy(), strict=True):
        pixels = image.reshape(-1) / 255
        part = weights @ np.linalg.lstsq(weights, pixels, rcond=None)[0]
        expected = np.clip(np.round(255 * (pixels - part)), 0, 255)
        assert np.abs(expected - result.reshape(-1)).max() <= 1  # halves
        assert np.abs(part).max() > 0.01


def test_weights_that_add_up_to_zero_span_one_direction_less() -> None:
    weights = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    weights -= weights.mean(1, keepdim=True)
    assert Projection(weights).basis_DK.shape == (12, 2)


def slow_fit(pixels: np.ndarray, labels: list[int], epochs: int, lr: float) -> np.ndarray:
    """Gradient descent with momentum on all images at once, an image at a time."""
    classes = max(labels) + 1
    weights, bias = np.zeros((pixels.shape[1], classes)), np.zeros(classes)
    speed_w, speed_b = np.zeros_like(weights), np.zeros_like(bias)
    for _ in range(epochs):
        by_w, by_b = np.zeros_like(weights), np.zeros_like(bias)
        for x, label in zip(pixels, labels, strict=True):
            scores = np.exp(x @ weights + bias)
            wrong = scores / scores.sum() - np.eye(classes)[label]
            by_w += np.outer(x, wrong) / len(pixels)
            by_b += wrong / len(pixels)
        speed_w, speed_b = 0.9 * speed_w + by_w, 0.9 * speed_b + by_b
        weights, bias = weights - lr * speed_w, bias - lr * speed_b
    return weights


def test_the_classifier_is_logistic_regression() -> None:
    draws = np.random.default_rng(1)
    images = draws.integers(0, 256, (12, 27), dtype=np.uint8)
    labels = [row % 3 for row in range(12)]
    config = OrthogonalConfig(epochs=15, batch_size=12, lr=0.3)
    found = fitted_weights(torch.from_numpy(images), torch.tensor(labels), config, 0)
    expected = slow_fit(images / 255, labels, 15, 0.3)
    assert np.abs(found.numpy() - expected).max() < 1e-5
    assert np.abs(expected).max() > 0.05


def told_apart(images: torch.Tensor, labels: torch.Tensor) -> float:
    """How well the nearest class mean of the even rows tells the odd ones."""
    pixels = images.flatten(1).float()
    means = torch.stack([pixels[::2][labels[::2] == k].mean(0) for k in labels.unique()])
    return float((torch.cdist(pixels[1::2], means).argmin(1) == labels[1::2]).float().mean())


class Marked(torch.utils.data.Dataset[Any]):
    """Noise with a mark of its class, as class-wise poisons are."""

    def __init__(self) -> None:
        draws = torch.Generator().manual_seed(0)
        self.targets = [row // 2 % 4 for row in range(160)]
        noise = torch.randint(60, 196, (160, 3, 8, 8), generator=draws)
        marks = torch.randint(0, 2, (4, 3, 8, 8), generator=draws) * 24 - 12
        self.images = (noise + marks[torch.tensor(self.targets)]).to(torch.uint8)
        self.transform: Any = transforms.PILToTensor()

    def __len__(self) -> int:
        return 160

    def __getitem__(self, row: int) -> Any:
        return self.transform(pillow(self.images[row])), self.targets[row]


def test_orthogonal_projection_undoes_marks_of_classes() -> None:
    data = Marked()
    labels = torch.tensor(data.targets)
    settings: dict[str, Any] = {"epochs": 60, "lr": 0.1}
    dataset = defended(data, "orthogonal", **settings)
    after = torch.stack([dataset[row][0] for row in range(160)])
    before = torch.stack([data[row][0] for row in range(160)])
    assert told_apart(before, labels) > 0.9
    assert told_apart(after, labels) < 0.6
    again = defended(data, "orthogonal", **settings)
    assert torch.equal(again[3][0], after[3])


@pytest.mark.parametrize(
    ("name", "make"), [("jpeg", Jpeg), ("grey", Grey), ("bit_depth", BitDepth)]
)
def test_a_data_set_is_squeezed_before_its_transform(name: str, make: Any) -> None:
    data = Photos(train=True, patches=1, transform=transforms.PILToTensor())
    dataset = defended(data, name)
    for row in range(3):
        assert torch.equal(dataset[row][0], make()(data[row][0]))


@pytest.mark.parametrize(
    ("name", "values", "text"),
    [
        ("jpeg", {"quality": 0}, r"defence\.quality must lie in \[1, 95\]; got 0"),
        ("bit_depth", {"bits": 8}, r"defence\.bits must lie in \[1, 7\]; got 8"),
        ("grey", {"bits": 8}, r"defence\.bits is not a setting"),
        ("orthogonal", {"lr": 0}, r"defence\.lr must be positive"),
    ],
)
def test_mistakes_in_settings(name: str, values: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        defence_settings(name, values)


def test_orthogonal_projection_needs_two_classes() -> None:
    data = Marked()
    data.targets = [-1] * 159 + [0]
    with pytest.raises(UserError, match="needs images of two labelled classes"):
        defended(data, "orthogonal")
