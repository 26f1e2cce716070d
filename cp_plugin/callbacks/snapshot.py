"""Delta beside a Lightning checkpoint: a file of its own, named and hashed in the checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cp_plugin.attack.poison_file import read, write_atomically
from cp_plugin.config.settings import UserError

KEPT = 2
"""A crash while writing leaves the snapshot of the checkpoint before."""


def save(folder: Path, step: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write a snapshot and return the plain values that a checkpoint keeps of it."""
    path = folder / f"delta-step={step:08d}.safetensors"
    write_atomically(path, tensors, {"step": str(step)})
    for old in sorted(folder.glob("delta-step=*.safetensors"))[:-KEPT]:
        old.unlink()
    return {"file": path.name, "sha256": _sha256(path)}


def load(folders: Sequence[Path], saved: dict[str, Any]) -> dict[str, Tensor]:
    """Read the snapshot that a checkpoint names.

    Raises:
        UserError: it is gone, or not the one that the checkpoint was saved with.
    """
    for folder in folders:
        path = folder / saved["file"]
        if path.is_file():
            if _sha256(path) != saved["sha256"]:
                raise UserError(f"{path} is not the snapshot of delta that the checkpoint names.")
            return read(path)[0]
    raise UserError(
        f"the checkpoint needs the snapshot {saved['file']}, which is in none of "
        f"{', '.join(map(str, folders))}; keep it beside the checkpoint or craft anew."
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.sha256(file.read()).hexdigest()
