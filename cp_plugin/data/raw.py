"""A data set with the host's transform taken off, so that images come before any augmentation."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from cp_plugin.config.settings import Fit, UserError
from cp_plugin.data import slots as markers
from cp_plugin.data import wrappers
from cp_plugin.data.batch import Batch
from cp_plugin.data.cache import Cache, CachedRows
from cp_plugin.data.image import Canonical, Size, image_key, is_image
from cp_plugin.data.kept import still_held
from cp_plugin.data.pipelines import IMAGE, grid_sides, takes_samples, view_form, view_pipelines
from cp_plugin.util.random_state import random_state_kept

MOST_VIEWS = 16
UNREADABLE = (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError)


class SampleError(UserError):
    """A sample that cannot be used.

    A worker process of a data loader hands errors on as text with a traceback before it; only the
    sentence is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rsplit(f"{type(self).__name__}: ", 1)[-1].rstrip())


class Item(NamedTuple):
    """One row of a raw data set."""

    row: int
    """The image's position."""
    key: int
    """Hash of the pixels, see `image_key`."""
    image: Tensor
    """uint8 (3, H, W), canonical."""
    sample: Any
    """The host's own sample, an integer placeholder where its views belong."""


class RawDataset(Dataset[Item]):
    """A map-style data set of images, read before its transform.

    Works on a shallow copy: the data set itself, and others that share its images, keep their
    transform. Data sets of torchvision, Lightly and solo-learn, subsets, joins and wrappers
    are followed to the object that has the attribute `transform`.

    Attributes:
        transform: the pipeline taken off, None if there was none; a list of pipelines, one a
            view, where the data set calls several, or one several times.
        places: how many elements of a sample are views, where the data set returns its views
            apart (`q, k, target`); 1 where they stand together.
        canonical: the form that its images are brought to.
        given: the first image as the transform gets it; None in another process.
        cache: all rows, once they are read (`read_once`); None: each is read when it is asked for.
    """

    def __init__(self, dataset: Any, image_size: int | Size | None, fit: Fit = "crop") -> None:
        """Take the transform off.

        Args:
            dataset: the host's data set.
            image_size: height and width of the canonical images in pixels, or the side of a
                square; None keeps each image's size.
            fit: as of `Canonical`.

        Raises:
            UserError: the data set streams, is empty, has no `transform`, or does not return what
                its transform makes; SampleError if the first image cannot be read.
        """
        wrappers.check_map_style(dataset)
        self.dataset = dataset
        self.transform = wrappers.pipeline_of(dataset)  # refuses what has none
        self.canonical = Canonical(image_size, fit)
        self._views: int | None = None
        self._probed = self._with_probe(None)
        self._process = os.getpid()
        self.given: Any = None
        self.places = self._count_places()
        self.cache: Cache | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Item:
        """Return an image before augmentation, and the host's sample without its views.

        Raises:
            SampleError: the image cannot be read; its file is named where it is known.
        """
        row = range(len(self))[row]
        if self.cache is not None:
            key, image = int(self.cache.keys[row]), self.cache.images[row]
            return Item(row, key, image, self.cache.sample(row))
        sample = self._read(row)
        marks = markers.find(sample)
        if not marks:
            raise SampleError(transform_not_called(self.dataset, row))
        if len(marks) != self.places:
            raise SampleError(
                f"Row {row} of {self._name} returns {len(marks)} views, row 0 {self.places}; "
                "all samples must have the same form."
            )
        image = marks[0].image
        return Item(row, image_key(image), image, markers.with_placeholders(sample, marks))

    def __getitems__(self, rows: Sequence[int]) -> Sequence[Item] | CachedRows:
        """Return what `collate` makes a batch of; a loader calls this in place of each item."""
        return CachedRows(rows) if self.cache is not None else [self[row] for row in rows]

    def collate(
        self,
        items: Sequence[Item] | CachedRows,
        host_collate: Callable[[Any], Any] = default_collate,
    ) -> Batch:
        """Make a batch of items.

        Args:
            items: B items, or what `__getitems__` returned.
            host_collate: the host's own `collate_fn`, called on the samples.

        Returns:
            The batch; its `sample` waits for views (`with_views`).

        Raises:
            SampleError: images of different sizes.
        """
        if isinstance(items, CachedRows):
            assert self.cache is not None
            rows, cache = torch.tensor(items.rows, dtype=torch.int64), self.cache
            sample = self._collated([cache.sample(row) for row in items.rows], host_collate)
            return Batch(rows, cache.keys[rows], cache.images[rows], sample)
        sizes = {tuple(item.image.shape[1:]) for item in items}
        if len(sizes) > 1:
            raise SampleError(
                f"Images of different sizes in one batch: {sorted(sizes)[:3]}; set "
                "poison.image_size, so that they are resized and cropped to one."
            )
        return Batch(
            rows=torch.tensor([item.row for item in items], dtype=torch.int64),
            keys=torch.tensor([item.key for item in items], dtype=torch.int64),
            images=torch.stack([item.image for item in items]),
            sample=self._collated([item.sample for item in items], host_collate),
        )

    def with_views(self, sample: Any, views: Sequence[Tensor]) -> Any:
        """Return the host's own batch: a collated sample with views in their place.

        Args:
            sample: `Batch.sample`, from `collate`.
            views: V views, each float (B, C, h, w).

        Raises:
            UserError: the host's collate has not kept the place, or the number of views differs.
        """
        alone = len(views) == 1 and view_pipelines(self.transform) is None
        return markers.with_views(sample, views, self.places, alone)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the copy: another process makes its own."""
        return {**vars(self), "_probed": None, "given": None}

    @staticmethod
    def _collated(samples: list[Any], host_collate: Callable[[Any], Any]) -> Any:
        try:
            return markers.with_places(host_collate(samples))
        except (TypeError, AttributeError):
            listed = [markers.as_lists(sample) for sample in samples]
        try:
            return markers.with_places(host_collate(listed), listed=True)
        except (TypeError, AttributeError) as error:
            raise SampleError(
                f"The collate_fn of the data loader fails on samples whose views are still to be "
                f"made ({type(error).__name__}: {error}); it sees no view before it is augmented, "
                "so let `self.transform` make the views, as Lightly's MultiViewTransform([first, "
                "second]) does, and use PyTorch's default collate_fn."
            ) from error

    @property
    def _name(self) -> str:
        return type(self.dataset).__name__

    def _with_probe(self, views: int | None) -> Any:
        probe = Probe(self.canonical, views)
        return wrappers.with_transform(self.dataset, probe.of)

    def _read(self, row: int) -> Any:
        if self._process != os.getpid() or self._probed is None:
            # Files that the copy has opened meanwhile (h5) are of no use in another process.
            self._probed, self._process = self._with_probe(self._views), os.getpid()
        return read(self._probed, row)

    def _count_places(self) -> int:
        """Read the first sample; one that unpacks its views is tried with 2, 3, … of them."""
        for views in (None, *range(2, MOST_VIEWS + 1)):
            self._views, self._probed = views, self._with_probe(views)
            try:
                sample = self._read(0)
                marks = markers.find(sample)
            except UserError:
                raise
            except (TypeError, ValueError, AttributeError) as error:
                reason = f" ({type(error).__name__}: {error})"
                continue
            if marks:
                self._check_other_images(sample)
                self.transform = self._transform_of(marks)
                self.given = marks[0].given
                places, kept = len(marks), [weakref.ref(mark) for mark in marks]
                del sample, marks
                self._check_kept(kept)
                return places
            reason = ""
        raise UserError(
            f"{self._name} does not return what its transform makes{reason}, so the place of the "
            "views in a sample is not known; apply `self.transform` to the image and return the "
            "result as it is, and give a data set that keeps its samples with an empty cache."
        )

    def _check_kept(self, marks: Sequence[weakref.ref[Any]]) -> None:
        """Check that what was read through a copy of the data set has not stayed in the original.

        Raises:
            UserError: it has: the data set would give it to whoever reads it later.
        """
        self._probed = None  # what the copy keeps goes with it
        if not still_held(marks):
            return
        with random_state_kept():
            stayed = markers.find(read(self.dataset, 0))
        if stayed:
            raise UserError(
                f"{self._name} keeps its samples in a place that all its copies share (a global, "
                "a class attribute, a cache of another library), so clean and perturbed ones would "
                "be mixed up; keep them in a dictionary or list of the data set itself, or switch "
                "the cache off, and make the data set anew."
            )

    def _transform_of(self, marks: Sequence[markers.ViewMarker | markers.MarkerPart]) -> Any:
        """Return what made the marked places: one transform, or one for each place.

        Raises:
            UserError: there are several, and one of them makes several views.
        """
        sources = [mark.source for mark in marks]
        if isinstance(marks[0], markers.MarkerPart):
            self._check_parts([mark.number for mark in marks], sources[0])  # type: ignore[union-attr]
            return sources[0]
        if len(marks) == 1:
            return sources[0]
        if any(view_pipelines(source) is not None for source in sources):
            raise UserError(
                f"{self._name} calls {len(sources)} transforms for a sample, and one of them makes "
                "several views by itself, so which view stands where is not known; keep one "
                "transform that makes all of them in `self.transform`."
            )
        return sources

    def _check_parts(self, numbers: list[Any], source: Any) -> None:
        """Check that a sample has all views that its transform makes, each once.

        Raises:
            UserError: it has not.
        """
        made = view_pipelines(source)
        count = None if made is None else len(made) + len(grid_sides(source))
        if count is not None and numbers != list(range(count)):
            raise UserError(
                f"{self._name} returns {len(numbers)} of an image's views and its transform makes "
                f"{count}, so which view stands where is not known; return each view once, or let "
                "the transform make those alone that are returned."
            )

    def _check_other_images(self, sample: Any) -> None:
        """Check that a sample has no image beside those that the transform makes.

        Raises:
            UserError: it has.
        """
        others = images_in(sample)
        if others:
            raise UserError(
                f"{self._name} returns {others} images a sample that the transforms in its "
                "attributes do not make, so these would stay without a perturbation; let "
                "`self.transform` make every image that __getitem__ returns."
            )


def images_in(sample: Any) -> int:
    """Count the images with three channels in a sample."""
    found: list[Any] = []

    def note(value: Any) -> Any:
        if is_image(value) and 3 in getattr(value, "shape", (3,)):
            found.append(value)
        return value

    markers.rebuilt(sample, note)
    return len(found)


class Probe:
    """Makes what stands where the host's transforms were; they return the image itself, marked."""

    def __init__(self, canonical: Canonical, views: int | None) -> None:
        self._canonical = canonical
        self._views = views

    def of(self, transform: Any) -> ProbeOf:
        """Return what stands in the place of a transform."""
        return ProbeOf(self._canonical, self._views, transform)


class ProbeOf:
    """Stands in the place of one transform."""

    def __init__(self, canonical: Canonical, views: int | None, transform: Any) -> None:
        self._canonical, self._views, self._transform = canonical, views, transform
        self._form = view_form(transform)

    def __call__(self, image: Any = None, /, **named: Any) -> Any:
        """Return the mark of a canonical image, or parts of it as the transform returns views."""
        if named or isinstance(image, markers.ViewMarker):
            how = f"with {next(iter(named))}=…" if named else "on what another one has made"
            raise UserError(
                f"the data set calls a transform {how}, and a transform is read only where it is "
                "called on the image alone; keep one pipeline of torchvision, Lightly or "
                "solo-learn in `self.transform` and return `self.transform(image)`."
            )
        if takes_samples(self._transform):
            return self._in_samples(image)
        mark = self._mark(image)
        return mark if self._form is None else markers.rebuilt(self._form, mark.part)

    def _mark(self, image: Any) -> markers.ViewMarker:
        return markers.ViewMarker(self._canonical(image), self._views, self._transform, image)

    def _in_samples(self, sample: Mapping[str, Any]) -> Any:
        """Return a sample for each view, the marks in place of their images."""
        mark = self._mark(sample[IMAGE])
        if self._form is None:
            return {**sample, IMAGE: mark}

        def with_part(value: Any) -> Any:
            return {**sample, IMAGE: mark[value]} if isinstance(value, int) else value

        return markers.rebuilt(self._form, with_part)


def transform_not_called(dataset: Any, row: int) -> str:
    """Say that a data set has returned a sample that it kept from before."""
    return (
        f"{type(dataset).__name__} returned row {row} without calling its transform, as a data set "
        "does that keeps its samples, so its image cannot be reached; give it with an empty cache, "
        "or without one."
    )


def read(dataset: Any, row: int) -> Any:
    """Return `dataset[row]`.

    Raises:
        SampleError: the image cannot be read; its file is named where it is known.
    """
    try:
        return dataset[row]
    except UserError as error:
        file = wrappers.file_of(dataset, row) or f"row {row}"
        raise SampleError(f"{file}: {error}") from error
    except UNREADABLE as error:
        path = wrappers.file_of(dataset, row)
        where = f"{path} (row {row})" if path else f"row {row} of {type(dataset).__name__}"
        raise SampleError(
            f"Cannot read the image {where}: {error}; replace or remove the file."
        ) from error
