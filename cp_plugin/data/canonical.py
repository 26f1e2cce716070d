"""The canonical size of a data set's images: the one size that delta is crafted and added at.

The rule, in this order:

1. A size that was asked for (`image_size`) is taken: a square of that side.
2. Images that all have one size keep it. The host's transform then gets an image of the shape it
   would have had: a `RandomCrop(24)` of 32 x 32 pixels still finds 9 x 9 places, and a
   `Resize((32, 32))` still squeezes the whole of a 32 x 96 image.
3. Images of several sizes, and images much larger than the pipeline makes them, are resized and
   centre-cropped to a square: delta needs one shape, and rows of a photograph's own resolution
   would cost megabytes each for pixels that no view shows. Its side is the largest that a resizing
   step of the pipeline makes, which need not be the size of the finished views: a `Resize(256)`
   before a crop of 224 needs 256. A pipeline that does not resize (a crop at the images' own scale,
   or none) would show other pixels at another scale; there images of one size are kept however
   large they are, and images of several sizes get the shortest side among them.

Everything that belongs to one comparison (crafting, random noise, injection, clean runs) asks here,
or takes the size of the poison, so that its images differ by delta alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cp_plugin.config.settings import Fit
from cp_plugin.data import wrappers
from cp_plugin.data.fit import GRID
from cp_plugin.data.image import Size
from cp_plugin.data.raw import RawDataset
from cp_plugin.data.raw_images import UNREADABLE
from cp_plugin.data.raw_stream import RawStream
from cp_plugin.data.stream import streams

log = logging.getLogger("cp_plugin")

MUCH_LARGER = 2
"""Images whose shorter side is more than this many times the pipeline's are reduced: up to there
a random crop of a quarter of the area still has as many pixels as the view that is made of it."""
READ = 1000
"""Images decoded to learn their size, where no file header or array says it."""
CHECKED = 16
"""Images decoded to check that what headers and arrays say is what the transform gets."""


class Form(NamedTuple):
    """The canonical form of a data set's images."""

    size: Size
    """Height and width in pixels."""
    changes: bool
    """Whether an image is resized, or may be: not all sizes are known."""
    reason: str = ""
    """Why images are resized; empty where none is known to be."""

    def announce(self) -> None:
        """Say in one line of the log where images are resized."""
        if self.reason:
            log.info(
                "every image is resized and centre-cropped to %d x %d pixels before its "
                "augmentation (%s), in clean and in poisoned runs alike",
                *self.size,
                self.reason,
            )


def canonical_size(
    dataset: Any, resized_side: int | None, image_size: int | None = None, fit: Fit = "crop"
) -> Size:
    """Return the size of delta for a data set's images, and log what happens to them.

    With `fit: crop` it is their canonical size, see `canonical_form`; with `cover` a square grid:
    as large as was asked for, else as what the pipeline makes of an image.
    """
    if fit == "cover":
        side = image_size or resized_side or GRID
        log.info("delta lies on a grid of %d x %d over each whole image", side, side)
        return (side, side)
    if streams(dataset):
        first = RawStream(dataset, None).first()
        sizes = [(item.image.shape[1], item.image.shape[2]) for item in first]
        return stream_size(sizes, resized_side, image_size)
    form = canonical_form(dataset, resized_side, image_size)
    form.announce()
    return form.size


def stream_size(
    sizes: Sequence[Size], resized_side: int | None, image_size: int | None = None
) -> Size:
    """Return the size of delta for a stream by the sizes of its first images, and log it."""
    size, reason = _by_rule(list(dict.fromkeys(sizes)), resized_side, image_size)
    Form(size, True, "" if set(sizes) == {size} else reason).announce()
    return size


def aspects(raw: RawDataset) -> Tensor:
    """Return width over height of each image of a data set in its own size, float64 (N).

    A data set that knows says so in an attribute `aspects`; else files' headers are read, and
    images without a file are decoded.
    """
    known = getattr(raw.dataset, "aspects", None)
    if isinstance(known, Tensor):
        return known.double()
    sizes = _Known(RawDataset(raw.dataset, None))
    found = [sizes.of(row) for row in range(len(raw))]
    return torch.tensor([width / height for height, width in found], dtype=torch.float64)


def canonical_form(dataset: Any, resized_side: int | None, image_size: int | None = None) -> Form:
    """Return the canonical form of a data set's images, by the rule above.

    Args:
        dataset: a map-style data set of images with a `transform`.
        resized_side: `Mirror.resized_side` of its pipeline.
        image_size: the side that was asked for; None: by the rule.

    Raises:
        UserError: an image cannot be read.
    """
    known = _Known(RawDataset(dataset, None))
    sizes: list[Size] = []
    for found in known.sizes():
        if found not in sizes:
            sizes.append(found)
        if len(sizes) > 1 and resized_side is not None:  # the others would change nothing
            break
    size, reason = _by_rule(sizes, resized_side, image_size)
    if sizes == [size]:
        return Form(size, changes=not known.all)
    return Form(size, True, reason)


def _by_rule(
    sizes: list[Size], resized_side: int | None, image_size: int | None
) -> tuple[Size, str]:
    if image_size is not None:
        return (image_size, image_size), "poison.image_size"
    shortest = min(min(size) for size in sizes)
    if len(sizes) > 1:
        side = resized_side or shortest
        return (side, side), "they have several sizes"
    if resized_side is not None and shortest > MUCH_LARGER * resized_side:
        return (resized_side, resized_side), "they are much larger: {} x {}".format(*sizes[0])
    return sizes[0], ""


class _Known:
    """The sizes of images: of all, where that takes no decoding, else of some."""

    def __init__(self, raw: RawDataset) -> None:
        self._raw = raw
        self.all = True
        """Whether `sizes` has left out no image."""

    def sizes(self) -> Iterator[Size]:
        count = len(self._raw)
        found = {row: self._decoded(row) for row in _spread(count, CHECKED)}
        yield from found.values()
        if self._in_one_array(found):
            return
        if all(self._header(row) == size for row, size in found.items()):
            for row in range(count):
                yield self.of(row)
            return
        self.all = count <= READ
        for row in _spread(count, READ):
            yield self._decoded(row)

    def of(self, row: int) -> Size:
        """Return the size of an image."""
        return self._header(row) or self._decoded(row)

    def _decoded(self, row: int) -> Size:
        _, height, width = self._raw[row].image.shape
        return height, width

    def _header(self, row: int) -> Size | None:
        """Return the size in the header of an image's file, None where there is no such file."""
        path = wrappers.file_of(self._raw.dataset, row)
        if path is None:
            return None
        try:
            with Image.open(path) as picture:
                return picture.height, picture.width
        except UNREADABLE:
            return None

    def _in_one_array(self, found: dict[int, Size]) -> bool:
        """Tell whether all images lie in one array, and come out of it in its own size."""
        if len(set(found.values())) > 1:
            return False
        size = next(iter(found.values()))
        rows = range(len(self._raw))
        places = [wrappers.place(self._raw.dataset, row) for row in rows]
        holders = list({id(place.dataset): place.dataset for place in places}.values())
        arrays = [value for value in wrappers.attributes(holders[0]).values() if _is_array(value)]
        return len(holders) == 1 and any(
            size in (tuple(array.shape[1:3]), tuple(array.shape[2:])) for array in arrays
        )


def _is_array(value: Any) -> bool:
    return isinstance(value, (np.ndarray, Tensor)) and value.ndim == 4


def _spread(count: int, most: int) -> list[int]:
    rows: list[int] = torch.linspace(0, count - 1, min(count, most)).round().long().tolist()
    return rows
