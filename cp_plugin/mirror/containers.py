"""Operations made of operations: in a row, with a probability."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from cp_plugin.config.settings import UserError
from cp_plugin.mirror.base import Operation, Params, Shape, chance


class Identity(Operation):
    """Leaves pixels alone."""

    commutes_with_flips: bool = True

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Return the images."""
        return images


class Sequence(Operation):
    """One operation after another (torchvision `Compose`)."""

    def __init__(self, operations: Iterable[Operation], name: str | None = None) -> None:
        super().__init__(name)
        self.operations = list(operations)

    def parts(self) -> list[Operation]:
        """Return the operations, in order."""
        return self.operations

    def check(self, shape: Shape) -> None:
        """Check every operation with the shape that reaches it."""
        for step in self.operations:
            step.check(shape)
            shape = step.output_shape(shape)

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape after the last operation."""
        for step in self.operations:
            shape = step.output_shape(shape)
        return shape

    def sample(self, shape: Shape, generator: torch.Generator | None = None) -> Params:
        """Draw for every operation: `steps`, a list in their order."""
        drawn = []
        for step in self.operations:
            drawn.append(step.sample(shape, generator))
            shape = step.output_shape(shape)
        return {"steps": drawn}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Apply one after another."""
        for step, drawn in zip(self.operations, params["steps"], strict=True):
            images = step.apply(images, drawn)
        return images


class RandomApply(Operation):
    """An operation that an image gets with probability p (torchvision `RandomApply`)."""

    def __init__(self, inner: Operation, p: float, name: str | None = None) -> None:
        super().__init__(name)
        self.inner = inner
        self.p = p
        self.commutes_with_flips = inner.commutes_with_flips

    def parts(self) -> list[Operation]:
        """Return the operation."""
        return [self.inner]

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
        index = chance(shape.batch, self.p, generator).nonzero()[:, 0]
        inner = self.inner.sample(shape.of_some(index), generator)
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
    rest, part = _Take.apply(images, index)
    out: Tensor = _Put.apply(rest, index, operation.apply(part, params))
    return out


class _Take(torch.autograd.Function):
    """A part of a batch; with `_Put`, cheaper than indexing: nothing is filled with zeros."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        ctx.index = index
        return images.view_as(images), images.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        rest, part = grads
        return rest.index_copy(0, ctx.index, part), None


class _Put(torch.autograd.Function):
    """The batch with that part replaced; `_Take` overwrites the part's rows of its gradient."""

    @staticmethod
    def forward(ctx: Any, rest: Tensor, index: Tensor, part: Tensor) -> Tensor:
        ctx.index = index
        return rest.index_copy(0, index, part)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor]:
        return grads[0], None, grads[0].index_select(0, ctx.index)


class RandomChoice(Operation):
    """One of several operations for each image (torchvision `RandomChoice`)."""

    def __init__(
        self, options: Iterable[Operation], weights: Iterable[float], name: str | None = None
    ) -> None:
        super().__init__(name)
        self.options = list(options)
        self.weights = torch.tensor(list(weights), dtype=torch.float64)

    def parts(self) -> list[Operation]:
        """Return the operations to choose from."""
        return self.options

    def check(self, shape: Shape) -> None:
        """Refuse options that give images of different sizes."""
        for option in self.options:
            option.check(shape)
        sizes = {option.output_shape(shape) for option in self.options}
        if len(sizes) > 1:
            raise UserError(
                f"{self.name} expected options that give one image size, got "
                f"{sorted(size[2:] for size in sizes)}: resize after it or in every option."
            )

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape that every option gives."""
        return self.options[0].output_shape(shape)

    def sample(self, shape: Shape, generator: torch.Generator | None = None) -> Params:
        """Draw `index` and `inner`: for every option the images that take it, and their draws."""
        chosen = torch.multinomial(self.weights, shape.batch, replacement=True, generator=generator)
        index = [(chosen == number).nonzero()[:, 0] for number in range(len(self.options))]
        inner = [
            option.sample(shape.of_some(part), generator)
            for option, part in zip(self.options, index, strict=True)
        ]
        return {"index": index, "inner": inner}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Apply each option to the images that take it."""
        options = zip(self.options, params["index"], params["inner"], strict=True)
        made = [
            option.apply(images.index_select(0, part), drawn)
            for option, part, drawn in options
            if len(part) or not len(images)
        ]
        return torch.cat(made).index_select(0, torch.cat(params["index"]).argsort())


class RandomOrder(Operation):
    """All operations, in an order of its own for each image (torchvision `RandomOrder`)."""

    def __init__(self, operations: Iterable[Operation], name: str | None = None) -> None:
        super().__init__(name)
        self.operations = list(operations)

    def parts(self) -> list[Operation]:
        """Return the operations, in the order they were given."""
        return self.operations

    def check(self, shape: Shape) -> None:
        """Refuse operations that change the image size."""
        for step in self.operations:
            step.check(shape)
            if step.output_shape(shape) != shape:
                raise UserError(
                    f"{self.name} expected operations that keep the image size, got {step.name}: "
                    f"move it out of {self.name}."
                )

    def sample(self, shape: Shape, generator: torch.Generator | None = None) -> Params:
        """Draw `turns`: for each place in the order, and each operation, `index` and `inner`."""
        count = len(self.operations)
        order = torch.rand(shape.batch, count, generator=generator).argsort(1)
        turns = []
        for place in range(count):
            for number, step in enumerate(self.operations):
                index = (order[:, place] == number).nonzero()[:, 0]
                inner = step.sample(shape.of_some(index), generator)
                turns.append({"number": number, "index": index, "inner": inner})
        return {"order": order, "turns": turns}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Apply in order."""
        steps = self.operations
        for turn in params["turns"]:
            step = steps[turn["number"]]
            images = apply_to(images, turn["index"], step, turn["inner"])
        return images
