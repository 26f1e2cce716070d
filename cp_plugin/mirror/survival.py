"""What may happen to published images before anybody trains on them: JPEG and rescaling."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from cp_plugin.mirror.base import Gradient, Operation, Params, Shape, chance, uniform

PROBABILITY = 0.5
"""Of each operation: delta must work on unchanged images too."""
QUALITIES = (50, 95)
"""Range of JPEG's quality, as Pillow counts it."""
FACTORS = (0.5, 1.0)
"""Range of the sides of a smaller copy, as a part of the image's."""


class Compressed(Operation):
    """Images that went through JPEG, each with a chance and a quality of its own."""

    gradient: ClassVar[Gradient] = "straight_through"

    def sample(self, shape: Shape, generator: torch.Generator | None = None) -> Params:
        """Draw `used` (B,) and `quality` (B,)."""
        return {
            "used": chance(shape.batch, PROBABILITY, generator),
            "quality": uniform(shape.batch, *QUALITIES, generator).round(),
        }

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Compress."""
        with torch.no_grad():
            changed = images.detach().clone()
            bytes_ = images.detach().mul(255).round().clamp(0, 255).byte().cpu()
            for row in params["used"].nonzero()[:, 0].tolist():
                again = through_jpeg(bytes_[row], int(params["quality"][row]))
                changed[row] = again.to(images) / 255
        return images + (changed - images).detach()


class Rescaled(Operation):
    """Images that were made smaller and large again, each with a chance of its own."""

    def sample(self, shape: Shape, generator: torch.Generator | None = None) -> Params:
        """Draw `used` (B,), and one `factor` for the batch, (1,)."""
        return {
            "used": chance(shape.batch, PROBABILITY, generator),
            "factor": uniform(1, *FACTORS, generator),
        }

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Make smaller and large again, bilinear and antialiased."""
        height, width = images.shape[2:]
        factor = float(params["factor"][0])
        smaller = [max(1, round(height * factor)), max(1, round(width * factor))]
        small = functional.interpolate(images, smaller, mode="bilinear", antialias=True)
        again = functional.interpolate(small, [height, width], mode="bilinear", antialias=True)
        return torch.where(params["used"].to(images.device).view(-1, 1, 1, 1), again, images)


OPERATIONS: dict[str, type[Operation]] = {"resize": Rescaled, "jpeg": Compressed}
"""In the order in which they come: a picture is made smaller, then stored."""


def survived(
    images_BCHW: Tensor, survive: Sequence[str], generator: torch.Generator | None = None
) -> Tensor:
    """Return images as they may arrive where somebody trains on them.

    Args:
        images_BCHW: floating point in [0, 1].
        survive: names of `OPERATIONS`.
        generator: on the CPU.
    """
    shape = Shape(*images_BCHW.shape)
    for name, kind in OPERATIONS.items():
        if name in survive:
            operation = kind()
            images_BCHW = operation.apply(images_BCHW, operation.sample(shape, generator))
    return images_BCHW


def through_jpeg(pixels_CHW: Tensor, quality: int) -> Tensor:
    """Return an image, uint8 on the CPU, as it is read again after Pillow has stored it as JPEG."""
    planes = pixels_CHW.permute(1, 2, 0).numpy()
    grey = planes.shape[2] == 1
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(planes[:, :, 0] if grey else planes)).save(
        file, "JPEG", quality=quality
    )
    with Image.open(file) as image:
        found = np.array(image)
    found = found[:, :, None] if grey else found
    return torch.from_numpy(found).permute(2, 0, 1)
