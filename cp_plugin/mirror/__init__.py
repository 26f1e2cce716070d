"""The differentiable counterpart of a host's augmentation pipeline.

`mirror(pipeline)` reads a torchvision, solo-learn, Lightly or stable-pretraining pipeline and
returns a module that maps images (B, C, H, W) in [0, 1] to the list of its views, with gradients.
"""

import cp_plugin.mirror.from_hosts
import cp_plugin.mirror.from_kornia
import cp_plugin.mirror.from_stable_pretraining
import cp_plugin.mirror.from_torchvision
import cp_plugin.mirror.from_torchvision_policies
import cp_plugin.mirror.from_torchvision_rare  # noqa: F401  (each registers its ops)
from cp_plugin.mirror.base import Operation, Params, Shape
from cp_plugin.mirror.pipeline import Mirror, mirror
from cp_plugin.mirror.registry import register_op

register_twin = register_op
"""The name of `register_op` in version 0.1."""

__all__ = ["Mirror", "Operation", "Params", "Shape", "mirror", "register_op", "register_twin"]
