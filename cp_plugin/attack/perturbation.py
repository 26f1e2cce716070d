"""The delta store: one row a class or an image, in memory or mapped from disk.

This is the only place that writes and clips delta. Only the rows of a batch are read and written.
Row numbers stay on the CPU, where they come from: no accelerator is waited for because of them.
Legend for shapes: K rows of the store, U rows asked for, C channels, H and W pixels.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from cp_plugin.attack.rounding import decode, encode, is_short, stepped
from cp_plugin.config.settings import RowType, UserError, check_eps

DTYPES: dict[RowType, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "int8": torch.int8,
}


class Perturbation:
    """Rows of delta, each at most eps a pixel.

    Row numbers below zero mean "not poisoned": they read as zero and are never written.
    """

    def __init__(self, stored: Tensor, eps: float) -> None:
        """Wrap rows that are already within the budget; `uniform` and `zeros` make new ones.

        Args:
            stored: (K, C, H, W), float32, float16 or int8 (units of eps / 127).
            eps: largest change of a pixel, in [0, 1].

        Raises:
            UserError: a row exceeds eps, or eps is no budget.
        """
        self.eps = check_eps(eps)
        self.stored = stored
        self.moved = torch.zeros(len(stored), dtype=torch.bool, device=stored.device)
        """Rows that any gradient has moved, bool (K)."""
        for part in torch.split(stored, 4096):
            worst = decode(part, eps).abs().max().item() if part.numel() else 0.0
            if not worst <= eps * (1 + 1e-6):
                raise UserError(
                    f"expected a perturbation of at most {eps:.5f} a pixel, got {worst:.5f}; "
                    "the file is damaged or was made with a larger eps."
                )

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
            file: keep the rows in this file, mapped into memory, instead of in memory.
        """
        store = cls.zeros(rows, shape, eps, dtype, file)
        for start in range(0, rows, 4096):
            part = store.stored[start : start + 4096]
            draw = torch.rand(part.shape, generator=generator)
            part.copy_(encode((2 * draw - 1) * eps, eps, part.dtype))
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
        count = math.prod(size)
        file.unlink(missing_ok=True)
        mapped = torch.from_file(str(file), shared=True, size=count, dtype=DTYPES[dtype])
        return cls(mapped.view(size), eps)

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a row."""
        channels, height, width = self.stored.shape[1:]
        return channels, height, width

    def move(self, device: torch.device) -> None:
        """Keep the rows on a device from now on, such as that of the model they are made with."""
        self.stored, self.moved = self.stored.to(device), self.moved.to(device)

    def gather(self, rows_U: Tensor, device: torch.device | None = None) -> Tensor:
        """Return the rows as a new float32 tensor (U, C, H, W).

        Args:
            rows_U: int64, on the CPU.
            device: where the result is; None: where the rows are kept.
        """
        home = self.stored.device
        picked = self.stored[_moved(rows_U.clamp(min=0), home)]
        delta = decode(_moved(picked, device or home), self.eps)
        return delta.mul_(_moved(rows_U >= 0, delta.device).view(-1, 1, 1, 1))

    def write(self, rows_U: Tensor, delta_UCHW: Tensor) -> None:
        """Clip and store the rows; a row number may stand only once in `rows_U`."""
        home, delta = self.stored.device, delta_UCHW.detach()
        (kept,) = torch.nonzero(rows_U >= 0, as_tuple=True)
        if len(kept) < len(rows_U):
            delta = delta[_moved(kept, delta.device)]
        stored = _moved(encode(delta, self.eps, self.stored.dtype), home)
        self.stored[_moved(rows_U[kept], home)] = stored

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
        if seed is not None and is_short(step, self.eps, self.stored.dtype):
            rows = _moved(self.stored[kept], direction.device)
            made = stepped(rows, direction[own], step, self.eps, seed)
            self.stored[kept] = _moved(made, home)
        else:
            self.write(rows_U, self.gather(rows_U, direction.device).sub_(direction, alpha=step))
        self.moved[kept] |= _moved(direction.flatten(1).any(1)[own], home)


def _moved(values: Tensor, device: torch.device) -> Tensor:
    """Return values on a device; on the way to an accelerator nobody waits for them."""
    # On the way back somebody must: they would be read before they are there.
    return values.to(device, non_blocking=device.type != "cpu")
