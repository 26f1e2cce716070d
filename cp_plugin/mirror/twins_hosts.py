"""Twins of solo-learn's and Lightly's own transforms, and what makes several views of an image."""

from __future__ import annotations

from typing import Any

from cp_plugin.mirror.blur import PillowBlur
from cp_plugin.mirror.containers import RandomApply
from cp_plugin.mirror.operation import Operation, Stage
from cp_plugin.mirror.tones import Equalize, Solarize
from cp_plugin.mirror.translate import RULES, Translator, dotted_name, rule
from cp_plugin.mirror.warp import RandomRotation

SOLO = "solo.data.pretrain_dataloader."
LIGHTLY = "lightly.transforms."
MULTI_VIEW = (
    LIGHTLY + "multi_view_transform.MultiViewTransform",
    LIGHTLY + "multi_view_transform_v2.MultiViewTransformV2",
)
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
    return Solarize(128, translator.stage, "Solarization")


@rule(LIGHTLY + "gaussian_blur.GaussianBlur")
def lightly_blur(host: Any, translator: Translator) -> Operation:
    """Translate Lightly's GaussianBlur."""
    inner = PillowBlur((float(host.sigmas[0]), float(host.sigmas[1])), "GaussianBlur")
    return RandomApply(inner, host.prob, "GaussianBlur")


@rule(LIGHTLY + "solarize.RandomSolarization")
def lightly_solarization(host: Any, translator: Translator) -> Operation:
    """Translate Lightly's RandomSolarization."""
    inner = Solarize(host.threshold, Stage.PILLOW, "RandomSolarization")
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


def view_hosts(host: Any) -> list[object] | None:
    """Return the host's pipeline of each view, or None where it makes one view only."""
    if isinstance(host, (list, tuple)):
        return [view for item in host for view in view_hosts(item) or [item]]
    name = dotted_name(type(host))
    if name == SOLO + "FullTransformPipeline":
        return view_hosts(list(host.transforms))
    if name == SOLO + "NCropAugmentation":
        return [host.transform] * host.num_crops
    if _is_multi_view(type(host)):
        return list(host.transforms)
    return None


def _is_multi_view(cls: type) -> bool:
    """Whether a class is Lightly's MultiViewTransform or inherits its call unchanged."""
    for base in cls.__mro__:
        if dotted_name(base) in MULTI_VIEW:
            return cls.__call__ is base.__call__
    return False
