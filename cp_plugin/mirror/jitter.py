"""ColorJitter: brightness, contrast, saturation and hue in an order of its own for every image.

Brightness, contrast and saturation are affine in a pixel's channels: clamp(M x + k * mean(grey x)
+ b) with a 3x3 matrix M, one batched matrix product. The batch is sorted by how many of these come
before hue, so that images of one slice share the step at which hue comes. On a processor `fused.py`
does the same an image at a time, where Numba is installed, and on a GPU `fused_device.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from cp_plugin.mirror.base import (
    LEVEL,
    ImageFormat,
    Operation,
    Params,
    Shape,
    chance,
    portions,
    uniform,
)
from cp_plugin.mirror.colour import grey_weights
from cp_plugin.mirror.hue import Analysis, rotate_hue, rotate_hue_backward
from cp_plugin.mirror.processor import compiled, serves, serves_device

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""Numbers of a ColorJitter's operations."""
Range = tuple[float, float] | None
Tape = list[Tensor | Analysis]


class ColorJitter(Operation):
    """torchvision's `ColorJitter`, applied to an image with probability p (`RandomApply`).

    Pillow truncates to 8 bit after each step: half a level, the mean of it, is taken off.
    """

    needs_colour: ClassVar[bool] = True
    commutes_with_flips: bool = True

    def __init__(
        self,
        brightness: Range,
        contrast: Range,
        saturation: Range,
        hue: Range,
        p: float = 1.0,
        format: ImageFormat = ImageFormat.PILLOW,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.ranges = (brightness, contrast, saturation, hue)
        self.p = p
        self.format = format

    def sample(self, shape: Shape, generator: torch.Generator | None = None) -> Params:
        """Draw `factors` (B, 4), `order` (B, 4) and `applied` (B,).

        Columns of `factors` are brightness, contrast, saturation, hue; `order` lists these
        numbers in the order in which they are carried out.
        """
        count = shape.batch
        factors = torch.ones(count, 4, dtype=torch.float64)
        factors[:, HUE] = 0
        for column, bounds in enumerate(self.ranges):
            if bounds is not None:
                factors[:, column] = uniform(count, *bounds, generator)
        order = torch.rand(count, 4, generator=generator).argsort(1)
        return self.prepare(factors, order, chance(count, self.p, generator))

    def prepare(self, factors: Tensor, order: Tensor, applied: Tensor) -> Params:
        """Turn factors, order and choice, all on the CPU, into what `apply` needs."""
        affine = [kind for kind in range(HUE) if self.ranges[kind] is not None]
        active = [kind for kind in range(4) if self.ranges[kind] is not None]
        place = order.argsort(1)
        before_hue = (place[:, affine] < place[:, HUE:]).sum(1)
        if self.ranges[HUE] is None:
            before_hue = torch.full_like(before_hue, len(affine))
        forth = torch.where(applied, before_hue, -1).argsort(descending=True)
        sorted_before = before_hue[forth][: int(applied.sum())]
        kinds = place[:, affine].argsort(1)[forth]
        params = _affine_steps(torch.tensor(affine)[kinds], factors[forth], self.format)
        carried_out = applied[:, None] & torch.isin(order, torch.tensor(active))
        return {
            "factors": factors,
            "order": order,
            "applied": applied,
            "forth": forth,
            "back": forth.argsort(),
            "ends": [int((sorted_before >= steps).sum()) for steps in range(len(affine) + 1)],
            "shift": _hue_shift(factors[forth, HUE], self.format)[:, None, None],
            "steps": torch.where(carried_out, order, -1),
            "amounts": _amounts(factors, self.format),
            "has_hue": HUE in active,
            "has_contrast": CONTRAST in active,
            "quantised": self.format is ImageFormat.PILLOW,
            "grey": grey_weights(self.format),
            **params,
        }

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Change the colours of the images chosen."""
        if params["ends"][0] == 0:
            return images
        function: type[torch.autograd.Function] = _Jitter
        if serves(images):
            function = _FusedJitter
        elif serves_device(images):
            function = _DeviceJitter
        out: Tensor = function.apply(images, like(params, images.dtype))
        return out


def like(params: Params, dtype: torch.dtype) -> Params:
    """Give all floating-point parameters the dtype of the images."""
    return {
        key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in params.items()
    }


def _affine_steps(kinds: Tensor, factors: Tensor, format: ImageFormat) -> Params:
    """Make matrix, weight of the mean grey and bias of every step, for kinds (B, steps)."""
    factor = factors.gather(1, kinds).T
    rest = 1 - factor
    eye = torch.eye(3, dtype=factors.dtype)
    grey = grey_weights(format).expand(3, 3)
    saturation = torch.where(kinds.T == SATURATION, rest, 0.0)
    return {
        "matrix": factor[..., None, None] * eye + saturation[..., None, None] * grey,
        "mean_weight": torch.where(kinds.T == CONTRAST, rest, 0.0),
        "bias": _bias(factor, format),
    }


def _bias(factor: Tensor, format: ImageFormat) -> Tensor:
    return -0.5 * LEVEL * (factor != 1) if format.rounds else torch.zeros_like(factor)


def _hue_shift(factor: Tensor, format: ImageFormat) -> Tensor:
    """Pillow: the whole steps that torchvision adds to the hue byte; tensors: turns."""
    return (factor * 255).trunc().remainder(256) if format is ImageFormat.PILLOW else factor


def _amounts(factors: Tensor, format: ImageFormat) -> Tensor:
    """Return (2, B, 4): factor and bias of every kind; of hue its shift."""
    shifted = factors.clone()
    shifted[:, HUE] = _hue_shift(factors[:, HUE], format)
    return torch.stack([shifted, _bias(factors, format)])


class _FusedJitter(torch.autograd.Function):
    """All steps on one image at a time; keeps the images and repeats the steps to go back."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, params: Params) -> Tensor:
        ctx.save_for_backward(images)
        arrays = [params["steps"], *params["amounts"], params["grey"]]
        ctx.plan = compiled("fused").Plan(*(array.numpy() for array in arrays), params["quantised"])
        out: Tensor = compiled("fused").forward(images, ctx.plan)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (images,) = ctx.saved_tensors
        return compiled("fused").backward(images, grads[0], ctx.plan), None


class _DeviceJitter(torch.autograd.Function):
    """The same on a GPU."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, params: Params) -> Tensor:
        images = images.contiguous()
        ctx.plan = compiled("fused_device").as_plan(params)
        out, means = compiled("fused_device").forward(images, ctx.plan)
        ctx.save_for_backward(images, means)
        changed: Tensor = out
        return changed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        images, means = ctx.saved_tensors
        return compiled("fused_device").backward(images, means, grads[0], ctx.plan), None


class _Jitter(torch.autograd.Function):
    """All steps on a sorted batch; keeps the images alone and repeats the steps to go back."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, params: Params) -> Tensor:
        ctx.save_for_backward(images)
        ctx.params = params
        ctx.means = []
        now = images.index_select(0, params["forth"])
        for piece in _pieces(images, params):
            means: list[Tensor] = []
            now[piece.part] = _forward(now[piece.part], piece, means)
            ctx.means.append(means)
        return now.index_select(0, params["back"])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (images,) = ctx.saved_tensors
        params = ctx.params
        grad = grads[0].index_select(0, params["forth"])
        for piece, means in zip(_pieces(images, params), ctx.means, strict=True):
            tape: Tape = []
            start = images.index_select(0, params["forth"][piece.part])
            _forward(start, piece, list(means), tape)
            grad[piece.part] = _backward(grad[piece.part], piece, tape)
        return grad.index_select(0, params["back"]), None


class _Piece(NamedTuple):
    """Images with the same number of affine steps before hue; tensors are (steps, n, ...)."""

    part: slice
    before_hue: int
    """Steps before hue; -1: no hue."""
    matrix: Tensor
    mean_weight: Tensor
    bias: Tensor
    shift: Tensor
    grey: Tensor
    has_contrast: bool
    quantised: bool


def _pieces(images: Tensor, params: Params) -> Iterator[_Piece]:
    """Cut the sorted batch where the number of steps before hue changes, and into portions."""
    start = 0
    for steps, end in reversed(list(enumerate(params["ends"]))):
        for inner in portions(images, end - start):
            part = slice(start + inner.start, start + inner.stop)
            yield _Piece(
                part,
                steps if params["has_hue"] else -1,
                params["matrix"][:, part],
                params["mean_weight"][:, part],
                params["bias"][:, part],
                params["shift"][part],
                params["grey"],
                params["has_contrast"],
                params["quantised"],
            )
        start = end


def _forward(now: Tensor, piece: _Piece, means: list[Tensor], tape: Tape | None = None) -> Tensor:
    """Change the colours of a piece, which may be overwritten.

    Appends to `means` the mean grey before each step; with a tape it takes them from there, and
    records what `_backward` needs.
    """
    for step in range(len(piece.matrix) + 1):
        if step == piece.before_hue:
            if tape is not None and step:
                now = now.clone()
            found = rotate_hue(now, piece.shift, piece.quantised)
            if tape is not None:
                tape.append(found)
        if step == len(piece.matrix):
            break
        pixels, offset = now.flatten(2), piece.bias[step]
        if piece.has_contrast:
            if tape is None:
                means.append(torch.mv(pixels.mean(2), piece.grey))
            offset = torch.addcmul(offset, piece.mean_weight[step], means[step])
        out = torch.baddbmm(offset[:, None, None], piece.matrix[step], pixels).clamp_(0, 1)
        now = out.view_as(now)
        if tape is not None:
            tape.append(out)
    return now


def _backward(grad: Tensor, piece: _Piece, tape: Tape) -> Tensor:
    """Return the gradient of a piece's images; `grad` may be overwritten."""
    for step in reversed(range(len(piece.matrix) + 1)):
        if step < len(piece.matrix):
            inner = torch.ops.aten.hardtanh_backward(grad.flatten(2), tape.pop(), 0.0, 1.0)
            matrix = piece.matrix[step].mT
            if piece.has_contrast:
                weight = piece.mean_weight[step] * inner.sum((1, 2)) / inner.shape[2]
                pixels = torch.baddbmm(weight[:, None, None] * piece.grey[:, None], matrix, inner)
            else:
                pixels = torch.bmm(matrix, inner)
            grad = pixels.view_as(grad)
        if step == piece.before_hue:
            found = tape.pop()
            assert isinstance(found, Analysis)
            rotate_hue_backward(grad, found, piece.quantised)
    return grad
