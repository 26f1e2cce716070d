"""Accuracy of frozen features: kNN and a linear probe, as pure functions.

Shapes: N images of the bank, M queries, D feature width, C channels, H and W pixels. Accuracies are
in percent, 0 to 100.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from cp_plugin.config.settings import UserError
from cp_plugin.evaluation.knn_search import INDICES, QUERY_BATCH, search

SMALL_BANK = 5_000
PROBE_BATCH = 512
PROBE_MOMENTUM = 0.9
COSINE, PAPER, NONE = "cosine", "paper", "none"
PROBES = (COSINE, PAPER, NONE)
"""Linear probes by name: ours, the authors' beside it, none."""


@dataclass(frozen=True)
class KnnResult:
    """Accuracy of a weighted kNN vote, and all that the figure depends on."""

    accuracy: float
    """Percent, 0 to 100."""
    k: int
    """Neighbours that voted."""
    temperature: float
    """Votes weigh exp(cosine / temperature)."""
    distance: str
    """Always `cosine`."""
    index: str
    """`flat`: exact search; `ivf`: an inverted file of principal components."""
    bank_size: int
    """Labelled images that could be neighbours."""


@dataclass(frozen=True)
class LinearResult:
    """Accuracy of a linear probe."""

    last: float
    """Percent, 0 to 100, after the last epoch: the figure to report."""
    best: float
    """The highest of all epochs, chosen on the test set: beside the last, never instead of it."""
    epochs: int
    """Passes over the training features."""
    lr: float
    """Learning rate at the start."""
    protocol: str = COSINE
    """`cosine`: `linear_probe`; `paper`: `cp_plugin.evaluation.paper_probe`."""


def features(
    encode: Callable[[Tensor], Tensor],
    images: Tensor | Dataset[Any],
    normalize: Callable[[Tensor], Tensor],
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the features of images.

    Args:
        encode: from normalised images, float (B, C, H, W), to features (B, D).
        images: uint8 (N, C, H, W), or a map-style data set of uint8 images (C, H, W), alone or as
            first element of a tuple.
        normalize: from float images in [0, 1] to what `encode` takes.
        batch_size: images that are encoded at once.
        device: where `encode` works.

    Returns:
        float32 (N, D), on the CPU.

    Raises:
        UserError: the images are not uint8, there are none, or `encode` does not return (B, D).
    """
    rows = []
    with torch.no_grad():
        for batch in _batches(images, batch_size):
            encoded = encode(normalize(batch.to(device).float() / 255))
            if encoded.ndim != 2 or len(encoded) != len(batch):
                raise UserError(
                    f"The encoder must return one row of features an image, ({len(batch)}, D); "
                    f"got {tuple(encoded.shape)}. Pool its feature maps."
                )
            rows.append(encoded.float().cpu())
    if not rows:
        raise UserError("There are no images to make features of; got an empty data set.")
    return torch.cat(rows)


def default_k(bank_size: int) -> int:
    """Return the usual number of neighbours: 200, or 20 for a bank of fewer than 5,000 images."""
    return 200 if bank_size >= SMALL_BANK else 20


def knn(
    bank_ND: Tensor,
    bank_labels: Tensor,
    query_MD: Tensor,
    query_labels: Tensor,
    k: int | None = None,
    temperature: float = 0.07,
    classes: int | None = None,
    index: str = "flat",
) -> KnnResult:
    """Classify queries by the votes of their nearest neighbours in a labelled bank.

    Search by cosine with faiss; a neighbour's vote weighs exp(cosine / temperature) (Wu et al.,
    "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018). At equal
    votes the lowest label wins. Negative labels are unlabelled: left out of bank and queries.

    Args:
        bank_ND, query_MD: float (N, D) and (M, D) features.
        bank_labels, query_labels: int64 (N) and (M).
        k: neighbours, at most the whole bank; None: `default_k`.
        temperature: positive.
        classes: number of classes; None: as many as the labels name.
        index: `flat`, exact, or `ivf`, approximate, for large banks (Douze et al., "The Faiss
            library", 2024); a small bank is searched exactly either way.

    Returns:
        The accuracy in percent, with its settings.

    Raises:
        UserError: shapes that do not fit, no labelled image, features that are not finite, settings
            out of range, or faiss is not installed.
    """
    if temperature <= 0 or not math.isfinite(temperature):
        raise UserError(f"temperature must be positive, got {temperature}.")
    bank, bank_labels = _labelled("bank", bank_ND, bank_labels)
    queries, query_labels = _labelled("query", query_MD, query_labels)
    if bank.shape[1] != queries.shape[1]:
        raise UserError(
            f"Bank and queries must have features of one width, got {bank.shape[1]} and "
            f"{queries.shape[1]}; encode both with the same model."
        )
    neighbours = default_k(len(bank)) if k is None else k
    if neighbours < 1:
        raise UserError(f"k must be at least 1, got {k}.")
    neighbours = min(neighbours, len(bank))
    if index not in INDICES:
        raise UserError(f"index must be one of {', '.join(INDICES)}; got {index!r}.")
    kind = "flat" if len(bank) < SMALL_BANK else index
    highest = int(torch.cat([bank_labels, query_labels]).max()) + 1
    if classes is not None and classes < highest:
        raise UserError(f"classes={classes}, but a label is {highest - 1}; raise classes.")
    correct, truth = 0, iter(torch.split(query_labels, QUERY_BATCH))
    for cosines, rows in search(bank, queries, neighbours, kind):
        voted = vote(cosines, bank_labels[rows], temperature, classes or highest)
        correct += int((voted == next(truth)).sum())
    return KnnResult(
        accuracy=100 * correct / len(queries),
        k=neighbours,
        temperature=temperature,
        distance="cosine",
        bank_size=len(bank),
        index=kind,
    )


def vote(cosines_Mk: Tensor, labels_Mk: Tensor, temperature: float, classes: int) -> Tensor:
    """Return the labels, int64 (M), that get the heaviest votes; the lowest one at equal votes."""
    # Relative to the nearest neighbour: the order is the same and nothing overflows.
    relative = (cosines_Mk - cosines_Mk.amax(1, keepdim=True)).double() / temperature
    votes = torch.zeros(len(cosines_Mk), classes, dtype=torch.float64)
    return votes.scatter_add_(1, labels_Mk, relative.exp()).argmax(1)


def linear_probe(
    train_ND: Tensor,
    train_labels: Tensor,
    test_MD: Tensor,
    test_labels: Tensor,
    epochs: int = 100,
    lr: float = 1.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> LinearResult:
    """Fit a linear classifier to frozen features and test it after every epoch.

    The protocol `cosine`: SGD with momentum 0.9, batches of 512, cosine schedule to 0, no weight
    decay, images as they are. Features are standardised with the training set's mean and deviation
    and divided by the square root of D, so that a row has length 1 on average and one learning rate
    serves every encoder. The figure is that of the last epoch. Negative labels are left out. He,
    Zha and Katabi (ICLR 2023) do otherwise: see `cp_plugin.evaluation.paper_probe`.

    Args:
        train_ND, test_MD: float (N, D) and (M, D) features.
        train_labels, test_labels: int64 (N) and (M).
        epochs: passes over the training features.
        lr: learning rate at the start.
        seed: of the batches' order; the classifier starts at 0.
        device: where it is fitted.

    Returns:
        Accuracy after the last epoch, and the best of all epochs.

    Raises:
        UserError: shapes that do not fit, no labelled image, or settings out of range.
    """
    if epochs < 1 or lr <= 0:
        raise UserError(f"A probe needs epochs >= 1 and lr > 0, got {epochs} and {lr}.")
    train, train_labels = _labelled("train", train_ND, train_labels)
    test, test_labels = _labelled("test", test_MD, test_labels)
    if train.shape[1] != test.shape[1]:
        raise UserError(
            f"Training and test features must have one width, got {train.shape[1]} and "
            f"{test.shape[1]}; encode both with the same model."
        )
    classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    train, test = (one.to(device) for one in _standardised(train, test))
    train_labels, test_labels = train_labels.to(device), test_labels.to(device)
    weight = torch.zeros(classes, train.shape[1], device=device, requires_grad=True)
    bias = torch.zeros(classes, device=device, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=lr, momentum=PROBE_MOMENTUM)
    order = torch.Generator().manual_seed(seed)
    steps = math.ceil(len(train) / PROBE_BATCH)
    accuracies = []
    for epoch in range(epochs):
        shuffled = torch.randperm(len(train), generator=order).to(device)
        for step in range(steps):
            rows = shuffled[step * PROBE_BATCH : (step + 1) * PROBE_BATCH]
            done = (epoch * steps + step) / (epochs * steps)
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * done)) / 2
            optimizer.zero_grad()
            with torch.enable_grad():
                logits = functional.linear(train[rows], weight, bias)
                torch.autograd.backward(functional.cross_entropy(logits, train_labels[rows]))
            optimizer.step()
        with torch.no_grad():
            right = functional.linear(test, weight, bias).argmax(1) == test_labels
        accuracies.append(100 * float(right.double().mean()))
    return LinearResult(last=accuracies[-1], best=max(accuracies), epochs=epochs, lr=lr)


def _batches(images: Tensor | Dataset[Any], batch_size: int) -> Iterator[Tensor]:
    """Yield uint8 (B, C, H, W)."""
    total = len(images)  # type: ignore[arg-type]
    for start in range(0, total, batch_size):
        rows = range(start, min(start + batch_size, total))
        if isinstance(images, Tensor):
            batch = images[rows.start : rows.stop]
        else:
            items = [images[row] for row in rows]
            firsts = [item[0] if isinstance(item, (tuple, list)) else item for item in items]
            batch = torch.stack(firsts)
        if batch.dtype != torch.uint8 or batch.ndim != 4:
            raise UserError(
                f"Features are made of uint8 images (N, C, H, W), got {batch.dtype} "
                f"{tuple(batch.shape)}; bring the images to canonical form first."
            )
        yield batch


def _labelled(name: str, features_ND: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the labelled rows, float32 and on the CPU."""
    if features_ND.ndim != 2 or labels.shape != features_ND.shape[:1]:
        raise UserError(
            f"The {name} needs features (N, D) and labels (N), got {tuple(features_ND.shape)} and "
            f"{tuple(labels.shape)}."
        )
    kept = labels.cpu() >= 0
    if not bool(kept.any()):
        raise UserError(
            f"The {name} has no labelled image; kNN and the linear probe need labels. Give a data "
            "set with labels."
        )
    rows = features_ND.detach().cpu().float()[kept]
    if not bool(torch.isfinite(rows).all()):
        raise UserError(
            f"The features of the {name} are not finite; the encoder has diverged: lower the "
            "learning rate or take an earlier checkpoint."
        )
    return rows, labels.cpu().long()[kept]


def _standardised(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    mean, deviation = train.mean(0), train.std(0, unbiased=False)
    scale = deviation.clamp_min(1e-6) * math.sqrt(train.shape[1])
    return (train - mean) / scale, (test - mean) / scale
