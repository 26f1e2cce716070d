"""Tables and pictures from result files: one HTML page that needs nothing else, and Markdown."""

from __future__ import annotations

from pathlib import Path

from cp_plugin.apps.report.page import write

__all__ = ["report"]


def report(folder: Path, out: Path | None = None) -> tuple[Path, Path]:
    """Write `report.html` and `report.md`.

    Args:
        folder: of a study, of a demo, or any with runs of the embedded engine below it.
        out: where the two files go; None: the folder itself.

    Returns:
        The two files.

    Raises:
        UserError: there is no measured run in the folder.
    """
    return write(folder, out or folder)
