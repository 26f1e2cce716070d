"""Operations made of operations: in a row, with a probability."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from cp_plugin.config import UserError
from cp_plugin.mirror.operation import Operation, Params, Shape, chance


class Sequence(Operation):
    """One operation after another (torchvision `Compose`)."""

    operations: nn.ModuleList

    def __init__(self, operations: Iterable[Operation], name: str | None = None) -> None:
        super().__init__(name)
        self.operations = nn.ModuleList(operations)

    def steps(self) -> list[Operation]:
        """Return the operations, in order."""
        return [step for step in self.operations if isinstance(step, Operation)]

    def check(self, shape: Shape) -> None:
        """Check every operation with the shape that reaches it."""
        for step in self.steps():
            step.check(shape)
            shape = step.output_shape(shape)

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape after the last operation."""
        for step in self.steps():
            shape = step.output_shape(shape)
        return shape

    def sample(self, shape: Shape, generator: torch.Generator | None = None) -> Params:
        """Draw for every operation: `steps`, a list in their order."""
        drawn = []
        for step in self.steps():
            drawn.append(step.sample(shape, generator))
            shape = step.output_shape(shape)
        return {"steps": drawn}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Apply one after another."""
        for step, drawn in zip(self.steps(), params["steps"], strict=True):
            images = step.apply(images, drawn)
        return images


class RandomApply(Operation):
    """An operation that an image gets with probability p (torchvision `RandomApply`)."""

    def __init__(self, inner: Operation, p: float, name: str | None = None) -> None:
        super().__init__(name)
        self.inner = inner
        self.p = p
        self.commutes_with_flips = inner.commutes_with_flips

    def check(self, shape: Shape) -> None:
        """Refuse an operation that changes the size: images of one batch need one size."""
        self.inner.check(shape)
        if self.inner.output_shape(shape) != shape:
            raise UserError(
                f"{self.name} expected operations that keep the image size, since only a part of "
                f"a batch gets them, got {self.inner.name}: move it out of {self.name}."
            )

    def sample(self, shape: Shape, generator: torch.Generator | None = None) -> Params:
        """Draw `index`, the images that get it, and `inner` for these."""
        index = chance(shape.count, self.p, generator).nonzero()[:, 0]
        inner = self.inner.sample(shape._replace(count=len(index)), generator)
        return {"index": index, "inner": inner}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Apply to the images chosen."""
        return apply_to(images, params["index"], self.inner, params["inner"])


def apply_to(images: Tensor, index: Tensor, operation: Operation, params: Params) -> Tensor:
    """Apply an operation to the images with the given numbers."""
    if len(index) == 0:
        return images
    if len(index) == len(images):
        return operation.apply(images, params)
    part = operation.apply(images.index_select(0, index), params)
    return images.index_copy(0, index, part)
