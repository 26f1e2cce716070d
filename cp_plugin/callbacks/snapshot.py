"""Delta beside a Lightning checkpoint: a file of its own, named and hashed in the checkpoint."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cp_plugin.attack.poison_file import read, write_atomically
from cp_plugin.config.settings import UserError
from cp_plugin.util.whole_files import sha256

NAME = re.compile(r"delta-step=\d+\.safetensors")
KEPT = 2
"""The newest are kept whatever the checkpoints say: one of them is not written yet, and a crash
while writing leaves the one before."""


def save(
    folder: Path, step: int, tensors: dict[str, Tensor], checkpoints: Sequence[Path] = ()
) -> dict[str, Any]:
    """Write a snapshot and return the plain values that a checkpoint keeps of it.

    Snapshots that no checkpoint names any more are removed.

    Args:
        folder: where snapshots are.
        step: optimiser steps so far.
        tensors: delta and keys.
        checkpoints: folders of the run's checkpoints, beside `folder`.
    """
    path = folder / f"delta-step={step:08d}.safetensors"
    write_atomically(path, tensors, {"step": str(step)})
    known = sorted(folder.glob("delta-step=*.safetensors"), key=lambda file: file.stat().st_mtime)
    files = {file for place in {folder, *checkpoints} for file in place.rglob("*.ckpt")}
    pickles = [_pickle(file) for file in files] if len(known) > KEPT else []
    for old in known[:-KEPT]:
        if not any(pickle is None or old.name.encode() in pickle for pickle in pickles):
            old.unlink()
    return {"file": path.name, "sha256": sha256(path)}


def _pickle(checkpoint: Path) -> bytes | None:
    """Return the small part of a checkpoint that holds its names, None where there is none."""
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            return archive.read(name)
    except (OSError, ValueError, zipfile.BadZipFile):
        return None


def load(folders: Sequence[Path], saved: dict[str, Any]) -> dict[str, Tensor]:
    """Read the snapshot that a checkpoint names.

    Raises:
        UserError: it is gone, or not the one that the checkpoint was saved with.
    """
    if not NAME.fullmatch(str(saved["file"])):
        raise UserError(f"the checkpoint names {saved['file']!r}, which is no snapshot of delta.")
    for folder in folders:
        path = folder / saved["file"]
        if path.is_file():
            if sha256(path) != saved["sha256"]:
                raise UserError(f"{path} is not the snapshot of delta that the checkpoint names.")
            return read(path)[0]
    raise UserError(
        f"the checkpoint needs the snapshot {saved['file']}, which is in none of "
        f"{', '.join(map(str, folders))}; keep it beside the checkpoint or craft anew."
    )
