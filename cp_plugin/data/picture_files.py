"""Picture files in folders: which there are, and which are left out and why."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from cp_plugin.config.settings import UserError
from cp_plugin.data.image import as_picture

log = logging.getLogger("cp_plugin")

OTHER_ENDINGS = (".gif", ".jfif", ".jpe", ".avif", ".heic", ".heif", ".jp2", ".tga")
"""Endings of pictures beside torchvision's; Pillow reads them if it was built with their codecs."""
SHOWN = 3
"""Names in a sentence about files."""


class Listing(NamedTuple):
    """The files of a folder and its subfolders, links followed."""

    pictures: list[Path]
    """In the order of their paths."""
    left_out: dict[Path, str]
    """The other files, and why."""


def listing(folder: Path) -> Listing:
    """List the files below a folder.

    A file with one of torchvision's endings is taken for a picture (if it is damaged, reading it
    says so), one with another ending of pictures if Pillow can read it.
    """
    pictures: list[Path] = []
    left_out: dict[Path, str] = {}
    for path in sorted(_files(folder)):
        reason = _reason_against(path, folder)
        if reason is None:
            pictures.append(path)
        else:
            left_out[path] = reason
    return Listing(pictures, left_out)


def open_picture(path: str | Path) -> Image.Image:
    """Return a file's picture in RGB, 16-bit ones scaled to 8 bit."""
    with Image.open(path) as picture:
        picture.load()  # while the file is open
        return as_picture(picture)


def tell_left_out(folder: Path, left_out: dict[Path, str], why: str = "left out") -> None:
    """Say in one sentence how many files are left out, and name the first."""
    if left_out:
        log.warning("%d files of %s are %s: %s", len(left_out), folder, why, _named(left_out))


def inside(folder: Path, name: Path) -> Path:
    """Return where a file of this name is in a folder.

    Raises:
        UserError: `..`, an absolute path or a link leads out of the folder.
    """
    path = folder / name
    if ".." in name.parts or not path.parent.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"{path} lies outside of {folder}, by its name or by a link, and is left alone."
        )
    return path


def _named(files: dict[Path, str]) -> str:
    first = [f"{path.name} ({reason})" for path, reason in list(files.items())[:SHOWN]]
    return ", ".join(first) + (", …" if len(files) > SHOWN else "")


def _files(folder: Path) -> Iterator[Path]:
    seen: set[Path] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = Path(root).resolve()
        if real in seen:  # a link to a folder that is listed already, or that it lies in
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(root) / name for name in names)


def _reason_against(path: Path, folder: Path) -> str | None:
    if any(part.startswith(".") for part in path.relative_to(folder).parts):
        return "hidden"
    ending = path.suffix.lower()
    if ending in IMG_EXTENSIONS:
        return None if path.is_file() else "a broken link"
    if ending not in OTHER_ENDINGS:
        return "no picture"
    try:
        with Image.open(path):
            return None
    except (OSError, SyntaxError, ValueError):
        needed = ": pip install pillow-heif" if ending in (".heic", ".heif") else ""
        return f"Pillow cannot read it{needed}"


def distinct_names(names: Sequence[Path], endings: Sequence[str]) -> list[Path]:
    """Return names with other endings, no two the same: where endings alone differ, they stay.

    A name that has its ending already keeps it, so that the others give way.
    """
    lasting = {
        str(name).lower()
        for name, ending in zip(names, endings, strict=True)
        if name.suffix.lower() == ending.lower()
    }
    taken = set(lasting)
    found = []
    for name, ending in zip(names, endings, strict=True):
        chosen = name.with_suffix(ending) if name.suffix.lower() != ending.lower() else name
        if chosen is not name:
            longer = name
            while str(chosen).lower() in taken:
                chosen = longer = longer.with_name(f"{longer.name}{ending}")
            taken.add(str(chosen).lower())
        found.append(chosen)
    return found


def beside(files: Iterable[Path], folder: Path) -> dict[Path, str]:
    """Return the files that lie in a folder itself, not in one of its class folders."""
    return {path: "beside the class folders" for path in files if path.parent == folder}
