"""The embedded engine: SimCLR, MoCo v2 and BYOL from Lightly's parts, in solo-learn's schema."""

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
