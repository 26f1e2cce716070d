"""Rows of delta in the type in which they are stored: levels of int8, float16 or float32.

A step shorter than half a level would be lost in rounding to the nearest, and one a little longer
would be a whole level. Short steps are therefore rounded up or down at random, such that the mean
is the step (Gupta et al., "Deep Learning with Limited Numerical Precision", ICML 2015).
"""

from __future__ import annotations

import torch
from torch import Tensor

INT8_LEVELS = 127
"""A row of int8 counts in units of eps / 127."""
SHORT = 16
"""Steps of fewer levels are rounded at random; longer ones to the nearest, off by 3 % at most."""
HALF_DIGITS, HALF_LEAST = 10, 2.0**-24
"""Binary digits of a float16 number behind its first, and the least distance of two numbers."""
EXPONENT = 0x7F800000
"""The bits of a float32 number that hold its exponent."""


def decode(rows: Tensor, eps: float) -> Tensor:
    """Return stored rows as float32 in [-eps, eps]."""
    if rows.dtype == torch.int8:
        return rows.float() * (eps / INT8_LEVELS)
    return rows.float()


def encode(delta: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Clip float rows to [-eps, eps] and bring them to the nearest value of the stored type.

    Rounding to the stored type never leaves the budget: float16 rows are clipped again to the
    largest float16 number that is at most eps.
    """
    delta = delta.clamp(-eps, eps)
    if dtype == torch.int8:
        return (delta * (INT8_LEVELS / eps)).round().to(torch.int8)
    limit = _largest(eps, dtype)
    return delta.to(dtype).clamp(-limit, limit)


def is_short(step: float, eps: float, dtype: torch.dtype) -> bool:
    """Whether a step, in pixels, is so short that rows of a type round it at random."""
    if dtype == torch.float32:
        return False
    level = eps / INT8_LEVELS if dtype == torch.int8 else float(_spacing(torch.tensor(eps)))
    return step < SHORT * level


def stepped(rows: Tensor, direction: Tensor, step: float, eps: float, seed: int) -> Tensor:
    """Return stored rows after a step against a direction, rounded at random and clipped.

    A pixel that the direction leaves alone stays as it is.

    Args:
        rows: (U, C, H, W), int8 or float16.
        direction: of the same shape and device, -1, 0 or 1.
        step: in pixels.
        eps: largest change of a pixel.
        seed: of the random numbers; with the device they are drawn on, it fixes them.
    """
    unit = eps / INT8_LEVELS if rows.dtype == torch.int8 else 1.0
    values = rows.float().sub_(direction, alpha=step / unit)
    generator = torch.Generator(rows.device).manual_seed(seed)
    drawn = torch.rand(values.shape, generator=generator, device=rows.device)
    if rows.dtype == torch.int8:
        values.clamp_(-INT8_LEVELS, INT8_LEVELS)
        return _at_random(values, drawn).to(torch.int8)
    spacing = _spacing(values)
    limit = _largest(eps, rows.dtype)
    return (_at_random(values / spacing, drawn) * spacing).to(rows.dtype).clamp_(-limit, limit)


def _at_random(values: Tensor, drawn: Tensor) -> Tensor:
    """Return whole numbers, the upper one with the probability of the part behind the point."""
    below = values.floor()
    return below + (drawn < values - below)


def _spacing(values: Tensor) -> Tensor:
    """Return how far apart float16 numbers are where float32 values lie, exactly."""
    power = (values.view(torch.int32) & EXPONENT).view(torch.float32)
    return (power * 2.0**-HALF_DIGITS).clamp_(min=HALF_LEAST)


def _largest(eps: float, dtype: torch.dtype) -> float:
    """Return the largest number of a floating type that is at most eps."""
    limit = torch.tensor(eps, dtype=torch.float64).to(dtype)
    if limit.double() > eps:
        limit = torch.nextafter(limit, torch.zeros_like(limit))
    return limit.item()
