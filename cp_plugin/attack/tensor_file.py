"""Files of tensors and text metadata: safetensors, written whole, read without running code."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cp_plugin.attack.row_file import RowFile
from cp_plugin.config.settings import UserError
from cp_plugin.util.whole_files import written_whole

BY_ROWS = 1 << 30
"""Rows that take more bytes are left in their file and read as they are asked for."""
NAMES = {
    "I8": torch.int8,
    "F16": torch.float16,
    "F32": torch.float32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
"""What safetensors calls the types of rows and of what stands beside them."""


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata of a safetensors file.

    Raises:
        UserError: the file is missing or damaged.
    """
    tensors, metadata = read_by_rows(path, None)
    return {name: one for name, one in tensors.items() if isinstance(one, Tensor)}, metadata


def read_by_rows(
    path: Path, name: str | None
) -> tuple[dict[str, Tensor | RowFile], dict[str, str]]:
    """Read tensors and metadata; a large one of rows (K, C, H, W) is left in the file.

    Args:
        path: the file.
        name: of the tensor that may be left there; None: none is.

    Raises:
        UserError: the file is missing or damaged.
    """
    if not path.is_file():
        raise UserError(f"there is no poison file at {path}.")
    try:
        # For torch the whole file is mapped to be written, as much as there is memory at most.
        large = name is not None and path.stat().st_size > BY_ROWS
        with safe_open(str(path), framework="np" if large else "pt") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
            rows = _rows_in(path, name) if large and name in names else None
            found: dict[str, Tensor | RowFile] = {
                one: rows if one == name and rows is not None else _tensor(file.get_tensor(one))
                for one in names
            }
            return found, metadata
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} is damaged or truncated ({error}); make or copy it again."
        ) from None


def write_atomically(
    path: Path, tensors: Mapping[str, Tensor | RowFile], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file that is either whole or absent; rows in a file pass part by part.

    Raises:
        NoRoom: the disk is full.
    """
    held = {name: one for name, one in tensors.items() if isinstance(one, Tensor)}
    with written_whole(path) as partial:
        if len(held) == len(tensors):
            save_file(held, str(partial), dict(metadata))
        else:
            _write_parts(partial, tensors, metadata)


def _tensor(found: Any) -> Tensor:
    return found if isinstance(found, Tensor) else torch.from_numpy(found)


def _write_parts(
    path: Path, tensors: Mapping[str, Tensor | RowFile], metadata: Mapping[str, str]
) -> None:
    names = {dtype: name for name, dtype in NAMES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    # As the format asks: no gaps, and wide types first, so that each begins at a multiple of it.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    for name, one in ordered:
        begin, end = end, end + one.nbytes
        header[name] = {
            "dtype": names[one.dtype],
            "shape": list(one.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, one in ordered:
            if isinstance(one, Tensor):
                file.write(_bytes(one))
                continue
            for rows in one.parts():
                if one.written(rows):
                    file.write(_bytes(one[rows]))
                else:
                    file.seek((rows.stop - rows.start) * one.row_bytes, os.SEEK_CUR)
        file.truncate(8 + len(text) + end)


def _bytes(values: Tensor) -> memoryview:
    return values.contiguous().flatten().view(torch.uint8).numpy().data


def _rows_in(path: Path, name: str | None) -> RowFile | None:
    """Return rows that are left in a file whose header was found to be right; None: they are few.

    Only their header is read here.
    """
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        told = json.loads(file.read(length))[name]
    begin, end = told["data_offsets"]
    shape = tuple(told["shape"])
    if (
        end - begin <= BY_ROWS
        or not RowFile.available
        or len(shape) != 4
        or told["dtype"] not in NAMES
    ):
        return None
    return RowFile(path, shape, NAMES[told["dtype"]], start=8 + length + begin)
