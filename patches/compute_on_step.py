"""solo-learn's online kNN passes an argument that torchmetrics 1.0 removed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

PACKAGE = "torchmetrics"
VERSIONS = ">=1.0"
REASON = (
    "solo-learn's knn_eval.enabled=True builds a metric with compute_on_step=False, which "
    "torchmetrics deprecated in 0.8 and refuses since 1.0"
)
LINK = "https://github.com/Lightning-AI/torchmetrics/pull/792"


def is_needed() -> bool:
    """Tell whether solo-learn is there and its metric cannot be built."""
    try:
        metric = importlib.import_module("solo.utils.knn").WeightedKNNClassifier
    except ImportError:
        return False
    try:
        metric()
    except ValueError as error:
        return "compute_on_step" in str(error)
    return False


def apply() -> Callable[[], None]:
    """Let this one metric take the argument, and update without computing as it asks for.

    Returns:
        What gives the metric its own base class back.
    """
    metric = importlib.import_module("solo.utils.knn").WeightedKNNClassifier
    before = metric.__bases__
    metric.__bases__ = (_updating(before[0]),)

    def undo() -> None:
        metric.__bases__ = before

    return undo


def _updating(base: Any) -> Any:
    class Updating(base):  # type: ignore[misc]
        """The metric's base class as it was before torchmetrics 1.0."""

        def __init__(self, compute_on_step: bool = True, **settings: Any) -> None:
            super().__init__(**settings)
            self._computes = compute_on_step

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            """Update and, unless `compute_on_step=False`, compute."""
            if self._computes:
                return super().forward(*args, **kwargs)
            return self.update(*args, **kwargs)

    return Updating
