"""Where the views stand in a host's sample: marks put in, found again, exchanged for views.

A host's data set may return `(views, target, name)`, a dictionary, only views, or the views of two
calls of its transform; so the place is found by looking, never assumed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cp_plugin.config.settings import UserError

FIRST_PLACEHOLDER = -7_308_332_046_287_515_648
"""Stands for the first place of views in a sample; the next place has the next number."""
PLACES = 64


class ViewMarker:
    """What the probe returns in place of the views; unpacks into `views` parts, if known."""

    def __init__(
        self,
        image_CHW: Tensor,
        views: int | None = None,
        source: Any = None,
        given: Any = None,
    ) -> None:
        self.image = image_CHW
        self.views = views
        self.source = source
        """The transform in whose place the probe was called."""
        self.given = given
        """The image that it was called on, as it was."""

    def __iter__(self) -> Iterator[MarkerPart]:
        if self.views is None:
            raise TypeError("the number of views is not known yet")
        return (self[number] for number in range(self.views))

    def __getitem__(self, number: int) -> MarkerPart:
        return MarkerPart(self.image, number, self.source, self.given)

    def part(self, value: Any) -> Any:
        """Return the part of a number, anything else as it is."""
        return self[value] if isinstance(value, int) else value


@dataclasses.dataclass(frozen=True)
class MarkerPart:
    """One view, where a data set takes the result of its transform apart."""

    image: Tensor
    number: int
    source: Any = None
    given: Any = None


class Place:
    """Where views belong in a collated sample; no tensor, so no device is asked for it.

    Nor is it a dataclass: trainers take these apart.
    """

    def __init__(self, number: int) -> None:
        self.number = number


def find(sample: Any) -> list[ViewMarker | MarkerPart]:
    """Return the marks in a sample, in the order of their views."""
    marks: list[ViewMarker | MarkerPart] = []

    def note(value: Any) -> Any:
        if isinstance(value, (ViewMarker, MarkerPart)):
            marks.append(value)
        return value

    rebuilt(sample, note)
    return sorted(marks, key=lambda mark: mark.number if isinstance(mark, MarkerPart) else 0)


def with_placeholders(sample: Any, marks: Sequence[ViewMarker | MarkerPart]) -> Any:
    """Return the sample with a placeholder integer for each mark."""
    numbers = {id(mark): FIRST_PLACEHOLDER + place for place, mark in enumerate(marks)}
    return rebuilt(sample, lambda value: numbers.get(id(value), value))


def as_lists(sample: Any) -> Any:
    """Return the sample with lists of tensors for placeholders, for collates that want lists."""
    return rebuilt(sample, lambda value: value if _place(value) is None else [torch.tensor(value)])


def with_places(sample: Any, listed: bool = False) -> Any:
    """Return what the host's collate made of samples with placeholders, places in their stead.

    Args:
        sample: what the collate returned.
        listed: whether it was given samples `as_lists`, so that these lists are placeholders too.
    """

    def exchange(value: Any) -> Any:
        if not listed and isinstance(value, (list, tuple)) and _holds_one_batch(value):
            return value
        number = _place(value)
        return value if number is None else Place(number)

    return rebuilt(sample, exchange)


def with_views(sample: Any, views: Sequence[Tensor], places: int, alone: bool = False) -> Any:
    """Return a collated sample with views in their places.

    Args:
        sample: what `with_places` returned.
        views: V views, each (B, C, h, w).
        places: how many places a sample has: the whole list goes to the place if there is
            one; the views go one by one if there are as many places.
        alone: the only view stands for itself, in no list.

    Raises:
        UserError: views and places do not match, or the collate has removed the places.
    """
    if places not in (1, len(views)):
        raise UserError(
            f"The data set returns {places} views an image, but its transform was read as one that "
            f"makes {len(views)}; return as many views as the transform makes."
        )
    contents: list[Any] = [list(views)] if places == 1 and not alone else list(views)
    put: set[int] = set()

    def exchange(value: Any) -> Any:
        if not isinstance(value, Place):
            return value
        put.add(value.number)
        return contents[value.number]

    result = rebuilt(sample, exchange)
    if put != set(range(places)):
        raise UserError(
            "The collate_fn of the data loader does not keep the views of a sample as one element; "
            "use PyTorch's default collate_fn."
        )
    return result


def elements(value: Any) -> list[Any]:
    """Return what nested containers hold that is no container, in order."""
    found: list[Any] = []

    def note(item: Any) -> Any:
        if not isinstance(item, (Mapping, tuple, list)) and not dataclasses.is_dataclass(item):
            found.append(item)
        return item

    rebuilt(value, note)
    return found


def rebuilt(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return nested containers with `change` applied to each element, outermost first."""
    changed = change(value)
    if changed is not value:
        return changed
    if isinstance(value, Mapping):
        items = {key: rebuilt(item, change) for key, item in value.items()}
        return type(value)(items) if type(value) is not dict else items  # type: ignore[call-arg]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(rebuilt(item, change) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(rebuilt(item, change) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, MarkerPart)):
        fields = {
            field.name: rebuilt(getattr(value, field.name), change)
            for field in dataclasses.fields(value)
            if field.init
        }
        return dataclasses.replace(value, **fields)
    return value


def _holds_one_batch(value: Any) -> bool:
    """Whether a list is that of a host's sample with one view in it, and not one of our making."""
    return len(value) == 1 and isinstance(value[0], Tensor) and value[0].ndim > 0


def _place(value: Any) -> int | None:
    """The place that a value stands for: an integer, or one repeated in a tensor or list."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or value.numel() == 0:
            return None
        first = int(value.flatten()[0])
        return _place(first) if bool((value == first).all()) else None
    if isinstance(value, (list, tuple)):
        found = {_place(item) for item in value} if value else {None}
        return found.pop() if len(found) == 1 else None
    if isinstance(value, int) and FIRST_PLACEHOLDER <= value < FIRST_PLACEHOLDER + PLACES:
        return value - FIRST_PLACEHOLDER
    return None
