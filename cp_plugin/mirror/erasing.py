"""Random erasing: a rectangle of every image is overwritten."""

from __future__ import annotations

import torch
from torch import Tensor

from cp_plugin.mirror.base import Operation, Params, Shape, chance, uniform, whole
from cp_plugin.mirror.geometry import ATTEMPTS


class RandomErasing(Operation):
    """Overwrite a random rectangle (Zhong et al., AAAI 2020; torchvision `RandomErasing`).

    Args:
        p: probability of an image.
        scale: range of the rectangle's part of the area.
        ratio: range of its height over its width.
        value: one for all or one a channel, as the pixels then are; None: normal noise.
    """

    def __init__(
        self,
        p: float,
        scale: tuple[float, float],
        ratio: tuple[float, float],
        value: tuple[float, ...] | None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.p = p
        self.scale = scale
        self.ratio = ratio
        self.value = value

    def sample(self, shape: Shape, generator: torch.Generator | None = None) -> Params:
        """Draw `top`, `left`, `height`, `width` (B,) in pixels, 0 high where nothing happens."""
        count, _, image_height, image_width = shape
        area = uniform((count, ATTEMPTS), *self.scale, generator) * image_height * image_width
        low, high = torch.log(torch.tensor(self.ratio, dtype=torch.float64)).tolist()
        aspect = torch.exp(uniform((count, ATTEMPTS), low, high, generator))
        heights, widths = (area * aspect).sqrt_().round_(), (area / aspect).sqrt_().round_()
        fits = (heights < image_height) & (widths < image_width)
        first = fits.to(torch.uint8).argmax(1, keepdim=True)
        used = fits.any(1) & chance(count, self.p, generator)
        height = torch.where(used, heights.gather(1, first)[:, 0], 0).long()
        width = widths.gather(1, first)[:, 0].long().clamp(max=image_width)
        params: Params = {
            "top": whole(image_height - height + 1, generator),
            "left": whole(image_width - width + 1, generator),
            "height": height,
            "width": width,
        }
        if self.value is None:
            params["noise"] = torch.randn(shape, generator=generator, dtype=torch.float64)
        return params

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Overwrite."""
        rows = _within(params["top"], params["height"], images.shape[-2])
        columns = _within(params["left"], params["width"], images.shape[-1])
        erased = rows[:, None, :, None] & columns[:, None, None, :]
        if self.value is None:
            value = params["noise"].to(images.dtype)
        else:
            value = images.new_tensor(self.value)[:, None, None]
        return torch.where(erased, value, images)


def _within(start: Tensor, length: Tensor, size: int) -> Tensor:
    index = torch.arange(size, device=start.device)
    return (index >= start[:, None]) & (index < (start + length)[:, None])
