"""Rows of delta in a file, read and written a batch at a time: memory grows with the batch alone.

The file has places of one row each, and a table tells in which place a row lies; a row that was
never written has none and reads as zero. A state of the rows is kept by keeping its table: from
then on its places are not written any more, and a row that moves goes to another place. So a state
costs its table and the rows that moved since the one before, and all that are kept stay whole
whenever a process is killed (shadow paging: Gray et al., "The recovery manager of the System R
database manager", ACM Computing Surveys 13, 1981).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cp_plugin.util.whole_files import SENTENCE, NoRoom, is_no_room

PART = 32 << 20
"""Bytes that are read or written at a time where all rows are."""
UNFLUSHED = 1 << 30
"""Bytes that are written before the disk is waited for, so that keeping a state is quick."""
NOWHERE = -1
MORE_PLACES = 1 << 16


class RowFile:
    """Rows in a file; read and written by their numbers, as a tensor of them would be."""

    device = torch.device("cpu")
    available = hasattr(os, "preadv")
    """Whether the system reads and writes at a place of a file; Windows does not."""

    def __init__(
        self,
        path: Path,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        places_K: Tensor | None = None,
        start: int = 0,
        writable: bool = False,
    ) -> None:
        """Open a file that is there.

        Args:
            path: the file.
            shape: (K, C, H, W).
            dtype: of the rows.
            places_K: int64 (K), where each row lies, counted in rows, `NOWHERE` where it was never
                written; None: they lie in order.
            start: bytes of the file before the first place.
            writable: whether rows may be written.

        Raises:
            OSError: the file cannot be opened, or is shorter than its rows.
        """
        self.path, self.shape, self.dtype = path, torch.Size(shape), dtype
        self.places = torch.arange(shape[0]) if places_K is None else places_K
        """int64 (K), the table."""
        self._start, self._writable = start, writable
        self.row_bytes = math.prod(shape[1:]) * dtype.itemsize
        self._file = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
        size = os.fstat(self._file).st_size - start
        if len(self.places) and int(self.places.max()) >= size // self.row_bytes:
            raise OSError(f"{path} is shorter than its rows")
        self._end = -(-size // self.row_bytes)
        """Places so far; all behind are free."""
        self._kept = torch.ones(self._end, dtype=torch.bool)
        """Places that may not be written."""
        self._free = torch.empty(0, dtype=torch.int64)
        self._unflushed = 0

    @classmethod
    def create(cls, path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> RowFile:
        """Make a file of rows that are zero and take no room yet; one that is there is replaced."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.touch()
        nowhere = torch.full((shape[0],), NOWHERE)
        return cls(path, shape, dtype, nowhere, writable=True)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return len(self) * self.row_bytes

    def __getitem__(self, rows_U: Tensor | slice) -> Tensor:
        """Return rows as a new tensor (U, C, H, W) of the file's type."""
        places = self.places[rows_U]
        found = torch.zeros((len(places), *self.shape[1:]), dtype=self.dtype)
        for part, offset in self._runs(places, found):
            _read(self._file, part, offset, self.path)
        return found

    def __setitem__(self, rows_U: Tensor | slice, values: Tensor) -> None:
        """Write rows (U, C, H, W); each only once.

        Raises:
            NoRoom: the disk is full.
        """
        places = self._places_to_write(self.places[rows_U])
        try:
            for part, offset in self._runs(places, values.contiguous()):
                _write(self._file, part, offset)
        except OSError as error:
            if is_no_room(error):
                raise NoRoom(SENTENCE.format(self.path)) from error
            raise
        self.places[rows_U] = places
        self._unflushed += values.nbytes
        if self._unflushed > UNFLUSHED:
            self.flush()

    def written(self, rows_U: Tensor | slice) -> bool:
        """Whether any of the rows was ever written; the others are zero and take no room."""
        return bool((self.places[rows_U] >= 0).any())

    def parts(self) -> Iterator[slice]:
        """Yield all rows, so many at a time that they take little memory."""
        yield from slices(len(self), self.row_bytes)

    def to_write(self) -> RowFile:
        """Return the same rows, open for writing; those that are kept are written elsewhere."""
        made = self._opened_again({"_writable": True})
        os.close(made._file)
        made._file = os.open(self.path, os.O_RDWR)
        return made

    def grow(self, count: int) -> None:
        """Let there be so many rows; those behind the present ones are zero and take no room."""
        more = torch.full((count - len(self),), NOWHERE)
        self.places = torch.cat([self.places, more])
        self.shape = torch.Size((count, *self.shape[1:]))

    def selected(self, rows_M: Tensor) -> RowFile:
        """Return some of the rows as they lie in the same file, to be read."""
        return self._opened_again({"places": self.places[rows_M]})

    def copied(self, path: Path) -> RowFile:
        """Copy the rows, in order, to a file of their own, which may be written."""
        made = RowFile.create(path, self.shape, self.dtype)
        for rows in self.parts():
            made[rows] = self[rows]
        return made

    def flush(self) -> None:
        """Wait until all that was written is on the disk."""
        os.fsync(self._file)
        self._unflushed = 0

    def keep(self, others: Iterable[Tensor] = ()) -> None:
        """Keep the rows as they are now, and states of which there are tables, and no others.

        Args:
            others: int64 (K) each, tables of states of this file.
        """
        self._kept.zero_()
        for places in (self.places, *others):
            self._kept[places[places >= 0]] = True
        self._free = (~self._kept[: self._end]).nonzero().flatten()

    def remove(self) -> None:
        """Remove the file; it can be used until the process ends."""
        self.path.unlink(missing_ok=True)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to the process; another one reads the same file."""
        return {**vars(self), "_file": None, "_writable": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the file."""
        vars(self).update(state)
        self._file = os.open(self.path, os.O_RDONLY)

    def __del__(self) -> None:
        """Close the file."""
        if vars(self).get("_file") is not None:
            os.close(self._file)

    def _opened_again(self, changed: dict[str, Any]) -> RowFile:
        made = object.__new__(RowFile)
        vars(made).update(self.__getstate__(), **changed, _file=os.dup(self._file))
        made.shape = torch.Size((len(made.places), *self.shape[1:]))
        return made

    def _places_to_write(self, places_U: Tensor) -> Tensor:
        """Return where rows may be written, given where they lie."""
        assert self._writable
        places = places_U.clone()
        elsewhere = places < 0
        if len(self._kept):
            elsewhere |= self._kept[places.clamp(min=0)]
        count = int(elsewhere.sum())
        free, self._free = self._free[:count], self._free[count:]
        end = self._end + count - len(free)
        if end > len(self._kept):
            more = self._kept.new_zeros(end + MORE_PLACES - len(self._kept))
            self._kept = torch.cat([self._kept, more])
        places[elsewhere] = torch.cat([free, torch.arange(self._end, end)])
        self._end = end
        return places

    def _runs(self, places_U: Tensor, rows: Tensor) -> Iterator[tuple[memoryview, int]]:
        """Yield the bytes of rows that lie behind one another in the file, and where they do."""
        data = rows.flatten().view(torch.uint8).numpy().data
        follows = (places_U[1:] == places_U[:-1] + 1) & (places_U[:-1] >= 0)
        ends = [*((~follows).nonzero().flatten() + 1).tolist(), len(places_U)]
        first = 0
        for end in ends:
            place, size = (int(places_U[first]), self.row_bytes) if end > first else (NOWHERE, 0)
            if place >= 0:
                yield data[first * size : end * size], self._start + place * size
            first = end


def slices(count: int, row_bytes: int) -> Iterator[slice]:
    """Yield slices that cover so many rows, each of at most `PART` bytes, or one row."""
    step = max(1, PART // row_bytes)
    for first in range(0, count, step):
        yield slice(first, min(first + step, count))


def _read(file: int, part: memoryview, offset: int, path: Path) -> None:
    while len(part):
        done = os.preadv(file, [part], offset)
        if not done:
            raise OSError(f"{path} ends before its rows do")
        part, offset = part[done:], offset + done


def _write(file: int, part: memoryview, offset: int) -> None:
    while len(part):
        done = os.pwritev(file, [part], offset)
        part, offset = part[done:], offset + done
