"""From the host's own pipeline object to a mirror: one op for each exact class.

Classes are looked up by identity or by their full dotted name, so that neither solo-learn nor
Lightly has to be importable. A subclass is another class: it may do anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

from cp_plugin.config.settings import UserError
from cp_plugin.data.pipelines import dotted_name, held_pipeline
from cp_plugin.mirror.base import ImageFormat, Operation
from cp_plugin.mirror.colour import GreyNormalize, Normalize, RandomGrayscale
from cp_plugin.mirror.containers import Identity, RandomApply, Sequence
from cp_plugin.mirror.geometry import Flip, RandomResizedCrop
from cp_plugin.mirror.jitter import ColorJitter

OpFactory = Callable[[Any], Operation]
"""Makes the op of a host's transform."""


ALBUMENTATIONS = {
    "Compose": "Compose",
    "OneOf": "RandomChoice",
    "RandomResizedCrop": "RandomResizedCrop",
    "RandomCrop": "RandomCrop",
    "CenterCrop": "CenterCrop",
    "Resize": "Resize",
    "SmallestMaxSize": "Resize",
    "HorizontalFlip": "RandomHorizontalFlip",
    "VerticalFlip": "RandomVerticalFlip",
    "ColorJitter": "RandomApply([ColorJitter])",
    "ToGray": "RandomGrayscale",
    "GaussianBlur": "RandomApply([GaussianBlur])",
    "GaussNoise": "v2.GaussianNoise",
    "Solarize": "RandomSolarize",
    "Posterize": "RandomPosterize",
    "Equalize": "RandomEqualize",
    "InvertImg": "RandomInvert",
    "Affine": "RandomAffine",
    "Rotate": "RandomRotation",
    "Perspective": "RandomPerspective",
    "Erasing": "RandomErasing",
    "CoarseDropout": "RandomErasing",
    "ImageCompression": "v2.JPEG",
    "Normalize": "ToTensor and Normalize",
    "ToTensorV2": "ToTensor",
    "ToFloat": "ToTensor",
}
"""What torchvision has in the place of transforms of albumentations."""


class Unmirrored(Operation):
    """Stands for a transform that nothing is known about; it cannot be applied."""


class Translator:
    """Walks a host's pipeline and keeps track of what an image is at each point."""

    def __init__(self, outline: bool = False) -> None:
        """Start at a Pillow image; see `mirror_outline` for `outline`."""
        self.format = ImageFormat.PILLOW
        self._outline = outline

    def operation(self, host: object) -> Operation:
        """Translate one transform.

        Raises:
            UserError: nothing is known about its class.
        """
        name = dotted_name(type(host))
        if self.format is ImageFormat.SPECTRUM and name in RULES and name not in ON_SPECTRA:
            raise UserError(
                f"{name} expected an image, got {self.format.value}: put IRFFT2DTransform before "
                "it."
            )
        rule = RULES.get(name) or _of_family(name)
        if rule is not None:
            return rule(host, self)
        op = OPS.get(type(host))
        if op is not None:
            return checked_op(op(host), type(host))
        held = held_pipeline(host)  # of a class that does nothing but call it
        if held is not None:
            return self.operation(held)
        if self._outline and self.format in (ImageFormat.PILLOW, ImageFormat.BYTES):
            return Unmirrored(type(host).__name__)  # of 8 bit, so it normalises nothing
        raise UserError(unknown(host))

    def view(self, host: object) -> Sequence:
        """Translate the pipeline of one view.

        Raises:
            UserError: nothing is known about one of its classes, or what it makes is no image.
        """
        found = self.sequence([host])
        if self.format is ImageFormat.SPECTRUM:
            raise UserError(
                "the mirror expected a pipeline that ends in an image, got one that ends in "
                f"{self.format.value}: add IRFFT2DTransform."
            )
        return found

    def sequence(self, hosts: Iterable[object], name: str | None = None) -> Sequence:
        """Translate transforms that follow one another."""
        steps: list[Operation] = []
        for host in hosts:
            step = self.operation(host)
            steps.extend(step.operations if isinstance(step, Sequence) else [step])
        return Sequence(simplified(steps), name)


Rule = Callable[[Any, Translator], Operation]
RULES: dict[str, Rule] = {}
"""Built-in ops by the full name of the host's class."""
FAMILIES: dict[str, Rule] = {}
"""Built-in ops for all classes of a package, by the beginning of their full names."""
ON_SPECTRA: set[str] = set()
"""Those of them that take the spectrum of an image."""
OPS: dict[type, OpFactory] = {}
"""Operations that `register_op` was given."""


def register_op(host_class: type, op: OpFactory) -> None:
    """Tell `mirror` what stands for a transform of your own.

    Args:
        host_class: the exact class; subclasses need a call of their own.
        op: takes an object of that class and returns an `Operation`: a subclass that overrides
            `apply(images, params)`, and `sample(shape, generator)` where it draws anything.

    Raises:
        UserError: `host_class` is no class.

    Example:
        >>> class Darker(Operation):
        ...     def apply(self, images, params):
        ...         return images * 0.5
        >>> register_op(MyDarker, lambda host: Darker())
    """
    if not isinstance(host_class, type):
        raise UserError(
            f"register_op expected a class first, got {host_class!r}: pass the transform's "
            "class, not an object or a function."
        )
    OPS[host_class] = op


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a built-in op under the full names of host classes."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def checked_op(op: object, host_class: type) -> Operation:
    """Refuse an op that is no operation."""
    if not isinstance(op, Operation):
        raise UserError(
            f"the op registered for {dotted_name(host_class)} must return an Operation, got "
            f"{type(op).__name__}: subclass cp_plugin.mirror.Operation."
        )
    return op


def _of_family(name: str) -> Rule | None:
    return next((rule for start, rule in FAMILIES.items() if name.startswith(start)), None)


def unknown(host: object) -> str:
    """Say that a class has no op, and how to give it one."""
    name = dotted_name(type(host))
    if isinstance(host, FunctionType):
        return (
            f"the transform is a function, {host.__qualname__}, that cannot be looked into: use a "
            "pipeline such as transforms.Compose, Lightly's MultiViewTransform([first, second]) "
            "for several views, or a class that holds its pipelines as attributes."
        )
    if name.startswith("albumentations."):
        own = type(host).__name__
        return (
            f"{own} is of albumentations, whose transforms take numpy arrays by keyword and have "
            f"no gradient: write the pipeline with {ALBUMENTATIONS.get(own, 'transforms')} of "
            "torchvision, or hold it in a class of your own that is called on a Pillow image, and "
            "give that class an op (cp_plugin.mirror.register_op)."
        )
    if name.endswith(".Lambda"):
        return (
            f"{name} hides a function that has no known gradient: use a named transform, or a "
            "class of your own with an op (cp_plugin.mirror.register_op)."
        )
    return (
        f"the mirror expected transforms that it has a differentiable op for, got {name}: "
        f"register one with cp_plugin.mirror.register_op({type(host).__name__}, "
        "lambda host: MyOperation(...)), where MyOperation subclasses cp_plugin.mirror.Operation."
    )


def simplified(steps: list[Operation]) -> list[Operation]:
    """Merge what gives the same pixels in fewer passes.

    Flips are carried out within the crop before them, since they commute with changes of tone and
    blur; grey and normalising are one matrix product; conversions to tensors change no pixel.
    """
    kept: list[Operation] = []
    for step in steps:
        if isinstance(step, Flip) and _absorbed(step, kept):
            continue
        kept.append(_with_probability(step))
    kept = [step for step in kept if not isinstance(step, Identity)] or kept[:1]
    if len(kept) > 1 and isinstance(kept[-2], RandomGrayscale) and isinstance(kept[-1], Normalize):
        kept[-2:] = [GreyNormalize(kept[-2], kept[-1])]
    return kept


def _absorbed(flip: Flip, before: list[Operation]) -> bool:
    attribute = "flip_horizontal" if flip.dim == -1 else "flip_vertical"
    for step in reversed(before):
        if isinstance(step, RandomResizedCrop) and getattr(step, attribute) == 0.0:
            setattr(step, attribute, flip.p)
            return True
        if not step.commutes_with_flips:
            return False
    return False


def _with_probability(step: Operation) -> Operation:
    """Let ColorJitter draw for itself whether it is applied."""
    if not isinstance(step, RandomApply):
        return step
    inner = step.inner
    if isinstance(inner, Sequence) and len(inner.operations) == 1:
        inner = inner.operations[0]
    if isinstance(inner, ColorJitter) and inner.p == 1:
        inner.p = step.p
        return inner
    return RandomApply(inner, step.p, step.name)
