"""Tables and pictures from result files: one HTML page that needs nothing else, and Markdown."""

from __future__ import annotations

from pathlib import Path

from cp_plugin.apps.report.page import write
from cp_plugin.apps.report.projection import PCA, check_projection

__all__ = ["report"]


def report(folder: Path, out: Path | None = None, features: str = PCA) -> tuple[Path, Path, Path]:
    """Write `report.html`, `report.md`, and `report.csv` with every measured run.

    Args:
        folder: of a study, of a demo, or any with runs of the embedded engine below it.
        out: where the files go; None: the folder itself.
        features: how maps of features are made, `pca` or `tsne`.

    Returns:
        The three files.

    Raises:
        UserError: there is no measured run in the folder, or `tsne` without scikit-learn.
    """
    check_projection(features)
    return write(folder, out or folder, features)
