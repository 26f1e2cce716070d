"""What the attack, the callbacks and the monitor see of a framework's method: one small protocol.

Adapters (`cp_plugin.adapters`) put a framework behind it; everything else in the package knows only
this. Shapes: B images of a batch, C channels, H and W pixels, V views, D feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn


class Batch(NamedTuple):
    """Images as the data set holds them, before any augmentation, and what came with them."""

    rows: Tensor
    """int64 (B), on the CPU: the images' positions in the training set."""
    keys: Tensor
    """int64 (B), on the CPU: 64-bit hashes of the decoded pixels, see
    `cp_plugin.data.image_key`."""
    images: Tensor
    """uint8 (B, C, H, W), all of one size."""
    sample: Any
    """The host's own collated sample, its views missing; `Host.loss` puts views back."""


@runtime_checkable
class Host(Protocol):
    """An SSL method as its framework runs it.

    `loss` is the framework's own computation, reached through its own `training_step`; it may leave
    traces (EMA, queue, statistics, logs), which `cp_plugin.release.untouched` undoes.
    """

    framework: str
    """The framework's name, as it is written into poison files: `lightly`, `solo-learn`."""
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
