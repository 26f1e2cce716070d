"""Defences that change an image before its augmentation: in a data set, or as a transform."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

from cp_plugin.config.defences import (
    BitDepthConfig,
    DiffusionConfig,
    GreyConfig,
    JpegConfig,
    MatrixCompletionConfig,
    OrthogonalConfig,
    PurifyConfig,
    SmoothingConfig,
    defence_settings,
)
from cp_plugin.config.settings import UserError
from cp_plugin.data import PreTransformDataset
from cp_plugin.data.image import Size
from cp_plugin.defences.completion import Completions
from cp_plugin.defences.denoiser import fitted_denoiser
from cp_plugin.defences.diffusion import diffusion_purifier
from cp_plugin.defences.precomputed import Precomputed
from cp_plugin.defences.projection import fitted_projection
from cp_plugin.defences.squeezing import BitDepth, Grey, Jpeg

ImageSettings = (
    MatrixCompletionConfig
    | SmoothingConfig
    | JpegConfig
    | GreyConfig
    | BitDepthConfig
    | OrthogonalConfig
    | PurifyConfig
    | DiffusionConfig
)
IMAGE_DEFENCES = get_args(ImageSettings)


class Smoothing(nn.Module):
    """Blur images with a Gaussian or a median window; borders are reflected.

    Shape:
        (C, H, W) or (B, C, H, W), uint8 or float, to the same.

    Source: Xu, Evans, Qi, "Feature Squeezing", NDSS 2018.
    """

    def __init__(self, kind: str = "gaussian", size: int = 3, sigma: float = 1.0) -> None:
        """Take the settings of `SmoothingConfig`.

        Raises:
            UserError: a value is out of range.
        """
        super().__init__()
        self.config = SmoothingConfig(kind, size, sigma)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        """Return the blurred images."""
        config = self.config
        if config.kind == "gaussian":
            window = [config.size, config.size]
            blurred: Tensor = functional.gaussian_blur(images, window, [config.sigma] * 2)
            return blurred
        reach = config.size // 2
        batch = images if images.ndim == 4 else images[None]
        padded = nn.functional.pad(batch.float(), [reach] * 4, mode="reflect")
        windows = padded.unfold(2, config.size, 1).unfold(3, config.size, 1)
        median = windows.flatten(-2).median(-1).values.to(images.dtype)
        return median.view_as(images)

    def extra_repr(self) -> str:
        """Name the settings."""
        return f"{self.config.kind}, size={self.config.size}, sigma={self.config.sigma}"


class Purified(Precomputed):
    """The images of a data set as a purifier leaves them.

    A purifier is any module from uint8 images (B, C, H, W) to the same.
    """

    name = "purification"

    def __init__(
        self,
        dataset: Any,
        purifier: nn.Module,
        image_size: int | Size | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Purify them, in eval mode and without gradients; see `Precomputed`."""

        @torch.no_grad()
        def purified(images_BCHW: Tensor) -> Tensor:
            found: Tensor = purifier(images_BCHW)
            return found[:, None]

        super().__init__(dataset, purified, image_size, device)


class _Changed:
    """Changes images of a data set by a module; what `PreTransformDataset` calls."""

    reads_labels = False

    def __init__(self, change: nn.Module) -> None:
        self._change = change

    @torch.no_grad()
    def __call__(self, image_CHW: Tensor, key: int, label: int) -> Tensor:
        changed: Tensor = self._change(image_CHW)
        return changed

    @torch.no_grad()
    def many(self, images_BCHW: Tensor, keys: Sequence[int], labels: Sequence[int]) -> Tensor:
        changed: Tensor = self._change(images_BCHW)
        return changed


def defended(
    dataset: Any,
    name: str,
    *,
    image_size: int | Size | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    **settings: Any,
) -> PreTransformDataset:
    """Return a data set whose images are defended before its own transform.

    Args:
        dataset: a map-style data set of images, poisoned ones included; it stays as it is.
        name: `matrix_completion` (all completions are made now), `smoothing`, `jpeg`, `grey`,
            `bit_depth`, `orthogonal` (its classifier is fitted now), `purify` or `diffusion` (all
            images are purified now).
        image_size: canonical height and width in pixels, or the side of a square; None keeps
            the images' own.
        device: where completions are computed, classifiers fitted and images purified.
        seed: of the pixels that are dropped, of the order of the images, of a purifier's noise.
        settings: those of the defence, by name, see `cp_plugin.config.defences`.

    Raises:
        UserError: another name, an unknown setting, or images that cannot be read.

    Example:
        >>> dataset = defended(ImageFolder("images", transform), "matrix_completion")
    """
    config = defence_settings(name, settings)
    if not isinstance(config, IMAGE_DEFENCES):
        raise UserError(
            f"{name} does not change the images of a data set; defended serves matrix_completion, "
            "smoothing, jpeg, grey, bit_depth, orthogonal, purify and diffusion, the others act on "
            "views and labels (see cp_plugin.defences)."
        )
    return with_images_changed(dataset, config, image_size, device, seed)[0]


def with_images_changed(
    dataset: Any,
    config: ImageSettings,
    image_size: int | Size | None,
    device: torch.device | str,
    seed: int,
) -> tuple[PreTransformDataset, dict[str, float]]:
    """Do what `defended` does, with checked settings; return what it took as well."""
    if isinstance(config, MatrixCompletionConfig):
        made = Completions(dataset, config, image_size, device, seed)
        return PreTransformDataset(dataset, made, image_size), {
            "completion_seconds": round(made.seconds, 2)
        }
    if isinstance(config, PurifyConfig | DiffusionConfig):
        purifier, facts = _purifier(config, device, seed)
        purified = Purified(dataset, purifier, image_size, device)
        facts["purification_seconds"] = round(purified.seconds, 2)
        return PreTransformDataset(dataset, purified, image_size), facts
    facts = {}
    if isinstance(config, OrthogonalConfig):
        change: nn.Module
        change, seconds = fitted_projection(dataset, config, image_size, device, seed)
        facts["projection_seconds"] = round(seconds, 2)
    else:
        change = _module(config)
    changed = _Changed(change)
    return PreTransformDataset(dataset, changed, image_size, changed.many), facts


def _purifier(
    config: PurifyConfig | DiffusionConfig, device: torch.device | str, seed: int
) -> tuple[nn.Module, dict[str, float]]:
    """Return a purifier, on the device, and what making it took."""
    if isinstance(config, DiffusionConfig):
        return diffusion_purifier(config, device, seed), {}
    denoiser, seconds = fitted_denoiser(config, device, seed)
    return denoiser, {"denoiser_seconds": round(seconds, 2)}


def _module(config: SmoothingConfig | JpegConfig | GreyConfig | BitDepthConfig) -> nn.Module:
    if isinstance(config, SmoothingConfig):
        return Smoothing(config.kind, config.size, config.sigma)
    if isinstance(config, JpegConfig):
        return Jpeg(config.quality)
    return Grey() if isinstance(config, GreyConfig) else BitDepth(config.bits)
