"""The linear probe of He, Zha and Katabi's released code, beside the one in `metrics`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision import transforms

from cp_plugin.config.settings import UserError
from cp_plugin.evaluation.banks import Bank
from cp_plugin.evaluation.metrics import PAPER, PROBE_BATCH, PROBE_MOMENTUM, LinearResult
from cp_plugin.mirror import mirror

EPOCHS, LR = 100, 1.0
DECAY_AFTER, DECAY = (60, 75, 90), 0.2
"""Epochs after which the rate is multiplied, and by what."""
SCALE = (0.2, 1.0)
"""Range of a crop's part of the area."""


def paper_probe(
    encode: Callable[[Tensor], Tensor],
    normalize: Callable[[Tensor], Tensor],
    bank: Bank,
    query: Bank,
    epochs: int = EPOCHS,
    lr: float = LR,
    seed: int = 0,
) -> LinearResult:
    """Fit a linear classifier to the features of augmented images, as the authors' code does.

    Random crops, bilinear, and flips, encoded anew each epoch; raw features; SGD with momentum 0.9,
    batches of 512, no weight decay, learning rate 1 times 0.2 after epochs 60, 75 and 90; torch's
    own start of a linear layer. Test images are whole. The authors report the best of all epochs,
    chosen on the test set. Negative labels are left out.

    Args:
        encode: from normalised images, float (B, C, H, W), to features (B, D), in eval mode.
        normalize: from images in [0, 1] to what `encode` takes.
        bank: labelled images to train on.
        query: labelled images to test on.
        epochs: passes over the bank.
        lr: learning rate at the start.
        seed: of the classifier's start, the order and the augmentation.

    Returns:
        Accuracy after the last epoch, and the best of all epochs.

    Raises:
        UserError: no labelled image, settings out of range, or the classifier diverges.

    Source: github.com/kaiwenzha/contrastive-poisoning, `evaluation.py`.
    """
    if epochs < 1 or lr <= 0:
        raise UserError(f"A probe needs epochs >= 1 and lr > 0, got {epochs} and {lr}.")
    known, tested = ((one.labels >= 0).nonzero().flatten() for one in (bank, query))
    if not len(known) or not len(tested):
        raise UserError(
            f"probe=paper needs labelled images, got {len(known)} to train on and {len(tested)} to "
            "test on; give a data set with labels."
        )
    test = query.features(encode, normalize)[tested]
    truth = query.labels[tested]
    augment = mirror(
        transforms.Compose(
            [
                transforms.RandomResizedCrop(bank.images[0].shape[-1], SCALE),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
            ]
        )
    )
    draw = torch.Generator().manual_seed(seed)
    classes = int(torch.cat([bank.labels, query.labels]).max()) + 1
    classifier = _started(test.shape[1], classes, draw)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=lr, momentum=PROBE_MOMENTUM)
    accuracies = []
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = lr * DECAY ** sum(epoch >= mark for mark in DECAY_AFTER)
        for part in torch.split(known[torch.randperm(len(known), generator=draw)], PROBE_BATCH):
            images = torch.stack([bank.images[row] for row in part.tolist()]).float() / 255
            with torch.no_grad():
                (view,) = augment(images, generator=draw)
                found = encode(normalize(view)).flatten(1).float().cpu()
            with torch.enable_grad():
                loss = functional.cross_entropy(classifier(found), bank.labels[part])
                optimizer.zero_grad()
                torch.autograd.backward(loss)
            optimizer.step()
            if not math.isfinite(float(loss.detach())):
                raise UserError(
                    f"probe=paper diverged in epoch {epoch + 1} at a learning rate of {lr} on raw "
                    "features; use probe=cosine, which standardises them."
                )
        with torch.no_grad():
            right = classifier(test).argmax(1) == truth
        accuracies.append(100 * float(right.double().mean()))
    return LinearResult(accuracies[-1], max(accuracies), epochs, lr, PAPER)


def _started(width: int, classes: int, generator: torch.Generator) -> nn.Linear:
    """Return a linear layer as torch starts one, drawn from a generator of its own."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, width, classes)  # type: ignore[no-untyped-call]
    bound = 1 / math.sqrt(width)
    for weight in layer.parameters():
        nn.init.uniform_(weight, -bound, bound, generator)
    return layer
