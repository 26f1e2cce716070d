"""Whether a module fits the contract: a loss of its views, free of labels."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cp_plugin.config.settings import UserError
from cp_plugin.data.batch import Batch
from cp_plugin.data.slots import rebuilt
from cp_plugin.hosts.gradients import MomentumGradients, preserve_state
from cp_plugin.hosts.lineage import tensors_in
from cp_plugin.hosts.modes import hold_still
from cp_plugin.hosts.protocol import LossRequest, LossRequests

log = logging.getLogger("cp_plugin")

NOISE = 10.0
"""A gradient depends on labels if they change it more than this many times what chance does."""
SMALLEST = 1e-5


def check_module(module: Any) -> None:
    """Check what can be seen before a step has run.

    Args:
        module: a LightningModule, or the modules of a loop.

    Raises:
        UserError: it takes the loader's iterator.
    """
    step = getattr(module, "training_step", None)
    if step is not None and "dataloader_iter" in inspect.signature(step).parameters:
        raise UserError(
            f"{type(module).__name__}.training_step takes dataloader_iter, so no row numbers can "
            "be added to its batches; take `batch, batch_idx` instead."
        )


def tell_uncompared(method: str) -> None:
    """Log that a method compares no two views, so that the paper does not speak of its poison."""
    log.info(
        "%s compares no two views of an image: its own loss is minimised over delta all the same, "
        "which the paper (SimCLR, MoCo, BYOL) does not cover",
        method,
    )


def checking_labels(
    method: str,
    gradients_of: Callable[[], MomentumGradients],
    views: Sequence[Tensor],
    batch: Batch,
    labels: Tensor | None,
) -> LossRequests:
    """Check that the gradient with respect to the views is the same whatever the labels are.

    Args:
        method: its name.
        gradients_of: makes the context that the noise phase uses.
        views: V views, each float (B, C, h, w).
        batch: what they were made of.
        labels: int64 (B); None: integers of the sample that repeat are taken for labels.

    Raises:
        UserError: it is not: the method uses labels by design, or a classifier was not found.
    """
    rolled = batch._replace(sample=rebuilt(batch.sample, _roller(batch, labels)))
    if _equal(batch.sample, rolled.sample):
        return
    first: list[Tensor] = []
    other: list[Tensor] = []
    again: list[Tensor] = []
    yield from view_gradient(gradients_of(), views, batch, first)
    yield from view_gradient(gradients_of(), views, rolled, other)
    size = sum(float(g.norm()) for g in first)
    change = distance(first, other)
    if change <= SMALLEST * size:
        return
    yield from view_gradient(gradients_of(), views, batch, again)
    if change > NOISE * distance(first, again):
        raise UserError(
            f"the loss of {method} depends on the labels of its batch: with other labels its "
            f"gradient changes by {100 * change / max(size, 1e-30):.2g} %. A contrastive poison "
            "minimises a loss without labels: leave the supervised term out, or call the module "
            "that reads labels `…classifier` and give it detached features."
        )


def view_gradient(
    gradients: MomentumGradients, views: Sequence[Tensor], batch: Batch, found: list[Tensor]
) -> LossRequests:
    """Ask for the loss of a batch and fill in its gradient with respect to each view."""
    leaves = [view.detach().requires_grad_() for view in views]
    found[:] = [torch.zeros_like(leaf, dtype=torch.float32) for leaf in leaves]

    def on_loss(loss: Tensor, weight: Tensor | None = None, retain_graph: bool = False) -> None:
        if loss.requires_grad:
            parts = torch.autograd.grad(
                loss, leaves, weight, retain_graph=retain_graph, allow_unused=True
            )
            found[:] = [
                total if part is None else total + part.float()
                for total, part in zip(found, parts, strict=True)
            ]

    with preserve_state(gradients.module), torch.enable_grad():
        hold_still(gradients.module)
        with gradients:
            yield LossRequest([leaf.clone() for leaf in leaves], batch, on_loss)


def distance(first: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Return how far two gradients lie apart, the norms of all views added up."""
    return sum(float((a - b).norm()) for a, b in zip(first, other, strict=True))


def _roller(batch: Batch, labels: Tensor | None) -> Callable[[Any], Any]:
    """Return what gives every image another image's label; values stay those of the batch."""
    count = len(batch.rows)
    known = None if labels is None else labels.cpu()

    def roll(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape != (count,) or value.is_floating_point():
            return value
        own = value.cpu()
        if len(set(own.tolist())) == count and (known is None or not torch.equal(own, known)):
            return value  # a number of its own for each image is no label
        changes = (shift for shift in range(1, count) if not torch.equal(own.roll(shift), own))
        return value.roll(next(changes, 0))

    return roll


def _equal(first: Any, other: Any) -> bool:
    pairs = zip(tensors_in(first), tensors_in(other), strict=True)
    return all(torch.equal(before, after) for before, after in pairs)
