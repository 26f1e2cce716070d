"""Nearest neighbours by cosine, on faiss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cp_plugin.config.settings import UserError

QUERY_BATCH = 1_024
"""Queries that are searched at once; it bounds the memory."""
INDICES = ("flat", "ivf")
MANY = 20_000
"""Rows from which on bounds of distances save more than they cost."""
SEARCHED = 0.1
"""Part of the lists of an inverted file that a query is compared with."""
FEWEST = 8
"""Lists that it is compared with at least: few lists are wide, and a query is often at an edge."""
POINTS_A_LIST = 40
"""Rows of the bank, for each list, that the lists are made from."""
ROUNDS = 5
"""Of the k-means that makes the lists: more of them change no vote that was seen."""

Search = Callable[[Any], tuple[Any, Any]]
"""From unit queries, float32 array (B, D), to cosines and rows, arrays (B, k)."""


def search(bank: Tensor, queries: Tensor, k: int, kind: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the k nearest rows of a bank for batches of `QUERY_BATCH` queries.

    Args:
        bank: float32 (N, D), on the CPU, of any length.
        queries: float32 (M, D).
        k: neighbours, at most N.
        kind: `flat`, exact, or `ivf`, an inverted file of principal components (Douze et al., "The
            Faiss library", 2024).

    Yields:
        Cosines, float32 (B, k), highest first, and rows, int64 (B, k). Those of `ivf` are told from
        distances between components, so they are a little too high. Where the lists searched hold
        fewer than k rows, the rest is row -1 with a cosine that is far below any true one.

    Raises:
        UserError: faiss is not installed.
    """
    unit = functional.normalize(bank).numpy()
    nearest = _exact(unit, k) if kind == "flat" else _approximate(unit, k)
    for part in torch.split(queries, QUERY_BATCH):
        cosines, rows = nearest(functional.normalize(part).numpy())
        yield torch.from_numpy(cosines), torch.from_numpy(rows)


def _exact(bank: Any, k: int) -> Search:
    """Return a search among unit rows, float32 array (N, D), which are not copied."""
    faiss = _faiss()
    if len(bank) >= max(MANY, 50 * k) and bank.shape[1] >= 3 * WIDTH:
        return Bounds(faiss, bank, k)
    return lambda queries: faiss.knn(queries, bank, k, faiss.METRIC_INNER_PRODUCT)


def _approximate(bank: Any, k: int) -> Search:
    """Return a search among the components of unit rows, float32 array (N, D)."""
    faiss, components_of = _faiss(), Components(bank)
    points, lists = components_of(bank), round(math.sqrt(len(bank)))
    index = faiss.index_factory(points.shape[1], f"IVF{lists},Flat", faiss.METRIC_L2)
    index.cp.max_points_per_centroid = POINTS_A_LIST
    index.cp.niter = ROUNDS
    index.nprobe = min(lists, max(FEWEST, math.ceil(SEARCHED * lists)))
    # Rows from everywhere: a bank may be in the order of its classes.
    index.train(np.ascontiguousarray(points[:: max(1, len(bank) // (POINTS_A_LIST * lists))]))
    index.add(points)

    def nearest(queries: Any) -> tuple[Any, Any]:
        squares, rows = index.search(components_of(queries), k)
        return 1 - squares / 2, rows

    return nearest


def _faiss() -> ModuleType:
    # Loaded at the first search, so that all but kNN works without it.
    try:
        import faiss
    except ImportError as error:
        raise UserError(
            "kNN needs faiss, which is not installed; run `pip install 'cp-plugin[cpu]'` "
            "(or `[gpu]`, never both)."
        ) from error
    found: ModuleType = faiss
    return found


WIDTH = 127
"""Principal components, at most: with one length more they are as many as BLAS is fast with."""


SAMPLE = 5_000
"""Rows of the bank that they are made from."""


LEAST = 1e-4
"""Added to the squared length of what components leave out. It brings two lengths no further apart,
and keeps a rounding error of the squares, some 1e-7, from growing in the root."""


class Components:
    """Principal components, and the length of what they leave out as one component more."""

    def __init__(self, bank: Any) -> None:
        """Find the components.

        Args:
            bank: unit rows, float32 array (N, D).
        """
        # Rows from everywhere: a bank may be in the order of its classes.
        sample = torch.from_numpy(bank[:: max(1, len(bank) // SAMPLE)])
        self._centre = sample.mean(0)
        self._axes = torch.linalg.eigh(torch.cov(sample.T)).eigenvectors[:, -WIDTH:]

    def __call__(self, rows: Any) -> Any:
        """Return components, float32 array (B, `WIDTH` + 1 or fewer), of unit rows (B, D)."""
        rows_BD, centre = torch.from_numpy(rows), self._centre
        kept = (rows_BD @ self._axes).sub_(centre @ self._axes)
        squares = torch.linalg.vector_norm(rows_BD, dim=1).square()
        squares += centre @ centre - 2 * (rows_BD @ centre)
        rest = (squares - kept.square().sum(1)).clamp_(min=0).add_(LEAST).sqrt_()
        return torch.cat([kept, rest[:, None]], dim=1).numpy()


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
