"""The row of an image by its key, in little memory: 16 bytes an image, and no Python objects."""

from __future__ import annotations

import torch
from torch import Tensor

RECENT = 1 << 14
"""New keys that are collected before they are sorted in among the others."""
HITS = 1 << 10
"""New keys that are found again, one by one, before they are sorted in for that reason."""


class KeyIndex:
    """Rows by key, int64 both; the first row that is given for a key stays."""

    def __init__(self, keys_K: Tensor | None = None, rows_K: Tensor | None = None) -> None:
        """Take keys and rows.

        Args:
            keys_K: int64 (K); None: the index is empty.
            rows_K: int64 (K), at least 0; None: the places of the keys.
        """
        keys = torch.empty(0, dtype=torch.int64) if keys_K is None else keys_K
        rows = torch.arange(len(keys)) if rows_K is None else rows_K
        self._keys, order = torch.sort(keys, stable=True)
        self._rows = rows[order]
        self._recent: dict[int, int] = {}
        self._hits = 0
        """How often one of them was found."""

    def find(self, keys_B: Tensor) -> Tensor:
        """Return the rows of keys, int64 (B), -1 where a key has none."""
        if len(self._recent) >= RECENT or self._hits >= max(HITS, len(self._recent)):
            self._sort_in()
        if not len(self._keys):
            rows = torch.full_like(keys_B, -1)
        else:
            places = torch.searchsorted(self._keys, keys_B).clamp_(max=len(self._keys) - 1)
            rows = torch.where(self._keys[places] == keys_B, self._rows[places], -1)
        if self._recent:
            missing = rows < 0
            found = [self._recent.get(key, -1) for key in keys_B[missing].tolist()]
            rows[missing] = torch.tensor(found, dtype=torch.int64)
            self._hits += len(found) - found.count(-1)
        return rows

    def claim(self, key: int, row: int) -> int:
        """Give a row to a key that `find` has just not found, and return it.

        A key that was claimed since then keeps its row, which is returned.
        """
        return self._recent.setdefault(key, row)

    def _sort_in(self) -> None:
        keys = torch.tensor([*self._recent], dtype=torch.int64)
        rows = torch.tensor([*self._recent.values()], dtype=torch.int64)
        self._keys, order = torch.sort(torch.cat([self._keys, keys]))
        self._rows = torch.cat([self._rows, rows])[order]
        self._recent, self._hits = {}, 0
