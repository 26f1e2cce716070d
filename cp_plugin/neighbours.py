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

from cp_plugin import components
from cp_plugin.bounds import Bounds
from cp_plugin.config import UserError

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
    if len(bank) >= max(MANY, 50 * k) and bank.shape[1] >= 3 * components.WIDTH:
        return Bounds(faiss, bank, k)
    return lambda queries: faiss.knn(queries, bank, k, faiss.METRIC_INNER_PRODUCT)


def _approximate(bank: Any, k: int) -> Search:
    """Return a search among the components of unit rows, float32 array (N, D)."""
    faiss, components_of = _faiss(), components.Components(bank)
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
