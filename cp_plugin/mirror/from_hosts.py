"""Twins of solo-learn's and Lightly's own transforms, and what makes several views of an image."""

from __future__ import annotations

from typing import Any

from cp_plugin.data.pipelines import LIGHTLY, SOLO
from cp_plugin.mirror.base import ImageFormat, Operation
from cp_plugin.mirror.blur import PillowBlur
from cp_plugin.mirror.containers import RandomApply
from cp_plugin.mirror.geometric import RandomRotation
from cp_plugin.mirror.intensity import Equalize, Solarize
from cp_plugin.mirror.registry import RULES, Translator, rule

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
