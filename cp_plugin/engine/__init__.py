"""The embedded engine: SimCLR, MoCo v2 and BYOL from Lightly's parts, in solo-learn's schema.

Names are imported at first use, so that a part of it (`placement`, `backbones`) needs neither
Lightning nor Lightly.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cp_plugin.engine.methods import METHODS, build_method
    from cp_plugin.engine.pipeline import build_pipeline, normalisation
    from cp_plugin.engine.settings import complete, device_count

__all__ = [
    "METHODS",
    "build_method",
    "build_pipeline",
    "complete",
    "device_count",
    "normalisation",
]

_HOME = {  # where each name is defined
    "METHODS": "cp_plugin.engine.methods",
    "build_method": "cp_plugin.engine.methods",
    "build_pipeline": "cp_plugin.engine.pipeline",
    "complete": "cp_plugin.engine.settings",
    "device_count": "cp_plugin.engine.settings",
    "normalisation": "cp_plugin.engine.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
