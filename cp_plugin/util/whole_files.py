"""Files that are whole or as they were, whenever a process is killed or a disk is full."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space left, a quota that is used up, a file larger than allowed."""
TOLD = tuple(f"os error {number}" for number in FULL)
"""How safetensors, whose errors have no number, tells the same."""
LEAST = 1 << 16
"""A disk with less room, in bytes, is full."""
PART = 1 << 22
"""Bytes of a file that are read at a time."""
SENTENCE = (
    "{} cannot be written, since there is no room left on the disk; make room and run the same "
    "command again: what was finished before is intact."
)

HERE = re.sub(r"\W", "", platform.node()) or "here"
"""This machine, in the names of files that are being written: others may share the disk."""
PARTIAL = re.compile(rf"\..+\.{HERE}-(\d+)(\.\w+)?")
"""Names of files that are being written here, with the process that writes them."""


class NoRoom(OSError):
    """A disk is full, or a file may not be as large; the text is a sentence for the user."""


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a path beside a file to write to; it takes the file's place once it is on the disk.

    Args:
        path: the file; folders that it needs are made. The path given has its ending.

    Raises:
        NoRoom: there is no room; what was at the path stays.
    """
    partial = path.with_name(f".{path.stem}.{HERE}-{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except Exception as error:
        full = isinstance(error, OSError) and _is_full(path.parent)  # Pillow drops the number
        if full or is_no_room(error):
            raise NoRoom(SENTENCE.format(path)) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def clear_partial(folder: Path) -> None:
    """Remove what processes of this machine that were killed had begun to write below a folder."""
    for place, _, names in os.walk(folder):
        for name in names:
            found = PARTIAL.fullmatch(name)
            if found and not _runs(int(found[1])):
                Path(place, name).unlink(missing_ok=True)


def _runs(process: int) -> bool:
    if os.name == "nt":  # where a signal would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def write_text(path: Path, text: str) -> None:
    """Write a text file whole, in UTF-8, see `written_whole`."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf8")


def sha256(path: Path) -> str:
    """Return the hash of a file's content, in hexadecimal; it is read a part at a time."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(PART):
            found.update(part)
    return found.hexdigest()


def reserve(path: Path) -> None:
    """Take the room that a sparse file may need; a mapped one that finds none ends the process."""
    if hasattr(os, "posix_fallocate"):
        with path.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def is_no_room(error: BaseException) -> bool:
    """Whether an error tells that a disk is full or a file may not be as large."""
    if isinstance(error, NoRoom) or (isinstance(error, OSError) and error.errno in FULL):
        return True
    return any(words in str(error) for words in TOLD)


def _is_full(folder: Path) -> bool:
    return folder.is_dir() and shutil.disk_usage(folder).free < LEAST


def no_room_sentence(error: BaseException) -> str:
    """Return what to say of an error that `is_no_room` knows."""
    if isinstance(error, NoRoom):
        return str(error)
    return SENTENCE.format(getattr(error, "filename", None) or "a file")
