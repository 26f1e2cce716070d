"""A poison added to the images of a data set, before its own transform."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset

from cp_plugin.attack.carried import many_carry, share_carried
from cp_plugin.attack.poison_file import Poison
from cp_plugin.config.settings import UserError
from cp_plugin.data import (
    Canonical,
    PreTransformDataset,
    PreTransformStream,
    RawDataset,
    SampleError,
    changes_in,
    labels,
    names_or_numbers,
    streams,
    wrappers,
)
from cp_plugin.data.labels import distinct

CHECKED = 1000
"""Images looked up before training, all over the data set; the rest are when they are loaded."""
LOOKED_AT = 256
"""Images of those whose pixels are compared with delta, where no key tells whether they have it."""
EXPECTED = 100
"""Of a poison for a part of the images, so many are looked up that this many should carry it."""
IMPROBABLE = 1e-3
"""A share of poisoned images that chance would bring more rarely is that of other images."""


class AddPoison:
    """Adds a poison to one image; what `PreTransformDataset` calls in the workers."""

    def __init__(self, poison: Poison, classes: tuple[str, ...] | None) -> None:
        """Bind a poison to a data set's classes.

        Args:
            poison: the poison.
            classes: the data set's class names.

        Raises:
            UserError: the poison was made for other classes.
        """
        poison.check_classes(classes)
        self.poison, self.classes = poison, classes
        self._partial = poison.fraction < 1
        self.reads_labels = poison.needs_labels

    def __call__(self, image_CHW: Tensor, key: int, label: int) -> Tensor:
        """Return the poisoned image, uint8 (C, H, W).

        Raises:
            SampleError: a poison of single images or of clusters has no row for the image.
        """
        return self.many(image_CHW[None], [key], [label])[0]

    def many(self, images_BCHW: Tensor, keys: Sequence[int], labels: Sequence[int]) -> Tensor:
        """Return poisoned images, uint8 (B, C, H, W).

        Raises:
            SampleError: a poison of single images or of clusters has no row for an image.
        """
        return self.poison.apply(images_BCHW, self._rows(keys, labels))

    def changes(self, key: int, label: int) -> bool:
        """Tell whether an image carries a perturbation, as one outside a part of a poison does not.

        Raises:
            SampleError: a poison of single images or of clusters has no row for it.
        """
        return bool(self._rows([key], [label])[0] >= 0)

    def row(self, key: int, label: int) -> Tensor:
        """Return the delta of one image, float32 (C, h, w), zero where it carries none.

        Raises:
            SampleError: a poison of single images or of clusters has no row for it.
        """
        return self.poison.perturbation.gather(self._rows([key], [label]))[0]

    def _rows(self, keys: Sequence[int], labels: Sequence[int]) -> Tensor:
        if self.classes and max(labels, default=-1) >= len(self.classes):
            raise SampleError(
                f"an image has the label {max(labels)}, and the data set has "
                f"{len(self.classes)} classes; give it labels from 0 on."
            )
        names = [self.classes[y] if self.classes and y >= 0 else None for y in labels]
        rows = self.poison.rows(keys=keys, classes=names)
        if not (self.poison.needs_labels or self._partial) and bool((rows < 0).any()):
            raise SampleError(
                "the poison has no row for this image; use the data set it was made for."
            )
        return rows


class AddToStream(AddPoison):
    """Adds a poison to the images of a stream, none of which could be looked up before."""

    _seen = 0
    _carried = False

    def many(self, images_BCHW: Tensor, keys: Sequence[int], labels: Sequence[int]) -> Tensor:
        """Return poisoned images, uint8 (B, C, H, W).

        Raises:
            SampleError: a poison for a part of the images has carried none of so many that they
                are others.
        """
        if self._partial and not self._carried:
            self._seen += len(keys)
            self._carried = bool((self._rows(keys, labels) >= 0).any())
            if not self._carried and self._seen >= EXPECTED / self.poison.fraction:
                raise SampleError(_of_others(self.poison, self._seen, 0))
        return super().many(images_BCHW, keys, labels)


def inject(
    dataset: Any, poison: Poison, fraction: float = 1.0
) -> PreTransformDataset | PreTransformStream:
    """Return a data set whose images carry a poison before its own transform.

    Args:
        dataset: a data set of images, or a stream of samples with images.
        poison: the poison.
        fraction: part of the poisoned images that stays so, see `part`.

    Raises:
        UserError: the poison belongs to other images (the first missing ones are named) or classes.
    """
    return added(dataset, part(dataset, poison, fraction))


def added(dataset: Any, poison: Poison) -> PreTransformDataset | PreTransformStream:
    """Return a data set whose images carry a poison that is known to fit."""
    if streams(dataset):
        add: AddPoison = AddToStream(poison, _classes_of_stream(dataset, poison))
        return PreTransformStream(dataset, add, poison.size, poison.fit)
    add = AddPoison(poison, _classes(dataset, poison))
    return PreTransformDataset(dataset, add, poison.size, add.many, poison.fit)


def part(dataset: Any, poison: Poison, fraction: float) -> Poison:
    """Return what a data set uses of a poison; a part is the same part of each class.

    Args:
        dataset: a data set of images; where fraction is less than 1, all are read once. Images of
            a stream are looked up as they come.
        poison: the poison.
        fraction: part of the poisoned images that stays so, in (0, 1].

    Raises:
        UserError: the poison belongs to other images (the first missing ones are named) or classes,
            or the images carry it already.
    """
    check_unpoisoned(dataset)
    if streams(dataset):
        return _of_stream(dataset, poison, fraction)
    classes = _classes(dataset, poison)
    poison.check_classes(classes)
    if poison.owned_keys is not None:
        _check_images(dataset, poison)
    else:
        _check_pixels(dataset, poison, classes)
    if fraction == 1:
        return poison
    keys = torch.tensor([key for _, key in _images(dataset, poison, range(len(dataset)))])
    return poison.part(fraction, keys, labels(dataset), classes)


def _classes(dataset: Any, poison: Poison) -> tuple[str, ...] | None:
    """Return the names of a data set's classes, where the poison asks for them."""
    return names_or_numbers(dataset) if poison.needs_labels else None


def _of_stream(stream: Any, poison: Poison, fraction: float) -> Poison:
    """Check what can be known of a stream that has not begun."""
    if fraction < 1:
        raise UserError(
            f"fraction={fraction:g} picks images among all, and {type(stream).__name__} streams "
            "them; write a part of the poison with a map-style data set, or craft with "
            "poison.fraction, and inject that file."
        )
    poison.check_classes(_classes_of_stream(stream, poison))
    return poison


def _classes_of_stream(stream: Any, poison: Poison) -> tuple[str, ...] | None:
    """Return the names of a stream's classes, where the poison asks for them.

    They are its attribute `classes`, or the names that Hugging Face's `features` give its label; a
    poison of numbered classes has the numbers.
    """
    if not poison.needs_labels:
        return None
    features = getattr(stream, "features", None) or {}
    named = [getattr(feature, "names", None) for feature in dict(features).values()]
    found = getattr(stream, "classes", None) or next(filter(None, named), None)
    if found is not None:
        return distinct([str(name) for name in found])
    own = poison.classes
    return own if own is not None and own == tuple(map(str, range(len(own)))) else None


def check_unpoisoned(dataset: Any) -> None:
    """Check that the images of a data set carry no poison yet: two would exceed the budget.

    Raises:
        UserError: they carry one.
    """
    own = [dataset.add] if isinstance(dataset, PreTransformStream) else changes_in(dataset)
    for add in own:
        if isinstance(add, AddPoison):
            raise UserError(
                f"the images of {type(dataset).__name__} carry a {add.poison.granularity} poison "
                "already, and a second one on top would exceed its budget; give the clean data set."
            )


def _check_images(dataset: Any, poison: Poison) -> None:
    """Look up images all over the data set: as many must carry the poison as its file says."""
    assert poison.owned_keys is not None
    known = labels(dataset) if poison.needs_labels or poison.fraction < 1 else None
    rows = torch.arange(len(dataset))
    if poison.needs_labels and known is not None:
        rows = rows[known >= 0]  # the others carry none by design
    count = min(len(rows), max(CHECKED, math.ceil(EXPECTED / poison.fraction)))
    looked_up = rows[torch.linspace(0, len(rows) - 1, count).round().long()]
    keys = torch.tensor([key for _, key in _images(dataset, poison, looked_up.tolist())])
    carry = torch.isin(keys, poison.owned_keys)
    if poison.fraction < 1:
        images, found = len(torch.unique(keys)), len(torch.unique(keys[carry]))
        if count == len(rows) and images == poison.images:
            fits = found == len(poison.owned_keys)
        else:
            kinds = torch.zeros(len(rows)) if known is None else known[rows]
            fits = found > 0 and _is_probable(poison, images, found, kinds)
        if not fits:
            raise UserError(_of_others(poison, images, found))
        return
    missing = looked_up[~carry].tolist()
    if missing:
        names = ", ".join(
            wrappers.file_of(dataset, image) or f"row {image}" for image in missing[:3]
        )
        raise UserError(
            f"the poison has no row for {len(missing)} of {count} images looked up "
            f"({names}{', …' if len(missing) > 3 else ''}); use the data set it was made for."
        )


def _check_pixels(dataset: Any, poison: Poison, classes: tuple[str, ...] | None) -> None:
    """Check that images of a poison of classes do not carry it yet, as exported ones do."""
    known = labels(dataset)
    assert known is not None
    rows = torch.arange(len(dataset))[known >= 0]
    if not len(rows):
        return
    rows = rows[torch.linspace(0, len(rows) - 1, min(len(rows), LOOKED_AT)).round().long()]
    names = [classes[label] if classes else None for label in known[rows].tolist()]
    own = poison.rows(classes=names)
    shares: list[Tensor] = []
    for (image, _), row in zip(_images(dataset, poison, rows.tolist()), own, strict=True):
        two = torch.stack([row, (row + 1) % len(poison.perturbation)])
        shares.append(share_carried(image[None], poison.perturbation.gather(two)))
    own_N, other_N = torch.stack(shares).unbind(1)
    alone = len(poison.perturbation) == 1
    if many_carry(own_N, torch.zeros_like(own_N) if alone else other_N):
        raise UserError(
            f"the images of {type(dataset).__name__} carry this poison already, as by "
            f"cp-plugin export: of {len(rows)} looked at, the mean has {own_N.mean():.2f} of delta "
            "in its pixels. A second one on top would exceed the budget; give the clean images, or "
            "train on these as they are, without a poison group."
        )


def _of_others(poison: Poison, images: int, found: int) -> str:
    return (
        f"the poison is for {100 * poison.fraction:.3g} % of the images that it was made for, and "
        f"of {images} different images looked up here it has {found} "
        f"({100 * found / images:.3g} %), so these are other images or were changed since, as by "
        "another decoder or resize; use the data set that it was made for."
    )


def _is_probable(poison: Poison, images: int, found: int, labels_N: Tensor) -> bool:
    """Tell whether a share of poisoned images may be that of a part of the poison's own."""
    shares = [poison.fraction]
    if poison.images is None:
        # An older file tells its fraction before it was rounded to whole images of each class.
        sizes = torch.unique(labels_N, return_counts=True)[1].tolist()
        whole = sum(max(1, round(poison.fraction * size)) for size in sizes)
        shares.append(whole / len(labels_N))
    few = _at_most(found, images, min(shares))
    many = _at_most(images - found, images, 1 - max(shares))
    return min(few, many) >= IMPROBABLE


def _at_most(found: int, count: int, p: float) -> float:
    """Return the probability that at most `found` of `count` are hit, each with probability p."""
    if p <= 0 or found >= count:
        return 1.0
    logs = [
        math.lgamma(count + 1)
        - math.lgamma(k + 1)
        - math.lgamma(count - k + 1)
        + k * math.log(p)
        + (count - k) * math.log1p(-p)
        for k in range(found + 1)
    ]
    return math.fsum(map(math.exp, logs))


def _images(dataset: Any, poison: Poison, rows: Sequence[int]) -> Iterator[tuple[Tensor, int]]:
    """Yield the canonical image and the key of some rows, also without a transform."""
    apart = isinstance(dataset, ConcatDataset)  # its parts may have transforms of their own
    if wrappers.transforms_of(dataset) and not apart:
        raw = RawDataset(dataset, poison.size, poison.fit)
        for row in rows:
            item = raw[row]
            yield item.image, item.key
        return
    seen: list[tuple[Tensor, int]] = []

    def note(image_CHW: Tensor, key: int, label: int) -> Tensor:
        seen.append((Canonical(poison.size, poison.fit)(image_CHW), key))
        return image_CHW

    plain = PreTransformDataset(dataset, note, poison.size, fit=poison.fit)
    for row in rows:
        plain[row]
        yield seen.pop()
