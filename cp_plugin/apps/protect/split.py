"""What `cp-plugin protect --check` looks at: pictures to train on, held-out ones, their labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from cp_plugin.apps.protect.sources import LEAST, Source, names_in_out
from cp_plugin.apps.timing import timed
from cp_plugin.attack.poison_file import Poison
from cp_plugin.config.settings import UserError
from cp_plugin.data import Canonical
from cp_plugin.data.picture_cache import Filling, PictureCache, Pixels
from cp_plugin.data.picture_pixels import FileFormat
from cp_plugin.engine.placement import Placement
from cp_plugin.evaluation.clusters import centres, nearest

HELD_OUT = 4
"""Every fourth picture is held out."""
MOST = 2000
"""Pictures, spread over all, that are looked at."""
ORIGINALS, PROTECTED, QUERIES = "originals", "protected", "held_out"
COLOURS = 8
"""Side of the small copies of pictures that are grouped by their colours."""
GROUPS = 10


class Pair(NamedTuple):
    """A picture before and after."""

    name: Path
    original: Path
    protected: Path


@dataclass(frozen=True)
class Split:
    """The pictures that the networks are trained on, and those that tell what they have learnt."""

    training: list[Pair]
    held_out: list[Pair]

    @classmethod
    def of(cls, pictures: Sequence[Source], out: Path, file_format: FileFormat) -> Split:
        """Split the pictures that are protected in OUT.

        Raises:
            UserError: there are too few.
        """
        names = names_in_out(pictures, file_format)
        pairs = [
            Pair(source.name, source.file, out / name)
            for source, name in zip(pictures, names, strict=True)
            if (out / name).is_file()
        ]
        check_enough(len(pairs))
        chosen = torch.linspace(0, len(pairs) - 1, min(MOST, len(pairs))).round().long().tolist()
        pairs = [pairs[number] for number in chosen]
        held_out = pairs[HELD_OUT - 1 :: HELD_OUT]
        return cls([pair for pair in pairs if pair not in set(held_out)], held_out)


def check_enough(count: int) -> None:
    """Check that there are pictures enough to train on and some to hold out.

    Raises:
        UserError: there are not.
    """
    needed = math.ceil(LEAST * HELD_OUT / (HELD_OUT - 1))
    if count < needed:
        raise UserError(
            f"--check needs at least {needed} pictures, of which it holds out a quarter, and there "
            f"are {count}; leave it out, or protect more pictures."
        )


def filled(split: Split, folder: Path, size: int) -> dict[str, PictureCache]:
    """Read the pictures once, squeezed to squares of `size` pixels."""
    files = {
        ORIGINALS: [pair.original for pair in split.training],
        PROTECTED: [pair.protected for pair in split.training],
        QUERIES: [pair.original for pair in split.held_out],
    }
    for name, those in files.items():
        filling = Filling(folder / name, those, size)
        for file, reason in timed(f"reading {name}", filling.fill(), len(those)):
            if reason is not None:
                raise UserError(f"{file} cannot be read any more: {reason}.")
    return {name: PictureCache(folder / name) for name in files}


def labels_of(
    split: Split, shown: dict[str, Pixels], poison: Poison, seed: int
) -> tuple[dict[str, Tensor], str]:
    """Return the labels of training and held-out pictures, int64, and what they come from."""
    folders = [
        [pair.name.parts[:-1] for pair in pairs] for pairs in (split.training, split.held_out)
    ]
    names = sorted(set(folders[0]))
    counts = [folders[0].count(name) for name in names]
    if len(names) > 1 and min(counts) > 1 and set(folders[1]) <= set(names):
        numbers = {name: number for number, name in enumerate(names)}
        known = [torch.tensor([numbers[name] for name in part]) for part in folders]
        return {ORIGINALS: known[0], QUERIES: known[1]}, "folder"
    places = (ORIGINALS, QUERIES)
    placement = Placement.of(poison)
    if placement is not None:
        found = {name: placement.clusters(shown[name]) for name in places}
        return found, "cluster"
    small = Canonical(COLOURS, "cover")
    colours = {
        name: functional.normalize(
            torch.stack(
                [
                    small(image).flatten().float()
                    for image in map(shown[name].__getitem__, range(len(shown[name])))
                ]
            )
            - 128
        )
        for name in places
    }
    middle = centres(colours[ORIGINALS], GROUPS, seed)
    return {name: nearest(colours[name], middle) for name in places}, "colour group"
