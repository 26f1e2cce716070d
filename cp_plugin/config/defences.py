"""Settings of the defences of a victim: frozen, checked where they are made, one unit each.

The names are those of the YAML group `defence` and of the keyword arguments of `Defence`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cp_plugin.config.settings import UserError, given


@dataclass(frozen=True)
class MatrixCompletionConfig:
    """Pixels dropped at random, the image completed with low rank (ME-Net; Yang et al., ICML 2019).

    The countermeasure that He, Zha and Katabi (ICLR 2023) try against contrastive poisons.
    """

    keep_min: float = 0.4
    """Least part of the pixels that is kept, in (0, 1)."""
    keep_max: float = 0.6
    """Largest part; the completions of an image are spread evenly between the two."""
    completions: int = 4
    """Completions an image; one of them is drawn whenever the image is loaded."""
    shrinkage: float = 0.3
    """Weight of the nuclear norm, in units of singular values of the image, pixels in [0, 1]."""
    iterations: int = 60
    """Thresholding steps."""
    seed: int | None = None
    """Of the pixels that are dropped. None: the run's seed."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UserError: a value is out of its range.
        """
        if not 0 < self.keep_min <= self.keep_max < 1:
            raise UserError(
                "expected 0 < defence.keep_min <= defence.keep_max < 1, parts of the pixels that "
                f"are kept; got {self.keep_min} and {self.keep_max}."
            )
        _within("completions", self.completions, 1, 100)
        _within("iterations", self.iterations, 1, 10_000)
        _positive("shrinkage", self.shrinkage)


@dataclass(frozen=True)
class AdversarialConfig:
    """Adversarial training: the victim trains on views moved to raise its own loss.

    Supervised: Madry et al., ICLR 2018. Contrastive, all views of an image moved together: Kim,
    Tack, Hwang, NeurIPS 2020; Jiang et al., NeurIPS 2020 (adversarial-to-adversarial).
    """

    eps: float = 8 / 255
    """Largest change of a pixel of a view, in [0, 1]."""
    steps: int = 7
    """Sign-gradient steps a batch."""
    step_size: float = 0.25
    """Length of one step, in units of eps."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UserError: a value is out of its range.
        """
        _within("eps", self.eps, 1e-6, 1)
        _within("steps", self.steps, 1, 1000)
        _within("step_size", self.step_size, 1e-6, 2)


@dataclass(frozen=True)
class NoiseConfig:
    """Gaussian noise on every view (a defence in section 5 of He, Zha, Katabi, ICLR 2023)."""

    std: float = 8 / 255
    """Standard deviation, pixels in [0, 1]."""

    def __post_init__(self) -> None:
        """Check the deviation.

        Raises:
            UserError: it is out of its range.
        """
        _within("std", self.std, 1e-6, 1)


@dataclass(frozen=True)
class SmoothingConfig:
    """Images blurred before augmentation (feature squeezing; Xu, Evans, Qi, NDSS 2018)."""

    kind: Literal["gaussian", "median"] = "gaussian"
    """Weighted mean or median of the pixels around each pixel."""
    size: int = 3
    """Side of the window in pixels, odd."""
    sigma: float = 1.0
    """Standard deviation of the Gaussian's weights in pixels; no effect on the median."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UserError: a value is out of its range.
        """
        if self.kind not in ("gaussian", "median"):
            raise UserError(f"defence.kind must be gaussian or median; got {self.kind!r}.")
        if not 3 <= self.size <= 31 or self.size % 2 == 0:
            raise UserError(f"defence.size must be odd, from 3 to 31 pixels; got {self.size}.")
        _positive("sigma", self.sigma)


@dataclass(frozen=True)
class JpegConfig:
    """Images stored as JPEG before augmentation (Liu et al., ICML 2023)."""

    quality: int = 10
    """As Pillow counts it, 1 to 95; the paper takes 10."""

    def __post_init__(self) -> None:
        """Check the quality.

        Raises:
            UserError: it is out of its range.
        """
        _within("quality", self.quality, 1, 95)


@dataclass(frozen=True)
class GreyConfig:
    """Images without colour before augmentation (Liu et al., ICML 2023)."""


@dataclass(frozen=True)
class BitDepthConfig:
    """Pixels of few values before augmentation (Liu et al., ICML 2023)."""

    bits: int = 2
    """Of a colour, 1 to 7; the paper takes 2."""

    def __post_init__(self) -> None:
        """Check the bits.

        Raises:
            UserError: they are out of their range.
        """
        _within("bits", self.bits, 1, 7)


@dataclass(frozen=True)
class OrthogonalConfig:
    """What a linear classifier reads, projected away (Sandoval-Segura et al., NeurIPS 2023).

    The classifier is fitted to the images that the victim gets; it needs their labels.
    """

    epochs: int = 20
    """Of the classifier, by SGD with momentum 0.9."""
    batch_size: int = 128
    """Images a step."""
    lr: float = 0.01
    """Learning rate, pixels in [0, 1]."""
    seed: int | None = None
    """Of the order of the images. None: the run's seed."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UserError: a value is out of its range.
        """
        _within("epochs", self.epochs, 1, 1000)
        _within("batch_size", self.batch_size, 1, 1 << 20)
        _positive("lr", self.lr)


@dataclass(frozen=True)
class PurifyConfig:
    """Images purified by a small denoiser that was trained on clean ones, before augmentation.

    Its network and its training are those of DnCNN (Zhang et al., TIP 2017), smaller.
    """

    path: str | None = None
    """A denoiser's `.safetensors` file, as `save` leaves it."""
    images: str | None = None
    """In place of it, a folder of clean images to train one on; not the ones that are defended.
    None: the embedded photographs."""
    save: str | None = None
    """Where a denoiser that was trained goes, for further victims. None: nowhere."""
    std: float = 16 / 255
    """Largest standard deviation of the Gaussian noise that it learns to take off, pixels in
    [0, 1]."""
    steps: int = 1_000
    """Optimiser steps (Adam)."""
    batch_size: int = 32
    """Squares of 32 pixels a step."""
    lr: float = 3e-3
    """Learning rate at the start; it falls to 0 on a cosine."""
    depth: int = 5
    """Convolutions; the paper has 17."""
    width: int = 24
    """Channels between them; the paper has 64."""
    seed: int | None = None
    """Of weights and noise. None: the run's seed."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UserError: a value is out of its range, or a denoiser is both given and to be trained.
        """
        for name in ("images", "save"):
            if self.path is not None and getattr(self, name) is not None:
                raise UserError(
                    f"defence.path gives a denoiser and defence.{name} is for one that is trained; "
                    "set one of the two."
                )
        _within("std", self.std, 1e-6, 1)
        _within("steps", self.steps, 1, 10_000_000)
        _within("batch_size", self.batch_size, 1, 1 << 16)
        _within("depth", self.depth, 2, 100)
        _within("width", self.width, 1, 1024)
        _positive("lr", self.lr)


@dataclass(frozen=True)
class DiffusionConfig:
    """Images purified by a diffusion model of the user's (DiffPure; Nie et al., ICML 2022)."""

    path: str
    """Folder of an unconditional DDPM of pixels, as diffusers' `save_pretrained` writes it."""
    steps: int = 100
    """Of noise that are added and taken off again; of 1,000, the paper takes 100 on CIFAR-10."""
    seed: int | None = None
    """Of the noise. None: the run's seed."""

    def __post_init__(self) -> None:
        """Check the steps.

        Raises:
            UserError: they are out of their range.
        """
        _within("steps", self.steps, 1, 100_000)


@dataclass(frozen=True)
class CutoutConfig:
    """A square of every view set to the mean (DeVries, Taylor, arXiv:1708.04552, 2017)."""

    size: float = 0.5
    """Side of the square as a part of the view's; the paper cuts 16 of 32 pixels. Its centre lies
    anywhere in the view, so that a part of it may fall outside."""

    def __post_init__(self) -> None:
        """Check the size.

        Raises:
            UserError: it is out of its range.
        """
        _within("size", self.size, 1e-3, 1)


@dataclass(frozen=True)
class UeraserConfig:
    """Views under plasma noise, shuffled channels and TrivialAugment (UEraser; Qin et al., 2023).

    In the worst-case form each step trains on the draw of several that has the largest loss: of
    each image where the loss is one of single images (method supervised), else of the batch.
    """

    form: Literal["mean", "worst"] = "worst"
    """`mean`: one draw a step, which minimises the mean loss; `worst`: the worst of several."""
    draws: int = 5
    """Draws a step of the worst-case form, each with a forward pass of its own."""
    worst_epochs: int | None = None
    """Epochs from the first on that have the worst-case form, the rest has one draw. None: all; the
    paper takes 60 of 200."""
    intensity: float = 1.0
    """Largest range of the change of brightness by a plasma, pixels in [0, 1]."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UserError: a value is out of its range.
        """
        if self.form not in ("mean", "worst"):
            raise UserError(f"defence.form must be mean or worst; got {self.form!r}.")
        _within("draws", self.draws, 2, 100)
        if self.worst_epochs is not None:
            _within("worst_epochs", self.worst_epochs, 1, 1_000_000)
        _within("intensity", self.intensity, 1e-6, 1)


@dataclass(frozen=True)
class MixupConfig:
    """Pairs of images and labels averaged (Zhang et al., ICLR 2018); supervised victims only."""

    alpha: float = 1.0
    """The weight of the first image is drawn from Beta(alpha, alpha)."""

    def __post_init__(self) -> None:
        """Check alpha.

        Raises:
            UserError: it is not positive.
        """
        _positive("alpha", self.alpha)


@dataclass(frozen=True)
class CutmixConfig(MixupConfig):
    """A rectangle of another image, and its part of the label (Yun et al., ICCV 2019).

    For supervised victims only; the area that stays is drawn from Beta(alpha, alpha).
    """


@dataclass(frozen=True)
class DpSgdConfig:
    """Differentially private SGD (Abadi et al., CCS 2016) by Opacus; supervised victims only.

    Batch normalisation is exchanged for group normalisation, batches are drawn by Poisson sampling.
    """

    epsilon: float = 8.0
    """The budget that the whole training spends; the noise follows from it."""
    delta: float = 1e-5
    """Probability with which the guarantee may fail; less than one over the number of images."""
    max_grad_norm: float = 1.0
    """The gradient of each image is clipped to this length."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UserError: a value is out of its range.
        """
        _positive("epsilon", self.epsilon)
        _positive("max_grad_norm", self.max_grad_norm)
        if not 0 < self.delta < 1:
            raise UserError(f"defence.delta must be in (0, 1), got {self.delta}.")


Settings = (
    MatrixCompletionConfig
    | AdversarialConfig
    | NoiseConfig
    | SmoothingConfig
    | JpegConfig
    | GreyConfig
    | BitDepthConfig
    | OrthogonalConfig
    | PurifyConfig
    | DiffusionConfig
    | CutoutConfig
    | UeraserConfig
    | MixupConfig
    | DpSgdConfig
)
DEFENCES: dict[str, type[Any] | None] = {
    "matrix_completion": MatrixCompletionConfig,
    "adversarial": AdversarialConfig,
    "noise": NoiseConfig,
    "smoothing": SmoothingConfig,
    "jpeg": JpegConfig,
    "grey": GreyConfig,
    "bit_depth": BitDepthConfig,
    "orthogonal": OrthogonalConfig,
    "purify": PurifyConfig,
    "diffusion": DiffusionConfig,
    "cutout": CutoutConfig,
    "ueraser": UeraserConfig,
    "mixup": MixupConfig,
    "cutmix": CutmixConfig,
    "dp_sgd": DpSgdConfig,
    "none": None,
}
SUPERVISED = ("supervised",)
"""Methods whose loss is a cross-entropy with the labels of single images."""
_NEEDS_LABELS = "mixes the labels of images"
_WHY = {
    "mixup": _NEEDS_LABELS,
    "cutmix": _NEEDS_LABELS,
    "dp_sgd": "clips the gradient of each image by itself",
}
"""Defences that supervised victims alone can have, and what they do."""


def defence_settings(
    name: str, values: Mapping[str, Any], config: Settings | None = None
) -> Settings | None:
    """Return the checked settings of a defence, None for `none`.

    Args:
        name: of `DEFENCES`.
        values: keys and values, without the name.
        config: the settings as an object, in place of values.

    Raises:
        UserError: an unknown name or key, a value out of range, or settings of another defence.
    """
    if name not in DEFENCES:
        near = difflib.get_close_matches(name, DEFENCES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(DEFENCES)}."
        raise UserError(f"defence.name={name} is unknown; {hint}")
    kind = DEFENCES[name]
    if kind is None:
        if values:
            raise UserError(f"defence.{next(iter(values))} is not a setting of defence=none.")
        return None
    settings: Settings = given(kind, config, values, "defence")
    return settings


def check_defence(name: str, method: str) -> None:
    """Check that a method can be defended so.

    Args:
        name: the defence.
        method: name of the victim's method.

    Raises:
        UserError: the defence needs a supervised loss and the method has none.
    """
    if name not in _WHY or method in SUPERVISED:
        return
    reason = f"the loss of {method} compares the images of a batch"
    if name != "dp_sgd":
        reason = f"the loss of {method} has no labels of single images"
    raise UserError(
        f"defence={name} {_WHY[name]}, but {reason}; use it on a supervised victim "
        "(method=supervised), or choose noise, smoothing, cutout, adversarial or "
        "matrix_completion."
    )


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UserError(f"defence.{name} must lie in [{low:g}, {high:g}]; got {value}.")


def _positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise UserError(f"defence.{name} must be positive; got {value}.")
