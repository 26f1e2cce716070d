"""Checks a folder of protected pictures against the originals; shares no code with the package.

    python tests/support/check_protected.py ORIGINALS PROTECTED 8/255

Every picture must be there, of the same size, mode, transparency, profile and orientation, and
each pixel within the budget; what differs is printed, and the exit code is 1.
"""

from __future__ import annotations

import json
import sys
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image
from torchvision.io import ImageReadMode, decode_png, read_file

IN_FULL_COLOUR = {"P": ("RGB", "RGBA"), "1": ("L",)}
"""Modes that cannot hold a perturbation, and what they become."""
Pixels = np.ndarray  # type: ignore[type-arg]


def decoded(path: Path) -> tuple[Pixels, int]:
    """Return an array (H, W, C) and the largest level."""
    with Image.open(path) as image:
        kind, bits = image.format, 8
        if kind == "PNG":
            bits = path.read_bytes()[24]
        if kind == "TIFF":
            bits = int(np.max(image.tag_v2.get(258, 8)))
    if bits == 16 and kind == "PNG":
        planes = decode_png(read_file(str(path)), ImageReadMode.UNCHANGED)
        return planes.permute(1, 2, 0).numpy().astype(np.int64), 65535
    if bits == 16:
        found = tifffile.imread(path).astype(np.int64)
        return found.reshape(*found.shape[:2], -1), 65535
    with Image.open(path) as image:
        mode = {"P": "RGBA" if "transparency" in image.info else "RGB", "1": "L"}
        found = np.asarray(image.convert(mode.get(image.mode, image.mode)), dtype=np.int64)
    return found.reshape(*found.shape[:2], -1), 255


def faults(one: Path, other: Path, eps: float) -> list[str]:
    """Say what differs."""
    found = []
    with Image.open(one) as before, Image.open(other) as after:
        modes = IN_FULL_COLOUR.get(before.mode, (before.mode,))
        alpha = before.has_transparency_data
        if after.mode not in modes and not alpha:
            found.append(f"mode {before.mode} became {after.mode}")
        if before.size != after.size:
            return [f"size {before.size} became {after.size}"]
        if before.getexif().get(0x0112, 1) != after.getexif().get(0x0112, 1):
            found.append("orientation")
        if before.info.get("icc_profile") != after.info.get("icc_profile"):
            found.append("profile")
    (first, full), (second, other_full) = decoded(one), decoded(other)
    if full != other_full or first.shape != second.shape:
        return [*found, f"{first.shape} of {full} levels became {second.shape} of {other_full}"]
    if alpha and not np.array_equal(first[:, :, -1], second[:, :, -1]):
        found.append("transparency")
    off = int(np.abs(first - second).max())
    if off > int(full * eps + 1e-6):
        found.append(f"a pixel is off by {off} of {full}")
    if off == 0:
        found.append("nothing was changed")
    return found


def partner(file: Path, root: Path, out: Path) -> Path | None:
    """Return the protected file of an original."""
    name = out / file.relative_to(root)
    candidates = [
        name.with_name(name.name + ".png"),
        name.with_name(name.name + ".tif"),
        *(name.with_suffix(ending) for ending in (file.suffix, ".png", ".tif")),
    ]
    return next((path for path in candidates if path.is_file()), None)


def main(originals: Path, protected: Path, eps: float) -> int:
    """Check two trees."""
    wrong, checked, partners = {}, 0, set()
    for file in sorted(originals.rglob("*")):
        if not file.is_file():
            continue
        other = partner(file, originals, protected)
        if other is None:
            wrong[str(file)] = ["is not there"]
            continue
        partners.add(other)
        checked += 1
        if differences := faults(file, other, eps):
            wrong[str(file)] = differences
    for file in protected.rglob("*"):
        if file.is_file() and file not in partners:
            wrong[str(file)] = ["belongs to no original"]
    print(json.dumps({"checked": checked, "wrong": wrong}, indent=1, ensure_ascii=False))
    return 1 if wrong else 0


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), float(Fraction(sys.argv[3]))))
