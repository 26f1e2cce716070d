"""What the attack, the callbacks and the monitor see of a framework's method: one small protocol.

Adapters (`cp_plugin.hosts`) put a framework behind it; everything else in the package knows only
this. Whoever needs a loss (the attack, a check) asks for it by a `LossRequest`; a host answers, or
the body of a user's loop. Shapes: B images of a batch, C channels, H and W pixels, V views, D
feature width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import NamedTuple, Protocol, runtime_checkable

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

    def loss(self, views: Sequence[Tensor], batch: Batch) -> Tensor | None:
        """Return the method's scalar loss on V views, each float (B, C, h, w).

        None: the method leaves this batch out.
        """
        ...

    def show(self, request: LossRequest) -> None:
        """Compute the loss that is asked for and show it; a host may show several, which add up."""
        loss = self.loss(request.views, request.batch)
        if loss is not None:
            request.on_loss(loss)

    def momentum_modules(self) -> Sequence[nn.Module]:
        """Return the modules of the momentum branch; empty when the method has none."""
        ...

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Return features, float (B, D), of normalised images; no gradient, no side effects."""
        ...


class OnLoss(Protocol):
    """What a loss that was asked for is shown to, before anything else runs."""

    def __call__(
        self, loss: Tensor, weight: Tensor | None = None, retain_graph: bool = False
    ) -> None:
        """Take the loss; a request may be shown several, which add up.

        Args:
            loss: the loss, usually a scalar.
            weight: of the shape of the loss, what its gradient is multiplied by: the factor of a
                scaled loss; None: 1.
            retain_graph: whether another loss shares its graph.
        """
        ...


class LossRequest(NamedTuple):
    """A loss that is asked for: whoever can compute it does, and shows it at once."""

    views: Sequence[Tensor]
    """V views, each float (B, C, h, w)."""
    batch: Batch
    """What they were made of."""
    on_loss: OnLoss
    """To be called with the loss."""


LossRequests = Iterator[LossRequest]
"""Work that needs losses: the host stays prepared while a request is open, then it is put back."""


def answer(requests: LossRequests, host: Host) -> None:
    """Let a host compute the losses that are asked for."""
    with closing(requests):  # type: ignore[type-var]
        for request in requests:
            host.show(request)
