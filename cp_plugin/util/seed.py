"""The seed of a run."""

from __future__ import annotations


def run_seed(default: int = 0) -> int:
    """Return the seed of `seed_everything`, or the default where it was not called."""
    import os

    return int(os.environ.get("PL_GLOBAL_SEED", default))
