"""`cp-plugin protect`: pictures of one's own, changed so that nobody can pretrain on them usefully.

What it makes lies in two folders: OUT, a tree like the given one, and OUT-poison beside it, which
holds the poison and must not be published: who has it can take it off again. A call that was
interrupted goes on where it was when it is made again.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cp_plugin.apps.craft_plan import CACHE, Plan, Settings, craft, measured_plan
from cp_plugin.apps.protected_looks import (
    AMPLIFIED,
    Look,
    centre,
    comparable,
    side_by_side,
    similarity,
)
from cp_plugin.apps.timing import timed
from cp_plugin.attack.poison_file import Poison
from cp_plugin.config.settings import UserError, eps_levels
from cp_plugin.data import Canonical, image_key
from cp_plugin.data.picture_cache import Filling, cluster_name
from cp_plugin.data.picture_files import distinct_names, listing, tell_left_out
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
from cp_plugin.util.run_files import POISON_FILE

log = logging.getLogger("cp_plugin")

LEAST = 64
"""Pictures that are enough to train a small network on."""
NO_ROW = (
    "the poison has no perturbation for it: it was made with --clusters 0, for its own pictures"
)
NAMED = 20
"""Files that an error names."""
MEASURED = 5
"""Files whose loss by compression is measured."""
SHOWN = 8
"""Pictures that are compared with their originals."""
SETTINGS, PLAN, LOOKS = "settings.json", "plan.json", "looks.png"


@dataclass(frozen=True)
class Source:
    """A picture to protect."""

    file: Path
    name: Path
    """Below OUT, with the ending that the picture has."""


def protect(
    sources: Sequence[Path],
    out: Path,
    settings: Settings,
    poison_file: Path | None = None,
    file_format: FileFormat = "png",
    skip_unreadable: bool = False,
) -> int:
    """Protect pictures.

    Args:
        sources: folders, whose trees are kept, and files.
        out: a new or empty folder, or one of a call like this that was interrupted.
        settings: of the poison.
        poison_file: a poison to use instead of crafting one.
        file_format: of what is written.
        skip_unreadable: leave out files that cannot be protected.

    Returns:
        The number of protected pictures in `out`.

    Raises:
        UserError: pictures that cannot be read, too few of them, or folders that do not fit.
    """
    started = time.perf_counter()
    work = out.with_name(f"{out.name}-poison")
    pictures = _sources(sources, out)
    _check_place(out, work, poison_file)
    if poison_file is None:
        poison_file = _crafted(pictures, work, settings, skip_unreadable, started)
    poison = Poison.load(poison_file)
    if poison.fit != "cover":
        raise UserError(
            f"{poison_file} was made for images of {poison.size[0]} x {poison.size[1]} pixels, not "
            "for pictures of any size; craft it with cp-plugin protect, or with poison.fit=cover."
        )
    writing = _Writing(out, work, poison, file_format)
    for _ in timed("writing", writing.all(pictures), len(pictures)):
        pass
    writing.tell(skip_unreadable)
    shutil.rmtree(work / CACHE, ignore_errors=True)
    return writing.written


def _sources(given: Sequence[Path], out: Path) -> list[Source]:
    """List the pictures.

    Raises:
        UserError: there are none, or OUT lies among them.
    """
    found: list[Source] = []
    for path in given:
        if path.is_dir():
            if out.resolve().is_relative_to(path.resolve()):
                raise UserError(
                    f"{out} lies in {path}, whose files stay as they are; choose another."
                )
            listed = listing(path)
            tell_left_out(path, listed.left_out)
            found += [Source(file, file.relative_to(path)) for file in listed.pictures]
        elif path.is_file():
            found.append(Source(path, Path(path.name)))
        else:
            raise UserError(f"there is no file or folder at {path}.")
    if not found:
        raise UserError(f"there are no pictures in {', '.join(map(str, given))}.")
    names = [source.name for source in found]
    if len(set(names)) < len(names):
        raise UserError(
            "two of the given folders hold files of the same name; protect them one by one."
        )
    return found


def _check_place(out: Path, work: Path, poison_file: Path | None) -> None:
    occupied = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if occupied and not (work / SETTINGS).is_file() and poison_file is None:
        raise UserError(f"{out} is not empty, and there is no {work} beside it; give a new folder.")


def _crafted(
    pictures: list[Source], work: Path, settings: Settings, skip: bool, started: float
) -> Path:
    """Return the poison of the pictures, crafted now or by an earlier call."""
    _keep(work, settings)
    poison_file = work / POISON_FILE
    if poison_file.is_file():
        return poison_file
    if len(pictures) < LEAST:
        raise UserError(
            f"{len(pictures)} pictures are too few to train on, {LEAST} are needed; protect them "
            "with a poison that was made on more: --with OUT-poison/poison.safetensors."
        )
    filling = Filling(work / CACHE, [source.file for source in pictures], settings.size)
    unreadable: dict[Path, str] = {}
    for file, reason in timed("reading", filling.fill(), len(pictures)):
        if reason is not None:
            unreadable[file] = reason
    _tell_unprotected(unreadable, skip)
    left = len(pictures) - len(unreadable)
    if left < LEAST:
        raise UserError(f"only {left} of the pictures can be read, and {LEAST} are needed.")
    place = work / PLAN
    if place.is_file():
        plan = Plan(**json.loads(place.read_text(encoding="utf8")))
    else:
        writing = _writing_time(pictures, work, settings, unreadable)
        so_far = time.perf_counter() - started
        plan = measured_plan(work, settings, left, so_far, writing)
        _written_whole(place, json.dumps(asdict(plan)))
    log.info("%s", plan)
    made = craft(work, settings, plan)
    made.replace(poison_file)
    return poison_file


def _keep(work: Path, settings: Settings) -> None:
    """Write the settings, or check them against those of the first call.

    Raises:
        UserError: they differ.
    """
    place, text = work / SETTINGS, json.dumps(asdict(settings), indent=1)
    if not place.is_file():
        work.mkdir(parents=True, exist_ok=True)
        _written_whole(place, text)
        return
    before = json.loads(place.read_text(encoding="utf8"))
    changed = [key for key, value in json.loads(text).items() if before.get(key) != value]
    if changed:
        raise UserError(
            f"{work} was begun with {changed[0]}={before.get(changed[0])}; make the same call, or "
            "give another OUT."
        )


def _written_whole(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf8")
    partial.replace(path)


def _tell_unprotected(files: dict[Path, str], skip: bool) -> None:
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


def _writing_time(
    pictures: list[Source], work: Path, settings: Settings, unreadable: dict[Path, str]
) -> float:
    """Return how long it takes to write all pictures, in seconds, from a few of them."""
    readable = [source for source in pictures if source.file not in unreadable]
    some = [readable[int(n)] for n in np.linspace(0, len(readable) - 1, 3).round()]
    began = time.perf_counter()
    for source in some:
        picture, canonical = read(source.file, Canonical(settings.size, "cover"))
        add(picture, canonical.float() / 255 * settings.eps, settings.eps)
        partial = work / f"partial{ending(source.file, 'png')}"
        write(picture, partial)
        partial.unlink()
    return (time.perf_counter() - began) * len(readable) / len(some)


class _Writing:
    """Writes protected pictures, each whole or not at all."""

    def __init__(self, out: Path, work: Path, poison: Poison, file_format: FileFormat) -> None:
        self._out, self._work, self._poison, self._format = out, work, poison, file_format
        self._canonical = Canonical(poison.size, poison.fit)
        self._placement = Placement.of(poison)
        self.written = 0
        self.unprotected: dict[Path, str] = {}
        """Files that are not in OUT, and why."""
        self.in_full_colour: dict[Path, str] = {}
        self.lost: list[tuple[int, float]] = []
        """Of some JPEG files: the largest change in levels, and the part of delta that is left."""
        self._looks: list[Look] = []

    def all(self, pictures: Sequence[Source]) -> Iterator[None]:
        """Write those that are not there yet; yield after each."""
        self._work.mkdir(parents=True, exist_ok=True)
        endings = [ending(source.file, self._format) for source in pictures]
        names = distinct_names([source.name for source in pictures], endings)
        for source, name in zip(pictures, names, strict=True):
            if (self._out / name).exists():
                self.written += 1
            else:
                try:
                    self._one(source, self._out / name)
                    self.written += 1
                except CannotProtect as error:
                    self.unprotected[source.file] = str(error)
            yield

    def _one(self, source: Source, target: Path) -> None:
        picture, canonical = read(source.file, self._canonical)
        delta = self._delta(canonical)
        measured = is_lossy(target) and not picture.inks and len(self.lost) < MEASURED
        before = picture.colours.astype(np.int16) if measured else None
        shown = comparable(picture.colours) and len(self._looks) < SHOWN
        looked = centre(picture.colours) if shown else None
        add(picture, delta, self._poison.eps)
        if looked is not None:
            self._looks.append(Look(looked, centre(picture.colours)))
        if picture.changed_mode is not None:
            self.in_full_colour[source.file] = f"mode {picture.changed_mode}"
        # In the work folder, since OUT never holds half a file.
        partial = self._work / f"partial{target.suffix}"
        write(picture, partial)
        if before is not None:
            meant, after = picture.colours - before, read(partial, self._canonical)[0].colours
            self.lost.append(_what_is_left(meant, after - before))
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.replace(target)

    def _delta(self, canonical: Tensor) -> Tensor:
        if self._placement is None:
            rows = self._poison.rows(keys=[image_key(canonical)])
        else:
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
        if self.lost:
            worst, left = max(off for off, _ in self.lost), np.mean([part for _, part in self.lost])
            log.warning(
                "JPEG is lossy: of %d files measured, pixels are off by up to %d levels (the "
                "budget is %d), and %.0f %% of the perturbation is left; PNG keeps both",
                len(self.lost),
                worst,
                eps_levels(self._poison.eps),
                100 * left,
            )
        _tell_unprotected(self.unprotected, skip)


def _what_is_left(meant: NDArray[Any], found: NDArray[Any]) -> tuple[int, float]:
    """Return the largest change, and how much of what was meant is in it."""
    wanted, got = meant.astype(np.float64), found.astype(np.float64)
    left = (wanted * got).sum() / max((wanted * wanted).sum(), 1e-9)
    return int(np.abs(found).max()), float(left)
