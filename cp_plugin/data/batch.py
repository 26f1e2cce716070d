"""A batch of images as the data set holds them."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Images as the data set holds them, before any augmentation, and what came with them."""

    rows: Tensor
    """int64 (B), on the CPU: the images' positions in the training set."""
    keys: Tensor
    """int64 (B), on the CPU: 64-bit hashes of the decoded pixels, see
    `cp_plugin.data.image_key`."""
    images: Tensor
    """uint8 (B, C, H, W), all of one size."""
    sample: Any
    """The host's own collated sample, its views missing; `Host.loss` puts views back."""
    labels: Tensor | None = None
    """int64 (B), on the CPU, negative where unlabelled; None where labels are known by row, or are
    not needed."""
