"""What the attack, the callbacks and the monitor see of a framework's method: one small protocol.

Adapters (`cp_plugin.hosts`) put a framework behind it; everything else in the package knows only
this. Shapes: B images of a batch, C channels, H and W pixels, V views, D feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from cp_plugin.data.batch import Batch


@runtime_checkable
class Host(Protocol):
    """An SSL method as its framework runs it.

    `loss` is the framework's own computation, reached through its own `training_step`; it may leave
    traces (EMA, queue, statistics, logs), which `preserve_state` undoes.
    """

    framework: str
    """The framework's name, as poison files have it: `lightly`, `solo-learn`, `pytorch`."""
    method: str
    """The method's name: `simclr`, `MoCo`, …"""
    module: nn.Module
    """The module that owns every parameter and buffer of the method."""

    def loss(self, views: Sequence[Tensor], batch: Batch) -> Tensor:
        """Return the method's scalar loss on V views, each float (B, C, h, w)."""
        ...

    def momentum_modules(self) -> Sequence[nn.Module]:
        """Return the modules of the momentum branch; empty when the method has none."""
        ...

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Return features, float (B, D), of normalised images; no gradient, no side effects."""
        ...
