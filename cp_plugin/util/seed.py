"""Seeds: that of the run, and those derived from it."""

from __future__ import annotations

import hashlib

SEED_BITS = 32
"""What torch's CPU generator, numpy and `seed_everything` use of a seed; torch drops the rest."""


def run_seed(default: int = 0) -> int:
    """Return the seed of `seed_everything`, or the default where it was not called."""
    import os

    return int(os.environ.get("PL_GLOBAL_SEED", default))


def derived_seed(seed: int, purpose: str, *numbers: int) -> int:
    """Return a seed of its own for a purpose and a place in a run, a whole number in [0, 2^32).

    Sums and shifts of seeds collide: torch's CPU generator keeps the low 32 bits alone, so
    `(seed << 32) + n` is the same stream for every seed. A hash has no such pattern, and is the
    same on every machine.

    Args:
        seed: the run's.
        purpose: what is drawn; streams of different purposes are independent.
        numbers: the place: a step, a batch, a process.
    """
    digest = hashlib.blake2b(repr((seed, purpose, *numbers)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 1) % (1 << SEED_BITS)
