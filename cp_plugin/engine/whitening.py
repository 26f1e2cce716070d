"""A fixed first layer that whitens small patches of an image, in front of any backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cp_plugin.data import RawDataset
from cp_plugin.data.canonical import canonical_size

if TYPE_CHECKING:  # an encoder that is fitted already needs no augmentations
    from cp_plugin.mirror import Mirror

PATCHES = (2, 3)
"""Sides in pixels of the patches that can be whitened."""
IMAGES = 2000
"""Images, spread over the data set, whose views the covariance is estimated from."""
EPSILON = 5e-4
"""Added to every eigenvalue, in units of the normalised pixels' variance."""


class Whitening(nn.Module):
    """Convolution with the principal components of patches, each scaled to variance 1.

    Every component comes with both signs before a GELU, so that none of it is lost: 2 * 3 * p * p
    channels for patches of p x p pixels. The filters are a buffer: no optimiser moves them, and
    checkpoints hold them. Until `fit_whitening` has been called they are zero.

    Whitening makes directions of small variance, such as fine detail, as loud as any other, so a
    network behind it discovers small perturbations sooner, random ones too: beside every figure
    of a whitened network belongs that of random noise.

    Source: the first layer of Keller Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU"
    (airbench), 2024, section 3.2, after tysam-code, "hlb-CIFAR10", 2023.
    """

    weight: Tensor
    """float (6 p p, 3, p, p)."""

    def __init__(self, patch_size: int, stride: int = 1) -> None:
        """Make an empty layer.

        Args:
            patch_size: side of the patches in pixels, p.
            stride: in pixels; an image of side s becomes a map of side s / stride.
        """
        super().__init__()
        self.patch_size, self.stride = patch_size, stride
        self.channels = 6 * patch_size**2
        self.register_buffer("weight", torch.zeros(self.channels, 3, patch_size, patch_size))
        missing = patch_size - stride
        before = max(0, missing) // 2
        self._padding = (before, max(0, missing) - before) * 2

    def forward(self, x: Tensor) -> Tensor:
        """Return whitened patches, (B, 6 p p, H / stride, W / stride), of images (B, 3, H, W)."""
        padded = functional.pad(x, self._padding) if any(self._padding) else x
        return functional.gelu(functional.conv2d(padded, self.weight, stride=self.stride))

    @torch.no_grad()
    def fit(self, views: Sequence[Tensor]) -> None:
        """Take the principal components of the patches of normalised views, (B, 3, H, W) each."""
        count, total, square = 0, torch.zeros(()), torch.zeros(())
        for view in views:
            patches = functional.unfold(view, self.patch_size).transpose(1, 2).flatten(0, 1)
            patches = patches.double().cpu()
            count, total = count + len(patches), total + patches.sum(0)
            square = square + patches.T @ patches
        mean = total / count
        values, vectors = torch.linalg.eigh(square / count - mean[:, None] * mean)
        filters = (vectors / (values.clamp_min(0) + EPSILON).sqrt()).T.flip(0)
        filters = filters.view(-1, 3, self.patch_size, self.patch_size).to(self.weight)
        self.weight.copy_(torch.cat([filters, -filters]))


class Whitened(nn.Module):
    """A backbone behind a whitening layer."""

    def __init__(self, whitening: Whitening, backbone: nn.Module, width: int) -> None:
        """Join them.

        Args:
            whitening: the first layer.
            backbone: takes as many channels as that layer gives.
            width: of the backbone's features.
        """
        super().__init__()
        self.whitening, self.backbone = whitening, backbone
        self.num_features = width

    def forward(self, x: Tensor) -> Tensor:
        """Return features, (B, D), of images, (B, 3, H, W)."""
        features: Tensor = self.backbone(self.whitening(x))
        return features


def fit_whitening(module: nn.Module, dataset: Any, views: Mirror) -> None:
    """Fit every whitening layer of a module to clean augmented images; nothing if it has none.

    All of them get the same filters, which depend on data set and augmentations alone, not on the
    seed of the run: surrogates and victims see images through the same first layer.

    Args:
        module: a method, its momentum branch included.
        dataset: map-style, with images before augmentation that `RawDataset` can read.
        views: the mirror of its augmentations.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, Whitening)]
    if not layers:
        return
    raw = RawDataset(dataset, canonical_size(dataset, views.resized_side))
    rows = torch.linspace(0, len(raw) - 1, min(IMAGES, len(raw))).round().long()
    images = torch.stack([raw[int(row)].image for row in rows]).float() / 255
    made = views(images, generator=torch.Generator().manual_seed(0))
    for layer in layers:
        layer.fit(made)
