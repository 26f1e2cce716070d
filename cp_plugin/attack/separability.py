"""How well the classes of a perturbation are told apart, as a loss that falls as they are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

SMALLEST = 1e-12
"""Distance that coinciding centres count as."""


def class_separability(delta_BCHW: Tensor, labels_B: Tensor) -> Tensor:
    """Return the class-wise separability discriminant of perturbations.

    With c_k the mean of the deltas of class k and s_k their mean Euclidean distance from it, it is
    the mean of (s_i + s_j) / |c_i - c_j| over all pairs of the M classes that are there.

    Args:
        delta_BCHW: float, one an image.
        labels_B: int64; images with a negative one are left out.

    Returns:
        A scalar with a gradient; 0 where fewer than two classes are there.

    Source: Ren et al., "Transferable Unlearnable Examples", ICLR 2023, section 4.1.
    """
    labelled = labels_B >= 0
    delta_BD = delta_BCHW[labelled].flatten(1)
    _, class_B = torch.unique(labels_B[labelled], return_inverse=True)
    classes = int(class_B.max()) + 1 if len(class_B) else 0
    if classes < 2:
        return 0 * delta_BCHW.sum()
    members_BM = functional.one_hot(class_B, classes).to(delta_BD)
    share_BM = members_BM / members_BM.sum(0)
    centres_MD = share_BM.T @ delta_BD
    spread_M = share_BM.T @ torch.linalg.vector_norm(delta_BD - centres_MD[class_B], dim=1)
    first, second = torch.triu_indices(classes, classes, 1, device=delta_BD.device)
    apart = functional.pdist(centres_MD).clamp(min=SMALLEST)
    mean: Tensor = ((spread_M[first] + spread_M[second]) / apart).mean()
    return mean
