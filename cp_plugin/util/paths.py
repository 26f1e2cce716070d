"""Where the package's configurations lie: inside an installed wheel, beside a source checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent


def shipped(folder: str) -> Path:
    """Return `configs` or `patches`: inside the package where a wheel put it, else beside it.

    Raises:
        FileNotFoundError: the installation is incomplete.
    """
    for place in (_PACKAGE / folder, _PACKAGE.parent / folder):
        if place.is_dir():
            return place
    raise FileNotFoundError(f"no {folder}/ in or beside {_PACKAGE}; install cp-plugin again")
