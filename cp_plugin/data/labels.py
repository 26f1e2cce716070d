"""Labels and class names of a data set: what its samples say, from its lists where these agree.

The lists that a data set keeps (`targets`, `samples`, …) tell all labels without decoding an image,
but which row of which list a sample comes from is a guess as soon as a user's own wrapper stands in
between. So what the lists say is compared with samples all over the data set; where they disagree,
or there are no lists, every sample is read. Classes of two data sets are matched by name, never by
number: a test folder that lacks a class numbers the others anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset

from cp_plugin.config.settings import UserError
from cp_plugin.data.raw import RawDataset
from cp_plugin.data.raw_images import SampleError
from cp_plugin.data.wrappers import attributes, indices_of, inside, single

log = logging.getLogger("cp_plugin")

# `samples` comes first: solo-learn's `data.fraction` replaces it and leaves `targets` stale.
PAIR_LISTS = ("samples", "imgs", "_data")
LABEL_LISTS = ("targets", "labels", "_labels")
LABEL_KEYS = frozenset({"label", "labels", "target", "targets", "class", "class_id", "cls", "y"})
"""What labels are called in samples that are dictionaries."""
UNLABELLED = -1
COMPARED = 200
"""Samples that are compared with the lists, all over the data set."""
OWN_PACKAGE = __name__.partition(".")[0] + "."
LEAST_NUMBER = -(1 << 62)
"""Placeholders of views are below."""


def labels(dataset: Any) -> Tensor | None:
    """Return the labels of a data set, as its samples have them.

    Args:
        dataset: any map-style data set; subsets, joins and wrappers are followed.

    Returns:
        int64 (N), negative where an image is unlabelled; None where the data set has no labels.

    Raises:
        UserError: the samples hold other numbers than the lists, and several that may be labels.
    """
    dataset = _of_user(dataset)
    guess = _listed(dataset)
    read = _reader(dataset)
    if read is None:
        return guess
    rows, samples = [], []
    for row in _spread(len(dataset), COMPARED):
        with suppress(SampleError):  # an unreadable image is named when it is needed
            samples.append(dict(numbers(read(row).sample)))
            rows.append(row)
    places = [
        place
        for place in samples[0]
        if all(place in sample for sample in samples)
        and any(sample[place] != row for sample, row in zip(samples, rows, strict=True))
    ]
    columns = {place: [sample[place] for sample in samples] for place in places}
    if guess is not None:
        listed = guess[rows].clamp(min=UNLABELLED).tolist()
        if any([max(UNLABELLED, n) for n in found] == listed for found in columns.values()):
            return guess
    # A number that is always the same tells nothing: often 0 stands for no label.
    columns = {place: found for place, found in columns.items() if len(set(found)) > 1}
    if not columns:
        return _of_images(dataset, guess, read, rows)
    place = _place_of_labels(columns, guess is not None, dataset)
    return None if place is None else _read_all(dataset, read, place)


def class_names(dataset: Any) -> tuple[str, ...] | None:
    """Return the names of the classes in label order, each once; None where they are not known."""
    dataset = _of_user(dataset)
    names = _own_names(dataset)
    if names is None:
        return None
    if "classes" in attributes(dataset) or single(dataset) is None:
        return names
    # The names are those of the data set inside, whose labels a wrapper may have changed.
    known, listed = labels(dataset), _listed(dataset)
    if known is None or (listed is not None and torch.equal(known, listed)):
        return names
    return names if _agrees_inside(dataset, known) else None


def names_or_numbers(dataset: Any) -> tuple[str, ...] | None:
    """Return the names of the classes, their numbers where they have none; None without labels."""
    names, known = class_names(dataset), labels(dataset)
    if known is None or not bool((known >= 0).any()):
        return None
    count = int(known.max()) + 1
    if names is not None and len(names) >= count:
        return names
    return tuple(map(str, range(count)))


def renumbered(
    labels_N: Tensor, names: Sequence[str] | None, reference: Sequence[str] | None
) -> Tensor:
    """Return labels with the numbers that their classes have in another data set, by name.

    Args:
        labels_N: int64 (N), negative where unlabelled.
        names: of the classes, in label order; None: they are not known.
        reference: the other data set's; without names on both sides numbers stay as they are.

    Raises:
        UserError: there are images of a class that the other data set lacks.
    """
    if names is None or reference is None or tuple(names) == tuple(reference):
        return labels_N
    number = {name: row for row, name in enumerate(reference)}
    present = [names[label] for label in torch.unique(labels_N[labels_N >= 0]).tolist()]
    missing = [name for name in present if name not in number]
    if missing:
        raise UserError(
            f"the test images have {len(missing)} classes that the training images lack "
            f"({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}), so that no answer "
            "could be right; give class folders of the same names, or leave these images out."
        )
    table = torch.tensor([number.get(name, UNLABELLED) for name in names])
    return torch.where(labels_N >= 0, table[labels_N.clamp(min=0)], labels_N)


def cluster_name(number: int) -> str:
    """Return the name that a group of like images has in a poison file."""
    return f"cluster {number}"


def distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Return names each of which stands once: a second `crane` is called `crane (2)`."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return tuple(found)


def _of_user(dataset: Any) -> Any:
    """Return the data set inside wrappers of this package, which keep rows and labels."""
    while type(dataset).__module__.startswith(OWN_PACKAGE) and single(dataset) is not None:
        dataset = single(dataset)
    return dataset


def _own_names(dataset: Any) -> tuple[str, ...] | None:
    names = getattr(dataset, "classes", None)
    if isinstance(names, (list, tuple)) and names:
        return distinct([", ".join(n) if isinstance(n, tuple) else str(n) for n in names])
    below = {_own_names(child) for child in inside(dataset)}
    return below.pop() if len(below) == 1 else None


def _listed(dataset: Any) -> Tensor | None:
    """Return the labels that the lists of a data set, or of those inside it, hold."""
    if isinstance(dataset, ConcatDataset):
        return _joined(dataset)
    found = _own_labels(dataset)
    if found is not None:
        return found
    inner = single(dataset)
    if inner is None:
        return None
    below = _listed(inner)
    indices = indices_of(dataset)
    if below is None:
        return None
    if indices is not None:
        return below[torch.as_tensor(np.asarray(indices), dtype=torch.int64)]
    return below if len(below) == len(dataset) else None


class _Sample:
    """A sample that was read without its augmentation."""

    def __init__(self, sample: Any, key: int | None) -> None:
        self.sample, self.key = sample, key


Reader = Callable[[int], _Sample]


def _reader(dataset: Any) -> Reader | None:
    """Return what reads a sample, None where none can be read; whoever needs images says why."""
    try:
        raw = RawDataset(dataset, None)
    except UserError:
        try:
            dataset[0]
        except Exception:  # a user's own data set may raise anything
            return None
        return lambda row: _Sample(dataset[row], None)

    def read(row: int) -> _Sample:
        item = raw[row]
        return _Sample(item.sample, item.key)

    return read


def numbers(sample: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], int]]:
    """Yield the whole numbers of a sample with their places in it."""
    if _is_whole(sample):
        if int(sample) > LEAST_NUMBER:
            yield place, int(sample)
    elif isinstance(sample, Mapping):
        for key, value in sample.items():
            yield from numbers(value, (*place, key))
    elif isinstance(sample, (list, tuple)):
        for number, value in enumerate(sample):
            yield from numbers(value, (*place, number))


def _place_of_labels(
    columns: dict[tuple[Any, ...], list[int]], listed: bool, dataset: Any
) -> tuple[Any, ...] | None:
    """Return where in a sample the label stands, None where no number may be one.

    Raises:
        UserError: it may be any of several.
    """
    named = [place for place in columns if place and place[-1] in LABEL_KEYS]
    same = all(columns[place] == columns[named[0]] for place in named)  # one for each view
    choice = named[:1] if named and same else list(columns)
    if len(choice) == 1:
        return choice[0]
    if not listed:
        return None
    raise UserError(
        f"the samples of {type(dataset).__name__} hold {len(choice)} whole numbers, and none is "
        "the label that the lists of its data set give, so which one is the label is not known; "
        "return one of them only, or call it `label` in a dictionary."
    )


def _read_all(dataset: Any, read: Reader, place: tuple[Any, ...]) -> Tensor | None:
    log.info(
        "reading the labels of %d images from the samples of %s, since no list of it has them",
        len(dataset),
        type(dataset).__name__,
    )
    found = torch.tensor([dict(numbers(read(row).sample))[place] for row in range(len(dataset))])
    numbers_of_images = len(torch.unique(found)) == len(found) > 1
    return None if numbers_of_images or not bool((found >= 0).any()) else found


def _of_images(
    dataset: Any, guess: Tensor | None, read: Reader, rows: Sequence[int]
) -> Tensor | None:
    """Return the labels of a wrapper whose samples hold none: those of the same images inside it.

    A wrapper that changes images cannot be followed so; its rows are taken for those inside.
    """
    inner = single(dataset)
    below, read_inner = (None, None) if inner is None else (_listed(inner), _reader(inner))
    if inner is None or below is None or read_inner is None:
        return guess
    if guess is not None:
        indices = indices_of(dataset)
        inner_rows = rows if indices is None else [int(indices[row]) for row in rows]
        pairs = zip(rows, inner_rows, strict=True)
        if all(read(row).key == read_inner(other).key for row, other in pairs):
            return guess
    label_of = {read_inner(row).key: int(below[row]) for row in range(len(inner))}
    keys = [read(row).key for row in range(len(dataset))]
    if None in label_of or not all(key in label_of for key in keys):
        return guess
    return torch.tensor([label_of[key] for key in keys])


def _agrees_inside(dataset: Any, known: Tensor) -> bool:
    """Tell whether images have the labels that they have in the data set inside."""
    inner = single(dataset)
    below, read, read_inner = _listed(inner), _reader(dataset), _reader(inner)
    if below is None or read is None or read_inner is None:
        return False
    wanted = [(read(row).key, int(known[row])) for row in _spread(len(dataset), COMPARED)]
    found = {read_inner(row).key: int(below[row]) for row in range(len(inner))}
    return None not in found and all(found.get(key) == label for key, label in wanted)


def _spread(count: int, most: int) -> list[int]:
    rows: list[int] = torch.linspace(0, count - 1, min(count, most)).round().long().tolist()
    return rows


def _joined(dataset: ConcatDataset[Any]) -> Tensor | None:
    """Labels of joined data sets; a part without labels is unlabelled unless all parts are."""
    parts = [_listed(part) for part in dataset.datasets]
    if all(part is None for part in parts):
        return None
    sizes = np.diff([0, *dataset.cumulative_sizes])
    return torch.cat(
        [
            torch.full((int(size),), UNLABELLED) if part is None else part
            for part, size in zip(parts, sizes, strict=True)
        ]
    )


def _own_labels(dataset: Any) -> Tensor | None:
    if _has_no_classes(dataset):
        return None
    change = getattr(dataset, "target_transform", None)
    for values in _candidates(dataset):
        if len(values) == len(dataset):
            if callable(change):
                values = [change(value) for value in values]
            if all(_is_whole(value) for value in values):
                found = torch.tensor([int(value) for value in values], dtype=torch.int64)
                return found if bool((found >= 0).any()) else None
    return None


def _candidates(dataset: Any) -> list[Sequence[Any]]:
    """The lists of a data set's own attributes that may be its labels, best first."""
    own = attributes(dataset)
    found: list[Sequence[Any]] = []
    for name in PAIR_LISTS:
        pairs = own.get(name)
        if isinstance(pairs, (list, tuple)) and pairs and isinstance(pairs[0], (list, tuple)):
            found.append([pair[-1] for pair in pairs])
    for name in LABEL_LISTS:
        values = own.get(name)
        if isinstance(values, (Tensor, np.ndarray)) and values.ndim == 1:
            found.append(values.tolist())
        elif isinstance(values, (list, tuple)):
            found.append(values)
    for tensor in own.get("tensors", ()):
        if isinstance(tensor, Tensor) and tensor.ndim == 1 and not tensor.is_floating_point():
            found.append(tensor.tolist())
    return found


def _is_whole(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0 and not value.is_floating_point()
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _has_no_classes(dataset: Any) -> bool:
    """Lightly's reader of a folder without subfolders gives every image the target 0."""
    return type(dataset).__module__ == "lightly.data._image" and not hasattr(dataset, "classes")
