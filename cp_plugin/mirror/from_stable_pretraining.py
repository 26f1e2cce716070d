"""Operations for stable-pretraining's transforms, which take and return a sample, a dictionary.

Nearly all are torchvision's with a key of the sample that they read and write, and some with a
probability. Those of whole batches are kornia's.
"""

from __future__ import annotations

from typing import Any

import cp_plugin.mirror.from_torchvision
import cp_plugin.mirror.from_torchvision_rare  # noqa: F401  (their rules are taken over)
from cp_plugin.config.settings import UserError
from cp_plugin.data.pipelines import IMAGE, SPT, SPT_BATCH
from cp_plugin.mirror.base import ImageFormat, Operation
from cp_plugin.mirror.blur import PillowBlur
from cp_plugin.mirror.colour import Normalize
from cp_plugin.mirror.containers import Identity, RandomApply
from cp_plugin.mirror.from_kornia import of_kornia
from cp_plugin.mirror.noise import GaussianNoise
from cp_plugin.mirror.registry import RULES, Rule, Translator, rule

AS_TORCHVISION = {
    **dict.fromkeys(("RandomResizedCrop", "Resize", "CenterCrop", "RandomCrop"), "_geometry"),
    **dict.fromkeys(("RandomHorizontalFlip", "RandomVerticalFlip"), "_geometry"),
    **dict.fromkeys(("RandomGrayscale", "RandomSolarize", "RandomEqualize"), "_color"),
    **dict.fromkeys(("RandomInvert", "RandomPosterize", "RandomAutocontrast"), "_color"),
    **dict.fromkeys(("RandomAdjustSharpness", "RandomChannelPermutation"), "_color"),
    **dict.fromkeys(("RandomRotation", "RandomAffine", "RandomPerspective"), "_geometry"),
    "RandomErasing": "_augment",
}
"""Classes that do what torchvision's of the same name do, and the module of v2 with those."""
WITH_PROBABILITY = {"ColorJitter": "_color", "GaussianBlur": "_misc", "GaussianNoise": "_misc"}
"""The same with a `p` of their own."""


def on_image(found: Rule) -> Rule:
    """Return a rule that refuses a transform of another part of the sample than its image."""

    def checked(host: Any, translator: Translator) -> Operation:
        if (host.source, host.target) != (IMAGE, IMAGE):
            raise UserError(
                f"{type(host).__name__} expected source and target {IMAGE!r}, got {host.source!r} "
                f"and {host.target!r}: the mirror follows the image of a sample alone."
            )
        return found(host, translator)

    return checked


def with_probability(found: Rule) -> Rule:
    """Return a rule for a transform that is applied to a part of the images."""

    def some(host: Any, translator: Translator) -> Operation:
        inner = found(host, translator)
        return inner if host.p == 1 else RandomApply(inner, float(host.p), type(host).__name__)

    return some


for _name, _module in AS_TORCHVISION.items():
    RULES[SPT + _name] = on_image(RULES[f"torchvision.transforms.v2.{_module}.{_name}"])
for _name, _module in WITH_PROBABILITY.items():
    RULES[SPT + _name] = on_image(
        with_probability(RULES[f"torchvision.transforms.v2.{_module}.{_name}"])
    )


@rule(SPT + "Compose")
def compose(host: Any, translator: Translator) -> Operation:
    """Translate a Compose."""
    return translator.sequence(host.args, "Compose")


@rule(SPT + "RGB")
@on_image
def rgb(host: Any, translator: Translator) -> Operation:
    """Translate an RGB: images have three channels before they are mirrored."""
    return Identity("RGB")


@rule(SPT + "PILGaussianBlur")
@on_image
@with_probability
def pillow_blur(host: Any, translator: Translator) -> Operation:
    """Translate a PILGaussianBlur."""
    return PillowBlur((float(host.sigma[0]), float(host.sigma[1])), "PILGaussianBlur")


@rule(SPT + "ToImage")
@on_image
def to_image(host: Any, translator: Translator) -> Operation:
    """Translate a ToImage: to bytes, to another dtype, normalised."""
    if translator.format is ImageFormat.PILLOW:
        translator.format = ImageFormat.BYTES
    return translator.sequence(
        [step for step in host.t.transforms[1:] if type(step).__name__ != "RGB"], "ToImage"
    )


@rule(SPT + "WrapTorchTransform")
@on_image
def wrapped(host: Any, translator: Translator) -> Operation:
    """Translate what a WrapTorchTransform calls on the image."""
    return translator.sequence([host.lambd], "WrapTorchTransform")


@rule(SPT + "AdditiveGaussian")
def additive_gaussian(host: Any, translator: Translator) -> Operation:
    """Translate an AdditiveGaussian, which takes float tensors and clips nothing."""
    if translator.format is not ImageFormat.FLOAT:
        raise UserError(
            f"AdditiveGaussian expected a float tensor, got {translator.format.value}: put ToImage "
            "before it."
        )
    inner = GaussianNoise(0.0, float(host.sigma), clip=False, name="AdditiveGaussian")
    return inner if host.p == 1 else RandomApply(inner, float(host.p), "AdditiveGaussian")


OF_KORNIA = (
    *("RandomResizedCrop", "RandomHorizontalFlip", "ColorJitter", "GaussianBlur"),
    *("RandomGrayscale", "RandomSolarize", "RandomErasing", "RandAugment"),
)
"""What kornia does to a batch, the names without their `GPU`."""


@rule(*(f"{SPT_BATCH}GPU{name}" for name in OF_KORNIA))
@on_image
def of_batches(host: Any, translator: Translator) -> Operation:
    """Translate what calls one of kornia's augmentations on a batch."""
    return of_kornia(host.kornia_op)


@rule(SPT_BATCH + "GPUCompose")
def batch_compose(host: Any, translator: Translator) -> Operation:
    """Translate a GPUCompose."""
    return translator.sequence(host.transforms, "GPUCompose")


@rule(SPT_BATCH + "GPUNormalize")
@on_image
def batch_normalize(host: Any, translator: Translator) -> Operation:
    """Translate a GPUNormalize."""
    return Normalize(host.mean.flatten().tolist(), host.std.flatten().tolist(), "GPUNormalize")


@rule(SPT_BATCH + "ToDevice")
def to_device(host: Any, translator: Translator) -> Operation:
    """Translate a ToDevice, which changes no pixel."""
    return Identity("ToDevice")
