"""Operations for torchvision's less usual transforms, v1 and v2."""

from __future__ import annotations

from typing import Any

from cp_plugin.config.settings import UserError
from cp_plugin.mirror.affine import RandomAffine
from cp_plugin.mirror.base import LEVEL, ImageFormat, Operation
from cp_plugin.mirror.colour import PermuteChannels
from cp_plugin.mirror.containers import RandomApply, RandomChoice, RandomOrder, Sequence
from cp_plugin.mirror.erasing import RandomErasing
from cp_plugin.mirror.from_torchvision import both, filter_name, pair, same_format
from cp_plugin.mirror.geometric import RandomPerspective, RandomRotation
from cp_plugin.mirror.geometry import Pad, RandomCrop
from cp_plugin.mirror.intensity import Autocontrast, Equalize, Invert, Posterize, Sharpness
from cp_plugin.mirror.jitter import ColorJitter
from cp_plugin.mirror.noise import GaussianNoise, Jpeg
from cp_plugin.mirror.registry import Translator, rule


@both("RandomChoice")
def random_choice(host: Any, translator: Translator) -> Operation:
    """Translate a RandomChoice."""
    options = _branches(host, translator)
    return RandomChoice(options, host.p or [1.0] * len(options), "RandomChoice")


@both("RandomOrder")
def random_order(host: Any, translator: Translator) -> Operation:
    """Translate a RandomOrder."""
    return RandomOrder(_branches(host, translator), "RandomOrder")


def _branches(host: Any, translator: Translator) -> list[Operation]:
    format = translator.format
    branches: list[Operation] = []
    for transform in host.transforms:
        branches.append(translator.sequence([transform]))
        same_format(format, translator.format, type(host).__name__)
    return branches


@both("RandomCrop")
def random_crop(host: Any, translator: Translator) -> Operation:
    """Translate a RandomCrop."""
    values = _values(host.padding or 0)
    left, top, right, bottom = values * (4 // len(values))
    if type(host).__module__.startswith("torchvision.transforms.v2") and len(values) == 4:
        left, right, top, bottom = values
    return RandomCrop(
        pair(host.size),
        (left, top, right, bottom),
        host.pad_if_needed,
        getattr(host.padding_mode, "value", host.padding_mode),
        _padded_with(host, translator),
        "RandomCrop",
    )


@both("Pad")
def pad(host: Any, translator: Translator) -> Operation:
    """Translate a Pad."""
    values = _values(host.padding)
    left, top, right, bottom = values * (4 // len(values))
    mode = getattr(host.padding_mode, "value", host.padding_mode)
    return Pad((left, top, right, bottom), mode, _padded_with(host, translator), "Pad")


def _values(padding: Any) -> list[int]:
    return [padding] if isinstance(padding, int) else list(padding)


def _padded_with(host: Any, translator: Translator) -> tuple[float, ...]:
    scale = LEVEL if translator.format.rounds else 1.0
    return tuple(scale * value for value in fill_of(host) or (0.0,))


def fill_of(host: Any) -> tuple[float, ...] | None:
    """Return what a host puts outside an image, None where it says nothing.

    Raises:
        UserError: another value for each kind of input.
    """
    fill = host.fill
    if isinstance(fill, dict):
        raise UserError(
            f"{type(host).__name__} expected one fill for images, got {fill!r}: give a number or "
            "one a channel."
        )
    if fill is None:
        return None
    values = [fill] if isinstance(fill, (int, float)) else list(fill)
    return tuple(float(value) for value in values)


@both("RandomRotation")
def random_rotation(host: Any, translator: Translator) -> Operation:
    """Translate a RandomRotation."""
    if host.expand:
        raise UserError(
            "RandomRotation expected expand=False, since a batch has one size, got True."
        )
    degrees = (float(host.degrees[0]), float(host.degrees[1]))
    return RandomRotation(
        degrees,
        filter_name(host),
        _centre(host),
        fill_of(host),
        translator.format,
        "RandomRotation",
    )


def _centre(host: Any) -> tuple[float, float] | None:
    return None if host.center is None else (float(host.center[0]), float(host.center[1]))


@both("RandomAffine")
def random_affine(host: Any, translator: Translator) -> Operation:
    """Translate a RandomAffine."""
    shear = [float(value) for value in host.shear or (0.0, 0.0)]
    along_x, along_y = shear[:2], shear[2:] or [0.0, 0.0]
    return RandomAffine(
        pair(host.degrees),
        pair(host.translate or (0.0, 0.0)),
        pair(host.scale or (1.0, 1.0)),
        (pair(along_x), pair(along_y)),
        _centre(host),
        filter_name(host),
        fill_of(host),
        translator.format,
        "RandomAffine",
    )


@both("RandomPerspective")
def random_perspective(host: Any, translator: Translator) -> Operation:
    """Translate a RandomPerspective."""
    inner = RandomPerspective(
        host.distortion_scale,
        filter_name(host),
        fill_of(host),
        translator.format,
        "RandomPerspective",
    )
    return RandomApply(inner, host.p, "RandomPerspective")


@both("RandomEqualize")
def random_equalize(host: Any, translator: Translator) -> Operation:
    """Translate a RandomEqualize."""
    return RandomApply(Equalize("RandomEqualize"), host.p, "RandomEqualize")


@both("RandomInvert")
def random_invert(host: Any, translator: Translator) -> Operation:
    """Translate a RandomInvert."""
    return RandomApply(Invert("RandomInvert"), host.p, "RandomInvert")


@both("RandomPosterize")
def random_posterize(host: Any, translator: Translator) -> Operation:
    """Translate a RandomPosterize."""
    return RandomApply(Posterize(host.bits, "RandomPosterize"), host.p, "RandomPosterize")


@both("RandomAutocontrast")
def random_autocontrast(host: Any, translator: Translator) -> Operation:
    """Translate a RandomAutocontrast."""
    inner = Autocontrast(translator.format, "RandomAutocontrast")
    return RandomApply(inner, host.p, "RandomAutocontrast")


@both("RandomAdjustSharpness")
def random_adjust_sharpness(host: Any, translator: Translator) -> Operation:
    """Translate a RandomAdjustSharpness."""
    inner = Sharpness(host.sharpness_factor, translator.format, "RandomAdjustSharpness")
    return RandomApply(inner, host.p, "RandomAdjustSharpness")


@both("RandomErasing")
def random_erasing(host: Any, translator: Translator) -> Operation:
    """Translate a RandomErasing."""
    value = host.value
    if value is None or value == "random":
        values = None
    else:
        values = tuple(float(v) for v in ([value] if isinstance(value, (int, float)) else value))
    scale, ratio = tuple(host.scale), tuple(host.ratio)
    return RandomErasing(host.p, scale, ratio, values, "RandomErasing")


@rule("torchvision.transforms.v2._color.RandomChannelPermutation")
def channel_permutation(host: Any, translator: Translator) -> Operation:
    """Translate a RandomChannelPermutation."""
    return PermuteChannels("RandomChannelPermutation")


@rule("torchvision.transforms.v2._color.RandomPhotometricDistort")
def photometric_distort(host: Any, translator: Translator) -> Operation:
    """Translate a RandomPhotometricDistort: contrast comes second or, as often, last."""
    name, ranges = "RandomPhotometricDistort", (host.brightness, host.contrast, host.saturation)
    steps = []
    for kind, bounds in enumerate((*ranges, host.hue)):
        one: list[Any] = [None] * 4
        one[kind] = bounds
        steps.append(ColorJitter(*one[:4], p=host.p, format=translator.format))  # type: ignore[misc]
    brightness, contrast, saturation, hue = steps
    orders = [
        Sequence([brightness, contrast, saturation, hue]),
        Sequence([brightness, saturation, hue, contrast]),
    ]
    return Sequence(
        [RandomChoice(orders, [1.0, 1.0]), RandomApply(PermuteChannels(), host.p)], name
    )


@rule("torchvision.transforms.v2._misc.GaussianNoise")
def gaussian_noise(host: Any, translator: Translator) -> Operation:
    """Translate a GaussianNoise, which takes tensors alone."""
    if translator.format is ImageFormat.PILLOW:
        raise UserError(
            "GaussianNoise expected a tensor, got a Pillow image: put ToImage before it."
        )
    mean, sigma = float(host.mean), float(host.sigma)
    return GaussianNoise(mean, sigma, host.clip, translator.format, "GaussianNoise")


@rule("torchvision.transforms.v2._augment.JPEG")
def jpeg(host: Any, translator: Translator) -> Operation:
    """Translate a JPEG."""
    if not translator.format.rounds:
        raise UserError(
            f"JPEG expected a Pillow image or a uint8 tensor, got {translator.format.value}: move "
            "it before the conversion to floats."
        )
    return Jpeg(pair(host.quality), "JPEG")
