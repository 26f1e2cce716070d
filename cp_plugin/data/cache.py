"""The canonical images of a data set in memory, each decoded and hashed once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class CachedRows:
    """Rows of a batch that are gathered when it is collated."""

    rows: Sequence[int]


@dataclass(frozen=True)
class Cache:
    """What a `RawDataset` has read.

    Worker processes that are forked share it with the process that has read it.
    """

    images: Tensor
    """uint8 (N, 3, H, W), canonical."""
    keys: Tensor
    """int64 (N), see `image_key`."""
    samples: Sequence[Any]
    """The host's own samples, placeholders where views belong."""

    @property
    def nbytes(self) -> int:
        """Memory of images and keys."""
        return int(self.images.nbytes + self.keys.nbytes)

    def sample(self, row: int) -> Any:
        """Return a sample; a list or a dictionary is a copy, since collates may change theirs."""
        sample = self.samples[row]
        return copy.copy(sample) if isinstance(sample, (list, dict)) else sample
