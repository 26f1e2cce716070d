"""What perturbations are like by themselves: how large, in which colours, places and frequencies.

Shapes: K rows of delta, C channels, H and W pixels. Energy is the sum of squared pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cp_plugin.attack.poison_file import Poison
from cp_plugin.evaluation.spectra import power, radial, share_below

AT_BOUND = 0.99
"""Pixels of this part of eps and more count as being at the bound."""
MOST_ROWS = 2_048
"""Rows of a poison that are looked at."""
LOW = 0.25
"""Frequencies up to this part of Nyquist's are the low ones."""


@dataclass(frozen=True)
class DeltaStatistics:
    """What some rows of a perturbation are like; shares are of the energy, 0 to 1."""

    rows: int
    """That it was computed from."""
    rms: float
    """Root of the mean squared pixel, in units of eps."""
    at_bound: float
    """Share of the pixels (not of energy) at the bound, |delta| >= 0.99 eps."""
    common: float
    """Share that all rows have in common: the energy of their mean."""
    grey: float
    """Share that is alike in all channels, which is what images without colour keep; 1/C for
    channels that are independent of each other."""
    centre: float
    """Share in the middle quarter of the image, 0.25 where energy is spread evenly."""
    low_frequencies: float
    """Share at frequencies up to a quarter of Nyquist's; about 0.05 for white noise."""
    profile: tuple[float, ...]
    """Mean power at 0, 1, 2, … cycles an image, over all directions, pixels in [0, 1]."""


def first_rows(poison: Poison) -> Tensor:
    """Return the first rows of a poison's delta (K, C, H, W), as many as statistics look at."""
    count = min(len(poison.perturbation), MOST_ROWS)
    return poison.perturbation.gather(torch.arange(count))


def delta_statistics(delta_KCHW: Tensor, eps: float) -> DeltaStatistics:
    """Return the statistics of rows.

    Args:
        delta_KCHW: float, at least one row, pixels in [0, 1].
        eps: the budget of the poison, in [0, 1].
    """
    delta = delta_KCHW.double()
    energy_HW = delta.square().mean((0, 1))
    total = max(float(energy_HW.mean()), torch.finfo(torch.float64).tiny)
    height, width = energy_HW.shape
    rows, columns = (slice(side // 4, side // 4 + max(1, side // 2)) for side in (height, width))
    spectrum = power(delta)
    return DeltaStatistics(
        rows=len(delta),
        rms=float(energy_HW.mean().sqrt()) / eps,
        at_bound=float((delta.abs() >= AT_BOUND * eps).double().mean()),
        common=float(delta.mean(0).square().mean()) / total,
        grey=float(delta.mean(1).square().mean()) / total,
        centre=float(energy_HW[rows, columns].sum()) / (total * height * width),
        low_frequencies=share_below(spectrum, LOW),
        profile=tuple(radial(spectrum).tolist()),
    )
