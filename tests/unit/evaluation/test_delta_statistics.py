"""Statistics, spectra, separability and saliency of delta, against numpy and finite differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision import transforms

from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.attack.poison_file import Poison
from cp_plugin.config.settings import UserError
from cp_plugin.data import Photos, RawDataset
from cp_plugin.data.batch import Batch
from cp_plugin.evaluation.delta_statistics import delta_statistics
from cp_plugin.evaluation.linear_separability import linear_separability, separability_of
from cp_plugin.evaluation.saliency import saliency
from cp_plugin.evaluation.spectra import power, radial, share_below
from cp_plugin.mirror import mirror

EPS = 8 / 255


def noise(*shape: int) -> Tensor:
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1) * EPS


def test_a_spectrum_keeps_the_power_and_shows_the_frequency() -> None:
    draws = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert power(draws).sum() == pytest.approx(float(draws.square().sum((2, 3)).mean()), rel=1e-6)
    wave = torch.cos(2 * torch.pi * 5 * torch.arange(16) / 16).expand(1, 1, 16, 16)
    profile = radial(power(wave))
    assert profile.argmax() == 5
    assert len(profile) == 9
    assert share_below(power(wave), 4 / 8) == pytest.approx(0, abs=1e-12)
    assert share_below(power(wave), 5 / 8) == pytest.approx(1)


def test_statistics_are_numpys() -> None:
    delta = noise(5, 3, 8, 12)
    found = delta_statistics(delta, EPS)
    values = delta.double().numpy()
    energy = (values**2).sum()
    assert found.rms == pytest.approx(np.sqrt((values**2).mean()) / EPS)
    assert found.at_bound == pytest.approx((np.abs(values) >= 0.99 * EPS).mean())
    assert found.common == pytest.approx(5 * (values.mean(0) ** 2).sum() / energy)
    assert found.grey == pytest.approx(3 * (values.mean(1) ** 2).sum() / energy)
    assert found.centre == pytest.approx((values[:, :, 2:6, 3:9] ** 2).sum() / energy)
    slow = sum(
        abs((image * np.exp(-2j * np.pi * (u * y / 8 + v * x / 12))).sum()) ** 2 / 96
        for image in values.reshape(-1, 8, 12)
        for y, x in [np.indices((8, 12))]
        for u in range(-4, 4)
        for v in range(-6, 6)
        if np.hypot(u, v) <= 1
    )
    assert found.low_frequencies == pytest.approx(slow / energy)


def test_statistics_of_what_is_known() -> None:
    grey = noise(1, 1, 16, 16).expand(6, 3, 16, 16)
    found = delta_statistics(grey, EPS)
    assert (found.common, found.grey) == (pytest.approx(1), pytest.approx(1))
    flat = delta_statistics(torch.full((2, 3, 16, 16), EPS), EPS)
    assert (flat.at_bound, flat.rms, flat.low_frequencies) == (1, pytest.approx(1), 1)
    assert flat.centre == pytest.approx(0.25)
    white = delta_statistics(noise(200, 3, 16, 16), EPS)
    assert white.grey == pytest.approx(1 / 3, abs=0.01)
    assert white.common == pytest.approx(1 / 200, abs=0.001)
    assert delta_statistics(torch.zeros(2, 3, 8, 8), EPS).grey == 0


def test_marks_of_classes_are_separable_and_noise_is_not() -> None:
    labels = torch.arange(400) % 4
    marks = torch.where(noise(4, 3, 8, 8) > 0, EPS / 3, -EPS / 3)
    marked = linear_separability(noise(400, 3, 8, 8) / 2 + marks[labels], labels)
    assert marked.held_out > 95
    plain = linear_separability(noise(400, 3, 8, 8), labels)
    assert plain.held_out < 40
    assert plain.fitted > plain.held_out + 20  # 400 rows of 192 pixels
    assert plain.chance == pytest.approx(25, abs=5)
    assert (plain.rows, plain.classes) == (400, 4)
    unknown = torch.where(labels == 3, -1, labels)
    assert linear_separability(noise(400, 3, 8, 8), unknown).rows == 300
    with pytest.raises(UserError, match="two labelled classes or more, got 400 of 1"):
        linear_separability(noise(400, 3, 8, 8), torch.zeros(400, dtype=torch.int64))


def test_a_poisons_rows_get_the_labels_of_their_images() -> None:
    data = Photos(train=True, patches=4, transform=transforms.PILToTensor())
    raw = RawDataset(data, None)
    items = [raw[row] for row in range(len(raw))]
    labels = torch.tensor(data.targets)
    side = items[0].image.shape[1]
    marks = noise(int(labels.max()) + 1, 3, side, side)
    delta = Perturbation((marks[labels] + noise(len(raw), 3, side, side)).clamp(-EPS, EPS), EPS)
    keys = torch.tensor([item.key for item in items])
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(1))
    mixed = Poison(Perturbation(delta.gather(order), EPS), "sample", keys[order])
    found = separability_of(mixed, data)
    assert found.held_out > 90
    wrong = separability_of(Poison(delta, "sample", keys[order]), data)
    assert wrong.held_out < 50
    by_class = Poison(Perturbation(marks, EPS), "class", classes=tuple(data.classes))
    assert separability_of(by_class, data).held_out == 100
    with pytest.raises(UserError, match="no row for any of the images"):
        separability_of(Poison(delta, "sample", keys + 1), data)


class Curved:
    """A method whose loss is smooth."""

    framework, method = "pytorch", "curved"

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 3))

    def loss(self, views: Any, batch: Batch) -> Tensor:
        found: Tensor = (self.module(views[0]) - self.module(views[1])).square().mean()
        return found + self.module(views[0]).square().mean()


def test_saliency_is_the_slope_of_the_mean_loss() -> None:
    """By finite differences, the same augmentations drawn again."""
    view = transforms.Compose([transforms.RandomHorizontalFlip(), transforms.ToTensor()])
    views = mirror([view, view])
    images = torch.randint(60, 190, (5, 3, 8, 8), generator=torch.Generator().manual_seed(2))
    batch = Batch(torch.arange(5), torch.arange(5), images.to(torch.uint8), None)
    host: Any = Curved()
    delta = noise(5, 3, 8, 8)
    found = saliency(host, views, batch, delta, EPS, draws=3, seed=7)
    assert found.map_BHW.shape == (5, 8, 8)
    for direction in (found.gradient_BCHW.sign(), noise(5, 3, 8, 8).sign()):
        ahead, behind = (
            saliency(host, views, batch, delta + step * direction, EPS, 3, 7).loss
            for step in (2e-3, -2e-3)
        )
        slope = float((found.gradient_BCHW * direction).sum())
        assert (ahead - behind) / 4e-3 == pytest.approx(slope, rel=0.01, abs=1e-4)
    best = -EPS * found.gradient_BCHW.sign()
    values = [float((found.gradient_BCHW * one).sum()) for one in (delta, best)]
    assert found.alignment == pytest.approx(values[0] / values[1], rel=1e-4)
    assert abs(found.alignment) < 0.2  # noise


class Straight(Curved):
    """A method whose loss is a weighted sum of the pixels of one view."""

    def loss(self, views: Any, batch: Batch) -> Tensor:
        return (views[0] * noise(3, 8, 8)).sum()


def test_a_perturbation_against_the_gradient_is_aligned_with_it() -> None:
    images = torch.full((5, 3, 8, 8), 128, dtype=torch.uint8)
    batch = Batch(torch.arange(5), torch.arange(5), images, None)
    host: Any = Straight()
    against = -EPS * noise(3, 8, 8).sign().expand(5, 3, 8, 8)
    views = mirror([transforms.ToTensor()])
    for part in (1, 0.5, -1):
        found = saliency(host, views, batch, part * against, EPS, draws=1, seed=0)
        assert found.alignment == pytest.approx(part)
