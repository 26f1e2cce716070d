"""Whether the images of a data set are those that a poison was made for, and carry it not yet."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset

from cp_plugin.attack.carried import many_carry, share_carried
from cp_plugin.attack.poison_file import Poison
from cp_plugin.config.settings import UserError
from cp_plugin.data import Canonical, PreTransformDataset, RawDataset, labels, wrappers

CHECKED = 1000
"""Images looked up before training, all over the data set; the rest are when they are loaded."""
LOOKED_AT = 256
"""Images whose pixels are compared with delta, where no key tells whether they carry it."""
BATCH = 32
"""Images whose pixels are compared at once."""
EXPECTED = 100
"""Of a poison for a part of the images, so many are looked up that this many should carry it."""
IMPROBABLE = 1e-3
"""A share of poisoned images that chance would bring more rarely is that of other images."""


def check_images(dataset: Any, poison: Poison) -> None:
    """Look up images all over the data set: as many must carry the poison as its file says.

    Raises:
        UserError: fewer or more do, so the poison was made for others.
    """
    assert poison.owned_keys is not None
    known = labels(dataset) if poison.needs_labels or poison.fraction < 1 else None
    rows = torch.arange(len(dataset))
    if poison.needs_labels and known is not None:
        rows = rows[known >= 0]  # the others carry none by design
    count = min(len(rows), max(CHECKED, math.ceil(EXPECTED / poison.fraction)))
    looked_up = rows[torch.linspace(0, len(rows) - 1, count).round().long()]
    keys = torch.tensor([key for _, key in canonical_images(dataset, poison, looked_up.tolist())])
    carry = torch.isin(keys, poison.owned_keys)
    if poison.fraction < 1:
        images, found = len(torch.unique(keys)), len(torch.unique(keys[carry]))
        if count == len(rows) and images == poison.images:
            fits = found == len(poison.owned_keys)
        else:
            kinds = torch.zeros(len(rows)) if known is None else known[rows]
            fits = found > 0 and _is_probable(poison, images, found, kinds)
        if not fits:
            raise UserError(of_others(poison, images, found))
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


def check_not_carried(dataset: Any, poison: Poison, classes: tuple[str, ...] | None) -> None:
    """Check that images of a poison of classes do not carry it yet, as exported ones do.

    Raises:
        UserError: they do.
    """
    known = labels(dataset)
    if known is None or classes is None:
        return
    rows = torch.arange(len(dataset))[(known >= 0) & (known < len(classes))]
    if not len(rows):
        return
    rows = rows[torch.linspace(0, len(rows) - 1, min(len(rows), LOOKED_AT)).round().long()]
    names = [classes[label] for label in known[rows].tolist()]
    own = poison.rows(classes=names)
    own_N, other_N = torch.zeros(len(rows)), torch.zeros(len(rows))
    images = canonical_images(dataset, poison, rows.tolist())
    for first in range(0, len(rows), BATCH):
        part = slice(first, first + BATCH)
        batch = torch.stack([image for image, _ in itertools.islice(images, BATCH)])
        own_N[part] = share_carried(batch, poison.perturbation.gather(own[part]))
        if len(poison.perturbation) > 1:
            other = (own[part] + 1) % len(poison.perturbation)
            other_N[part] = share_carried(batch, poison.perturbation.gather(other))
    if many_carry(own_N, other_N):
        raise UserError(
            f"the images of {type(dataset).__name__} carry this poison already, as by "
            f"cp-plugin export: of {len(rows)} looked at, the mean has {own_N.mean():.2f} of delta "
            "in its pixels. A second one on top would exceed the budget; give the clean images, or "
            "train on these as they are, without a poison group."
        )


def of_others(poison: Poison, images: int, found: int) -> str:
    """Say that so few of so many images are of those that a part of a poison is in."""
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


def canonical_images(
    dataset: Any, poison: Poison, rows: Sequence[int]
) -> Iterator[tuple[Tensor, int]]:
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
        yield seen[-1]
        seen.clear()
