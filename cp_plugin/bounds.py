"""Exact nearest neighbours among many unit rows, told from bounds of their distances."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cp_plugin.components import Components

COMPARED = 2
"""Rows that are compared in full, in units of k."""
SLACK = 3e-5
"""Of squared distances: float32 takes no bound for larger than it is by more."""


class Bounds:
    """The k nearest of unit rows.

    Two rows are at least as far apart as their components. So the rows of the least bounds are
    compared in full, and where the bounds of all others exceed the k-th distance found, no other
    can be nearer (multi-step search; Seidl and Kriegel, SIGMOD 1998). For queries where that fails,
    and where it fails for most of a batch for all that follow, every row is compared.
    """

    def __init__(self, faiss: ModuleType, bank: Any, k: int) -> None:
        """Make the components.

        Args:
            faiss: the package.
            bank: unit rows, float32 array (N, D), which are not copied.
            k: neighbours, at most N / `COMPARED`.
        """
        self._faiss, self._bank, self._k = faiss, bank, k
        self._components_of = Components(bank)
        self._components = self._components_of(bank)
        self._pays = True

    def __call__(self, queries: Any) -> tuple[Any, Any]:
        """Return cosines and rows, arrays (B, k), of unit queries, float32 array (B, D)."""
        if not self._pays:
            return self._among_all(queries)
        bounds, candidates = self._faiss.knn(
            self._components_of(queries),
            self._components,
            COMPARED * self._k,
            self._faiss.METRIC_L2,
        )
        cosines, places = self._compared(queries, candidates).topk(self._k)
        rows = torch.from_numpy(candidates).gather(1, places)
        unsure = torch.from_numpy(bounds)[:, -1] < 2 - 2 * cosines[:, -1] + SLACK
        if unsure.any():
            found = self._among_all(queries[unsure.numpy()])
            cosines[unsure], rows[unsure] = map(torch.from_numpy, found)
        self._pays = 2 * int(unsure.sum()) <= len(queries)
        return cosines.numpy(), rows.numpy()

    def _compared(self, queries: Any, rows: Any) -> Tensor:
        cosines = torch.empty(rows.shape)
        self._faiss.fvec_inner_products_by_idx(
            *map(self._faiss.swig_ptr, (cosines.numpy(), queries, self._bank, rows)),
            self._bank.shape[1],
            *rows.shape,
        )
        return cosines

    def _among_all(self, queries: Any) -> tuple[Any, Any]:
        found: tuple[Any, Any] = self._faiss.knn(
            queries, self._bank, self._k, self._faiss.METRIC_INNER_PRODUCT
        )
        return found
