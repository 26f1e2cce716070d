"""Operations for torchvision's transforms, v1 and v2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cp_plugin.config.settings import UserError
from cp_plugin.mirror.base import ImageFormat, Operation
from cp_plugin.mirror.blur import TensorBlur
from cp_plugin.mirror.colour import Normalize, RandomGrayscale
from cp_plugin.mirror.containers import Identity, RandomApply
from cp_plugin.mirror.fourier import Truncate
from cp_plugin.mirror.geometry import CenterCrop, Flip, RandomResizedCrop, Resize
from cp_plugin.mirror.intensity import Solarize
from cp_plugin.mirror.jitter import ColorJitter
from cp_plugin.mirror.registry import Rule, Translator, rule

FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""Pillow's numbers of its filters."""
V2 = {
    "Compose": "_container",
    "RandomApply": "_container",
    "RandomChoice": "_container",
    "RandomOrder": "_container",
    "RandomCrop": "_geometry",
    "RandomRotation": "_geometry",
    "RandomAffine": "_geometry",
    "Pad": "_geometry",
    "RandomPerspective": "_geometry",
    "RandomEqualize": "_color",
    "RandomInvert": "_color",
    "RandomPosterize": "_color",
    "RandomAutocontrast": "_color",
    "RandomAdjustSharpness": "_color",
    "RandomErasing": "_augment",
    "RandomResizedCrop": "_geometry",
    "Resize": "_geometry",
    "CenterCrop": "_geometry",
    "RandomHorizontalFlip": "_geometry",
    "RandomVerticalFlip": "_geometry",
    "ColorJitter": "_color",
    "RandomGrayscale": "_color",
    "Grayscale": "_color",
    "RandomSolarize": "_color",
    "GaussianBlur": "_misc",
    "Normalize": "_misc",
    "ToTensor": "_deprecated",
    "PILToTensor": "_type_conversion",
    "ToImage": "_type_conversion",
    "ToPureTensor": "_type_conversion",
    "ToDtype": "_misc",
    "ConvertImageDtype": "_misc",
    "Identity": "_misc",
}
"""The private module of torchvision.transforms.v2 that holds each class."""


def both(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for classes of these names in torchvision's v1 and v2."""
    full = [f"torchvision.transforms.transforms.{name}" for name in names]
    full += [f"torchvision.transforms.v2.{V2[name]}.{name}" for name in names]
    return rule(*full)


@both("Compose")
def compose(host: Any, translator: Translator) -> Operation:
    """Translate a Compose."""
    return translator.sequence(host.transforms, "Compose")


@both("RandomApply")
def random_apply(host: Any, translator: Translator) -> Operation:
    """Translate a RandomApply; the kind of image must be the same for all."""
    format = translator.format
    inner = translator.sequence(host.transforms, "RandomApply")
    same_format(format, translator.format, "RandomApply")
    return RandomApply(inner, host.p, "RandomApply")


def same_format(before: ImageFormat, after: ImageFormat, name: str) -> None:
    """Refuse conversions that only some images would get."""
    if before is not after:
        raise UserError(
            f"{name} expected transforms that leave {before.value}, got {after.value}: move the "
            "conversion to a tensor out of it."
        )


def filter_name(host: Any) -> str:
    """Return the name of the host's interpolation."""
    value = host.interpolation
    name = FILTERS[value] if isinstance(value, int) else str(getattr(value, "value", value))
    return name.removesuffix("-exact")


def filter_of(host: Any, format: ImageFormat) -> str:
    """Return the name of the host's interpolation to another size.

    Raises:
        UserError: it is not antialiased, on a tensor.
    """
    name = filter_name(host)
    if format is not ImageFormat.PILLOW and (
        name == "nearest" or not getattr(host, "antialias", True)
    ):
        raise UserError(
            f"{type(host).__name__} on a tensor expected an antialiased interpolation, got "
            f"{name} with antialias={getattr(host, 'antialias', None)}: set antialias=True."
        )
    return name


def pair(size: Any) -> tuple[int, int]:
    """Return (height, width) of a host's size argument."""
    values = [size] if isinstance(size, int) else list(size)
    return (values[0], values[-1])


@both("RandomResizedCrop")
def random_resized_crop(host: Any, translator: Translator) -> Operation:
    """Translate a RandomResizedCrop."""
    filter_name = filter_of(host, translator.format)
    return RandomResizedCrop(
        pair(host.size), host.scale, host.ratio, filter_name, translator.format, "RandomResizedCrop"
    )


@both("Resize")
def resize(host: Any, translator: Translator) -> Operation:
    """Translate a Resize."""
    size = host.size
    if isinstance(size, (list, tuple)):
        size = size[0] if len(size) == 1 else (size[0], size[1])
    filter_name = filter_of(host, translator.format)
    return Resize(size, host.max_size, filter_name, translator.format, "Resize")


@both("CenterCrop")
def center_crop(host: Any, translator: Translator) -> Operation:
    """Translate a CenterCrop."""
    return CenterCrop(pair(host.size), "CenterCrop")


@both("RandomHorizontalFlip")
def horizontal_flip(host: Any, translator: Translator) -> Operation:
    """Translate a RandomHorizontalFlip."""
    return Flip(-1, host.p, "RandomHorizontalFlip")


@both("RandomVerticalFlip")
def vertical_flip(host: Any, translator: Translator) -> Operation:
    """Translate a RandomVerticalFlip."""
    return Flip(-2, host.p, "RandomVerticalFlip")


@both("ColorJitter")
def color_jitter(host: Any, translator: Translator) -> Operation:
    """Translate a ColorJitter."""
    ranges = (host.brightness, host.contrast, host.saturation, host.hue)
    return ColorJitter(*ranges, format=translator.format, name="ColorJitter")


@both("RandomGrayscale")
def random_grayscale(host: Any, translator: Translator) -> Operation:
    """Translate a RandomGrayscale."""
    return RandomGrayscale(host.p, translator.format, "RandomGrayscale")


@both("Grayscale")
def grayscale(host: Any, translator: Translator) -> Operation:
    """Translate a Grayscale, to one channel or to three."""
    return RandomGrayscale(1.0, translator.format, "Grayscale", host.num_output_channels)


@both("RandomSolarize")
def random_solarize(host: Any, translator: Translator) -> Operation:
    """Translate a RandomSolarize."""
    inner = Solarize(host.threshold, translator.format, "RandomSolarize")
    return RandomApply(inner, host.p, "RandomSolarize")


@both("GaussianBlur")
def gaussian_blur(host: Any, translator: Translator) -> Operation:
    """Translate a GaussianBlur."""
    size = list(host.kernel_size)
    return TensorBlur((size[0], size[-1]), tuple(host.sigma), "GaussianBlur")


@both("Normalize")
def normalize(host: Any, translator: Translator) -> Operation:
    """Translate a Normalize."""
    return Normalize(list(host.mean), list(host.std), "Normalize")


def becomes(format: ImageFormat) -> Rule:
    """Make a rule for a transform that only changes what holds the pixels."""

    def change(host: Any, translator: Translator) -> Operation:
        translator.format = format
        return Identity(type(host).__name__)

    return change


@rule(
    "torchvision.transforms.transforms.ToPILImage",
    "torchvision.transforms.v2._type_conversion.ToPILImage",
)
def to_pil_image(host: Any, translator: Translator) -> Operation:
    """Translate a ToPILImage."""
    before, translator.format = translator.format, ImageFormat.PILLOW
    return Identity("ToPILImage") if before.rounds else Truncate("ToPILImage")


both("ToTensor")(becomes(ImageFormat.FLOAT))
both("PILToTensor")(becomes(ImageFormat.BYTES))
rule("torchvision.transforms.v2._type_conversion.ToImage")(becomes(ImageFormat.BYTES))
rule("lightly.transforms.torchvision_v2_compatibility.ToTensor")(becomes(ImageFormat.FLOAT))


@rule(
    "torchvision.transforms.v2._type_conversion.ToPureTensor",
    "torchvision.transforms.v2._misc.Identity",
    "torchvision.transforms.v2._color.RGB",
)
def identity(host: Any, translator: Translator) -> Operation:
    """Translate a transform that changes nothing."""
    return Identity(type(host).__name__)


@rule(
    "torchvision.transforms.v2._misc.ToDtype",
    "torchvision.transforms.v2._misc.ConvertImageDtype",
    "torchvision.transforms.transforms.ConvertImageDtype",
)
def to_dtype(host: Any, translator: Translator) -> Operation:
    """Translate a change of dtype; pixels must stay in [0, 1]."""
    name = type(host).__name__
    dtype = host.dtype
    if isinstance(dtype, dict):
        dtype = next((value for value in dtype.values() if value is not None), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"{name} expected a floating-point dtype, got {host.dtype}.")
    if translator.format is not ImageFormat.FLOAT and not getattr(host, "scale", True):
        raise UserError(f"{name} expected scale=True, so that pixels lie in [0, 1], got False.")
    translator.format = ImageFormat.FLOAT
    return Identity(name)
