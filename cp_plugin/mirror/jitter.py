"""ColorJitter: brightness, contrast, saturation and hue in an order of its own for every image.

Brightness, contrast and saturation are affine in a pixel's channels: clamp(M x + k * mean(grey x)
+ b) with a 3x3 matrix M, one batched matrix product. The batch is sorted by how many of these come
before hue, so that each step works on one slice and hue is computed once.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from cp_plugin.mirror.colour import grey_weights
from cp_plugin.mirror.hue import Analysis, rotate_hue, rotate_hue_backward
from cp_plugin.mirror.operation import (
    LEVEL,
    Operation,
    Params,
    Shape,
    Stage,
    chance,
    portions,
    uniform,
)

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
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
        stage: Stage = Stage.PILLOW,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.ranges = (brightness, contrast, saturation, hue)
        self.p = p
        self.stage = stage

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
        params = _affine_steps(torch.tensor(affine)[kinds], factors[forth], self.stage)
        return {
            "factors": factors,
            "order": order,
            "applied": applied,
            "forth": forth,
            "back": forth.argsort(),
            "bounds": [int((sorted_before > step).sum()) for step in range(len(affine))],
            "end": len(sorted_before),
            "shift": _hue_shift(factors[forth, HUE], self.stage),
            "has_hue": HUE in active,
            "has_contrast": CONTRAST in active,
            "quantised": self.stage is Stage.PILLOW,
            "grey": grey_weights(self.stage),
            **params,
        }

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Change the colours of the images chosen."""
        if params["end"] == 0:
            return images
        out: Tensor = _Jitter.apply(images, like(params, images.dtype))
        return out


def like(params: Params, dtype: torch.dtype) -> Params:
    """Give all floating-point parameters the dtype of the images."""
    return {
        key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in params.items()
    }


def _affine_steps(kinds: Tensor, factors: Tensor, stage: Stage) -> Params:
    """Make matrix, weight of the mean grey and bias of every step, for kinds (B, steps)."""
    factor = factors.gather(1, kinds).T
    rest = 1 - factor
    eye = torch.eye(3, dtype=factors.dtype)
    grey = grey_weights(stage).expand(3, 3)
    saturation = torch.where(kinds.T == SATURATION, rest, 0.0)
    bias = -0.5 * LEVEL * (factor != 1) if stage.rounds else torch.zeros_like(factor)
    return {
        "matrix": factor[..., None, None] * eye + saturation[..., None, None] * grey,
        "mean_weight": torch.where(kinds.T == CONTRAST, rest, 0.0),
        "bias": bias,
    }


def _hue_shift(factor: Tensor, stage: Stage) -> Tensor:
    """Pillow: the whole steps that torchvision adds to the hue byte; tensors: turns."""
    shift = (factor * 255).trunc().remainder(256) if stage is Stage.PILLOW else factor
    return shift[:, None, None]


class _Jitter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, params: Params) -> Tensor:
        ctx.save_for_backward(images)
        ctx.params = params
        params["mean"] = torch.empty_like(params["mean_weight"])  # grey, before each step
        now = images.index_select(0, params["forth"])
        for part in portions(images, params["end"]):
            _forward(now[part], _portion(params, part), None)
        return now.index_select(0, params["back"])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (images,) = ctx.saved_tensors
        params = ctx.params
        grad = grads[0].index_select(0, params["forth"])
        for part in portions(images, params["end"]):
            drawn = _portion(params, part)
            tape: Tape = []
            _forward(images.index_select(0, params["forth"][part]), drawn, tape)
            _backward(grad[part], drawn, tape)
        return grad.index_select(0, params["back"]), None


def _portion(params: Params, part: slice) -> Params:
    """Return the parameters of a part of the sorted batch."""
    size = part.stop - part.start
    return {
        **params,
        **{key: params[key][:, part] for key in ("matrix", "mean_weight", "mean", "bias")},
        "shift": params["shift"][part],
        "bounds": [min(max(bound - part.start, 0), size) for bound in params["bounds"]],
        "end": size,
    }


def _forward(now: Tensor, params: Params, tape: Tape | None) -> None:
    """Change the colours of sorted images, in place. Records what `_backward` needs."""
    end = params["end"]
    for step, bound in enumerate(params["bounds"]):
        _affine(now, params, step, slice(0, bound), tape)
    if params["has_hue"]:
        found = rotate_hue(now, params["shift"], params["quantised"])
        if tape is not None:
            tape.append(found)
    for step, bound in enumerate(params["bounds"]):
        _affine(now, params, step, slice(bound, end), tape)


def _backward(grad: Tensor, params: Params, tape: Tape) -> None:
    """Turn the gradient of the result into that of the images, in place."""
    end = params["end"]
    for step in reversed(range(len(params["bounds"]))):
        _affine_backward(grad, params, step, slice(params["bounds"][step], end), tape)
    if params["has_hue"]:
        found = tape.pop()
        assert isinstance(found, Analysis)
        rotate_hue_backward(grad, found, params["quantised"])
    for step in reversed(range(len(params["bounds"]))):
        _affine_backward(grad, params, step, slice(0, params["bounds"][step]), tape)


def _affine(now: Tensor, params: Params, step: int, part: slice, tape: Tape | None) -> None:
    """Carry out one affine step on a slice, in place."""
    if part.start == part.stop:
        return
    pixels = now[part].flatten(2)
    offset = params["bias"][step, part, None, None]
    if params["has_contrast"]:
        mean = params["mean"][step, part]
        if tape is None:
            torch.mv(pixels.mean(2), params["grey"], out=mean)
        offset = offset + (params["mean_weight"][step, part] * mean)[:, None, None]
    out = torch.baddbmm(offset, params["matrix"][step, part], pixels)
    if tape is None:
        torch.clamp(out, 0, 1, out=pixels)
    else:
        pixels.copy_(out.clamp_(0, 1))
        tape.append(out)


def _affine_backward(grad: Tensor, params: Params, step: int, part: slice, tape: Tape) -> None:
    if part.start == part.stop:
        return
    out = tape.pop()
    pixels = grad[part].flatten(2)
    inner = torch.ops.aten.hardtanh_backward(pixels, out, 0.0, 1.0)
    matrix = params["matrix"][step, part].mT
    if params["has_contrast"]:
        weight = params["mean_weight"][step, part] * (inner.sum((1, 2)) / inner.shape[2])
        offset = weight[:, None, None] * params["grey"][:, None]
        torch.baddbmm(offset, matrix, inner, out=pixels)
    else:
        torch.bmm(matrix, inner, out=pixels)
