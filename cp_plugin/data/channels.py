"""How many channels a host's own transform makes of an image, and whether a poison keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from cp_plugin.config.settings import UserError
from cp_plugin.data.image import Canonical, is_grey, like
from cp_plugin.data.pipelines import IMAGE, takes_samples
from cp_plugin.data.raw import RawDataset
from cp_plugin.data.raw_images import RawImages
from cp_plugin.data.slots import elements
from cp_plugin.util.random_state import random_state_kept

POINTS = 2
"""Last dimension of grids of points, which some transforms return beside views."""


@random_state_kept()
def channels_made(transform: Any, image: Any) -> set[int]:
    """Return the numbers of channels that views of an image have.

    Args:
        transform: the host's; None; or a list of them, one a view.
        image: as the transform gets it.

    Returns:
        Empty where the transform fails, or makes no images.
    """
    steps = transform if isinstance(transform, list) else [transform]
    try:
        made = [image if step is None else _called(step, image) for step in steps]
    except Exception:  # a user's transform may raise anything, and will when it is used
        return set()
    return set(_channels(made))


def _called(transform: Any, image: Any) -> Any:
    return transform({IMAGE: image} if takes_samples(transform) else image)


def _channels(made: Any) -> Iterator[int]:
    for value in elements(made):
        if isinstance(value, Image.Image):
            yield len(value.getbands())
        elif isinstance(value, Tensor) and value.ndim in (3, 4) and value.shape[-1] != POINTS:
            yield value.shape[-3]  # of four dimensions: the pieces of a puzzle
        elif isinstance(value, np.ndarray) and value.ndim in (2, 3):
            yield 1 if value.ndim == 2 else value.shape[2]


def check_channels(raw: RawDataset) -> None:
    """Check that the host's transform makes as many channels of a poisoned image as of a clean one.

    A perturbed image is RGB, or grey where it was.

    Raises:
        UserError: it does not.
    """
    if raw.given is None:
        return
    clean = channels_made(raw.transform, raw.given)
    poisoned = channels_made(raw.transform, like(Canonical(None)(raw.given), raw.given))
    if clean and poisoned and clean != poisoned:
        raise UserError(other_channels(raw, clean, poisoned))


def other_channels(raw: RawImages, clean: set[int], poisoned: set[int]) -> str:
    """Say that views of clean and of perturbed images have other numbers of channels."""
    mode = getattr(raw.given, "mode", None)
    form = "grey" if is_grey(raw.given) else "RGB"
    of = f"an image of Pillow's mode {mode}" if mode else f"an image {tuple(raw.given.shape)}"
    return (
        f"the transform of {type(raw.dataset).__name__} makes views of {_listed(clean)} of {of}, "
        f"and views of {_listed(poisoned)} once the image is perturbed, as {form}; let __getitem__ "
        "give the transform RGB or grey images (`image.convert('RGB')`, `image.convert('L')`)."
    )


def _listed(channels: set[int]) -> str:
    return " or ".join(map(str, sorted(channels))) + (
        " channel" if channels == {1} else " channels"
    )
