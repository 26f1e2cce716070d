"""Operations for torchvision's AutoAugment, RandAugment, TrivialAugmentWide and AugMix."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cp_plugin.config.settings import UserError
from cp_plugin.mirror.affine import Affine
from cp_plugin.mirror.base import ImageFormat, Operation, Params, Shape
from cp_plugin.mirror.containers import Identity, RandomApply, RandomChoice, Sequence
from cp_plugin.mirror.from_torchvision import filter_name
from cp_plugin.mirror.from_torchvision_rare import fill_of
from cp_plugin.mirror.geometric import RandomRotation
from cp_plugin.mirror.intensity import (
    Autocontrast,
    Equalize,
    Invert,
    Posterize,
    Sharpness,
    Solarize,
)
from cp_plugin.mirror.jitter import BRIGHTNESS, CONTRAST, SATURATION, ColorJitter
from cp_plugin.mirror.policies import AugMix, Graded
from cp_plugin.mirror.registry import Rule, Translator, rule
from cp_plugin.util.internals import policies_of, policy_strengths

BINS = 10
"""Strengths that AutoAugment and AugMix count."""
COLOURS = {"Brightness": BRIGHTNESS, "Contrast": CONTRAST, "Color": SATURATION}
GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY")
Prepare = Callable[[Tensor], Params]


def both(name: str) -> Callable[[Rule], Rule]:
    """Register a rule for a class of torchvision's v1 and v2, which take images of 8 bit."""

    def register(function: Rule) -> Rule:
        def checked(host: Any, translator: Translator) -> Operation:
            if not translator.format.rounds:
                raise UserError(
                    f"{name} expected a Pillow image or a uint8 tensor, got "
                    f"{translator.format.value}: move it before the conversion to floats."
                )
            return function(host, translator)

        modules = ("autoaugment", "v2._auto_augment")
        return rule(*(f"torchvision.transforms.{module}.{name}" for module in modules))(checked)

    return register


@both("RandAugment")
def rand_augment(host: Any, translator: Translator) -> Operation:
    """Translate a RandAugment: so many operations of one strength, each drawn anew."""
    bins, at = host.num_magnitude_bins, slice(host.magnitude, host.magnitude + 1)
    step = _any_of(_kinds(host, translator.format, bins, at))
    return Sequence([step] * host.num_ops, "RandAugment")


@both("TrivialAugmentWide")
def trivial_augment(host: Any, translator: Translator) -> Operation:
    """Translate a TrivialAugmentWide: one operation of any strength."""
    return _any_of(_kinds(host, translator.format, host.num_magnitude_bins, slice(None)))


@both("AutoAugment")
def auto_augment(host: Any, translator: Translator) -> Operation:
    """Translate an AutoAugment: one of its pairs, each operation with its chance and strength."""
    pairs = []
    for pair in policies_of(host):
        steps = []
        for name, p, strength in pair:
            at = slice(None) if strength is None else slice(strength, strength + 1)
            steps.append(RandomApply(_kind(host, translator.format, name, BINS, at), p, name))
        pairs.append(Sequence(steps))
    return RandomChoice(pairs, [1.0] * len(pairs), "AutoAugment")


@both("AugMix")
def aug_mix(host: Any, translator: Translator) -> Operation:
    """Translate an AugMix, which makes tensors of Pillow images."""
    step = _any_of(_kinds(host, ImageFormat.BYTES, BINS, slice(host.severity)))
    return AugMix(step, host.mixture_width, host.chain_depth, host.alpha, "AugMix")


def _any_of(kinds: list[Operation]) -> Operation:
    return RandomChoice(kinds, [1.0] * len(kinds))


def _kinds(host: Any, format: ImageFormat, bins: int, at: slice) -> list[Operation]:
    names = policy_strengths(host, bins, 1, 1)
    return [_kind(host, format, name, bins, at) for name in names]


def _kind(host: Any, format: ImageFormat, name: str, bins: int, at: slice) -> Operation:
    """Return the operation that one of the host's names stands for."""
    plain: dict[str, Callable[[], Operation]] = {
        "Identity": lambda: Identity(name),
        "AutoContrast": lambda: Autocontrast(format, name),
        "Equalize": lambda: Equalize(name),
        "Invert": lambda: Invert(name),
    }
    if name in plain:
        return plain[name]()
    _, signed = policy_strengths(host, bins, 1, 1)[name]
    inner, prepare = _of_strength(host, format, name)
    return Graded(inner, prepare, partial(_strengths, host, name, bins, at), signed, name)


def _strengths(host: Any, name: str, bins: int, at: slice, shape: Shape) -> Tensor:
    found, _ = policy_strengths(host, bins, shape.height, shape.width)[name]
    assert found is not None
    return found[at]


def _of_strength(host: Any, format: ImageFormat, name: str) -> tuple[Operation, Prepare]:
    filter, fill = filter_name(host), fill_of(host)
    if name in GEOMETRIC:
        return Affine(filter, fill, format, name), partial(_rows, name)
    if name == "Rotate":
        return RandomRotation((0.0, 0.0), filter, None, fill, format, name), _angle
    if name in COLOURS:
        jitter = ColorJitter(*_only(COLOURS[name]), 1.0, format, name)
        return jitter, partial(_factors, jitter, COLOURS[name])
    if name == "Sharpness":
        sharpness = Sharpness(1.0, format, name)
        return sharpness, partial(_sharper, sharpness)
    if name == "Posterize":
        posterize = Posterize(8, name)
        return posterize, posterize.prepare
    if name == "Solarize":
        solarize = Solarize(0, format, name)
        return solarize, partial(_solarised, solarize, format)
    raise UserError(
        f"{type(host).__name__} holds an operation, {name}, that the mirror has no counterpart of: "
        "use a version of torchvision that cp-plugin was tested with."
    )


def _only(kind: int) -> tuple[Any, Any, Any, Any]:
    """Return the ranges of a ColorJitter that does one thing alone."""
    first, second, third = ((0.0, 2.0) if kind == number else None for number in range(3))
    return first, second, third, None


def _rows(name: str, strength: Tensor) -> Params:
    """Return the maps back to the image: x + s y, y + s x, or a shift by whole pixels."""
    rows = torch.eye(2, 3, dtype=torch.float64).repeat(len(strength), 1, 1)
    row = int(name.endswith("Y"))
    if name.startswith("Shear"):
        rows[:, row, 1 - row] = strength
    else:
        rows[:, row, 2] = -strength.trunc()
    return {"rows": rows}


def _angle(strength: Tensor) -> Params:
    return {"angle": strength}


def _sharper(sharpness: Sharpness, strength: Tensor) -> Params:
    return sharpness.prepare(1 + strength)


def _solarised(solarize: Solarize, format: ImageFormat, strength: Tensor) -> Params:
    # Levels of a tensor are compared in float32, those of a Pillow image in Python's numbers.
    return solarize.prepare(strength if format is ImageFormat.PILLOW else strength.float())


def _factors(jitter: ColorJitter, kind: int, strength: Tensor) -> Params:
    factors = torch.ones(len(strength), 4, dtype=torch.float64)
    factors[:, 3] = 0
    factors[:, kind] += strength
    order = torch.arange(4).expand(len(strength), 4)
    return jitter.prepare(factors, order, torch.ones(len(strength), dtype=torch.bool))
