"""Delta beside a checkpoint: a file of its own, named and hashed in the checkpoint.

A small delta is in that file itself. A large one lies in a file of rows, to which a snapshot adds
the rows that changed since the one before; its own file holds the table of where they lie.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from cp_plugin.attack.perturbation import DTYPES, Perturbation
from cp_plugin.attack.row_file import RowFile
from cp_plugin.attack.tensor_file import read, write_atomically
from cp_plugin.config.settings import UserError
from cp_plugin.util.whole_files import sha256

NAME = re.compile(r"delta-step=\d+\.safetensors")
ROWS_NAME = re.compile(r"delta-[0-9a-f]{8}\.rows")
KEPT = 2
"""The newest are kept whatever the checkpoints say: one of them is not written yet, and a crash
while writing leaves the one before."""


def save(
    folder: Path,
    step: int,
    perturbation: Perturbation,
    others: Mapping[str, Tensor],
    checkpoints: Sequence[Path] = (),
) -> dict[str, Any]:
    """Write a snapshot and return the plain values that a checkpoint keeps of it.

    Snapshots that no checkpoint names any more are removed.

    Args:
        folder: where snapshots are.
        step: optimiser steps so far.
        perturbation: delta.
        others: further tensors: which rows have moved, and their keys.
        checkpoints: folders of the run's checkpoints, beside `folder`.
    """
    path = folder / f"delta-step={step:08d}.safetensors"
    rows = perturbation.in_file(folder)
    metadata = {"step": str(step)}
    if rows is None:
        write_atomically(path, {"delta": perturbation.stored, **others}, metadata)
    else:
        rows.flush()
        metadata |= {"rows": rows.path.name, "shape": json.dumps([*rows.shape])}
        metadata |= {"dtype": next(name for name, one in DTYPES.items() if one == rows.dtype)}
        write_atomically(path, {"places": rows.places, **others}, metadata)
    _remove_old(folder, checkpoints)
    if rows is not None:
        rows.keep(_tables(folder, rows.path.name))
        remove_unnamed(folder, rows)
    return {"file": path.name, "sha256": sha256(path)}


def _remove_old(folder: Path, checkpoints: Sequence[Path]) -> None:
    known = sorted(_snapshots(folder), key=lambda file: file.stat().st_mtime)
    files = {file for place in {folder, *checkpoints} for file in place.rglob("*.ckpt")}
    pickles = [_pickle(file) for file in files] if len(known) > KEPT else []
    for old in known[:-KEPT]:
        if not any(pickle is None or old.name.encode() in pickle for pickle in pickles):
            old.unlink()


def _pickle(checkpoint: Path) -> bytes | None:
    """Return the small part of a checkpoint that holds its names, None where there is none."""
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            return archive.read(name)
    except (OSError, ValueError, zipfile.BadZipFile):
        return None


def load(folders: Sequence[Path], saved: Mapping[str, Any]) -> dict[str, Tensor | RowFile]:
    """Read the snapshot that a checkpoint names.

    Returns:
        What `save` was given, by name, and `delta`; of a large one the file of its rows, to be read
        (`continued` makes it one that is written).

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
            tensors, metadata = read(path)
            if "rows" not in metadata:
                return {**tensors}
            places = tensors.pop("places", None)
            return {**tensors, "delta": _rows_of(path, places, metadata)}
    raise UserError(
        f"the checkpoint needs the snapshot {saved['file']}, which is in none of "
        f"{', '.join(map(str, folders))}; keep it beside the checkpoint or craft anew."
    )


def _rows_of(path: Path, places: Tensor | None, metadata: Mapping[str, str]) -> RowFile:
    """Open the rows that a snapshot has a table of.

    Raises:
        UserError: their file is gone or was cut, or the snapshot is none.
    """
    name, dtype = metadata["rows"], DTYPES.get(metadata.get("dtype", ""))  # type: ignore[call-overload]
    try:
        shape = tuple(int(one) for one in json.loads(metadata["shape"]))
        if not ROWS_NAME.fullmatch(name) or dtype is None or places is None:
            raise ValueError
        if len(shape) != 4 or min(shape) < 1 or places.shape != shape[:1]:
            raise ValueError
    except (KeyError, ValueError, TypeError):
        raise UserError(f"{path} is no snapshot of delta; craft anew.") from None
    try:
        rows = RowFile(path.with_name(name), shape, dtype, places.clone())
    except OSError as error:
        raise UserError(
            f"{path.name} needs the rows in {path.with_name(name)}, and {error}; keep that file "
            "beside the snapshot or craft anew."
        ) from None
    rows.keep(_tables(path.parent, name))
    return rows


def remove_unnamed(folder: Path, own: RowFile | None = None) -> None:
    """Remove files of rows in a folder that no snapshot names, as killed runs leave them.

    Args:
        folder: where snapshots are.
        own: a file that stays.
    """
    rows = [file for file in folder.glob("delta-*.rows") if ROWS_NAME.fullmatch(file.name)]
    named = {_metadata(file).get("rows") for file in _snapshots(folder)} if rows else set()
    for file in rows:
        if file.name not in named and (own is None or file.name != own.path.name):
            file.unlink(missing_ok=True)


def _snapshots(folder: Path) -> list[Path]:
    return [file for file in folder.glob("delta-step=*.safetensors") if NAME.fullmatch(file.name)]


def _tables(folder: Path, name: str) -> Iterator[Tensor]:
    """Yield where the rows of all snapshots lie in a file."""
    for file in _snapshots(folder):
        if _metadata(file).get("rows") == name:
            yield read(file)[0]["places"]


def _metadata(file: Path) -> dict[str, str]:
    with safe_open(str(file), framework="pt") as opened:
        return opened.metadata() or {}
