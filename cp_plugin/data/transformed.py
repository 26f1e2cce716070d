"""A poison added to the images of a data set as they are loaded, before the host's transform."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from cp_plugin.config.settings import Fit, UserError
from cp_plugin.data import wrappers
from cp_plugin.data.channels import check_channels
from cp_plugin.data.image import Canonical, Size, image_key, is_image, like
from cp_plugin.data.in_memory import AddMany, change_once
from cp_plugin.data.labels import UNLABELLED, labels
from cp_plugin.data.pipelines import IMAGE, StandIn, takes_samples
from cp_plugin.data.raw import RawDataset, read, transform_not_called
from cp_plugin.data.raw_images import SampleError, images_in
from cp_plugin.data.slots import rebuilt

ROWS_READ_AGAIN, READ_AGAIN = 4, 8
"""How often, and for how many rows, a data set without a transform is read to see whether it
augments: one that flips half of its images is taken for one that does not once in 2^32 times."""
Add = Callable[[Tensor, int, int], Tensor]
"""From an image uint8 (3, H, W), canonical or, with `fit: cover`, of its own size, the key of the
canonical one and its label, the poisoned image."""
AS_IT_IS = Canonical(None)

_label: ContextVar[int] = ContextVar("label", default=UNLABELLED)
_applied: ContextVar[bool] = ContextVar("applied", default=False)
"""Whether the change of the sample that is being read has been applied."""


@contextmanager
def labelled(label: int) -> Iterator[None]:
    """Let images that are changed inside have a label."""
    known = _label.set(label)
    try:
        yield
    finally:
        _label.reset(known)


class PreTransformDataset(Dataset[Any]):
    """A map-style data set whose images are changed before its transform; nothing else is.

    The transform gets the type it had got before: PIL image, array or tensor. A data set without
    any transform (`TensorDataset`) has the one image of each sample changed. All other
    attributes (`classes`, `targets`, …) are those of the data set.
    """

    def __init__(
        self,
        dataset: Any,
        add: Add,
        image_size: int | Size | None = None,
        add_many: AddMany | None = None,
        fit: Fit = "crop",
    ) -> None:
        """Wrap a data set, which stays as it is.

        Args:
            dataset: the data set of clean images.
            add: from canonical image, key and label (-1: unlabelled) to the image to train on.
            image_size: height and width of the canonical images in pixels, or the side of a
                square; None keeps each image's size.
            add_many: the same for a batch; with it, images that the data set holds in memory are
                changed once, now.
            fit: `crop`: images are brought to `image_size`; `cover`: they keep their own size, and
                their key alone is that of the canonical image, which is all of it.

        Raises:
            UserError: the data set streams, is empty, or augments images where no transform can be
                taken off.
        """
        wrappers.check_map_style(dataset)
        _check_images(dataset)
        self.dataset, self.add = dataset, add
        self._change = Change(add, Canonical(image_size, fit))
        if fit == "cover":  # what is held in memory is of one size, and the images need not be
            add_many = None
        self._changed_arrays = add_many and change_once(dataset, Canonical(image_size), add_many)
        found = labels(dataset) if getattr(add, "reads_labels", True) else None
        self._labels = None if found is None else found.tolist()
        self._built: Built | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Any:
        """Return the data set's own sample, made from the changed image.

        Raises:
            UserError: the image cannot be read (the file is named), or there is none.
        """
        row = range(len(self))[row]
        known = _label.set(UNLABELLED if self._labels is None else self._labels[row])
        try:
            changed = self._changed()
            if changed is not None:
                return self._read_changed(changed, row)
            return self._with_first_image_changed(read(self.dataset, row))
        finally:
            _label.reset(known)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what another process makes for itself."""
        return {**vars(self), "_built": None}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "dataset":
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.dataset, name)

    @property
    def transform(self) -> Any:
        """The transform that follows the poison; it can be set."""
        return wrappers.pipeline_of(self.dataset)

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset = wrappers.with_transform(self.dataset, lambda _: transform)

    def _changed(self) -> Any:
        """The data set with the poison before its transform; None where it has no transform."""
        built = self._built
        if built is None or built.source is not self.dataset or built.process != os.getpid():
            reached = bytearray(len(self.dataset))
            self._built = Built(self.dataset, self._made(), os.getpid(), reached)
        return cast(Built, self._built).changed

    def _read_changed(self, changed: Any, row: int) -> Any:
        """Read a row whose change was seen to be applied, now or when it was read before."""
        reached = cast(Built, self._built).reached
        if self._changed_arrays is not None or reached[row]:
            return read(changed, row)
        before = _applied.get()
        _applied.set(False)
        try:
            sample = read(changed, row)
            if not _applied.get():
                raise SampleError(transform_not_called(self.dataset, row))
        finally:  # one change around another reads through it, and must learn what was applied
            _applied.set(before or _applied.get())
        reached[row] = 1
        return sample

    def _made(self) -> Any:
        dataset = self._changed_arrays.put_into(self.dataset) if self._changed_arrays else None
        if dataset is not None:
            return dataset
        served = bool(wrappers.transforms_of(self.dataset))
        return wrappers.with_transform(self.dataset, self._change.before) if served else None

    def _with_first_image_changed(self, sample: Any) -> Any:
        done = False

        def change(value: Any) -> Any:
            nonlocal done
            if done or not is_image(value):
                return value
            done = True
            return self._change(value)

        result = rebuilt(sample, change)
        if not done:
            raise UserError(
                f"{type(self.dataset).__name__} returns no image (C, H, W) to poison; wrap a data "
                "set of images."
            )
        return result


def _check_images(dataset: Any) -> None:
    """Check that a change before the transform reaches every image that a data set returns.

    Raises:
        UserError: it does not.
    """
    if isinstance(dataset, ConcatDataset):  # its parts may have transforms of their own
        for part in dataset.datasets:
            _check_images(part)
    elif wrappers.transforms_of(dataset):
        check_channels(RawDataset(dataset, None))
    else:
        _check_finished(dataset)


def _check_finished(dataset: Any) -> None:
    """Check that a data set without a transform returns one raw image a sample.

    Raises:
        UserError: it returns several, or another one each time.
    """
    name = type(dataset).__name__
    advice = (
        "keep the augmentation in `self.transform` and return `self.transform(image)`, so that "
        "the perturbation is added before it."
    )
    for row in range(min(len(dataset), ROWS_READ_AGAIN)):
        sample = read(dataset, row)
        if (found := images_in(sample)) > 1:
            raise UserError(
                f"{name} returns {found} images a sample and no attribute of it is a known "
                f"transform, so all but one would stay without a perturbation; {advice}"
            )
        first = _images_of(sample)
        for _ in range(READ_AGAIN):
            again = _images_of(read(dataset, row))
            if not all(map(torch.equal, first, again)):
                raise UserError(
                    f"{name} returns other pixels each time row {row} is read and no attribute of "
                    f"it is a known transform, so it augments inside __getitem__; {advice}"
                )


def _images_of(sample: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(value: Any) -> Any:
        if is_image(value):
            found.append(value if isinstance(value, Tensor) else torch.from_numpy(np.array(value)))
        return value

    rebuilt(sample, note)
    return found


def clean_dataset(dataset: Any) -> Any:
    """Return a data set as it was before anything of this package changed or opened it.

    Poisons, image defences and opened data sets are taken off wherever they stand, also inside the
    user's own subsets, joins and wrappers; a data set without any is returned itself.
    """
    if isinstance(dataset, (PreTransformDataset, RawDataset)):
        return clean_dataset(dataset.dataset)
    replaced = {}
    for name, value in wrappers.children(dataset).items():
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        clean = [clean_dataset(item) for item in items]
        if any(new is not old for new, old in zip(clean, items, strict=True)):
            replaced[name] = type(value)(clean) if isinstance(value, (list, tuple)) else clean[0]
    if not replaced:
        return dataset
    copy = wrappers.shallow_copy(dataset)
    vars(copy).update(replaced)
    return copy


def changes_in(dataset: Any) -> Iterator[Add]:
    """Yield what changes the images of a data set before its transform, the last change first."""
    if isinstance(dataset, PreTransformDataset):
        yield dataset.add
    inside = [dataset.dataset] if isinstance(dataset, RawDataset) else wrappers.inside(dataset)
    for child in inside:
        yield from changes_in(child)


def resized(dataset: Any, size: Size) -> PreTransformDataset:
    """Return a data set whose images are brought to a canonical size before its transform."""
    return PreTransformDataset(dataset, _unchanged, size)


def _unchanged(image_CHW: Tensor, key: int, label: int) -> Tensor:
    return image_CHW


@dataclass(frozen=True)
class Built:
    """What was made of a data set; no container, so that it is not taken for a second one."""

    source: Any
    changed: Any
    process: int
    """Files that a data set has opened (h5) are of no use in another process."""
    reached: bytearray
    """Not 0 for rows whose change was seen to be applied."""


class Change:
    """Applies a poison to an image, whatever its type."""

    def __init__(self, add: Add, canonical: Canonical) -> None:
        self._add = add
        self._canonical = canonical

    def __call__(self, image: Any) -> Any:
        """Return the changed image, of the type of the given one."""
        _applied.set(True)
        canonical = self._canonical(image)
        clean = canonical if self._canonical.fit == "crop" else AS_IT_IS(image)
        return like(self._add(clean, image_key(canonical), _label.get()), image)

    def before(self, transform: Callable[[Any], Any] | None) -> ChangedFirst:
        """Return a transform that changes the image and then does what the given one does."""
        return ChangedFirst(self, transform)


class ChangedFirst(StandIn):
    """A poison, then the host's transform."""

    def __init__(self, change: Change, transform: Callable[[Any], Any] | None) -> None:
        super().__init__(transform)
        self._change = change

    def __call__(self, image: Any) -> Any:
        """Return the transform's result on the changed image."""
        if takes_samples(self):
            return self.host({**image, IMAGE: self._change(image[IMAGE])})
        changed = self._change(image)
        return changed if self.host is None else self.host(changed)

    def __repr__(self) -> str:
        return f"poison, {self.host!r}"
