"""What a poison file must hold: checked before anything of a file from elsewhere is believed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from cp_plugin.attack.perturbation import DTYPES
from cp_plugin.attack.row_file import RowFile
from cp_plugin.config.settings import Granularity, UserError

LARGEST_SIDE = 4096
"""Of delta, in pixels."""
OBJECTS, LISTS = ("schedule", "versions", "placement"), ("parts",)
"""Entries of the metadata that are JSON."""


def check_content(
    path: Path, tensors: Mapping[str, Tensor | RowFile], metadata: Mapping[str, str]
) -> None:
    """Check form and types of all tensors, and every entry of the metadata that is read later.

    Args:
        path: of the file, for errors.
        tensors: by name; `delta` is among them.
        metadata: all text.

    Raises:
        UserError: something is missing, of another type, or out of its range.
    """
    _require(path, metadata.get("granularity") in get_args(Granularity), "granularity", metadata)
    for name, least in (("eps", 0.0), ("fraction", 0.0), ("images", 1.0)):
        if name in metadata or name == "eps":
            found = _number(metadata.get(name))
            _require(path, found is not None and found >= least, name, metadata)
    for name in (*OBJECTS, *LISTS):
        if name in metadata:
            kind = dict if name in OBJECTS else list
            found_json = _json(metadata[name])
            whole = isinstance(found_json, kind)
            if whole and name in LISTS:
                whole = all(isinstance(item, dict) for item in found_json)
            _require(path, whole, name, metadata)
    if "classes" in metadata:
        names = _json(metadata["classes"])
        whole = isinstance(names, list) and all(isinstance(name, str) for name in names)
        _require(path, whole, "classes", metadata)
    delta = tensors["delta"]
    shape = tuple(delta.shape)
    fits = len(shape) == 4 and shape[1] == 3 and all(0 < n <= LARGEST_SIDE for n in shape[2:])
    if not fits or shape[0] == 0 or delta.dtype not in DTYPES.values():
        raise UserError(
            f"{path} holds a delta of shape {shape} and {delta.dtype}; expected (K, 3, H, W) of "
            f"{', '.join(DTYPES)}, so it is damaged or no poison file."
        )
    for name in ("keys", "chosen"):
        owners = tensors.get(name)
        if owners is not None and (owners.dtype != torch.int64 or len(owners.shape) != 1):
            raise UserError(
                f"{path} holds {name} of shape {tuple(owners.shape)} and {owners.dtype}; expected "
                "int64 (K), so it is damaged or no poison file."
            )


def _require(path: Path, holds: bool, name: str, metadata: Mapping[str, str]) -> None:
    if not holds:
        text = metadata.get(name, "nothing")
        raise UserError(
            f"{path} says {text[:60]!r} for {name}, which it cannot be; the file is damaged or no "
            "poison file: make or copy it again."
        )


def _number(text: str | None) -> float | None:
    try:
        found = float(text or "")
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
