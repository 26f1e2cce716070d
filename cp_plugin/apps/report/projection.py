"""Features in a plane, to be looked at: by principal components, or by t-SNE.

Features are brought to length 1 first, since kNN compares them by cosine. Shapes: N images, D
feature width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cp_plugin.config.settings import UserError
from cp_plugin.evaluation.spectra import Array

PCA, TSNE = "pca", "tsne"
PROJECTIONS = {
    PCA: "first two principal components",
    TSNE: "t-SNE (van der Maaten, Hinton, 2008; distances between groups mean nothing in it)",
}
"""By name, what the page calls them."""
MOST_IN_TSNE = 2_000
"""Images on a map by t-SNE, at most; the rest is left out by chance."""


def project(features_ND: Tensor, labels_N: Tensor, projection: str) -> tuple[Array, Array]:
    """Return the points of a map, float (M, 2), and their labels, int (M).

    Args:
        features_ND: float.
        labels_N: int64.
        projection: of `PROJECTIONS`.
    """
    if projection == PCA:
        return principal_plane(features_ND), labels_N.numpy()
    drawn = torch.randperm(len(features_ND), generator=torch.Generator().manual_seed(0))
    kept = drawn[:MOST_IN_TSNE].sort().values
    return tsne_plane(features_ND[kept]), labels_N[kept].numpy()


def principal_plane(features_ND: Tensor) -> Array:
    """Return the first two principal components of normalised features; float (N, 2)."""
    unit = functional.normalize(features_ND.double())
    centred = unit - unit.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    plane: Array = (centred @ directions[:2].T).numpy()
    return plane


def tsne_plane(features_ND: Tensor) -> Array:
    """Return normalised features in a plane by scikit-learn's t-SNE, started from PCA; (N, 2)."""
    manifold = _scikit_learn()
    unit = functional.normalize(features_ND.double()).numpy()
    perplexity = min(30.0, (len(unit) - 1) / 3)
    plane: Array = manifold.TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(
        unit
    )
    return plane


def check_projection(name: str) -> None:
    """Check, before anything is computed, that a map can be made so.

    Raises:
        UserError: another name, or scikit-learn is not installed.
    """
    if name not in PROJECTIONS:
        raise UserError(f"--features must be {' or '.join(PROJECTIONS)}; got {name!r}.")
    if name == TSNE:
        _scikit_learn()


def _scikit_learn() -> Any:
    try:
        from sklearn import manifold
    except ImportError as error:
        raise UserError(
            "t-SNE needs scikit-learn, which is not installed; pip install 'cp-plugin[tsne]'."
        ) from error
    return manifold
