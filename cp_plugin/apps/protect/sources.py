"""Which pictures a call of `cp-plugin protect` is about, and what they are called in OUT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cp_plugin.config.settings import UserError
from cp_plugin.data.picture_files import distinct_names, listing, tell_left_out
from cp_plugin.data.picture_pixels import FileFormat, ending

LEAST = 64
"""Pictures that are enough to train a small network on."""


@dataclass(frozen=True)
class Source:
    """A picture to protect."""

    file: Path
    name: Path
    """Below OUT, with the ending that the picture has."""


def sources_of(given: Sequence[Path], out: Path) -> list[Source]:
    """List the pictures of folders, and files.

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


def names_in_out(pictures: Sequence[Source], file_format: FileFormat) -> list[Path]:
    """Return each picture's name below OUT, with the ending that it gets there."""
    endings = [ending(source.file, file_format) for source in pictures]
    return distinct_names([source.name for source in pictures], endings)
