"""Images without what a linear classifier reads in them: orthogonal projection."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cp_plugin.config.defences import OrthogonalConfig
from cp_plugin.config.settings import UserError
from cp_plugin.data import labels
from cp_plugin.data.image import Size
from cp_plugin.defences.precomputed import canonical_images

RANK_ABOVE = 1e-4
"""Directions of weights with smaller singular values, as a part of the largest, are rounding."""

log = logging.getLogger("cp_plugin")


class Projection(nn.Module):
    """Remove from images what lies in the span of a linear classifier's weights.

    Shape:
        uint8 (C, H, W) or (B, C, H, W) to the same, clipped and rounded.
    """

    def __init__(self, weights_DK: Tensor) -> None:
        """Take the weights, float (C H W, K), of pixels in [0, 1]."""
        super().__init__()
        # From a start of zero the weights of all classes add up to zero: their rank is K - 1.
        left_DK, values_K, _ = torch.linalg.svd(weights_DK, full_matrices=False)
        self.register_buffer("basis_DK", left_DK[:, values_K > RANK_ABOVE * values_K.max()])

    basis_DK: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """Return the images without that part."""
        shown = images.flatten(-3).float() / 255
        left = shown - (shown @ self.basis_DK) @ self.basis_DK.T
        return left.mul(255).round().clamp(0, 255).to(torch.uint8).view_as(images)


def fitted_weights(
    images_ND: Tensor, labels_N: Tensor, config: OrthogonalConfig, seed: int
) -> Tensor:
    """Fit multinomial logistic regression by gradient descent; return its weights, (D, K).

    Args:
        images_ND: uint8.
        labels_N: int64, none negative.
        config: epochs, batch size and learning rate.
        seed: of the order of the images.
    """
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(images_ND.shape[1], int(labels_N.max()) + 1, device=images_ND.device)
    weights = list(model.parameters())
    with torch.no_grad():
        for weight in weights:
            weight.zero_()
    optimizer = torch.optim.SGD(weights, lr=config.lr, momentum=0.9)
    for _ in range(config.epochs):
        order = torch.randperm(len(images_ND), generator=generator).to(images_ND.device)
        for rows in torch.split(order, config.batch_size):
            shown = images_ND[rows].float() / 255
            loss = functional.cross_entropy(model(shown), labels_N[rows])
            for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                weight.grad = gradient
            optimizer.step()
    return model.weight.detach().T


def fitted_projection(
    dataset: Any,
    config: OrthogonalConfig,
    image_size: int | Size | None,
    device: torch.device | str,
    seed: int,
) -> tuple[Projection, float]:
    """Fit a classifier on the labelled images of a data set, and project away what it reads.

    Args:
        dataset: a map-style data set of images, poisoned ones included.
        config: the settings.
        image_size: of the canonical images, see `PreTransformDataset`.
        device: where the classifier is fitted.
        seed: of the order of the images.

    Returns:
        The projection, on the CPU, and the seconds that fitting took.

    Raises:
        UserError: there are no two classes, or images of several sizes.

    Source: Sandoval-Segura et al., "What Can We Learn from Unlearnable Datasets?", NeurIPS 2023,
        section 4.4.
    """
    known, started = labels(dataset), time.perf_counter()
    if known is None or len(torch.unique(known[known >= 0])) < 2:
        raise UserError(
            "defence=orthogonal fits a classifier and needs images of two labelled classes or "
            "more; use labelled data, or another defence."
        )
    images = [image for _, image in canonical_images(dataset, image_size)]
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise UserError(
            f"defence=orthogonal needs images of one size, got {len(shapes)}; resize them, or use "
            "another defence."
        )
    labelled = (known >= 0).nonzero().flatten()
    pixels = torch.stack([images[row].flatten() for row in labelled.tolist()]).to(device)
    chosen = seed if config.seed is None else config.seed
    weights = fitted_weights(pixels, known[labelled].to(device), config, chosen)
    seconds = time.perf_counter() - started
    log.info("orthogonal projection: fitted to %d images in %.1f s", len(pixels), seconds)
    return Projection(weights.cpu()), seconds
