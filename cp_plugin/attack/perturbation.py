"""The delta store: one row a class or an image, in memory or in a file.

This is the only place that writes and clips delta. Only the rows of a batch are read and written.
Row numbers stay on the CPU, where they come from: no accelerator is waited for because of them.
Legend for shapes: K rows of the store, U rows asked for, C channels, H and W pixels.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from cp_plugin.attack.rounding import decode, encode, is_short, stepped
from cp_plugin.attack.row_file import RowFile, slices
from cp_plugin.config.settings import RowType, UserError, check_eps

LEAST_SAVED_BY_ROWS = 64 << 20
"""A perturbation of fewer bytes is saved whole each time."""
DTYPES: dict[RowType, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "int8": torch.int8,
}


class Perturbation:
    """Rows of delta, each at most eps a pixel.

    Row numbers below zero mean "not poisoned": they read as zero and are never written.
    """

    def __init__(self, rows: Tensor | RowFile, eps: float) -> None:
        """Wrap rows that are already within the budget; `uniform` and `zeros` make new ones.

        Args:
            rows: (K, C, H, W), float32, float16 or int8 (units of eps / 127). Rows in memory are
                checked here, those of a file as they are read.
            eps: largest change of a pixel, in [0, 1].

        Raises:
            UserError: a row exceeds eps, or eps is no budget.
        """
        self.eps = check_eps(eps)
        self.rows = rows
        """What holds them, a tensor or a file."""
        self.moved = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        """Rows that any gradient has moved, bool (K)."""
        self._saved: RowFile | None = None
        """Rows in memory as they were when they were last written, where they are many."""
        self._unsaved = torch.ones(len(rows), dtype=torch.bool)
        """Rows that were written to since, bool (K)."""
        if isinstance(rows, Tensor):
            for part in self.parts():
                self._checked(decode(rows[part], eps))

    @classmethod
    def uniform(
        cls,
        rows: int,
        shape: tuple[int, int, int],
        eps: float,
        dtype: RowType = "float32",
        generator: torch.Generator | None = None,
        file: Path | None = None,
    ) -> Perturbation:
        """Draw every pixel uniformly from [-eps, eps], as the paper starts.

        Args:
            rows: K.
            shape: (C, H, W).
            eps: largest change of a pixel, in [0, 1].
            dtype: how rows are stored.
            generator: a CPU generator; None uses the global one.
            file: keep the rows in this file instead of in memory.
        """
        store = cls.zeros(rows, shape, eps, dtype, file)
        store.draw(0, rows, generator)
        return store

    @classmethod
    def zeros(
        cls,
        rows: int,
        shape: tuple[int, int, int],
        eps: float,
        dtype: RowType = "float32",
        file: Path | None = None,
    ) -> Perturbation:
        """Make rows of zeros; the arguments are those of `uniform`."""
        size = (rows, *shape)
        if file is None:
            return cls(torch.zeros(size, dtype=DTYPES[dtype]), eps)
        return cls(RowFile.create(file, size, DTYPES[dtype]), eps)

    def draw(self, first: int, end: int, generator: torch.Generator | None = None) -> None:
        """Draw every pixel of some rows uniformly from [-eps, eps].

        Args:
            first: the first row.
            end: the row behind the last one; rows drawn one by one are those drawn at once.
            generator: a CPU generator; None uses the global one.
        """
        for part in slices(end - first, 4 * math.prod(self.shape)):
            rows = slice(first + part.start, first + part.stop)
            draw = torch.rand((part.stop - part.start, *self.shape), generator=generator)
            made = encode((2 * draw - 1) * self.eps, self.eps, self.dtype)
            self.rows[rows] = made.to(self.rows.device)
            self._unsaved[rows] = True

    def grow(self, count: int) -> None:
        """Let there be so many rows; those behind the present ones are zero."""
        more = count - len(self)
        if isinstance(self.rows, RowFile):
            self.rows.grow(count)
        else:
            self.rows = torch.cat([self.rows, self.rows.new_zeros(more, *self.shape)])
        if self._saved is not None:
            self._saved.grow(count)
        self.moved = torch.cat([self.moved, self.moved.new_zeros(more)])
        self._unsaved = torch.cat([self._unsaved, self._unsaved.new_ones(more)])

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a row."""
        channels, height, width = self.rows.shape[1:]
        return channels, height, width

    @property
    def dtype(self) -> torch.dtype:
        """How rows are stored."""
        return self.rows.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all rows as they are stored."""
        return self.rows.nbytes

    @property
    def stored(self) -> Tensor:
        """All rows as one tensor (K, C, H, W); those of a file are read into memory."""
        return self.rows if isinstance(self.rows, Tensor) else self.rows[:]

    def parts(self) -> Iterator[slice]:
        """Yield all rows, so many at a time that they take little memory as float32 too."""
        yield from slices(len(self), 4 * math.prod(self.shape))

    def move(self, device: torch.device) -> None:
        """Keep the rows on a device from now on, such as that of the model they are made with.

        Those of a file stay where they are.
        """
        if isinstance(self.rows, Tensor):
            self.rows, self.moved = self.rows.to(device), self.moved.to(device)

    def in_file(self, folder: Path) -> RowFile | None:
        """Return a file with the rows as they are now; None where they are few.

        Of rows in memory those that changed since the last call are written to it.

        Args:
            folder: where the file is made, if there is none yet.
        """
        if isinstance(self.rows, RowFile):
            return self.rows
        if self.nbytes < LEAST_SAVED_BY_ROWS or not RowFile.available:
            return None
        if self._saved is None:
            self._saved = RowFile.create(new_rows(folder), tuple(self.rows.shape), self.dtype)
            self._unsaved.fill_(True)
        changed = self._unsaved.nonzero().flatten()
        for part in slices(len(changed), self._saved.row_bytes):
            own = changed[part]
            self._saved[own] = self.rows[own.to(self.rows.device)].cpu()
        self._unsaved.zero_()
        return self._saved

    @classmethod
    def continued(cls, saved: RowFile, eps: float, file: Path, in_memory: bool) -> Perturbation:
        """Go on from rows that were saved.

        Args:
            saved: the rows. Their file is written to where it is in the folder of `file`; if not,
                it stays as it is.
            eps: largest change of a pixel, in [0, 1].
            file: where they are copied to, if they have to be.
            in_memory: whether they are held in memory.
        """
        own = saved.path.parent.resolve() == file.parent.resolve()
        if not in_memory:
            return cls(saved.to_write() if own else saved.copied(file), eps)
        made = cls(saved[:], eps)
        if own:
            made._saved = saved.to_write()
            made._unsaved.zero_()
        return made

    def selected(self, rows_M: Tensor) -> Perturbation:
        """Return some of the rows: a copy of those in memory, those of a file as they lie there."""
        if isinstance(self.rows, Tensor):
            return Perturbation(self.rows[rows_M.to(self.rows.device)].cpu(), self.eps)
        return Perturbation(self.rows.selected(rows_M), self.eps)

    def largest(self) -> float:
        """Return the largest absolute entry, in [0, 1]."""
        return max(decode(self.rows[part], self.eps).abs().max().item() for part in self.parts())

    def gather(self, rows_U: Tensor, device: torch.device | None = None) -> Tensor:
        """Return the rows as a new float32 tensor (U, C, H, W).

        Args:
            rows_U: int64, on the CPU.
            device: where the result is; None: where the rows are kept.

        Raises:
            UserError: a row that is read from a file exceeds eps.
        """
        home = self.rows.device
        picked = self.rows[_moved(rows_U.clamp(min=0), home)]
        delta = decode(_moved(picked, device or home), self.eps)
        if isinstance(self.rows, RowFile):
            self._checked(delta)
        return delta.mul_(_moved(rows_U >= 0, delta.device).view(-1, 1, 1, 1))

    def write(self, rows_U: Tensor, delta_UCHW: Tensor) -> None:
        """Clip and store the rows; a row number may stand only once in `rows_U`."""
        home, delta = self.rows.device, delta_UCHW.detach()
        (kept,) = torch.nonzero(rows_U >= 0, as_tuple=True)
        if len(kept) < len(rows_U):
            delta = delta[_moved(kept, delta.device)]
        self.rows[_moved(rows_U[kept], home)] = _moved(encode(delta, self.eps, self.dtype), home)
        self._unsaved[rows_U[kept]] = True

    def descend(
        self, rows_U: Tensor, gradient_UCHW: Tensor, step: float, seed: int | None = None
    ) -> None:
        """Move the rows against the sign of the gradient and clip (He et al., 2023, eq. 4).

        Args:
            rows_U: int64, on the CPU, each row once.
            gradient_UCHW: gradient of the loss that is minimised, in any unit; NaN and infinities,
                which an overflow leaves, move nothing.
            step: length of the step, in pixels.
            seed: of the rounding of a step that is short for the stored type, see
                `cp_plugin.attack.rounding`; None: every step goes to the nearest value.
        """
        direction = torch.nan_to_num(gradient_UCHW.float(), posinf=0.0, neginf=0.0).sign_()
        home, own = self.moved.device, _moved((rows_U >= 0).nonzero().flatten(), direction.device)
        kept = _moved(rows_U[rows_U >= 0], home)
        if seed is not None and is_short(step, self.eps, self.dtype):
            rows = _moved(self.rows[kept], direction.device)
            made = stepped(rows, direction[own], step, self.eps, seed)
            self.rows[kept] = _moved(made, home)
            self._unsaved[rows_U[rows_U >= 0]] = True
        else:
            self.write(rows_U, self.gather(rows_U, direction.device).sub_(direction, alpha=step))
        self.moved[kept] |= _moved(direction.flatten(1).any(1)[own], home)

    def _checked(self, delta: Tensor) -> None:
        worst = delta.abs().max().item() if delta.numel() else 0.0
        if not worst <= self.eps * (1 + 1e-6):
            raise UserError(
                f"expected a perturbation of at most {self.eps:.5f} a pixel, got {worst:.5f}; "
                "the file is damaged or was made with a larger eps."
            )


def new_rows(folder: Path) -> Path:
    """Return the name of a new file of rows in a folder."""
    return folder / f"delta-{uuid.uuid4().hex[:8]}.rows"


def _moved(values: Tensor, device: torch.device) -> Tensor:
    """Return values on a device; on the way to an accelerator nobody waits for them."""
    # On the way back somebody must: they would be read before they are there.
    return values.to(device, non_blocking=device.type != "cpu")
