"""The embedded data set: patches of the photographs in scikit-image's wheel, a class each.

A photograph is divided into 3 x 3 cells. Three of them, one in each row and each column, are for
testing, the others for training; a patch lies wholly in its part, so that no pixel of a photograph
is in both. Patches are cut before they are made smaller, so nothing bleeds over the border.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from cp_plugin.config.settings import UserError

PHOTOGRAPHS = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "galaxies": "hubble_deep_field.jpg",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "motorcycle": "motorcycle_left.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "tissue": "ihc.png",
}
CELLS = 3
TEST_COLUMN = (1, 2, 0)
"""The column of the test cell in each row of cells."""
SIDE = 0.2
"""Side of the cut patches, in units of the photograph's shorter side."""
DRAWS = 100
"""How often a square is drawn for each that is wanted."""
TRAIN_PATCHES, TEST_PATCHES = 150, 150


class Box(NamedTuple):
    """A square of a photograph, in pixels."""

    left: int
    top: int
    side: int


class Photos(Dataset[tuple[Any, int]]):
    """Labelled square patches of photographs.

    Attributes (as in torchvision's data sets):
        data: uint8 array (N, size, size, 3), photograph by photograph.
        targets: list of N labels: the photograph.
        classes: names of the photographs, in label order.
        transform: applied to the PIL image of a patch; it can be set.
    """

    def __init__(
        self,
        train: bool,
        size: int = 32,
        transform: Callable[[Any], Any] | None = None,
        patches: int | None = None,
        seed: int = 0,
    ) -> None:
        """Cut the patches; the same arguments give the same patches.

        Args:
            train: the part for training, or the part for testing.
            size: side of a patch in pixels.
            transform: applied to each PIL image.
            patches: patches a photograph; None: 150 each.
            seed: of the positions of the patches.

        Raises:
            UserError: a size or number of patches that cannot be had, or files are missing.
        """
        if not 8 <= size <= 128:
            raise UserError(f"Photos come in sizes from 8 to 128 pixels, got {size}.")
        if patches is not None and patches < 1:
            raise UserError(f"Photos need at least one patch a photograph, got {patches}.")
        count = patches or (TRAIN_PATCHES if train else TEST_PATCHES)
        self.train = train
        self.transform = transform
        self.classes = list(PHOTOGRAPHS)
        self.class_to_idx = {name: label for label, name in enumerate(self.classes)}
        self.targets = [label for label in range(len(self.classes)) for _ in range(count)]
        self.data: NDArray[np.uint8] = np.concatenate(
            [_kept_patches(name, train, size, count, seed) for name in self.classes]
        )

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        """Return a patch, as PIL image or as its transform makes it, and its label."""
        image: Any = Image.fromarray(self.data[row])
        return (image if self.transform is None else self.transform(image)), self.targets[row]


def boxes(width: int, height: int, train: bool, count: int, seed: int | str) -> list[Box]:
    """Draw different squares that lie wholly in the training or the testing part of a photograph.

    Python's generator is used, since its stream is the same in every version.

    Raises:
        UserError: so many different squares were not found.
    """
    draw = random.Random(f"{seed} {train}")
    found: dict[Box, None] = {}  # identical images would share a row of delta
    side = round(SIDE * min(width, height))
    for _ in range(DRAWS * count):
        left, top = draw.randrange(width - side + 1), draw.randrange(height - side + 1)
        # A square is smaller than a cell, so its corners lie in all cells that it touches.
        corners = product((left, left + side - 1), (top, top + side - 1))
        if all(in_test_part(x, y, width, height) != train for x, y in corners):
            found[Box(left, top, side)] = None
        if len(found) == count:
            return list(found)
    raise UserError(f"A photograph has fewer than {count} different patches; ask for fewer.")


def in_test_part(x: int, y: int, width: int, height: int) -> bool:
    """Tell whether a pixel of a photograph belongs to the cells for testing."""
    return x * CELLS // width == TEST_COLUMN[y * CELLS // height]


def photograph(name: str) -> Image.Image:
    """Return one of the photographs in RGB.

    Raises:
        UserError: scikit-image, or this file of it, is not there.
    """
    # The files are read by path: importing scikit-image takes longer than cutting the patches.
    spec = find_spec("skimage")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        path = Path(folder) / "data" / PHOTOGRAPHS[name]
        if path.is_file():
            with Image.open(path) as picture:
                return picture.convert("RGB")
    raise UserError(
        f"The photograph {PHOTOGRAPHS[name]} of scikit-image was not found; "
        "run `pip install 'scikit-image>=0.22'`."
    )


@functools.lru_cache(maxsize=4 * len(PHOTOGRAPHS))
def _kept_patches(name: str, train: bool, size: int, count: int, seed: int) -> NDArray[np.uint8]:
    """Return `_patches`, cut once in a process, as for the runs of a study; not to be written."""
    patches = _patches(name, train, size, count, seed)
    patches.setflags(write=False)
    return patches


def _patches(name: str, train: bool, size: int, count: int, seed: int) -> NDArray[np.uint8]:
    """Return patches of one photograph, uint8 (count, size, size, 3)."""
    picture = photograph(name)
    cut = boxes(picture.width, picture.height, train, count, f"{seed} {name}")
    return np.stack(
        [
            np.asarray(
                picture.crop((box.left, box.top, box.left + box.side, box.top + box.side)).resize(
                    (size, size), Image.Resampling.BICUBIC
                )
            )
            for box in cut
        ]
    )
