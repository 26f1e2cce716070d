"""Views and labels in the batches that a host's `training_step` gets, whatever their form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cp_plugin.config.settings import UserError
from cp_plugin.data.slots import rebuilt


def views_of(batch: Any) -> list[Tensor]:
    """Return the views in a host's batch: its float tensors (B, C, h, w), in order.

    Raises:
        UserError: there is none.
    """
    found: list[Tensor] = []

    def note(value: Any) -> Any:
        if _is_view(value):
            found.append(value)
        return value

    rebuilt(batch, note)
    if not found:
        raise UserError(
            "a defence expected views, float tensors (B, C, H, W), in the batch of training_step, "
            "and found none."
        )
    return found


def with_views(batch: Any, views: Any) -> Any:
    """Return a host's batch with other views in the places of its own."""
    left = list(views)
    return rebuilt(batch, lambda value: left.pop(0) if _is_view(value) else value)


def labels_of(batch: Any) -> Tensor:
    """Return the labels in a host's batch: the last of its integer tensors (B).

    Raises:
        UserError: there is none.
    """
    count = len(views_of(batch)[0])
    found: list[Tensor] = []

    def note(value: Any) -> Any:
        if isinstance(value, Tensor) and value.shape == (count,) and value.dtype == torch.int64:
            found.append(value)
        return value

    rebuilt(batch, note)
    if not found:
        raise UserError("mixup and cutmix expected labels, int64 (B), in the batch; found none.")
    return found[-1]


def _is_view(value: Any) -> bool:
    """Tell a batch of images from other tensors, such as grids of points, (B, n, n, 2)."""
    batch = isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point()
    return batch and value.shape[-1] != 2
