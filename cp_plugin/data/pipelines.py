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


def view_pipelines(host: Any) -> list[object] | None:
    """Return the host's pipeline of each view, or None where it makes one view only."""
    if isinstance(host, (list, tuple)):
        return [view for item in host for view in view_pipelines(item) or [item]]
    name = dotted_name(type(host))
    if name == SOLO + "FullTransformPipeline":
        return view_pipelines(list(host.transforms))
    if name == SOLO + "NCropAugmentation":
        return [host.transform] * host.num_crops
    if _is_multi_view(type(host)):
        return list(host.transforms)
    return None


def _is_multi_view(cls: type) -> bool:
    """Whether a class is Lightly's MultiViewTransform or inherits its call unchanged."""
    for base in cls.__mro__:
        if dotted_name(base) in MULTI_VIEW:
            return cls.__call__ is base.__call__
    return False
