"""Protected pictures written to a folder, each whole or not at all, in threads."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cp_plugin.apps.protect.looks import (
    AMPLIFIED,
    Look,
    centre,
    comparable,
    side_by_side,
    similarity,
)
from cp_plugin.apps.protect.plan import Settings
from cp_plugin.apps.protect.sources import Source, names_in_out
from cp_plugin.attack.carried import Known
from cp_plugin.attack.poison_file import Poison
from cp_plugin.config.settings import UserError, eps_levels
from cp_plugin.data import Canonical, image_key
from cp_plugin.data.labels import cluster_name
from cp_plugin.data.picture_files import inside, tell_left_out
from cp_plugin.data.picture_pixels import (
    CannotProtect,
    FileFormat,
    add,
    ending,
    is_lossy,
    read,
    write,
)
from cp_plugin.engine.placement import Placement
from cp_plugin.util.threads import in_threads
from cp_plugin.util.whole_files import written_whole

log = logging.getLogger("cp_plugin")

NO_ROW = (
    "the poison has no perturbation for it: it was made with --clusters 0, for its own pictures"
)
CARRIED = (
    "it carries a perturbation of this poison already, and a second one on top would exceed its "
    "budget; give the original picture"
)
NAMED = 20
"""Files that an error names."""
TIMED = 4
"""Files that tell how long writing takes."""
MEASURED = 5
"""Files whose loss by compression is measured."""
SHOWN = 8
"""Pictures that are compared with their originals."""
BAND = 256
"""Rows of a picture that are compared at once."""
LOOKS = "looks.png"


def tell_unprotected(files: Mapping[Path, str], skip: bool) -> None:
    """Name the files that cannot be protected.

    Raises:
        UserError: there are some, and they are not to be skipped.
    """
    if not files:
        return
    named = [f"{file} ({reason})" for file, reason in list(files.items())[:NAMED]]
    text = "; ".join(named) + ("; …" if len(files) > NAMED else "")
    if not skip:
        raise UserError(
            f"{len(files)} files cannot be protected: {text}. Mend or remove them, or leave them "
            "out with --skip-unreadable."
        )
    log.warning("%d files are left out: %s", len(files), text)


def writing_time(
    pictures: Sequence[Source], work: Path, settings: Settings, unreadable: Mapping[Path, str]
) -> float:
    """Return how long it takes to write all pictures, in seconds, from a few of them."""
    readable = [source.file for source in pictures if source.file not in unreadable]

    def write_one(number: int) -> None:
        picture, canonical = read(readable[number], Canonical(settings.size, "cover"))
        add(picture, canonical.float() / 255 * settings.eps, settings.eps)
        partial = work / f"partial-{number}{ending(readable[number], 'png')}"
        write(picture, partial)
        partial.unlink()

    some = np.linspace(0, len(readable) - 1, min(TIMED, len(readable))).round().astype(int)
    began = time.perf_counter()
    for _ in in_threads(write_one, some.tolist()):
        pass
    return (time.perf_counter() - began) * len(readable) / len(some)


class _Job(NamedTuple):
    number: int
    source: Path
    target: Path


@dataclass(frozen=True)
class _Made:
    """What is told of a picture."""

    source: Path
    unprotected: str | None = None
    """Why it is not in OUT; None: it is."""
    changed_mode: str | None = None
    """The mode that it had, where it is written in full colour."""
    look: Look | None = None
    lost: tuple[int, float] | None = None
    """In a lossy file the largest change in levels, and the part of delta that is left."""


class Writing:
    """Writes protected pictures."""

    def __init__(self, out: Path, work: Path, poison: Poison, file_format: FileFormat) -> None:
        """Open the poison.

        Args:
            out: the folder for the pictures.
            work: the folder beside it, for everything else.
            poison: of `fit: cover`.
            file_format: of the pictures.
        """
        self._out, self._work, self._poison, self._format = out, work, poison, file_format
        self._canonical = Canonical(poison.size, poison.fit)
        self._placement = Placement.of(poison)
        if self._placement is not None:
            rows = torch.arange(len(poison.perturbation))
            self._known = Known(poison.perturbation.gather(rows))
        self.written = 0
        self.unprotected: dict[Path, str] = {}
        """Files that are not in OUT, and why."""
        self.in_full_colour: dict[Path, str] = {}
        self._lost: list[tuple[int, float]] = []
        self._looks: list[Look] = []

    def all(self, pictures: Sequence[Source]) -> Iterator[None]:
        """Write those that are not there yet; yield after each."""
        self._work.mkdir(parents=True, exist_ok=True)
        jobs = [
            _Job(number, source.file, inside(self._out, name))
            for number, (source, name) in enumerate(
                zip(pictures, names_in_out(pictures, self._format), strict=True)
            )
        ]
        for made in in_threads(self._one, jobs):
            self._note(made)
            yield

    def _note(self, made: _Made) -> None:
        if made.unprotected is not None:
            self.unprotected[made.source] = made.unprotected
            return
        self.written += 1
        if made.changed_mode is not None:
            self.in_full_colour[made.source] = f"mode {made.changed_mode}"
        if made.look is not None and len(self._looks) < SHOWN:
            self._looks.append(made.look)
        if made.lost is not None and len(self._lost) < MEASURED:
            self._lost.append(made.lost)

    def _one(self, job: _Job) -> _Made:
        if job.target.exists():
            return _Made(job.source)
        try:
            return self._written(job)
        except CannotProtect as error:
            return _Made(job.source, str(error))

    def _written(self, job: _Job) -> _Made:
        picture, canonical = read(job.source, self._canonical)
        delta = self._delta(canonical)
        # Enough are taken in the order of the files, so what a thread makes too much is left out.
        measured = is_lossy(job.target) and not picture.inks and len(self._lost) < MEASURED
        shown = comparable(picture.colours) and len(self._looks) < SHOWN
        before = picture.colours.copy() if measured else None
        looked = centre(picture.colours) if shown else None
        add(picture, delta, self._poison.eps)
        look = None if looked is None else Look(looked, centre(picture.colours))
        # In the work folder, since OUT never holds half a file.
        partial = self._work / f"partial-{job.number}{job.target.suffix}"
        with written_whole(partial) as writing:
            write(picture, writing)
        lost = None
        if before is not None:
            found = read(partial, self._canonical)[0].colours
            lost = _what_is_left(before, picture.colours, found)
        job.target.parent.mkdir(parents=True, exist_ok=True)
        partial.replace(job.target)
        return _Made(job.source, None, picture.changed_mode, look, lost)

    def _delta(self, canonical: Tensor) -> Tensor:
        if self._placement is None:
            rows = self._poison.rows(keys=[image_key(canonical)])
        else:
            if self._known.carried_by(canonical):
                raise CannotProtect(CARRIED)
            number = int(self._placement.clusters(canonical[None])[0])
            rows = self._poison.rows(classes=[cluster_name(number)])
        if int(rows[0]) < 0:
            raise CannotProtect(NO_ROW)
        return self._poison.perturbation.gather(rows)[0]

    def tell(self, skip: bool) -> None:
        """Say what was left out, changed or lost.

        Raises:
            UserError: files are left out, and they are not to be skipped.
        """
        if self._looks:
            place = self._work / LOOKS
            side_by_side(self._looks, place)
            ratio, alike = similarity(self._looks)
            log.info(
                "%d pictures beside their originals: PSNR %.1f dB, SSIM %.3f; originals, protected "
                "ones and %d times the difference are in %s",
                len(self._looks),
                ratio,
                alike,
                AMPLIFIED,
                place,
            )
        full = "written in full colour, since few colours hold no perturbation"
        tell_left_out(self._out, self.in_full_colour, full)
        if self._lost:
            left = np.mean([part for _, part in self._lost])
            log.warning(
                "JPEG is lossy: of %d files measured, pixels are off by up to %d levels (the "
                "budget is %d), and %.0f %% of the perturbation is left; PNG keeps both",
                len(self._lost),
                max(off for off, _ in self._lost),
                eps_levels(self._poison.eps),
                100 * left,
            )
        tell_unprotected(self.unprotected, skip)


def _what_is_left(
    original: NDArray[Any], meant: NDArray[Any], found: NDArray[Any]
) -> tuple[int, float]:
    """Return the largest change, and how much of the change that was meant is in it.

    Args:
        original, meant, found: uint8 (H, W, C): before, as protected, and as its file has it.
    """
    largest, both, wanted = 0, 0, 0
    for top in range(0, len(original), BAND):  # whole pictures of integers would take gigabytes
        rows = slice(top, top + BAND)
        before = original[rows].astype(np.int64)
        asked, got = meant[rows] - before, found[rows] - before
        largest = max(largest, int(np.abs(got).max()))
        both, wanted = both + int((asked * got).sum()), wanted + int((asked * asked).sum())
    return largest, both / max(wanted, 1)
