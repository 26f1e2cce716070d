"""Lightly's `examples/pytorch_lightning`: which of its files are crafted with as they stand."""

from __future__ import annotations

SERVED = (
    "aim", "barlowtwins", "byol", "capi", "dcl", "densecl", "dino", "dinov2", "fastsiam", "fda",
    "frossl", "ibot", "lejepa", "mae", "mmcr", "moco", "msn", "nnclr", "pixio", "pmsn", "simclr",
    "simmim", "simsiam", "smog", "swav", "swav_queue", "tico", "vicreg", "vicregl",
)  # fmt: skip
REFUSED = {
    "detcon": "its transform is a function, which makes a mask of each image beside its views and "
    "cannot be looked into"
}
"""Files that are refused in one sentence, and why."""
NOTES = ("ijepa",)
"""Files that hold no code."""
