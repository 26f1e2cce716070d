"""timm models in solo-learn's table of backbones, as `timm/<name>`."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

from omegaconf import OmegaConf
from torch import nn

from cp_plugin.engine.backbones import feature_width, surrogate

PREFIX = "timm/"


def timm_backbone(name: str, image_size: int) -> Callable[..., nn.Module]:
    """Return what solo-learn calls to build a backbone.

    Args:
        name: `timm/<model>`.
        image_size: side of the images in pixels; up to 64 the stem keeps their resolution.

    Returns:
        A function of solo-learn's `method` (timm has no use for it) and of `backbone.kwargs`, to a
        model whose `num_features` is the width of its features.
    """

    def build(method: str | None = None, **kwargs: Any) -> nn.Module:
        model = surrogate(name, image_size, **_plain(kwargs))
        width: Any = feature_width(model)
        if getattr(model, "num_features", None) != width:
            model.num_features = width
        if hasattr(model, "inplanes"):  # where solo-learn looks first
            model.inplanes = width
        return model

    return build


def add_timm_backbone(
    table: MutableMapping[str, Any], name: str, image_size: int
) -> Callable[[], None]:
    """Add a timm model to solo-learn's table of backbones; return what takes it out again."""
    before = table.get(name)
    table[name] = timm_backbone(name, image_size)

    def undo() -> None:
        if before is None:
            table.pop(name, None)
        else:
            table[name] = before

    return undo


def _plain(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return arguments without OmegaConf's containers, which timm does not take."""
    return {
        key: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        for key, value in kwargs.items()
    }
