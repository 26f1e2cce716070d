"""A folder of picture files of mixed kinds, made from scikit-image's photographs."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import skimage.data
import tifffile
from PIL import Image, ImageCms, ImageDraw

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
BROKEN = ("broken.png", "empty.jpg", "truncated.png", "giant.png", "moving.gif")
"""Files that cannot be protected, as `write_broken` names them."""


def photographs() -> list[Image.Image]:
    """Return photographs that scikit-image ships."""
    return [Image.fromarray(getattr(skimage.data, name)()) for name in PHOTOS]


def write_mixed(folder: Path, count: int, side: int = 96) -> list[Path]:
    """Write picture files of 16 kinds, in folders; return them.

    Args:
        folder: a new folder.
        count: how many.
        side: of most pictures in pixels, about.
    """
    photos = photographs()
    draw = np.random.default_rng(0)
    made = []
    for number in range(count):
        photo = photos[number % len(photos)]
        width = int(draw.integers(side // 2, side * 2))
        height = int(draw.integers(side // 2, side * 2))
        left = int(draw.integers(0, photo.width - min(width, photo.width) + 1))
        top = int(draw.integers(0, photo.height - min(height, photo.height) + 1))
        picture = photo.crop((left, top, left + width, top + height)).convert("RGB")
        kind = KINDS[number % len(KINDS)]
        path = folder / ("Bilder vom März", "a/b", ".")[number % 3] / f"photo {number:04d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        made.append(_write(kind, picture, path))
    return made


def write_broken(folder: Path) -> None:
    """Write the files of `BROKEN`."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = io.BytesIO()
    photographs()[0].crop((0, 0, 64, 64)).save(whole, "PNG")
    (folder / "broken.png").write_bytes(b"no picture at all")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "truncated.png").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    (folder / "giant.png").write_bytes(_giant(20_000))
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])


def _giant(side: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    packer = zlib.compressobj(9)
    lines = b"".join(packer.compress(bytes(1 + side)) for _ in range(side)) + packer.flush()
    header = struct.pack(">2I5B", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")
    )


def _profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "a camera"
    return exif


def _alpha(picture: Image.Image) -> Image.Image:
    mask = Image.new("L", picture.size, 255)
    ImageDraw.Draw(mask).ellipse((4, 4, 30, 30), 90)
    return mask


def _sixteen(picture: Image.Image) -> np.ndarray:  # type: ignore[type-arg]
    fine = np.random.default_rng(picture.width).integers(0, 256, (picture.height, picture.width, 3))
    return (np.asarray(picture).astype(np.uint16) << 8) + fine.astype(np.uint16)


def _write(kind: str, picture: Image.Image, path: Path) -> Path:
    name, _, ending = kind.partition(".")
    file = path.with_name(f"{path.name}.{ending}")
    if name == "plain":
        picture.save(file)
    elif name == "turned":
        picture.save(file, exif=_turned())
    elif name == "profile":
        picture.save(file, icc_profile=_profile())
    elif name == "alpha":
        picture.putalpha(_alpha(picture))
        picture.save(file)
    elif name == "grey":
        picture.convert("L").save(file)
    elif name == "greyalpha":
        grey = picture.convert("L")
        grey.putalpha(_alpha(picture))
        grey.save(file)
    elif name == "grey16":
        Image.fromarray(_sixteen(picture)[:, :, 0]).save(file)
    elif name == "colour16":
        tifffile.imwrite(file, _sixteen(picture), photometric="rgb", compression="zlib")
    elif name == "palette":
        picture.quantize(64).save(file)
    elif name == "inks":
        picture.convert("CMYK").save(file)
    elif name == "bits":
        picture.convert("1").save(file)
    return file


KINDS = (
    "plain.png",
    "plain.jpg",
    "turned.jpg",
    "profile.png",
    "alpha.png",
    "grey.jpg",
    "greyalpha.png",
    "grey16.png",
    "colour16.tif",
    "palette.png",
    "inks.jpg",
    "plain.webp",
    "plain.bmp",
    "plain.tif",
    "alpha.webp",
    "bits.png",
)
"""What `write_mixed` writes, as `kind.ending`."""
