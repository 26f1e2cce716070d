"""Where in an image a perturbation acts: the gradient of a method's loss with respect to delta."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cp_plugin.attack.loop import poisoned
from cp_plugin.config.settings import UserError
from cp_plugin.data.batch import Batch
from cp_plugin.hosts.protocol import Host
from cp_plugin.mirror import Mirror

TINY = 1e-30


@dataclass(frozen=True)
class Saliency:
    """The gradient of a loss with respect to the perturbations of B images."""

    gradient_BCHW: Tensor
    """float32, mean over draws of the augmentations."""
    loss: float
    """Mean over the draws."""
    alignment: float
    """-<gradient, delta> / (eps |gradient|_1), from -1 to 1: how much of what a step of length eps
    could lower the loss by, to first order, delta has. 1: every pixel is at the bound, against the
    gradient; about 0: delta is noise to this encoder."""

    @property
    def map_BHW(self) -> Tensor:
        """Mean magnitude over the channels, float32 (B, H, W)."""
        return self.gradient_BCHW.abs().mean(1)


def saliency(
    host: Host, mirror: Mirror, batch: Batch, delta_BCHW: Tensor, eps: float, draws: int, seed: int
) -> Saliency:
    """Differentiate the host's own loss on poisoned, augmented views with respect to delta.

    Gradients do not pass a momentum branch that the method itself cuts off.

    Args:
        host: a trained method, in the mode in which it is to be looked at; queues of it may move.
        mirror: its augmentations.
        batch: the clean images, all of one size.
        delta_BCHW: float32, the perturbation of each.
        eps: the budget, in [0, 1].
        draws: augmentations of every image that are averaged.
        seed: of the draws.

    Raises:
        UserError: the method has no loss for these images.
    """
    generator = torch.Generator().manual_seed(seed)
    total, losses = torch.zeros_like(delta_BCHW), []
    for _ in range(draws):
        delta = delta_BCHW.clone().requires_grad_()
        with torch.enable_grad():
            views = mirror(poisoned(batch.images, delta), generator)
            loss = host.loss(views, batch)
            if loss is None or not loss.requires_grad:
                raise UserError(f"{host.method} has no loss that depends on these images.")
            (gradient,) = torch.autograd.grad(loss, delta)
        total += gradient / draws
        losses.append(float(loss.detach()))
    size = float(total.abs().sum()) * eps
    alignment = -float((total * delta_BCHW).sum()) / max(size, TINY)
    return Saliency(total, sum(losses) / draws, alignment)
