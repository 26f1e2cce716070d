"""Operations of a drawn strength, and AugMix: the parts of AutoAugment and its relatives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cp_plugin.mirror.base import LEVEL, Operation, Params, Shape, chance, whole
from cp_plugin.mirror.containers import apply_to


class Graded(Operation):
    """An operation of a strength that is drawn for each image."""

    def __init__(
        self,
        inner: Operation,
        prepare: Callable[[Tensor], Params],
        strengths: Callable[[Shape], Tensor],
        signed: bool,
        name: str | None = None,
    ) -> None:
        """Take the operation.

        Args:
            inner: the operation.
            prepare: makes its parameters of strengths (B,).
            strengths: returns those to choose from, each as likely as any other, for images of a
                shape.
            signed: whether half of them are made negative.
            name: of the host's operation.
        """
        super().__init__(name)
        self.inner = inner
        self._prepare = prepare
        self._strengths = strengths
        self._signed = signed

    def parts(self) -> list[Operation]:
        """Return the operation."""
        return [self.inner]

    def check(self, shape: Shape) -> None:
        """Check the operation."""
        self.inner.check(shape)

    def sample(self, shape: Shape, generator: torch.Generator | None = None) -> Params:
        """Draw a strength an image."""
        choice = self._strengths(shape).double()
        drawn = choice[whole(torch.full((shape.batch,), len(choice)), generator)]
        if self._signed:
            drawn = torch.where(chance(shape.batch, 0.5, generator), -drawn, drawn)
        return self._prepare(drawn)

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Apply with the strengths drawn."""
        return self.inner.apply(images, params)


class AugMix(Operation):
    """An image mixed with chains of operations of it (Hendrycks et al., ICLR 2020).

    Args:
        step: one operation of a chain, drawn anew each time.
        width: number of chains.
        depth: operations of a chain; not positive: one to three, drawn for each image and chain.
        alpha: of the Dirichlet distributions of the weights.
    """

    def __init__(
        self, step: Operation, width: int, depth: int, alpha: float, name: str | None = None
    ) -> None:
        super().__init__(name)
        self.step = step
        self.width = width
        self.depth = depth
        self.alpha = alpha

    def parts(self) -> list[Operation]:
        """Return the operation of the chains."""
        return [self.step]

    def check(self, shape: Shape) -> None:
        """Check the operation."""
        self.step.check(shape)

    def sample(self, shape: Shape, generator: torch.Generator | None = None) -> Params:
        """Draw `weights` (B, 1 + width), and `chains`: for each its turns, `index` and `inner`."""
        seed = int(torch.randint(2**62, (), generator=generator))
        numbers = np.random.default_rng(seed)  # torch has no Dirichlet that takes a generator
        kept, mixed = numbers.dirichlet([self.alpha] * 2, shape.batch).T
        parts = numbers.dirichlet([self.alpha] * self.width, shape.batch)
        weights = np.concatenate((kept[:, None], mixed[:, None] * parts), 1)
        chains = [self._chain(shape, generator) for _ in range(self.width)]
        return {"weights": torch.from_numpy(weights), "chains": chains}

    def _chain(self, shape: Shape, generator: torch.Generator | None) -> list[Params]:
        depths = torch.full((shape.batch,), self.depth)
        if self.depth <= 0:
            depths = 1 + whole(torch.full((shape.batch,), 3), generator)
        turns = []
        for turn in range(int(depths.max()) if shape.batch else 0):
            index = (depths > turn).nonzero()[:, 0]
            turns.append(
                {"index": index, "inner": self.step.sample(shape.of_some(index), generator)}
            )
        return turns

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Mix; the host truncates to 8 bit in the end, by half a level in the mean."""
        weights = params["weights"].to(images.dtype)[:, :, None, None, None].unbind(1)
        mixed: Tensor = weights[0] * images
        for weight, turns in zip(weights[1:], params["chains"], strict=True):
            changed = images
            for turn in turns:
                changed = apply_to(changed, turn["index"], self.step, turn["inner"])
            mixed = mixed + weight * changed
        return (mixed - 0.5 * LEVEL).clamp(0, 1)
