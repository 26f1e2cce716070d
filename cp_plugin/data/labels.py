"""Labels and class names of a data set, read from its lists without decoding an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset

from cp_plugin.data.wrappers import attributes, indices_of, inside, single

# `samples` comes first: solo-learn's `data.fraction` replaces it and leaves `targets` stale.
PAIR_LISTS = ("samples", "imgs", "_data")
LABEL_LISTS = ("targets", "labels", "_labels")
UNLABELLED = -1


def labels(dataset: Any) -> Tensor | None:
    """Return the labels of a data set.

    Args:
        dataset: any map-style data set; subsets, joins and wrappers are followed.

    Returns:
        int64 (N), negative where an image is unlabelled; None where the data set has no labels.
    """
    if isinstance(dataset, ConcatDataset):
        return _joined(dataset)
    found = _own_labels(dataset)
    if found is not None:
        return found
    inner = single(dataset)
    if inner is None:
        return None
    below = labels(inner)
    indices = indices_of(dataset)
    if below is None:
        return None
    if indices is not None:
        return below[torch.as_tensor(np.asarray(indices), dtype=torch.int64)]
    return below if len(below) == len(dataset) else None


def class_names(dataset: Any) -> tuple[str, ...] | None:
    """Return the names of the classes in label order, None where they are not known."""
    names = getattr(dataset, "classes", None)
    if isinstance(names, (list, tuple)) and names:
        return tuple(", ".join(name) if isinstance(name, tuple) else str(name) for name in names)
    below = {class_names(child) for child in inside(dataset)}
    return below.pop() if len(below) == 1 else None


def _joined(dataset: ConcatDataset[Any]) -> Tensor | None:
    """Labels of joined data sets; a part without labels is unlabelled unless all parts are."""
    parts = [labels(part) for part in dataset.datasets]
    if all(part is None for part in parts):
        return None
    sizes = np.diff([0, *dataset.cumulative_sizes])
    return torch.cat(
        [
            torch.full((int(size),), UNLABELLED) if part is None else part
            for part, size in zip(parts, sizes, strict=True)
        ]
    )


def _own_labels(dataset: Any) -> Tensor | None:
    if _has_no_classes(dataset):
        return None
    change = getattr(dataset, "target_transform", None)
    for values in _candidates(dataset):
        if len(values) == len(dataset):
            if callable(change):
                values = [change(value) for value in values]
            if all(_is_whole(value) for value in values):
                found = torch.tensor([int(value) for value in values], dtype=torch.int64)
                return found if bool((found >= 0).any()) else None
    return None


def _candidates(dataset: Any) -> list[Sequence[Any]]:
    """The lists of a data set's own attributes that may be its labels, best first."""
    own = attributes(dataset)
    found: list[Sequence[Any]] = []
    for name in PAIR_LISTS:
        pairs = own.get(name)
        if isinstance(pairs, (list, tuple)) and pairs and isinstance(pairs[0], (list, tuple)):
            found.append([pair[-1] for pair in pairs])
    for name in LABEL_LISTS:
        values = own.get(name)
        if isinstance(values, (Tensor, np.ndarray)) and values.ndim == 1:
            found.append(values.tolist())
        elif isinstance(values, (list, tuple)):
            found.append(values)
    for tensor in own.get("tensors", ()):
        if isinstance(tensor, Tensor) and tensor.ndim == 1 and not tensor.is_floating_point():
            found.append(tensor.tolist())
    return found


def _is_whole(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0 and not value.is_floating_point()
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _has_no_classes(dataset: Any) -> bool:
    """Lightly's reader of a folder without subfolders gives every image the target 0."""
    return type(dataset).__module__ == "lightly.data._image" and not hasattr(dataset, "classes")
