"""What images before their transform share, whether they are asked for by row or streamed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from cp_plugin.config.settings import UserError
from cp_plugin.data import slots as markers
from cp_plugin.data.batch import Batch
from cp_plugin.data.image import Canonical, is_image
from cp_plugin.data.pipelines import grid_sides, view_pipelines

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
    label: int = -1
    """Of a stream whose labels are read; of a data set they are known by row."""


class RawImages:
    """Images read before the transform of the data set or stream that gives them.

    Attributes:
        dataset: the host's own.
        transform: the pipeline taken off, None if there was none; a list of pipelines, one a
            view, where the data set calls several, or one several times.
        places: how many elements of a sample are views, where the data set returns its views
            apart (`q, k, target`); 1 where they stand together.
        canonical: the form that its images are brought to.
        given: the first image as the transform gets it; None in another process.
    """

    dataset: Any
    transform: Any
    places: int
    canonical: Canonical
    given: Any

    def _read_form(self, first: Callable[[int | None], Any]) -> list[weakref.ref[Any]]:
        """Read the first sample; one that unpacks its views is tried with 2, 3, … of them.

        Args:
            first: reads it, where a transform makes so many views; None: they stay together.

        Returns:
            References to the marks of its views.

        Raises:
            UserError: the sample does not hold what the transform makes.
        """
        for views in (None, *range(2, MOST_VIEWS + 1)):
            try:
                sample = first(views)
                marks = markers.find(sample)
            except UserError:
                raise
            except (TypeError, ValueError, AttributeError) as error:
                reason = f" ({type(error).__name__}: {error})"
                continue
            if marks:
                self._check_other_images(sample)
                self.transform = self._transform_of(marks)
                self.given, self.places = marks[0].given, len(marks)
                return [weakref.ref(mark) for mark in marks]
            reason = ""
        raise UserError(
            f"{self._name} does not return what its transform makes{reason}, so the place of the "
            "views in a sample is not known; apply `self.transform` to the image and return the "
            "result as it is, and give a data set that keeps its samples with an empty cache."
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

    @staticmethod
    def _batch(items: Sequence[Item], host_collate: Callable[[Any], Any]) -> Batch:
        """Make a batch of items.

        Raises:
            SampleError: images of different sizes.
        """
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
            sample=RawImages._collated([item.sample for item in items], host_collate),
        )

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
