"""Images completed from a part of their pixels with low rank: nuclear-norm minimisation in batches.

    min over X:  1/2 sum over kept pixels (X - M)^2  +  shrinkage * (sum of singular values of X)

The minimiser of soft-impute (Mazumder, Hastie, Tibshirani, JMLR 2010), reached by ADMM (Boyd et
al., 2011). A step thresholds singular values, which is done without decomposing any matrix: the
matrix function of the Gram matrix that thresholds is built from matrix products (a scaled
Newton-Schulz iteration; Chen, Chow, 2014), which run in batches on any device.

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
MARGIN = 1.1
"""By how much the largest eigenvalue stays below what the iteration converges for."""
CLOSE = 5e-3
"""Singular values nearer to the threshold than this part of it need not be told apart."""
PORTION = 64
"""Matrices that a processor works on at a time, so that they stay in its cache."""
CONVERGED = 1e-5


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
    """Return matrices whose singular values s are max(s - threshold, 0).

    Singular vectors stay. From the Gram matrix G alone, D = P (1 - t G^(-1/2)) X, where
    P = (1 + sign(G^(1/2) - t)) / 2, in matrix products only. Where the roots of eigenvalues far
    below t^2 have not converged, P is 0.

    Args:
        matrices_NRK: float (N, R, K).
        threshold_N11: positive, float (N, 1, 1), at least 0.06 of each Frobenius norm.
    """
    gram = matrices_NRK @ matrices_NRK.mT
    scale = MARGIN * torch.linalg.matrix_norm(gram)[:, None, None]
    scale = torch.maximum(scale, MARGIN * threshold_N11**2)
    cut = threshold_N11 / scale.sqrt()
    one = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    root, inverse = _roots(gram / scale)
    above = (_sign((root + root.mT) / 2 - cut * one) + one) / 2
    product: Tensor = (above @ (one - cut * inverse)) @ matrices_NRK
    return product


def _check(matrices: Tensor, kept: Tensor) -> None:
    wrong = matrices.ndim != 3 or matrices.shape != kept.shape or kept.dtype != torch.bool
    if wrong or matrices.dtype not in (torch.float32, torch.float64):
        raise UserError(
            "complete expected matrices (N, R, K), float32 or float64, and kept, bool of the same "
            f"shape; got {tuple(matrices.shape)} {matrices.dtype} and {tuple(kept.shape)} "
            f"{kept.dtype}."
        )


def _scaled_newton_schulz(low: float) -> list[tuple[float, float]]:
    """Return (a, b) of polynomials a x + b x^3 that take [low, 1] to 1, one after the other.

    Each is the best one for the interval that the one before leaves (Chen, Chow, 2014).
    """
    coefficients, high = [], 1.0
    while 1 - low > CONVERGED:
        alpha = (3 / (high**2 + low * high + low**2)) ** 0.5
        beta = 4 / (2 + low * high * (low + high) * alpha**3)
        a, b = 1.5 * alpha * beta, -0.5 * beta * alpha**3
        coefficients.append((a, b))
        low = a * low + b * low**3
        high = 2 - low
    return coefficients


LEAST = (0.5 * THRESHOLD / MARGIN) ** 2
"""The threshold's square in units of `scale`, at least: a step's matrix may be larger than its
image, but not twice as large."""
_TO_SIGN = _scaled_newton_schulz(CLOSE * LEAST**0.5)
_TO_ROOT = _scaled_newton_schulz(LEAST**0.5)


def _sign(symmetric: Tensor) -> Tensor:
    """Return the matrix with the same eigenvectors and the signs of the eigenvalues."""
    for a, b in _TO_SIGN:
        symmetric = torch.baddbmm(symmetric, symmetric, symmetric @ symmetric, beta=a, alpha=b)
    return symmetric


def _roots(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Return the square root of a symmetric matrix and its inverse, for eigenvalues >= LEAST."""
    one = torch.eye(symmetric.shape[-1], dtype=symmetric.dtype, device=symmetric.device)
    (a, b), *others = _TO_ROOT
    inverse = a * one + b * symmetric
    root = symmetric @ inverse
    for a, b in others:
        factor = a * one + b * (inverse @ root)
        root, inverse = root @ factor, factor @ inverse
    return root, inverse
