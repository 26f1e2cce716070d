"""Which images of a data set are poisoned."""

from __future__ import annotations

import torch
from torch import Tensor


def choose(
    targets: Tensor | None, count: int, fraction: float, generator: torch.Generator
) -> Tensor:
    """Return which images are poisoned, bool (N): the same part of each class, if known."""
    chosen = torch.zeros(count, dtype=torch.bool)
    groups = torch.zeros(count, dtype=torch.int64) if targets is None else targets
    for group in sorted(set(groups.tolist())):
        members = (groups == group).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=generator)
        chosen[members[order[: max(1, round(fraction * len(members)))]]] = True
    return chosen
