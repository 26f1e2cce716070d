"""Which row of delta belongs to which image."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cp_plugin.attack.key_index import KeyIndex
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.data.batch import Batch
from cp_plugin.util.processes import gathered


@dataclass
class Rows:
    """Which row of delta belongs to which image of the training set; identical images share one."""

    of_image: Tensor
    """int64 (N): -1 for an image that is not poisoned."""
    keys: Tensor | None = None
    """int64 (K), 0 until the image of a row was seen; None where images share a row."""
    _row_of_key: KeyIndex = field(default_factory=KeyIndex)

    @classmethod
    def of_samples(cls, chosen: Tensor) -> Rows:
        """One row an image; `chosen` is bool (N)."""
        of_image = torch.where(chosen, chosen.cumsum(0) - 1, -1)
        return cls(of_image, keys=torch.zeros(int(chosen.sum()), dtype=torch.int64))

    @classmethod
    def of_classes(cls, labels: Tensor, chosen: Tensor) -> Rows:
        """One row a class; negative labels are unlabelled, hence not poisoned."""
        return cls(torch.where(chosen & (labels >= 0), labels, -1))

    def restore(self, keys: Tensor) -> None:
        """Take the keys of an earlier run's snapshot."""
        self.keys = keys
        (seen,) = torch.nonzero(keys, as_tuple=True)
        self._row_of_key = KeyIndex(keys[seen], seen)

    def of_batch(self, batch: Batch) -> Tensor:
        """Return the rows of the batch's images, int64 (P * B), on the CPU.

        With P processes they are those of all of them, interleaved as `Share.positions` says, so
        that every process keeps the same rows and keys.
        """
        rows = self.of_image[gathered(batch.rows)]
        if self.keys is None:
            return rows
        keys = gathered(batch.keys)
        first = torch.where(rows < 0, rows, self._row_of_key.find(keys))
        for place in ((rows >= 0) & (first < 0)).nonzero().flatten().tolist():
            key, row = int(keys[place]), int(rows[place])
            # The row of an identical image, where one was seen before.
            first[place] = self._row_of_key.claim(key, row)
            if first[place] == row:
                self.keys[row] = key
        return first

    def provide(self, perturbation: Perturbation) -> None:
        """Make the rows that `of_batch` has told and that are not there yet; here all are."""

    def tensors(self) -> dict[str, Tensor]:
        """Return what is needed to go on, beside delta."""
        return {} if self.keys is None else {"keys": self.keys}
