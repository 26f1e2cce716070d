"""Nearest neighbours by cosine, on faiss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cp_plugin.config import UserError

QUERY_BATCH = 1_024
"""Queries that are searched at once; it bounds the memory."""
INDICES = ("flat", "ivf")
SEARCHED = 0.05
"""Part of the lists of an inverted file that a query is compared with."""
POINTS_A_LIST = 40
"""Rows of the bank, for each list, that the lists are made from."""
ROUNDS = 5
"""Of the k-means that makes the lists: more of them change no vote that was seen."""


def search(bank: Tensor, queries: Tensor, k: int, kind: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the k nearest rows of a bank for batches of `QUERY_BATCH` queries.

    Args:
        bank: float32 (N, D), on the CPU, of any length.
        queries: float32 (M, D).
        k: neighbours, at most N.
        kind: `flat`, exact, or `ivf`, an inverted file (Douze et al., "The Faiss library", 2024).

    Yields:
        Cosines, float32 (B, k), highest first, and rows, int64 (B, k). Where the lists searched
        hold fewer than k rows, the rest is row -1 with the lowest number there is as cosine.

    Raises:
        UserError: faiss is not installed.
    """
    index = _index(functional.normalize(bank).numpy(), kind)
    for part in torch.split(queries, QUERY_BATCH):
        cosines, rows = index.search(functional.normalize(part).numpy(), k)
        yield torch.from_numpy(cosines), torch.from_numpy(rows)


def _index(bank: Any, kind: str) -> Any:
    """Return a faiss index of unit rows, float32 array (N, D)."""
    faiss = _faiss()
    flat = faiss.IndexFlatIP(bank.shape[1])
    if kind == "flat":
        flat.add(bank)
        return flat
    lists = round(math.sqrt(len(bank)))
    inverted = faiss.IndexIVFFlat(flat, bank.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
    inverted.cp.max_points_per_centroid = POINTS_A_LIST
    inverted.cp.niter = ROUNDS
    inverted.train(bank)
    inverted.add(bank)
    inverted.nprobe = math.ceil(SEARCHED * lists)
    return inverted


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
