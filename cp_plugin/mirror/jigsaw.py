"""A puzzle: pieces of an image, each augmented by itself, in random order."""

from __future__ import annotations

import torch
from torch import Tensor

from cp_plugin.config.settings import UserError
from cp_plugin.mirror.base import Operation, Params, Shape, whole


class Jigsaw(Operation):
    """Pieces of a grid, in an order of their own for each image (Lightly's `Jigsaw`, for PIRL).

    Args:
        inner: what every piece gets.
        grid: pieces a side.
        cell: side of a cell of the grid in pixels.
        piece: side of the pieces, cut out at random within their cells.
    """

    def __init__(
        self, inner: Operation, grid: int, cell: int, piece: int, name: str | None = None
    ) -> None:
        super().__init__(name)
        self.inner = inner
        self.grid = grid
        self.cell = cell
        self.piece = piece

    def parts(self) -> list[Operation]:
        """Return what every piece gets."""
        return [self.inner]

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of all pieces, one after another."""
        return shape.resized(self.piece, self.piece)._replace(batch=shape.batch * self.grid**2)

    def check(self, shape: Shape) -> None:
        """Refuse images that the grid does not fit into."""
        side = self.grid * self.cell
        if min(shape.height, shape.width) < side:
            raise UserError(
                f"{self.name} expected images of at least {side}x{side} pixels, got "
                f"{shape.height}x{shape.width}: give larger images or a smaller input_size."
            )
        self.inner.check(self.output_shape(shape))

    def sample(self, shape: Shape, generator: torch.Generator | None = None) -> Params:
        """Draw `corner` (B, grid^2, 2), rows first, `order` (B, grid^2), and `inner`."""
        size = (shape.batch, self.grid**2)
        room = torch.full((*size, 2), self.cell - self.piece + 1)
        index = torch.arange(self.grid**2)
        cells = torch.stack((index // self.grid, index % self.grid), 1) * self.cell
        return {
            "corner": whole(room, generator) + cells,
            "order": torch.rand(size, generator=generator).argsort(1),
            "inner": self.inner.sample(self.output_shape(shape), generator),
        }

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Cut, augment and shuffle.

        Returns:
            (B, grid^2, C, piece, piece).
        """
        count, channels = images.shape[:2]
        side = torch.arange(self.piece, device=images.device)
        rows = (params["corner"][..., 0, None] + side)[:, :, None, :, None]
        columns = (params["corner"][..., 1, None] + side)[:, :, None, None, :]
        image = torch.arange(count, device=images.device)[:, None, None, None, None]
        channel = torch.arange(channels, device=images.device)[:, None, None]
        pieces = images[image, channel, rows, columns]
        done = self.inner.apply(pieces.flatten(0, 1), params["inner"])
        done = done.view(count, -1, *done.shape[1:])
        order = params["order"][:, :, None, None, None].expand_as(done)
        out: Tensor = done.gather(1, order)
        return out
