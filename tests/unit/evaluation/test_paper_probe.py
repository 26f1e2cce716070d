"""The authors' linear probe against a transcription of their formulas on the same draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision import transforms

from cp_plugin.config.settings import UserError
from cp_plugin.evaluation.banks import Bank
from cp_plugin.evaluation.paper_probe import paper_probe
from cp_plugin.mirror import mirror

SIDE, CLASSES, WIDTH = 8, 3, 5


def bank(count: int, seed: int, labels: Tensor | None = None) -> Bank:
    generator = torch.Generator().manual_seed(seed)
    known = torch.randint(0, CLASSES, (count,), generator=generator) if labels is None else labels
    images = torch.randint(0, 240, (count, 3, SIDE, SIDE), generator=generator)
    images[torch.arange(count), known.clamp(min=0)] += 12  # a channel a class
    return Bank(images.to(torch.uint8), known, None, None)


def encode(images: Tensor) -> Tensor:
    """Features that are neither centred nor of one scale."""
    directions = torch.sin(torch.arange(3.0 * WIDTH)).view(3, WIDTH)
    return images.mean((2, 3)) @ directions + 0.3


def halved(images: Tensor) -> Tensor:
    return images * 0.5


def transcribed(train: Bank, test: Bank, epochs: int, seed: int) -> list[float]:
    """Their loop by hand: x0.2 once the epoch, counted from 1, is beyond 60, 75 and 90."""
    draw = torch.Generator().manual_seed(seed)
    augment = mirror(transforms.Compose([
        transforms.RandomResizedCrop(SIDE, (0.2, 1.0)), transforms.RandomHorizontalFlip(),
        transforms.ToTensor()]))  # fmt: skip
    bound = WIDTH**-0.5
    weight = torch.empty(CLASSES, WIDTH).uniform_(-bound, bound, generator=draw)
    bias = torch.empty(CLASSES).uniform_(-bound, bound, generator=draw)
    speeds = [torch.zeros_like(weight), torch.zeros_like(bias)]
    assert isinstance(train.images, Tensor)
    assert isinstance(test.images, Tensor)
    found = []
    for epoch in range(1, epochs + 1):
        rate = 1.0 * 0.2 ** sum(epoch > mark for mark in (60, 75, 90))
        order = torch.randperm(len(train.labels), generator=draw)
        (view,) = augment(train.images[order].float() / 255, generator=draw)
        x, y = encode(halved(view)), train.labels[order]
        wrong = (x @ weight.T + bias).softmax(1) - torch.eye(CLASSES)[y]
        gradients = [wrong.T @ x / len(x), wrong.mean(0)]
        for parameter, speed, gradient in zip((weight, bias), speeds, gradients, strict=True):
            speed.mul_(0.9).add_(gradient)
            parameter.sub_(rate * speed)
        scores = encode(halved(test.images.float() / 255)) @ weight.T + bias
        found.append(100 * float((scores.argmax(1) == test.labels).double().mean()))
    return found


@pytest.mark.parametrize("epochs", [5, 61, 100])
def test_the_probe_is_theirs(epochs: int) -> None:
    train, test = bank(40, 0), bank(60, 1)
    expected = transcribed(train, test, epochs, seed=3)
    found = paper_probe(encode, halved, train, test, epochs, seed=3)
    assert found.last == pytest.approx(expected[-1], abs=1e-6)
    assert found.best == pytest.approx(max(expected), abs=1e-6)
    assert (found.protocol, found.epochs, found.lr) == ("paper", epochs, 1.0)


def test_rates_are_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []

    class Recording(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            rates.append(self.param_groups[0]["lr"])
            assert (self.defaults["momentum"], self.defaults["weight_decay"]) == (0.9, 0)
            super().step(closure)

    monkeypatch.setattr(torch.optim, "SGD", Recording)
    paper_probe(encode, halved, bank(40, 0), bank(9, 1))
    expected = [1.0] * 60 + [0.2] * 15 + [0.04] * 15 + [0.008] * 10
    assert rates == pytest.approx(expected)


def test_unlabelled_images_take_no_part() -> None:
    labels = torch.tensor([0, 1, 2] * 10)
    train = bank(30, 0, labels)
    assert isinstance(train.images, Tensor)
    more = Bank(torch.cat([train.images, train.images[:7]]),
                torch.cat([labels, torch.full((7,), -1)]), None, None)  # fmt: skip
    test = bank(20, 1)
    assert paper_probe(encode, halved, more, test, 3) == paper_probe(encode, halved, train, test, 3)


def test_refusals() -> None:
    train, test = bank(20, 0), bank(20, 1)
    none = Bank(train.images, torch.full((20,), -1), None, None)
    with pytest.raises(UserError, match="needs labelled images, got 0 to train on"):
        paper_probe(encode, halved, none, test)
    with pytest.raises(UserError, match="epochs >= 1"):
        paper_probe(encode, halved, train, test, epochs=0)
    with pytest.raises(UserError, match=r"diverged in epoch 1 .* use probe=cosine"):
        paper_probe(lambda images: encode(images) * torch.inf, halved, train, test)
