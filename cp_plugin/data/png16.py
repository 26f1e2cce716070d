"""PNG files of 16 bit a colour, which Pillow reads and writes for grey pictures only.

Source: PNG specification, third edition (W3C, 2025), sections 5, 7.2, 9.2 and 11.3.
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
"""By channels: grey, grey with alpha, RGB, RGB with alpha."""
UP = 2
"""The filter that keeps each byte's difference to the one above."""
LINES = 64
"""Lines that are compressed at a time, so that a large picture needs little more memory."""
EFFORT = 3


GREY_ALPHA, RGB_ALPHA = 4, 6
HEADER = slice(len(SIGNATURE), len(SIGNATURE) + 25)


def read_png(path: Path) -> NDArray[Any]:
    """Read a PNG file of 16 bit a colour.

    Returns:
        uint16 (H, W, C), C of 1 to 4.

    Raises:
        OSError, SyntaxError: the file is damaged, as Pillow says it.
    """
    content = path.read_bytes()
    if content[HEADER][17] == GREY_ALPHA:
        # Bytes and filters of a 16-bit grey picture with alpha are those of an 8-bit RGBA one.
        width, height = struct.unpack(">2I", content[HEADER][8:16])
        like = struct.pack(">2I5B", width, height, 8, RGB_ALPHA, *content[HEADER][18:21])
        content = content[: HEADER.start] + _chunk(b"IHDR", like) + content[HEADER.stop :]
        with Image.open(io.BytesIO(content)) as image:
            both = np.ascontiguousarray(image)
        deep: NDArray[Any] = both.view(">u2").astype(np.uint16)
        return deep
    high, low = (_bytes(content, order) for order in "BL")
    if high.dtype == np.uint16:
        return high[:, :, None]
    joined: NDArray[Any] = (high.astype(np.uint16) << 8) | low
    return joined


def _bytes(content: bytes, order: str) -> NDArray[Any]:
    """Return the higher bytes of colours, or the lower ones, which Pillow takes for the higher
    where it is told that numbers begin with the lower."""
    with Image.open(io.BytesIO(content)) as image:
        image.tile = [
            tile._replace(args=str(tile.args).replace(";16B", f";16{order}"))
            if image.mode in ("RGB", "RGBA")
            else tile
            for tile in image.tile
        ]
        return np.array(image)


def write_png(
    path: Path, pixels: NDArray[Any], profile: bytes | None = None, exif: bytes | None = None
) -> None:
    """Write a PNG file.

    Args:
        path: the file.
        pixels: uint16 (H, W, C) with 1 to 4 channels.
        profile: an ICC colour profile.
        exif: EXIF data, with or without the prefix that JPEG files have.
    """
    height, width, channels = pixels.shape
    with path.open("wb") as file:
        file.write(SIGNATURE)
        header = struct.pack(">2I5B", width, height, 16, COLOUR_TYPES[channels], 0, 0, 0)
        file.write(_chunk(b"IHDR", header))
        if profile is not None:
            file.write(_chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(profile)))
        if exif is not None:
            file.write(_chunk(b"eXIf", exif.removeprefix(b"Exif\0\0")))
        packer = zlib.compressobj(EFFORT)
        above = np.zeros((1, 2 * width * channels), np.uint8)
        for first in range(0, height, LINES):
            lines = pixels[first : first + LINES].astype(">u2")
            rows = np.frombuffer(lines.tobytes(), np.uint8).reshape(len(lines), -1)
            filtered = np.empty((len(rows), 1 + rows.shape[1]), np.uint8)
            filtered[:, 0] = UP
            filtered[:, 1:] = rows - np.concatenate([above, rows[:-1]])
            above = rows[-1:]
            file.write(_chunk(b"IDAT", packer.compress(filtered.tobytes())))
        file.write(_chunk(b"IDAT", packer.flush()))
        file.write(_chunk(b"IEND", b""))


def _chunk(kind: bytes, content: bytes) -> bytes:
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)
