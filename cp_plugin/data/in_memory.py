"""Images that a data set holds in memory: changed once, when it is made, not at every loading.

Whether that is possible is not guessed from the data set's class: its images are read, changed,
written to a copy of its array, and read again; unless every one comes back as it was changed, the
data set is left to be changed as it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cp_plugin.config.settings import UserError
from cp_plugin.data import wrappers
from cp_plugin.data.image import Canonical, image_key
from cp_plugin.data.labels import UNLABELLED, labels
from cp_plugin.data.raw import read

AddMany = Callable[[Tensor, Sequence[int], Sequence[int]], Tensor]
"""From canonical images uint8 (B, 3, H, W), their keys and labels, the changed images."""
LARGEST_BYTES = 1 << 30
"""Larger arrays are not copied."""
BATCH = 1024


@dataclass(frozen=True)
class ChangedArrays:
    """The changed copy of each array; no container, so that it is not taken for a data set."""

    originals: tuple[Any, ...]
    changed: tuple[Any, ...]

    def put_into(self, dataset: Any) -> Any:
        """Return a shallow copy of a data set with the changed arrays, None where they are not its.

        The data set may have been copied, and its transform exchanged, since the change.
        """
        found: set[int] = set()
        copied = self._put(dataset, found)
        return copied if len(found) == len(self.originals) else None

    def _put(self, dataset: Any, found: set[int]) -> Any:
        copied = wrappers.shallow_copy(dataset)
        for name, value in wrappers.attributes(dataset).items():
            for number, original in enumerate(self.originals):
                if value is original:
                    vars(copied)[name] = self.changed[number]
                    found.add(number)
        for name, value in wrappers.children(dataset).items():
            if isinstance(value, (list, tuple)):
                vars(copied)[name] = type(value)(self._put(item, found) for item in value)
            else:
                vars(copied)[name] = self._put(value, found)
        return copied


def change_once(dataset: Any, canonical: Canonical, add: AddMany) -> ChangedArrays | None:
    """Change the images of a data set in a copy of the arrays that hold them.

    Args:
        dataset: a map-style data set of images.
        canonical: brings an image to its canonical form.
        add: changes a batch of images.

    Returns:
        The copies; None where the images are not in memory as they are, 8 bit and RGB.

    Raises:
        UserError: what `add` raises.
    """
    if not wrappers.transforms_of(dataset):
        return None
    places = [wrappers.place(dataset, row) for row in range(len(dataset))]
    holders = {id(place.dataset): place.dataset for place in places}
    arrays = {key: _array_of(holder) for key, holder in holders.items()}
    originals = tuple(array for array in arrays.values() if array is not None)
    if len(originals) < len(holders) or sum(map(_bytes, originals)) > LARGEST_BYTES:
        return None
    copies = {key: array.copy() for key, array in arrays.items() if array is not None}
    targets = [copies[id(place.dataset)][place.row] for place in places]
    expected: list[Tensor] = []
    known = labels(dataset) if getattr(add, "reads_labels", True) else None
    own_labels = [UNLABELLED] * len(places) if known is None else known.tolist()
    for start in range(0, len(places), BATCH):
        rows = range(start, min(start + BATCH, len(places)))
        images = _images(dataset, rows, canonical)
        if images is None or images.shape[1:] not in (_chw(targets[start]), targets[start].shape):
            return None
        keys = [image_key(image) for image in images]
        expected.append(add(images, keys, [own_labels[row] for row in rows]))
        for target, image in zip(targets[start : rows.stop], expected[-1], strict=True):
            pixels = image.numpy()
            target[...] = pixels if target.shape == pixels.shape else pixels.transpose(1, 2, 0)
    made = ChangedArrays(originals, tuple(copies.values()))
    return made if _reads_back(dataset, made, canonical, expected) else None


def _reads_back(
    dataset: Any, arrays: ChangedArrays, canonical: Canonical, expected: list[Tensor]
) -> bool:
    changed = arrays.put_into(dataset)
    if changed is None:
        return False
    start = 0
    for batch in expected:
        try:
            found = _images(changed, range(start, start + len(batch)), canonical)
        except UserError:  # a poison below looks for its own images in the changed array
            return False
        if found is None or not torch.equal(found, batch):
            return False
        start += len(batch)
    return True


class _Taken(Exception):
    """Carries an image from where a data set calls its transform."""

    def __init__(self, image: Any) -> None:
        super().__init__()
        self.image = image


def _take(image: Any) -> Any:
    raise _Taken(image)


def _images(dataset: Any, rows: range, canonical: Canonical) -> Tensor | None:
    """Return the images that a data set gives its transform, uint8 (B, 3, H, W)."""
    taking = wrappers.with_transform(dataset, lambda _: _take)
    found = []
    for row in rows:
        try:
            read(taking, row)
        except _Taken as taken:
            if not _as_in_memory(taken.image):
                return None
            found.append(canonical(taken.image))
        else:  # the data set has caught it, or made nothing of its transform
            return None
    return torch.stack(found) if len({image.shape for image in found}) == 1 else None


def _as_in_memory(image: Any) -> bool:
    """Tell whether an image is 8 bit and RGB, hence unchanged by its canonical form."""
    if isinstance(image, Image.Image):
        return image.mode == "RGB"
    if isinstance(image, np.ndarray):
        return bool(image.dtype == np.uint8 and image.shape[2:] == (3,))
    return isinstance(image, Tensor) and image.dtype == torch.uint8 and image.shape[0] == 3


def _array_of(holder: Any) -> NDArray[np.uint8] | None:
    """Return the one array of images that an object holds, None where there is none or several."""
    found = [
        value
        for value in wrappers.attributes(holder).values()
        if isinstance(value, np.ndarray)
        and value.dtype == np.uint8
        and value.ndim == 4
        and len(value) == len(holder)
    ]
    return found[0] if len(found) == 1 else None


def _bytes(array: NDArray[np.uint8]) -> int:
    return int(array.nbytes)


def _chw(image_HWC: NDArray[np.uint8]) -> tuple[int, ...]:
    height, width, *channels = image_HWC.shape
    return (*channels, height, width)
