"""Spectra of perturbations: power by spatial frequency.

Shapes: K rows of delta, C channels, H and W pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


def power(delta_KCHW: Tensor) -> Array:
    """Return the mean power of each spatial frequency, the lowest in the middle; float (H, W).

    The squared magnitude of the orthonormal 2-D Fourier transform, averaged over rows and channels:
    its sum is that of the squared pixels (Parseval).
    """
    spectrum = torch.fft.fft2(delta_KCHW.double(), norm="ortho").abs().square().mean((0, 1))
    shifted: Array = torch.fft.fftshift(spectrum).numpy()
    return shifted


def radial(power_HW: Array) -> Array:
    """Return the mean power at each whole distance from the lowest frequency, up to Nyquist's."""
    distance = frequencies(power_HW).round().astype(int).ravel()
    total = np.bincount(distance, power_HW.ravel())
    profile: Array = total / np.maximum(np.bincount(distance), 1)
    return profile[: min(power_HW.shape) // 2 + 1]


def share_below(power_HW: Array, part: float) -> float:
    """Return the share of the power at frequencies of at most a part of Nyquist's, 0 to 1."""
    total = power_HW.sum()
    limit = part * min(power_HW.shape) / 2
    return float(power_HW[frequencies(power_HW) <= limit].sum() / total) if total > 0 else 0.0


def frequencies(power_HW: Array) -> Array:
    """Return the frequency of each place of a spectrum, in cycles an image, float (H, W)."""
    height, width = power_HW.shape
    y, x = np.indices(power_HW.shape)
    found: Array = np.hypot(y - height // 2, x - width // 2)
    return found
