"""Pipelines of the hosts that make several views of an image."""

from __future__ import annotations

from typing import Any


def dotted_name(cls: type) -> str:
    """Return module and name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


SOLO = "solo.data.pretrain_dataloader."


LIGHTLY = "lightly.transforms."


MULTI_VIEW = (
    LIGHTLY + "multi_view_transform.MultiViewTransform",
    LIGHTLY + "multi_view_transform_v2.MultiViewTransformV2",
)


ONE_IN_A_LIST = tuple(
    f"{LIGHTLY}{name}_transform.{upper}Transform"
    for name, upper in (("mae", "MAE"), ("aim", "AIM"), ("capi", "CAPI"))
)
"""Classes that return the one view of their `transform` in a list."""
WITH_GRIDS = (LIGHTLY + "image_grid_transform.ImageGridTransform",)
"""Classes that return views, then for each where its pixels were in the image."""


class InARow:
    """Transforms that a host's class calls one after another."""

    def __init__(self, transforms: tuple[object, ...]) -> None:
        self.transforms = transforms


def view_pipelines(host: Any) -> list[object] | None:
    """Return the host's pipeline of each view, or None where it makes one view only."""
    if isinstance(host, (list, tuple)):
        return [view for item in host for view in view_pipelines(item) or [item]]
    name = dotted_name(type(host))
    if name in ONE_IN_A_LIST:
        return [host.transform]
    if _inherits_call(type(host), WITH_GRIDS):
        rows = {id(pair): InARow(tuple(pair)) for pair in host.transforms}
        return [rows[id(pair)] for pair in host.transforms]
    if name == LIGHTLY + "detcon_transform.DetConSTransform" and host.mask_fn is None:
        return list(host.transforms)
    if name == SOLO + "FullTransformPipeline":
        return view_pipelines(list(host.transforms))
    if name == SOLO + "NCropAugmentation":
        return [host.transform] * host.num_crops
    if _inherits_call(type(host), MULTI_VIEW):
        return list(host.transforms)
    return None


def grid_sides(host: Any) -> list[int]:
    """Return, for every view that a host returns with a grid, the points a side of that grid."""
    if not _inherits_call(type(host), WITH_GRIDS):
        return []
    return [int(crop.grid_size) for crop, _ in host.transforms]


def _inherits_call(cls: type, names: tuple[str, ...]) -> bool:
    """Whether a class is one of those named, or inherits its call unchanged."""
    for base in cls.__mro__:
        if dotted_name(base) in names:
            return cls.__call__ is base.__call__
    return False
