"""Images of a stream changed as they come, before the stream's own transform.

A stream has no rows, no length and no list of labels: what an image carries is known by the hash of
its pixels, or by the label that stands in its sample. Nothing is kept, so memory does not grow with
the length of the stream.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import IterableDataset

from cp_plugin.config.settings import Fit
from cp_plugin.data import wrappers
from cp_plugin.data.image import Canonical, Size, is_image
from cp_plugin.data.labels import LABEL_KEYS, UNLABELLED, distinct, numbers
from cp_plugin.data.pipelines import takes_samples
from cp_plugin.data.raw_images import SampleError, images_in
from cp_plugin.data.slots import rebuilt
from cp_plugin.data.transformed import Add, Change, labelled

PASSED_ON = ("set_epoch", "state_dict", "load_state_dict")
"""Methods of a stream that neither read it nor make another one of it."""


def streams(dataset: Any) -> bool:
    """Whether a data set has no rows: PyTorch's `IterableDataset`, Hugging Face's, webdataset's."""
    return isinstance(dataset, IterableDataset) or (
        hasattr(type(dataset), "__iter__") and not hasattr(type(dataset), "__getitem__")
    )


def stream_classes(stream: Any) -> tuple[str, ...] | None:
    """Return the names of a stream's classes, None where it does not tell them.

    They are its attribute `classes`, or the names that Hugging Face's `features` give its label.
    """
    features = getattr(stream, "features", None) or {}
    named = [getattr(feature, "names", None) for feature in dict(features).values()]
    found = getattr(stream, "classes", None) or next(filter(None, named), None)
    return None if found is None else distinct([str(name) for name in found])


class PreTransformStream(IterableDataset[Any]):
    """A stream whose images are changed before its transform; nothing else is.

    A stream with a `transform` has what its transform gets changed. Of one without, the one image
    of each sample is: augment what comes out of this one then.
    """

    def __init__(
        self,
        stream: Any,
        add: Add,
        image_size: int | Size | None = None,
        fit: Fit = "crop",
    ) -> None:
        """Wrap a stream, which stays as it is.

        Args:
            stream: anything whose `__iter__` gives samples with images.
            add: from canonical image, key and label (-1: unlabelled) to the image to train on; its
                attribute `reads_labels` tells whether the label is looked for.
            image_size: height and width of the canonical images in pixels, or the side of a
                square; None keeps each image's size.
            fit: as of `PreTransformDataset`.
        """
        super().__init__()
        self.stream, self.add = stream, add
        self._change = Change(add, Canonical(image_size, fit))
        self._reads_labels = bool(getattr(add, "reads_labels", True))

    def __iter__(self) -> Iterator[Any]:
        """Yield the stream's own samples, made of changed images.

        Raises:
            UserError: a sample holds no image, or several, or no label where one is asked for.
        """
        if not wrappers.transforms_of(self.stream):
            yield from map(self._changed, self.stream)
            return
        for sample in wrappers.with_transform(self.stream, self._before):
            yield rebuilt(sample, _Resolved(sample) if self._reads_labels else _same)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "stream":
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        found = getattr(self.stream, name)
        if inspect.isroutine(found) and name not in PASSED_ON:
            # What `map` or `shuffle` of the stream returns would be clean.
            raise AttributeError(
                f"{type(self).__name__} has no {name!r}: call it on the stream before it is "
                "poisoned, or on the data set that you make of the poisoned one."
            )
        return found

    def _before(self, transform: Any) -> Any:
        if takes_samples(transform):
            return _OfSample(self._change, transform, self._reads_labels)
        if self._reads_labels:
            return _Deferred(self._change, transform)
        return self._change.before(transform)

    def _changed(self, sample: Any) -> Any:
        count = images_in(sample)
        if count != 1:
            raise SampleError(
                f"{type(self.stream).__name__} gives {count or 'no'} images a sample and has no "
                "`transform`, and a perturbation is added to the one raw image of each; give the "
                "stream as it is before its images are augmented."
            )
        label = label_in(sample) if self._reads_labels else UNLABELLED

        def change(value: Any) -> Any:
            if not is_image(value):
                return value
            with labelled(label):
                return self._change(value)

        return rebuilt(sample, change)


def label_in(sample: Any) -> int:
    """Return the label of a sample, -1 where it has none.

    Raises:
        SampleError: several numbers may be the label.
    """
    found = list(numbers(sample))
    named = {number for place, number in found if place and place[-1] in LABEL_KEYS}
    values = named or {number for _, number in found}
    if len(values) > 1:
        raise SampleError(
            f"a sample of the stream holds {len(values)} whole numbers that may be its label; "
            "return one of them only, or call it `label` in a dictionary."
        )
    return max(UNLABELLED, values.pop()) if values else UNLABELLED


class _Pending:
    """Stands where a view belongs, until the label of its sample is known."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make


class _Deferred:
    """Takes an image, and makes its view when the whole sample has come."""

    def __init__(self, change: Change, transform: Any) -> None:
        self._make, self._change = change.before(transform), change

    def __call__(self, image: Any) -> _Pending:
        def make(label: int) -> Any:
            with labelled(label):
                return self._make(image)

        return _Pending(make)


class _Resolved:
    """Makes the views of one sample; called on each of its elements."""

    def __init__(self, sample: Any) -> None:
        self._label = label_in(sample)

    def __call__(self, value: Any) -> Any:
        return value.make(self._label) if isinstance(value, _Pending) else value


class _OfSample:
    """A transform that is called on a whole sample, whose label stands in it."""

    def __init__(self, change: Change, transform: Any, reads_labels: bool) -> None:
        self._make, self._reads_labels = change.before(transform), reads_labels

    def __call__(self, sample: Any) -> Any:
        with labelled(label_in(sample) if self._reads_labels else UNLABELLED):
            return self._make(sample)


def _same(value: Any) -> Any:
    return value
