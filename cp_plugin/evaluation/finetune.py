"""Fine-tuning a pretrained encoder on a labelled part of its images."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision import transforms

from cp_plugin.config.settings import UserError
from cp_plugin.evaluation.banks import Bank
from cp_plugin.mirror import mirror

EPOCHS = 20
BATCH = 128
LR = 0.05
MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4


@dataclass(frozen=True)
class FinetuneResult:
    """Accuracy of a fine-tuned network, and all that the figure depends on."""

    last: float
    """Percent, 0 to 100, after the last epoch: the figure to report."""
    best: float
    """The highest of all epochs, chosen on the test set: beside the last, never instead of it."""
    fraction: float
    """Part of the labelled images that was used, the same part of each class."""
    images: int
    """Their number."""
    epochs: int
    """Passes over them."""
    lr: float
    """Learning rate at the start."""


def finetune(
    encoder: nn.Module,
    normalize: Callable[[Tensor], Tensor],
    bank: Bank,
    query: Bank,
    fraction: float,
    seed: int = 0,
    epochs: int = EPOCHS,
) -> FinetuneResult:
    """Train a copy of an encoder and a linear classifier on a part of a bank.

    SGD with momentum 0.9, batches of 128, learning rate 0.05 on a cosine to 0, weight decay 1e-4;
    padded crops and flips. The encoder itself stays as it is.

    Args:
        encoder: from normalised images, float (B, C, H, W), to features (B, D).
        normalize: from images in [0, 1] to what the encoder takes.
        bank: labelled images to train on.
        query: labelled images to test on.
        fraction: in (0, 1], class-balanced.
        seed: of the choice, the order and the augmentation.
        epochs: passes over the chosen images.

    Raises:
        UserError: the fraction or the epochs are out of range.
    """
    check_fraction(fraction)
    if epochs < 1:
        raise UserError(f"Fine-tuning needs at least one epoch, got {epochs}.")
    draw = torch.Generator().manual_seed(seed)
    chosen = _drawn(bank.labels, fraction, draw) & (bank.labels >= 0)
    rows = chosen.nonzero().flatten().tolist()
    images = torch.stack([bank.images[row] for row in rows])
    device = next(encoder.parameters()).device
    labels = bank.labels[chosen].to(device)
    network = _with_classifier(encoder, normalize(images[:2].float() / 255).to(device), bank, query)
    side = images.shape[-1]
    augment = mirror(
        transforms.Compose(
            [
                transforms.RandomCrop(side, padding=max(1, side // 8)),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
            ]
        )
    )
    optimizer = torch.optim.SGD(
        network.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    steps = math.ceil(len(rows) / BATCH)
    accuracies = []
    for epoch in range(epochs):
        network.train()
        for step, part in enumerate(torch.split(torch.randperm(len(rows), generator=draw), BATCH)):
            done = (epoch * steps + step) / (epochs * steps)
            optimizer.param_groups[0]["lr"] = LR * (1 + math.cos(math.pi * done)) / 2
            (view,) = augment(images[part].float() / 255, generator=draw)
            loss = functional.cross_entropy(network(normalize(view).to(device)), labels[part])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        accuracies.append(_accuracy(network.eval(), normalize, query))
    return FinetuneResult(
        last=accuracies[-1],
        best=max(accuracies),
        fraction=fraction,
        images=len(rows),
        epochs=epochs,
        lr=LR,
    )


def check_fraction(fraction: float) -> None:
    """Check a part of the labels.

    Raises:
        UserError: it is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise UserError(
            f"--finetune must be a part of the labelled images, got {fraction}; give a "
            "number in (0, 1], such as 0.1."
        )


def _drawn(labels_N: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Draw a part of each class by chance, at least one image; bool (N)."""
    chosen = torch.zeros(len(labels_N), dtype=torch.bool)
    for label in torch.unique(labels_N).tolist():
        members = (labels_N == label).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=generator)
        chosen[members[order[: max(1, round(fraction * len(members)))]]] = True
    return chosen


def _with_classifier(encoder: nn.Module, example: Tensor, bank: Bank, query: Bank) -> nn.Module:
    """Return a copy of the encoder, all of it trained, and a classifier that starts at 0."""
    body = copy.deepcopy(encoder).eval().requires_grad_(True)
    with torch.no_grad():
        width = body(example).flatten(1).shape[1]
    head = nn.Linear(width, int(torch.cat([bank.labels, query.labels]).max()) + 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return nn.Sequential(body, nn.Flatten(1), head.to(example.device))


def _accuracy(network: nn.Module, normalize: Callable[[Tensor], Tensor], query: Bank) -> float:
    known = query.labels >= 0
    device = next(network.parameters()).device
    predicted = query.features(lambda images: network(images.to(device)), normalize).argmax(1)
    return 100 * float((predicted == query.labels)[known].double().mean())
