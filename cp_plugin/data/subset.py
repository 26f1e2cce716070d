"""Which images of a data set a part of them is: the same for whoever asks."""

from __future__ import annotations

import torch
from torch import Tensor


def keys_of_part(keys_N: Tensor, labels_N: Tensor | None, fraction: float) -> Tensor:
    """Return the keys of a part of the images, the same part of each class, at least one image.

    Images are taken in the order of their keys, which are hashes: an order that has nothing to do
    with what the images show and everything to do with the images alone. So every poison of a
    fraction sits in the same images, and a smaller part lies within a larger one.

    Args:
        keys_N: int64 (N), the keys of the images; identical images have one key and count once.
        labels_N: int64 (N), images with a negative label are a class of their own; None where
            there are no labels.
        fraction: in (0, 1].

    Returns:
        int64 (M), sorted, each once.
    """
    labels = torch.zeros_like(keys_N) if labels_N is None else labels_N
    kept = [keys_N[:0]]
    for label in torch.unique(labels).tolist():
        members = torch.unique(keys_N[labels == label])
        kept.append(members[: max(1, round(fraction * len(members)))])
    chosen: Tensor = torch.unique(torch.cat(kept))
    return chosen
