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
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cp_plugin.apps.protect.files import Writing, tell_unprotected, writing_time
from cp_plugin.apps.protect.plan import Plan, Settings
from cp_plugin.apps.protect.sources import LEAST, Source, sources_of
from cp_plugin.apps.timing import timed
from cp_plugin.attack.poison_file import Poison
from cp_plugin.config.settings import UserError
from cp_plugin.data.picture_cache import CACHE, Filling
from cp_plugin.data.picture_pixels import FileFormat
from cp_plugin.util.run_files import POISON_FILE
from cp_plugin.util.whole_files import clear_partial, write_text

log = logging.getLogger("cp_plugin")

SETTINGS, PLAN = "settings.json", "plan.json"


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
    work = work_folder(out)
    pictures = sources_of(sources, out)
    _check_place(out, work, poison_file)
    for folder in (out, work):
        clear_partial(folder)
    if poison_file is None:
        poison_file = _crafted(pictures, work, settings, skip_unreadable, started)
    poison = Poison.load(poison_file)
    if poison.fit != "cover":
        raise UserError(
            f"{poison_file} was made for images of {poison.size[0]} x {poison.size[1]} pixels, not "
            "for pictures of any size; craft it with cp-plugin protect, or with poison.fit=cover."
        )
    writing = Writing(out, work, poison, file_format)
    for _ in timed("writing", writing.all(pictures), len(pictures)):
        pass
    writing.tell(skip_unreadable)
    shutil.rmtree(work / CACHE, ignore_errors=True)
    return writing.written


def work_folder(out: Path) -> Path:
    """Return the folder beside OUT that holds what must not be published."""
    return out.with_name(f"{out.name}-poison")


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
    tell_unprotected(unreadable, skip)
    left = len(pictures) - len(unreadable)
    if left < LEAST:
        raise UserError(f"only {left} of the pictures can be read, and {LEAST} are needed.")
    # Heavy: a poison that is there already needs neither Lightning nor Hydra.
    from cp_plugin.apps.protect.craft import craft, measured_plan

    place = work / PLAN
    if place.is_file():
        plan = Plan(**json.loads(place.read_text(encoding="utf8")))
    else:
        writing = writing_time(pictures, work, settings, unreadable)
        so_far = time.perf_counter() - started
        plan = measured_plan(work, settings, left, so_far, writing)
        write_text(place, json.dumps(asdict(plan)))
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
        write_text(place, text)
        return
    before = json.loads(place.read_text(encoding="utf8"))
    changed = [key for key, value in json.loads(text).items() if before.get(key) != value]
    if changed:
        raise UserError(
            f"{work} was begun with {changed[0]}={before.get(changed[0])}; make the same call, or "
            "give another OUT."
        )
