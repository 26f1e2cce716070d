"""The differentiable twin of a host's augmentation pipeline.

`mirror(pipeline)` reads a torchvision, solo-learn or Lightly pipeline and returns a module that
maps images (B, C, H, W) in [0, 1] to the list of its views, with gradients.
"""

import cp_plugin.mirror.twins_hosts
import cp_plugin.mirror.twins_rare
import cp_plugin.mirror.twins_torchvision  # noqa: F401  (each registers its twins)
from cp_plugin.mirror.operation import Operation, Params, Shape
from cp_plugin.mirror.pipeline import Mirror, mirror
from cp_plugin.mirror.translate import register_twin

__all__ = ["Mirror", "Operation", "Params", "Shape", "mirror", "register_twin"]
