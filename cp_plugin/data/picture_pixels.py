"""A picture file's own pixels, changed by a perturbation and written with all that the file has.

Mode, bit depth, transparency, colour profile and EXIF data stay what they were; of EXIF data the
embedded preview goes, since it is a copy of the unchanged picture. What no 8-bit palette can hold
is written in full colour: pictures with a palette and of one bit.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cp_plugin.config.settings import UserError
from cp_plugin.data.fit import in_bands, in_levels, luminance
from cp_plugin.data.image import Canonical
from cp_plugin.data.png16 import read_png, write_png
from cp_plugin.data.raw_images import UNREADABLE

FileFormat = Literal["png", "same"]
UNDECODABLE = (*UNREADABLE, ValueError, EOFError, struct.error, OverflowError, RuntimeError)
"""What reading a damaged file may raise."""
ORIENTATION = 0x0112
"""EXIF's tag of how a picture is turned when it is shown."""
TIFF_BITS = 258
JPEG_QUALITY = 95
PNG_EFFORT = 1
"""zlib's level: noise shrinks little, and a large picture takes seconds longer at higher ones.

Only runs are looked for: what else repeats in noise is chance, and costs more than it saves.
"""
KEPT_FORMATS = {"JPEG": "JPEG", "MPO": "JPEG", "WEBP": "WEBP", "TIFF": "TIFF"}
"""Pillow's names of formats that `same` keeps, and what they are written as."""
JPEG_ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif")
SUPPORTED = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16", "I;16B")
IN_FULL_COLOUR = ("P", "PA", "1")


class CannotProtect(UserError):
    """A picture that no perturbation can be added to; the text is the reason."""


@dataclass
class Picture:
    """A picture as its file has it."""

    colours: NDArray[Any]
    """uint8 or uint16 (H, W, C): grey, RGB, or cyan, magenta, yellow and black."""
    alpha: NDArray[Any] | None
    """(H, W) of the same type; None: opaque."""
    format: str
    """Pillow's name of the file's format."""
    changed_mode: str | None = None
    """The mode that it had, where it cannot be kept."""
    kept: dict[str, Any] = field(default_factory=dict)
    """Colour profile and EXIF data, as Pillow's `save` takes them."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.colours.shape[:2]
        return height, width

    @property
    def inks(self) -> bool:
        """Whether colours are inks, of which more is darker."""
        return bool(self.colours.shape[2] == 4)

    @property
    def deep(self) -> bool:
        """Whether it has 16 bit."""
        return bool(self.colours.dtype == np.uint16)


def read(path: Path, canonical: Canonical) -> tuple[Picture, Tensor]:
    """Read a picture file.

    Args:
        path: the file.
        canonical: the form that its key is made of.

    Returns:
        The picture, and its canonical form, uint8 (3, h, w).

    Raises:
        CannotProtect: it is damaged, too large, animated, or of a kind that is not known.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns at half the pixels at which it refuses a picture.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)  # of odd metadata
            return _read(path, canonical)
    except CannotProtect:
        raise
    except Image.DecompressionBombError as error:
        raise CannotProtect(f"too large: {_first_line(error)}") from None
    except UNDECODABLE as error:
        raise CannotProtect(f"unreadable: {_first_line(error)}") from None


def add(picture: Picture, delta_CHW: Tensor, eps: float) -> None:
    """Add a perturbation on a grid to a picture, in place, by channels and bands of columns.

    Args:
        picture: of any size and mode.
        delta_CHW: float (3, h, w), at most eps.
        eps: the budget, in [0, 1]; of the full scale in 16 bit.
    """
    full = 65535 if picture.deep else 255
    if picture.colours.shape[2] == 1:
        delta_CHW = luminance(delta_CHW)
    for number, channel in enumerate(delta_CHW):
        for columns, part in in_bands(channel, picture.size):
            levels = in_levels(part, eps, full)
            # An ink takes away what its colour adds, and black scales both: the bound holds in
            # RGB too.
            changed = levels.mul_(-1 if picture.inks else 1).numpy()
            changed += picture.colours[:, columns, number]
            np.clip(changed, 0, full, out=changed)
            picture.colours[:, columns, number] = changed


def ending(file: Path, file_format: FileFormat) -> str:
    """Return the ending of the file that a picture is written to.

    Args:
        file: the picture; of one that cannot be read it is `.png`.
        file_format: `png` (TIFF for CMYK, which PNG cannot hold), or `same` for JPEG, WebP and
            TIFF files.
    """
    try:
        with Image.open(file) as image:
            if file_format == "same" and image.format in KEPT_FORMATS:
                return file.suffix if _format_of(file) == KEPT_FORMATS[image.format] else ".png"
            return ".tif" if image.mode == "CMYK" else ".png"
    except UNDECODABLE:
        return ".png"


def write(picture: Picture, path: Path) -> None:
    """Write a picture; the path's ending tells the format."""
    kind = _format_of(path)
    if picture.deep and kind == "TIFF":
        planes = _stacked(picture)
        tifffile.imwrite(
            path,
            planes[:, :, 0] if planes.shape[2] == 1 else planes,
            photometric="rgb" if picture.colours.shape[2] == 3 else "minisblack",
            extrasamples=None if picture.alpha is None else ["unassalpha"],
            iccprofile=picture.kept.get("icc_profile"),
            compression="zlib",
        )
        return
    if picture.deep:
        exif = picture.kept.get("exif")
        write_png(path, _stacked(picture), picture.kept.get("icc_profile"), _bytes(exif))
        return
    image = _image(picture)
    options: dict[str, dict[str, Any]] = {
        "PNG": {"compress_level": PNG_EFFORT, "compress_type": zlib.Z_RLE},
        "JPEG": {"quality": JPEG_QUALITY, "subsampling": 0},
        "WEBP": {"lossless": True, "exact": True, "quality": 30},
        "TIFF": {"compression": "tiff_adobe_deflate"},
    }
    image.save(path, kind, **options[kind], **picture.kept)


def is_lossy(path: Path) -> bool:
    """Whether a file that `write` makes has other pixels than the picture."""
    return _format_of(path) == "JPEG"


def _format_of(path: Path) -> str:
    known = {".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"}
    suffix = path.suffix.lower()
    return "JPEG" if suffix in JPEG_ENDINGS else known.get(suffix, "PNG")


def _read(path: Path, canonical: Canonical) -> tuple[Picture, Tensor]:
    with Image.open(path) as image:
        # A JPEG of a phone may hold a preview (MPO); its first picture is the picture.
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":
            raise CannotProtect(f"{frames} frames or pages")
        if image.mode not in SUPPORTED:
            raise CannotProtect(f"mode {image.mode}, which has no 8 or 16 bit a colour")
        deep = _is_deep(image, path)
        image.load()
        colours, alpha = _deep(image, path) if deep else _shallow(image)
        in_full = image.mode if image.mode in IN_FULL_COLOUR else None
        picture = Picture(colours, alpha, image.format or "", in_full, _kept(image))
        return picture, canonical(image)


def _shallow(image: Image.Image) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Return 8-bit colours and transparency."""
    grey = image.mode in ("1", "L", "LA")
    if image.has_transparency_data:
        both = np.array(image.convert("LA" if grey else "RGBA"))
        return np.ascontiguousarray(both[:, :, :-1]), np.ascontiguousarray(both[:, :, -1])
    if image.mode == "CMYK":
        return np.array(image), None
    found = np.array(image.convert("L" if grey else "RGB"))
    return (found[:, :, None] if grey else found), None


def _is_deep(image: Image.Image, path: Path) -> bool:
    """Whether a file has 16 bit a colour, of which Pillow keeps 8 unless it is grey."""
    if image.mode.startswith("I;16"):
        return True
    if image.format == "PNG":
        with path.open("rb") as file:
            return file.read(25)[24] == 16
    if image.format == "TIFF":
        return 16 in np.atleast_1d(image.tag_v2.get(TIFF_BITS, 8))  # type: ignore[attr-defined]
    return False


def _deep(image: Image.Image, path: Path) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Return 16-bit colours and transparency."""
    if image.format == "PNG":
        planes = read_png(path)
    else:
        planes = np.array(image) if image.mode.startswith("I;16") else tifffile.imread(path)
        planes = planes.astype(np.uint16, copy=False).reshape(image.height, image.width, -1)
    count = planes.shape[2]
    if planes.dtype != np.uint16 or count not in (1, 2, 3, 4) or image.mode == "CMYK":
        raise CannotProtect(f"{count} channels of {planes.dtype}")
    if count % 2:
        return planes, None
    return np.ascontiguousarray(planes[:, :, :-1]), np.ascontiguousarray(planes[:, :, -1])


def _kept(image: Image.Image) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    if image.info.get("icc_profile"):
        kept["icc_profile"] = image.info["icc_profile"]
    exif = image.getexif()
    if image.format == "TIFF":  # its tags describe the file beside the picture
        turned = exif.get(ORIENTATION, 1)
        exif = Image.Exif()
        if turned != 1:
            exif[ORIENTATION] = turned
    if len(exif):
        kept["exif"] = exif
    return kept


def _image(picture: Picture) -> Image.Image:
    planes = _stacked(picture)
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "CMYK" if picture.inks else "RGBA"}[planes.shape[2]]
    if mode == "L":
        return Image.fromarray(planes[:, :, 0])
    height, width = picture.size
    return Image.frombuffer(mode, (width, height), planes, "raw", mode, 0, 1)


def _stacked(picture: Picture) -> NDArray[Any]:
    if picture.alpha is None:
        return picture.colours
    return np.concatenate([picture.colours, picture.alpha[:, :, None]], 2)


def _bytes(exif: Image.Exif | None) -> bytes | None:
    return None if exif is None else exif.tobytes()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
