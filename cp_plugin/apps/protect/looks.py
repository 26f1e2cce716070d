"""How protected pictures look: similarity to the originals, and both side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.metrics import structural_similarity

SIDE = 256
"""Largest side in pixels of the part of a picture that is compared, its centre."""
LEAST_SIDE = 7
"""Of the window of SSIM (Wang et al., 2004)."""
AMPLIFIED = 16


class Look(NamedTuple):
    """The centre of a picture before and after, uint8 (H, W, C)."""

    before: NDArray[Any]
    after: NDArray[Any]


def centre(colours: NDArray[Any]) -> NDArray[Any]:
    """Return a copy of the centre of a picture (H, W, C)."""
    height, width = colours.shape[:2]
    top, left = max(0, (height - SIDE) // 2), max(0, (width - SIDE) // 2)
    return colours[top : top + SIDE, left : left + SIDE].copy()


def comparable(colours: NDArray[Any]) -> bool:
    """Whether a picture of this kind is shown: 8 bit, grey or RGB, and not too small."""
    usual = colours.dtype == np.uint8 and colours.shape[2] in (1, 3)
    return bool(usual and min(colours.shape[:2]) >= LEAST_SIDE)


def similarity(looks: Sequence[Look]) -> tuple[float, float]:
    """Return PSNR in dB and SSIM, the means over pictures."""
    similar = cast(Any, structural_similarity)
    ratios = [_signal_to_noise(*look) for look in looks]
    alike = [similar(*look, channel_axis=2, data_range=255) for look in looks]
    return float(np.mean(ratios)), float(np.mean(alike))


def _signal_to_noise(before: NDArray[Any], after: NDArray[Any]) -> float:
    """Return PSNR in dB; scikit-image's takes a second to import, with all of scipy.stats."""
    error = np.square(after.astype(np.float64) - before).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def side_by_side(looks: Sequence[Look], path: Path) -> None:
    """Write originals, protected pictures and their difference, amplified around grey, in rows."""
    height, width = np.max([look.before.shape[:2] for look in looks], axis=0).tolist()
    sheet = Image.new("RGB", (3 * width, len(looks) * height), "white")
    for row, look in enumerate(looks):
        difference = look.after.astype(np.int16) - look.before
        shown = (128 + AMPLIFIED * difference).clip(0, 255).astype(np.uint8)
        for column, pixels in enumerate((look.before, look.after, shown)):
            image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
            sheet.paste(image, (column * width, row * height))
    sheet.save(path, "PNG", compress_level=1)  # noise shrinks little at higher ones
