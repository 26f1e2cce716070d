"""Operations for kornia's augmentations: kornia itself, its draws taken apart from its pixels.

They take float tensors and are differentiable as they stand. What kornia draws once a call, as the
order of ColorJitter's steps, all images of a batch share.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor

from cp_plugin.config.settings import UserError
from cp_plugin.data.pipelines import KORNIA, KORNIA_WITHOUT_GRADIENT
from cp_plugin.mirror.base import Gradient, ImageFormat, Operation, Params, Shape
from cp_plugin.mirror.colour import Normalize
from cp_plugin.mirror.intensity import StraightThrough
from cp_plugin.mirror.registry import FAMILIES, Translator
from cp_plugin.util.random_state import random_state_kept

SIZED = ("RandomResizedCrop", "RandomCrop", "CenterCrop", "Resize", "PadTo")
"""Classes that give images of a size of their own."""
OF_SIDES = ("LongestMaxSize", "SmallestMaxSize")
"""Classes that give each image another size."""
SHAPE = "forward_input_shape"


class Kornia(Operation):
    """One of kornia's augmentations."""

    def __init__(self, host: Any, name: str) -> None:
        """Take a copy of the augmentation, which keeps nothing of what is done with it."""
        super().__init__(name)
        self.host = copy.deepcopy(host)
        self.size: tuple[int, int] | None = None
        """Height and width of what it gives, None where it keeps the images' size."""
        if name in SIZED:
            size = host.flags.get("size", getattr(host, "size", None))
            self.size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape that it gives."""
        return shape if self.size is None else shape.resized(*self.size)

    def sample(self, shape: Shape, generator: torch.Generator | None = None) -> Params:
        """Draw what kornia draws for a batch."""
        if shape.aspects is not None and self.size is not None:
            raise UserError(
                f"kornia's {self.name} draws boxes of the images as they are, and with fit=cover "
                "they are squeezed; set fit=crop, or crop with torchvision's RandomResizedCrop."
            )
        seed = int(torch.randint(2**62, (), generator=generator))
        with random_state_kept():
            torch.manual_seed(seed)
            drawn = self.host.forward_parameters(torch.Size(shape))
        return {"drawn": {**drawn, SHAPE: tuple(shape)}}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Transform as kornia does."""
        drawn = {**params["drawn"], SHAPE: torch.tensor(params["drawn"][SHAPE])}
        made: Tensor = copy.copy(self.host)(images, params=drawn)  # it keeps what it was given
        return made


class KorniaStraightThrough(Kornia):
    """One of kornia's that has no useful gradient."""

    gradient: ClassVar[Gradient] = "straight_through"

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Transform as kornia does."""
        with torch.no_grad():
            made = super().apply(images.detach(), params)
        out: Tensor = StraightThrough.apply(images, made)
        return out


def kornia(host: Any, translator: Translator) -> Operation:
    """Translate an augmentation, or several in a row."""
    name = type(host).__name__
    if translator.format is not ImageFormat.FLOAT:
        raise UserError(
            f"kornia's {name} expected a float tensor, got {translator.format.value}: put ToTensor "
            "before it."
        )
    if name in ("AugmentationSequential", "ImageSequential"):
        return _sequence(host, name, translator)
    bases = {base.__name__ for base in type(host).__mro__}
    if "AugmentationBase2D" not in bases or name in OF_SIDES:
        raise UserError(
            f"the mirror expected one of kornia's augmentations that make one image of one size of "
            f"each image, got {name}: leave it out, or take kornia's Resize for its size."
        )
    if not host.keepdim:
        raise UserError(
            f"kornia's {name} makes a batch of one of each image: give it, or the "
            "AugmentationSequential around it, keepdim=True."
        )
    if name == "Normalize":
        mean, std = (host.flags[key].flatten().tolist() for key in ("mean", "std"))
        return Normalize(mean, std, name)
    return of_kornia(host)


def of_kornia(host: Any) -> Kornia:
    """Return the operation of one of kornia's augmentations."""
    name = type(host).__name__
    return (
        KorniaStraightThrough(host, name) if name in KORNIA_WITHOUT_GRADIENT else Kornia(host, name)
    )


def _sequence(host: Any, name: str, translator: Translator) -> Operation:
    keys = [str(getattr(key, "name", key)) for key in getattr(host, "data_keys", None) or ["IMAGE"]]
    if keys != ["IMAGE"] or host.random_apply or host.same_on_batch:
        raise UserError(
            f"kornia's {name} expected data_keys=['input'] and neither random_apply nor "
            "same_on_batch, since every image is transformed by itself and by all that it holds: "
            "leave these settings out."
        )
    return translator.sequence(host.children(), name)


FAMILIES[KORNIA] = kornia
