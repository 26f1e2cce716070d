"""Images completed from a part of their pixels with low rank: nuclear-norm minimisation in batches.

    min over X:  1/2 sum over kept pixels (X - M)^2  +  shrinkage * (sum of singular values of X)

The minimiser of soft-impute (Mazumder, Hastie, Tibshirani, JMLR 2010), reached by ADMM (Boyd et
al., 2011). A step thresholds singular values by the eigenvectors of the Gram matrices, which are
small, since an image has fewer rows than values in a row.

Legend for shapes: N matrices, R rows, K columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cp_plugin.config.settings import UserError

THRESHOLD = 0.12
"""Singular values that a step removes, in units of the image's Frobenius norm: sets the pace."""
OVERRELAXED = 1.6
"""Within (1, 2) fewer steps are needed (Eckstein, Bertsekas, 1992)."""
PORTION = 64
"""Matrices that a processor works on at a time, so that they stay in its cache."""


def complete(
    matrices_NRK: Tensor, kept_NRK: Tensor, shrinkage: float, iterations: int = 60
) -> Tensor:
    """Return the low-rank completions of matrices.

    Args:
        matrices_NRK: float32 or float64 (N, R, K), R <= K for speed; what is not kept is not read.
        kept_NRK: bool (N, R, K).
        shrinkage: weight of the nuclear norm, in units of singular values; > 0. Towards 0 the kept
            entries stay as they are.
        iterations: thresholding steps.

    Returns:
        (N, R, K), the minimiser up to the steps that were made.

    Raises:
        UserError: shapes or types do not match.
    """
    _check(matrices_NRK, kept_NRK)
    if matrices_NRK.device.type == "cpu" and len(matrices_NRK) > PORTION:
        portions = zip(*(torch.split(t, PORTION) for t in (matrices_NRK, kept_NRK)), strict=True)
        return torch.cat([complete(m, kept, shrinkage, iterations) for m, kept in portions])
    known = torch.where(kept_NRK, matrices_NRK, 0)
    part = kept_NRK.to(known.dtype).mean((1, 2), keepdim=True).clamp(min=1 / known[0].numel())
    size = torch.linalg.matrix_norm(known)[:, None, None] / part.sqrt()
    threshold = THRESHOLD * size.clamp(min=torch.finfo(known.dtype).tiny ** 0.25)
    pull = shrinkage / threshold
    weight = torch.where(kept_NRK, 1 / (1 + pull), 0)
    target = known * weight
    stay = torch.where(kept_NRK, pull / (1 + pull), 1)
    low_rank = estimate = known
    dual = torch.zeros_like(known)
    for _ in range(iterations):
        low_rank = soft_threshold(estimate - dual, threshold)
        dual += low_rank.lerp(estimate, 1 - OVERRELAXED)
        estimate = torch.addcmul(target, stay, dual)
        dual -= estimate
    return low_rank


def soft_threshold(matrices_NRK: Tensor, threshold_N11: Tensor) -> Tensor:
    """Return matrices whose singular values s are max(s - threshold, 0), singular vectors kept.

    The eigenvalues of the Gram matrix are the squares of s, so D = Q diag(1 - threshold / s) Q^T X.

    Args:
        matrices_NRK: float (N, R, K).
        threshold_N11: positive, float (N, 1, 1). In float32, of matrices of Frobenius norm 1, it
            should not be far below 1e-3, where the squares of s get lost in rounding.
    """
    squares_NR, vectors_NRR = torch.linalg.eigh(matrices_NRK @ matrices_NRK.mT)
    # What is not above the threshold is cut whatever it is: no division by nearly nothing.
    values_N1R = squares_NR[:, None].clamp(min=threshold_N11**2).sqrt()
    shrunk: Tensor = (vectors_NRR * (1 - threshold_N11 / values_N1R)) @ vectors_NRR.mT
    return shrunk @ matrices_NRK


def _check(matrices: Tensor, kept: Tensor) -> None:
    wrong = matrices.ndim != 3 or matrices.shape != kept.shape or kept.dtype != torch.bool
    if wrong or matrices.dtype not in (torch.float32, torch.float64):
        raise UserError(
            "complete expected matrices (N, R, K), float32 or float64, and kept, bool of the same "
            f"shape; got {tuple(matrices.shape)} {matrices.dtype} and {tuple(kept.shape)} "
            f"{kept.dtype}."
        )
