"""Picture files in canonical form in one mapped array, so that each is decoded once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from cp_plugin.config.settings import UserError
from cp_plugin.data.image import Canonical
from cp_plugin.data.picture_pixels import CannotProtect, read
from cp_plugin.util.threads import in_threads
from cp_plugin.util.whole_files import reserve, write_text, written_whole

IMAGES, ASPECTS = "images.npy", "aspects.npy"
FILES = "files.json"
CACHE = "pictures"
"""The folder of a cache beside a poison."""


class PictureCache(Dataset[tuple[Any, int]]):
    """The pictures of a cache, as a data set of squeezed images.

    Attributes:
        aspects: width over height of each picture, float64 (N).
        targets: -1 for each, they have no labels.
        transform: applied to each PIL image; it can be set.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open a cache that was filled.

        Raises:
            UserError: there is none.
        """
        self._folder = Path(folder)
        if not (self._folder / ASPECTS).is_file():
            raise UserError(
                f"{folder} holds no pictures that cp-plugin protect has prepared; use "
                "data.dataset=custom with a folder of images."
            )
        aspects = np.load(self._folder / ASPECTS)
        self._places = np.flatnonzero(aspects > 0)
        self.aspects = torch.from_numpy(aspects[self._places])
        self.targets = [-1] * len(self._places)
        self.transform: Callable[[Any], Any] | None = None
        self._images: Any = None

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        """Return a picture as PIL image, or as its transform makes it, and -1."""
        image: Any = Image.fromarray(self.pixels(row).permute(1, 2, 0).contiguous().numpy())
        return (image if self.transform is None else self.transform(image)), self.targets[row]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the mapped file, which another process maps for itself."""
        return {**vars(self), "_images": None}

    def pixels(self, row: int) -> Tensor:
        """Return a canonical image, uint8 (3, h, w)."""
        if self._images is None:
            self._images = np.load(self._folder / IMAGES, mmap_mode="r")
        return torch.from_numpy(self._images[self._places[row]].copy())


class Pixels(Dataset[Tensor]):
    """The canonical images of a cache alone, uint8 (3, h, w)."""

    def __init__(self, cache: PictureCache) -> None:
        self._cache = cache

    def __len__(self) -> int:
        return len(self._cache)

    def __getitem__(self, row: int) -> Tensor:
        return self._cache.pixels(row)


class Filling:
    """Fills a cache; one that was interrupted goes on where it was."""

    def __init__(self, folder: Path, files: Sequence[Path], size: int) -> None:
        """Open or begin a cache.

        Args:
            folder: of the cache.
            files: the pictures.
            size: side of the canonical images in pixels.

        Raises:
            UserError: the folder holds the cache of other pictures, or of these before a change.
        """
        self.files = list(files)
        self._folder, self._canonical = folder, Canonical(size, "cover")
        folder.mkdir(parents=True, exist_ok=True)
        stamp = json.dumps([size, [_stamp(file) for file in self.files]])
        mark = folder / FILES
        if not mark.is_file():
            shape = (len(self.files), 3, size, size)
            with written_whole(folder / IMAGES) as partial:
                np.lib.format.open_memmap(partial, "w+", np.uint8, shape).flush()
                reserve(partial)
            with written_whole(folder / ASPECTS) as partial:
                np.save(partial, np.zeros(len(self.files)))
            write_text(mark, stamp)
        elif mark.read_text(encoding="utf8") != stamp:
            raise UserError(
                f"the pictures, or --size, are no longer what they were when {folder.parent} was "
                "begun; give another OUT, or protect further pictures with --with."
            )

    def fill(self) -> Iterator[tuple[Path, str | None]]:
        """Read pictures that are not there yet; yield each, and why it cannot be read."""
        images = np.lib.format.open_memmap(self._folder / IMAGES, "r+")
        aspects = np.lib.format.open_memmap(self._folder / ASPECTS, "r+")

        def fill_row(row: int) -> str | None:
            if aspects[row]:
                return None
            try:
                picture, canonical = read(self.files[row], self._canonical)
            except CannotProtect as error:
                return str(error)
            images[row] = canonical.numpy()
            height, width = picture.size
            aspects[row] = width / height
            return None

        yield from zip(self.files, in_threads(fill_row, range(len(self.files))), strict=True)
        images.flush()
        aspects.flush()


def _stamp(file: Path) -> list[Any]:
    facts = file.stat()
    return [str(file), facts.st_size, facts.st_mtime_ns]
