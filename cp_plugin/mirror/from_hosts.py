"""Operations for solo-learn's and Lightly's own transforms, and what makes several views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cp_plugin.config.settings import UserError
from cp_plugin.data.pipelines import LIGHTLY, SOLO
from cp_plugin.mirror.base import ImageFormat, Operation
from cp_plugin.mirror.blur import PillowBlur
from cp_plugin.mirror.containers import Identity, RandomApply
from cp_plugin.mirror.fourier import (
    DropFrequencies,
    FromSpectrum,
    MaskByGaussians,
    RescaleAmplitude,
    ShiftPhase,
    ToSpectrum,
)
from cp_plugin.mirror.from_torchvision import compose, filter_of, pair
from cp_plugin.mirror.geometric import RandomRotation
from cp_plugin.mirror.geometry import RandomResizedCrop
from cp_plugin.mirror.intensity import Equalize, Solarize
from cp_plugin.mirror.jigsaw import Jigsaw
from cp_plugin.mirror.registry import ON_SPECTRA, RULES, Rule, Translator, rule

WRAPPERS = (
    "simclr_transform.SimCLRViewTransform",
    "dino_transform.DINOViewTransform",
    "ibot_transform.IBOTViewTransform",
    "swav_transform.SwaVViewTransform",
    "vicreg_transform.VICRegViewTransform",
    "vicregl_transform.VICRegLViewTransform",
    "byol_transform.BYOLView1Transform",
    "byol_transform.BYOLView2Transform",
    "simsiam_transform.SimSiamViewTransform",
    "msn_transform.MSNViewTransform",
    "smog_transform.SmoGViewTransform",
    "rotation.RandomRotateDegrees",
    "tico_transform.TiCoView1Transform",
    "tico_transform.TiCoView2Transform",
    "fda_transform.FDAView1Transform",
    "fda_transform.FDAView2Transform",
    "ijepa_transform.IJEPATransform",
)
"""Lightly's classes that only call the pipeline they hold as `transform`."""


@rule(SOLO + "GaussianBlur")
def solo_blur(host: Any, translator: Translator) -> Operation:
    """Translate solo-learn's GaussianBlur."""
    return PillowBlur((float(host.sigma[0]), float(host.sigma[1])), "GaussianBlur")


@rule(SOLO + "Solarization")
def solo_solarization(host: Any, translator: Translator) -> Operation:
    """Translate solo-learn's Solarization."""
    return Solarize(128, translator.format, "Solarization")


@rule(LIGHTLY + "gaussian_blur.GaussianBlur")
def lightly_blur(host: Any, translator: Translator) -> Operation:
    """Translate Lightly's GaussianBlur."""
    inner = PillowBlur((float(host.sigmas[0]), float(host.sigmas[1])), "GaussianBlur")
    return RandomApply(inner, host.prob, "GaussianBlur")


@rule(LIGHTLY + "solarize.RandomSolarization")
def lightly_solarization(host: Any, translator: Translator) -> Operation:
    """Translate Lightly's RandomSolarization."""
    inner = Solarize(host.threshold, ImageFormat.PILLOW, "RandomSolarization")
    return RandomApply(inner, host.prob, "RandomSolarization")


@rule(LIGHTLY + "rotation.RandomRotate")
def lightly_rotate(host: Any, translator: Translator) -> Operation:
    """Translate Lightly's RandomRotate by one angle."""
    angle = float(host.angle)
    return RandomApply(RandomRotation((angle, angle), name="RandomRotate"), host.prob)


@rule(SOLO + "Equalization")
def solo_equalization(host: Any, translator: Translator) -> Operation:
    """Translate solo-learn's Equalization."""
    return Equalize("Equalization")


def wrapper(host: Any, translator: Translator) -> Operation:
    """Translate an object that only calls its `transform`."""
    return translator.operation(host.transform)


RULES.update({LIGHTLY + name: wrapper for name in WRAPPERS})


rule("cp_plugin.data.pipelines.InARow")(compose)


@rule(LIGHTLY + "detcon_transform.DetConSViewTransform")
def detcon_view(host: Any, translator: Translator) -> Operation:
    """Translate DetCon's view of an image."""
    return translator.operation(host.tr)


@rule(LIGHTLY + "detcon_transform.DetConSTransform")
def detcon(host: Any, translator: Translator) -> Operation:
    """Refuse a DetConSTransform that makes masks; without, it is a list of views."""
    raise UserError(
        "DetConSTransform expected mask_fn=None, since a mirror makes images and no masks, got "
        f"{host.mask_fn!r}: leave mask_fn out."
    )


@rule(LIGHTLY + "add_grid_transform.AddGridTransform")
def add_grid(host: Any, translator: Translator) -> Operation:
    """Translate AddGridTransform, which changes masks and boxes and leaves images alone."""
    return Identity("AddGridTransform")


@rule(LIGHTLY + "random_crop_and_flip_with_grid.RandomResizedCropAndFlip")
def crop_and_flip(host: Any, translator: Translator) -> Operation:
    """Translate RandomResizedCropAndFlip, but for its grid."""
    crop = host.resized_crop
    found = RandomResizedCrop(
        pair(crop.size),
        crop.scale,
        crop.ratio,
        filter_of(crop, translator.format),
        translator.format,
        "RandomResizedCropAndFlip",
    )
    found.flip_horizontal, found.flip_vertical = host.horizontal_flip.p, host.vertical_flip.p
    return found


@rule(LIGHTLY + "jigsaw.Jigsaw")
def jigsaw(host: Any, translator: Translator) -> Operation:
    """Translate Lightly's Jigsaw; its pieces are Pillow images."""
    if translator.format is not ImageFormat.PILLOW:
        raise UserError(
            f"Jigsaw expected a Pillow image, got {translator.format.value}: move it before the "
            "conversion to a tensor."
        )
    inner = translator.sequence([host.transform])
    return Jigsaw(inner, host.n_grid, host.grid_size, host.crop_size, "Jigsaw")


def on_spectrum(name: str) -> Callable[[Rule], Rule]:
    """Register a rule for one of Lightly's classes that change a spectrum."""

    def register(function: Rule) -> Rule:
        def checked(host: Any, translator: Translator) -> Operation:
            if translator.format is not ImageFormat.SPECTRUM:
                raise UserError(
                    f"{type(host).__name__} expected a spectrum, got {translator.format.value}: "
                    "put RFFT2DTransform before it."
                )
            return function(host, translator)

        ON_SPECTRA.add(LIGHTLY + name)
        return rule(LIGHTLY + name)(checked)

    return register


ON_SPECTRA.update(
    f"torchvision.transforms.{module}.{name}"
    for module in ("transforms", "v2._container")
    for name in ("Compose", "RandomApply", "RandomChoice", "RandomOrder")
)


@rule(LIGHTLY + "rfft2d_transform.RFFT2DTransform")
def to_spectrum(host: Any, translator: Translator) -> Operation:
    """Translate an RFFT2DTransform."""
    if translator.format is not ImageFormat.FLOAT:
        raise UserError(
            f"RFFT2DTransform expected a float tensor, got {translator.format.value}: put ToTensor "
            "before it."
        )
    translator.format = ImageFormat.SPECTRUM
    return ToSpectrum("RFFT2DTransform")


@on_spectrum("irfft2d_transform.IRFFT2DTransform")
def from_spectrum(host: Any, translator: Translator) -> Operation:
    """Translate an IRFFT2DTransform."""
    translator.format = ImageFormat.FLOAT
    return FromSpectrum(pair(host.shape), "IRFFT2DTransform")


@on_spectrum("amplitude_rescale_transform.AmplitudeRescaleTransform")
def amplitude_rescale(host: Any, translator: Translator) -> Operation:
    """Translate an AmplitudeRescaleTransform."""
    factors = (float(host.dist.low), float(host.dist.high))
    return RescaleAmplitude(factors, "AmplitudeRescaleTransform")


@on_spectrum("phase_shift_transform.PhaseShiftTransform")
def phase_shift(host: Any, translator: Translator) -> Operation:
    """Translate a PhaseShiftTransform."""
    positive = float(host.sign_dist.probs) if host.include_negatives else 1.0
    angles = (float(host.dist.low), float(host.dist.high))
    return ShiftPhase(angles, positive, "PhaseShiftTransform")


@on_spectrum("random_frequency_mask_transform.RandomFrequencyMaskTransform")
def random_frequency_mask(host: Any, translator: Translator) -> Operation:
    """Translate a RandomFrequencyMaskTransform."""
    return DropFrequencies((float(host.k[0]), float(host.k[1])), "RandomFrequencyMaskTransform")


@on_spectrum("gaussian_mixture_masks_transform.GaussianMixtureMask")
def gaussian_mixture_mask(host: Any, translator: Translator) -> Operation:
    """Translate a GaussianMixtureMask."""
    deviations = (float(host.std_range[0]), float(host.std_range[1]))
    return MaskByGaussians(host.num_gaussians, deviations, "GaussianMixtureMask")
