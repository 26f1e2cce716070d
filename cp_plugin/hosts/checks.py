"""Whether a module fits the contract: a loss of two or more views, free of labels, returned."""

from __future__ import annotations

import inspect
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

MASKED = {
    "MAEDecoder": "MAE",
    "MAEDecoderTIMM": "MAE",
    "MAEBackbone": "MAE",
    "MaskedVisionTransformerDecoder": "MAE",
    "PixioDecoderTIMM": "Pixio",
    "IJEPAPredictor": "I-JEPA",
    "IJEPAPredictorTIMM": "I-JEPA",
    "IJEPABackbone": "I-JEPA",
    "AIMPredictionHead": "AIM",
    "MaskedCausalVisionTransformer": "AIM",
    "CAPIPredictorTIMM": "CAPI",
}
"""Lightly's building blocks of methods that predict hidden parts of one view, and the methods."""
NOISE = 10.0
"""A gradient depends on labels if they change it more than this many times what chance does."""
SMALLEST = 1e-5


SINGLE = frozenset({"MAETransform", "AIMTransform", "CAPITransform", "IJEPATransform"})
"""Lightly's transforms for such methods."""


def check_pipeline(method: str, pipeline: Any) -> None:
    """Check that a transform makes views to compare.

    Raises:
        UserError: it belongs to masked modelling or I-JEPA.
    """
    for base in type(pipeline).__mro__:
        if base.__name__ in SINGLE and base.__module__.startswith("lightly."):
            raise UserError(_masked(method, f"the transform {base.__name__}"))


def check_module(module: Any, views: int) -> None:
    """Check what can be seen before a step has run.

    Args:
        module: a LightningModule.
        views: number of views that its transform makes of an image.

    Raises:
        UserError: it takes the loader's iterator, or masks its images.
    """
    name = type(module).__name__
    step = getattr(module, "training_step", None)
    if step is not None and "dataloader_iter" in inspect.signature(step).parameters:
        raise UserError(
            f"{name}.training_step takes dataloader_iter, so no row numbers can be added to its "
            "batches; take `batch, batch_idx` instead."
        )
    for part in module.modules():
        for base in type(part).__mro__:
            if base.__name__ in MASKED and base.__module__.startswith("lightly."):
                raise UserError(_masked(name, f"{MASKED[base.__name__]}'s {base.__name__}"))
    if views < 2:
        raise UserError(
            f"the data set's transform makes one view of an image for {name}, and a contrastive "
            "poison minimises a loss that compares two or more; let `self.transform` make them, "
            "as Lightly's MultiViewTransform([first, second]) does (views that a collate_fn or "
            "training_step makes are not seen before they are augmented), or, where the method "
            "compares no views, craft on SimCLR, MoCo or BYOL and train it as a victim."
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
    yield from _gradient(gradients_of(), views, batch, first)
    yield from _gradient(gradients_of(), views, rolled, other)
    size = sum(float(g.norm()) for g in first)
    change = _distance(first, other)
    if change <= SMALLEST * size:
        return
    yield from _gradient(gradients_of(), views, batch, again)
    if change > NOISE * _distance(first, again):
        raise UserError(
            f"the loss of {method} depends on the labels of its batch: with other labels its "
            f"gradient changes by {100 * change / max(size, 1e-30):.2g} %. A contrastive poison "
            "minimises a loss without labels: leave the supervised term out, or call the module "
            "that reads labels `…classifier` and give it detached features."
        )


def _gradient(
    gradients: MomentumGradients, views: Sequence[Tensor], batch: Batch, found: list[Tensor]
) -> LossRequests:
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


def _distance(first: list[Tensor], other: list[Tensor]) -> float:
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


def _masked(name: str, what: str) -> str:
    return (
        f"{name} has {what}: such methods predict hidden parts of one view (masked modelling, "
        "I-JEPA), and a contrastive poison minimises a loss that compares two or more views. Use a "
        "method such as SimCLR, MoCo, BYOL or DINO as surrogate; any method can be a victim."
    )
