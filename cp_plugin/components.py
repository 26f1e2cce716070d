"""Few components of unit rows, between which no distance is larger than between the rows."""

from __future__ import annotations

from typing import Any

import torch

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
